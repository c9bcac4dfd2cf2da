"""Ports of tests are there on any machine, however many of them it gives to connections."""

import socket
from pathlib import Path

import pytest

from tests import ports


@pytest.mark.parametrize("given", ["32768\t60999", "1024\t65535", "10000\t65535", "10001\t65535"])
def test_a_free_port_is_another_one_at_each_call(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text(f"{given}\n")
    monkeypatch.setattr(ports, "_GIVEN", tmp_path / "range")
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", ports.free_port()))
        free = [ports.free_port() for _ in range(3)]
        assert len({busy.getsockname()[1], *free}) == 4
    assert all(ports._LOWEST <= port < ports._USUAL for port in free)
