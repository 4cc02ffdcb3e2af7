"""The interface that gloo listens on."""

import os
import socket

import pytest

from region_pretrain.engine import network
from region_pretrain.engine.network import choose_gloo_interface, interface_towards


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # restored afterwards
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(socket, "gethostname", lambda: "here")


def resolve(monkeypatch, **hosts):
    def gethostbyname(host):
        if host not in hosts:
            raise socket.gaierror(f"{host} is unknown")
        return hosts[host]

    monkeypatch.setattr(socket, "gethostbyname", gethostbyname)


def test_a_name_that_others_can_reach_needs_nothing(monkeypatch):
    resolve(monkeypatch, here="10.0.0.7")
    choose_gloo_interface("main")
    assert "GLOO_SOCKET_IFNAME" not in os.environ


@pytest.mark.parametrize("hosts", [{"here": "127.0.1.1"}, {}])
def test_a_loopback_name_gets_the_interface_towards_the_main_process(monkeypatch, hosts):
    asked = []
    monkeypatch.setattr(network, "interface_towards", lambda h: asked.append(h) or "eth3")
    resolve(monkeypatch, main="10.0.0.1", **hosts)
    choose_gloo_interface("main")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth3"
    del os.environ["GLOO_SOCKET_IFNAME"]
    choose_gloo_interface("here")  # on the main process's own machine: the default route
    assert asked == ["main", "192.0.2.1"]


def test_the_users_choice_is_kept_and_a_failure_is_explained(monkeypatch, caplog):
    resolve(monkeypatch, here="127.0.1.1")
    monkeypatch.setattr(network, "interface_towards", lambda h: None)
    choose_gloo_interface("main")
    assert "set GLOO_SOCKET_IFNAME to this machine's network interface" in caplog.text
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    choose_gloo_interface("main")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_the_interface_of_an_address():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None
