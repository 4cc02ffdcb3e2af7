"""The network interface through which the processes of several machines reach each other."""

from __future__ import annotations

import logging
import os
import socket
import struct

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915  # Linux: the address of an interface
_ELSEWHERE = "192.0.2.1"  # reserved for documentation; its route is the default route


def choose_gloo_interface(main_host: str | None) -> None:
    """Set ``GLOO_SOCKET_IFNAME`` if gloo would listen on an address that others cannot reach.

    gloo listens on the address of this machine's host name. Debian's installer maps that name to
    127.0.1.1, so other machines could not connect. NCCL chooses its interfaces itself.

    Args:
        main_host: name or address of the main process's machine.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname()):
        return
    target = main_host if main_host and not _is_loopback(main_host) else _ELSEWHERE
    name = interface_towards(target)
    if name is None:
        logger.warning(
            "the host name %s resolves to a loopback address, which other machines cannot reach: "
            "set GLOO_SOCKET_IFNAME to this machine's network interface",
            socket.gethostname(),
        )
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    logger.info("GLOO_SOCKET_IFNAME=%s: the host name resolves to a loopback address", name)


def _is_loopback(host: str) -> bool:
    """Whether a host name resolves to a loopback address, or not at all."""
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return True


def interface_towards(host: str) -> str | None:
    """The interface whose address this machine uses to send to a host; None if unknown.

    It is always unknown outside of Linux.
    """
    if fcntl is None:
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((host, 9))  # of a datagram socket: nothing is sent
        except OSError:
            return None
        own = sock.getsockname()[0]
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # the interface has no address
                continue
            if socket.inet_ntoa(found[20:24]) == own:
                return name
    return None
