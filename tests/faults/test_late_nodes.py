"""A machine that comes late to a run, or never."""

import os
import re
import socket
import time
from functools import partial

import pytest
from forked import Process, fork_processes
from tiny_run import write_ranks

from region_pretrain.engine import roll_call
from region_pretrain.engine.processes import launch
from region_pretrain.errors import UserError, exit_on_user_error


@pytest.fixture
def address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(autouse=True)
def _in_seconds(monkeypatch):
    monkeypatch.setattr(roll_call, "_QUIET_SECONDS", 0.6)
    monkeypatch.setattr(roll_call, "_PATIENCE_SECONDS", 3.0)
    monkeypatch.setattr(roll_call, "_FAREWELL_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_POLL_SECONDS", 0.05)


def machine(folder, address, rank, machines, processes=1, delay=0.0):
    """A machine of a run."""

    def run():
        fork_processes()
        time.sleep(delay)
        exit_on_user_error(launch)(
            write_ranks,
            processes,
            num_machines=machines,
            machine_rank=rank,
            dist_url=f"tcp://{address}",
            device="cpu",
            args=(str(folder),),
        )

    return Process(run, folder / f"out{rank}")


@pytest.mark.parametrize("late", [0, 1])
def test_the_others_wait_and_say_for_whom(tmp_path, address, late, monkeypatch):
    monkeypatch.setattr(roll_call, "_PATIENCE_SECONDS", 20.0)
    started = [
        machine(tmp_path, address, rank, 2, delay=4.0 if rank == late else 0.0) for rank in (0, 1)
    ]
    assert [process.wait(60) for process in started] == [0, 0], (tmp_path / "out0").read_text()
    assert [(tmp_path / rank).read_text()[:3] for rank in "01"] == ["0/2", "1/2"]
    text = (tmp_path / f"out{1 - late}").read_text()
    line = rf"rank {1 - late} of 2 is waiting at {address} for rank {late}: [0-3] of at most 20 s\n"
    assert len(re.findall(line, text)) == 1, text
    assert re.search(r"all 2 processes are here after [1-9] s", text)
    assert "waiting" not in (tmp_path / f"out{late}").read_text()


@pytest.mark.parametrize("missing", [0, 2])
def test_who_never_comes_is_named_in_one_line(tmp_path, address, missing):
    started = [machine(tmp_path, address, rank, 3) for rank in range(3) if rank != missing]
    assert [process.wait(60) for process in started] == [2, 2]
    for rank in {0, 1, 2} - {missing}:
        text = (tmp_path / f"out{rank}").read_text()
        assert "Traceback" not in text, text
        (line,) = [line for line in text.splitlines() if "error" in line.lower()]
        start = f"error: rank {missing} of 3 did not connect to {address} within "
        assert re.match(rf"{re.escape(start)}\d s(: Connection refused)?: check that every", line)


def test_machines_of_two_processes_print_one_line_each(tmp_path, address):
    assert machine(tmp_path, address, 0, 4, processes=2).wait(60) == 2
    text = (tmp_path / "out0").read_text()
    assert text.count("rank 0 of 8 is waiting") == text.count("is waiting") == 1
    assert text.count("error: ranks 2-7 of 8 did not connect") == text.count("error") == 1, text


def test_two_machines_of_the_same_rank_are_refused(tmp_path, address, monkeypatch):
    monkeypatch.setattr(roll_call, "_PATIENCE_SECONDS", 10.0)  # both must come in time
    started = [machine(tmp_path, address, rank, 3) for rank in (0, 1, 1)]
    assert [process.wait(60) for process in started] == [2, 2, 2]
    text = (tmp_path / "out1").read_text()
    assert text.count("error: two processes have rank 1 of 3: give each machine its own") == 1
    assert "error: rank 2 of 3 did not connect" in text


def test_a_port_in_use_is_one_line():
    with socket.socket() as s, pytest.raises(UserError, match="cannot listen on port .* in use"):
        s.bind(("", 0))
        s.listen()
        roll_call.meet("127.0.0.1", s.getsockname()[1], 0, 2)


def test_processes_of_a_scheduler_wait_too(tmp_path, address):
    host, port = address.split(":")

    def run():
        os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        exit_on_user_error(launch)(write_ranks, 1, device="cpu", args=(str(tmp_path),))

    assert Process(run, tmp_path / "out").wait(60) == 2
    text = (tmp_path / "out").read_text()
    assert "rank 1 of 2 is waiting" in text and "error: rank 0 of 2 did not connect" in text
    assert "Traceback" not in text


def test_machines_with_different_numbers_of_processes_are_refused(tmp_path, address, monkeypatch):
    monkeypatch.setattr(roll_call, "_PATIENCE_SECONDS", 10.0)
    host, port = address.split(":")

    def run(rank, local_rank, local_size):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(local_rank)}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        exit_on_user_error(launch)(write_ranks, 1, device="cpu", args=(str(tmp_path),))

    started = [
        Process(partial(run, *ranks), tmp_path / f"out{i}")
        for i, ranks in enumerate([(0, 0, 1), (1, 0, 2), (2, 1, 2)])
    ]
    assert [process.wait(60) for process in started] == [2, 2, 2]
    for i in range(3):
        text = (tmp_path / f"out{i}").read_text()
        assert text.count("error: machines with 1 and 2 processes: all must have as many") == 1
        assert "Traceback" not in text


def test_names_of_ranks():
    assert roll_call._names([3]) == "rank 3"
    assert roll_call._names([0, 2, 3, 4, 7, 8]) == "ranks 0, 2-4, 7-8"
