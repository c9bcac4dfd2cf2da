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
_SPREAD = 7919  # a prime, so that neighbouring processes are far from each other
_turns = count()


def free_port() -> int:
    """Return a port of this machine at which nobody listens, another one at each call."""
    given = Path("/proc/sys/net/ipv4/ip_local_port_range")
    span = (int(given.read_text().split()[0]) if given.is_file() else 32_768) - _LOWEST
    while True:
        port = _LOWEST + (os.getpid() * _SPREAD + next(_turns)) % span
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
