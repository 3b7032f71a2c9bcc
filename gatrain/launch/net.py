"""Addresses and ports of this machine, with the standard library only."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time

LOOPBACK = "127.0.0.1"


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; an empty host means every address of this machine, IPv6 included.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
    """
    if host == "" and socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=2048)
    return socket.create_server((host, port), backlog=2048)


def check_resolves(host: str, port: int) -> None:
    """Look a host name up; a second time where the answer is that there may be one later.

    Raises:
        OSError: there is no such host.
    """
    for attempt in (1, 2):
        try:
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            return
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or attempt == 2:
                raise
            time.sleep(1)


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the route to ``host``. Nothing is sent.

    Raises:
        OSError: the host name does not resolve, or there is no route to it.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Name of the network interface that has this IPv4 address (Linux); None where it cannot be told."""
    if sys.platform != "linux":
        return None
    import fcntl

    if address.startswith("127."):
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                siocgifaddr = 0x8915
                answer = fcntl.ioctl(probe.fileno(), siocgifaddr, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
