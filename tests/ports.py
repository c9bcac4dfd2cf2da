"""Ports that processes of a test meet at.

Whoever asks the system for a free port and closes it again may find it taken a moment later, by any
connection that began meanwhile. These ports are below those that connections are given, and
processes that ask at the same time begin to look at different ones.
"""

import os
import socket
from itertools import count
from pathlib import Path

_LOWEST = 10_000
_USUAL = 32_768  # where the ports of connections begin, unless a machine says otherwise
_FEWEST = 1_000  # ports to choose from; a machine may give almost all of them to connections
_GIVEN = Path("/proc/sys/net/ipv4/ip_local_port_range")
_SPREAD = 7919  # a prime, so that neighbouring processes are far from each other
_turns = count()


def free_port() -> int:
    """Return a port of this machine at which nobody listens, another one at each call."""
    span = (int(_GIVEN.read_text().split()[0]) if _GIVEN.is_file() else _USUAL) - _LOWEST
    span = span if span >= _FEWEST else _USUAL - _LOWEST
    while True:
        port = _LOWEST + (os.getpid() * _SPREAD + next(_turns)) % span
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
