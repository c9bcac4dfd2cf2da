"""What a test leaves behind is named, and what ends by itself in a moment is no fault."""

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from smbfast.base import locks
from smbfast.base.progress import AHEAD
from tests.left_behind import left_since, state


def test_nothing_is_left_where_nothing_was_done() -> None:
    assert left_since(state()) == ""


def test_what_goes_on_is_named_and_what_ends_is_not(tmp_path: Path) -> None:
    before, free = state(), threading.Event()
    thread = threading.Thread(target=free.wait, name="waits")
    thread.start()
    process = subprocess.Popen(["sleep", "600"])
    handle = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    try:
        assert locks.acquire(handle)
        said = left_since(before, patience=0.0)
    finally:
        threading.Timer(0.05, free.set).start()
        process.kill()
        process.wait()
        locks.release(handle)
    for word in ("waits", f"processes ['{process.pid} ", "locks ["):
        assert word in said, said
    assert left_since(before) == ""


def test_what_another_test_would_meet_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, handler = state(), signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("SMBFAST_LEFT", "here")
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        mask = os.umask(0o027)
        AHEAD.expect({}, before="the first step")
        try:
            said = left_since(before)
        finally:
            AHEAD.expect({})
            os.umask(mask)
            signal.signal(signal.SIGUSR1, handler)
    names = [f"signal handlers {int(signal.SIGUSR1)}: ", f"umask {mask} became {0o027}"]
    names += ["environment SMBFAST_LEFT: None became here", "times ahead (0, '') became"]
    for word in (*names, "working directory"):
        assert word in said, said
    assert left_since(before) == ""
