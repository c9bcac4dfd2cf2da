"""What a test leaves behind is named, and what ends by itself in a moment is no fault."""

import _thread
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from smbfast.base import locks
from smbfast.base.progress import AHEAD
from tests import left_behind
from tests.left_behind import left_since, state

needs_processes = pytest.mark.skipif(
    not left_behind.SEES_PROCESSES, reason="the system does not list the children of a process"
)


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
    names = [f"processes ['{process.pid} "] if left_behind.SEES_PROCESSES else []
    for word in ("waits", "locks [", *names):
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


@needs_processes
def test_a_process_that_was_there_before_may_end() -> None:
    """What has ended and was not waited for has no command any more."""
    process = subprocess.Popen(["sleep", "600"])
    try:
        before = state()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        said = left_since(before, patience=0.0)
    finally:
        process.kill()
        process.wait()
    assert said == ""


def test_where_the_system_lists_no_children_none_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(left_behind, "SEES_PROCESSES", False)
    monkeypatch.delattr(os, "waitid", raising=False)
    assert state()["processes"] == set()


def test_a_thread_that_python_has_not_started_is_no_test_s() -> None:
    """As those of autograd on a GPU, which stay; Python gives them a name once they ask for it."""
    before, known, free, over = state(), threading.Event(), threading.Event(), threading.Event()

    def of_a_library() -> None:
        threading.current_thread()
        known.set()
        free.wait()
        over.set()

    _thread.start_new_thread(of_a_library, ())
    assert known.wait(60)
    said = left_since(before, patience=0.0)
    free.set()
    assert over.wait(60) and said == ""


def test_what_garbage_has_held_has_a_moment_to_end() -> None:
    """As workers of a pool that nobody holds any more: a collection of garbage wakes them."""

    class Pool:
        def __init__(self) -> None:
            self.itself, self.free = self, threading.Event()
            threading.Thread(target=self.free.wait, name="worker").start()

        def __del__(self) -> None:
            threading.Timer(0.2, self.free.set).start()

    before = state()
    Pool()
    assert left_since(before, patience=20.0) == ""


def test_the_monitor_of_bars_is_known_without_a_name() -> None:
    """It comes with the first bar of a process, and stays."""
    before, free = state(), threading.Event()
    monitor = type("TMonitor", (threading.Thread,), {"__module__": "tqdm._monitor"})
    thread = monitor(target=free.wait)
    thread.start()
    said = left_since(before, patience=0.0)
    free.set()
    thread.join(60)
    assert said == ""
