"""What threads make ahead comes in order, and a thread that dies or hangs blocks nobody."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from smbfast.base import ahead
from smbfast.base.ahead import made_ahead
from smbfast.base.entry import RunFailed
from smbfast.data.loader import prefetched


def team(make: list[Callable[[], Any]], threads: int = 2, **more: Any) -> Any:
    return made_ahead(make, what="the loader", threads=threads, waiting=2 * threads, **more)


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_results_come_in_the_order_of_calls_whoever_is_done_first(threads: int) -> None:
    second = threading.Event()

    def make(i: int) -> int:
        if i == 0 and threads > 1:
            assert second.wait(60)  # the first is done after the second
        if i == 1:
            second.set()
        return i

    assert list(team([lambda i=i: make(i) for i in range(20)], threads)) == list(range(20))


def ends() -> None:
    raise SystemExit(3)


def test_a_thread_that_ends_ends_the_run_with_a_line() -> None:
    with pytest.raises(RunFailed, match="a thread of the loader ended: SystemExit"):
        list(prefetched([ends]))


def test_one_of_two_threads_that_dies_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    work, dies, taken = ahead._work, [False, True], threading.Event()

    def worker(jobs: Any) -> None:
        if dies.pop():
            jobs.get()  # and nobody will ever hear of what it took
            taken.set()
        elif taken.wait(60):
            work(jobs)

    monkeypatch.setattr(ahead, "_work", worker)
    monkeypatch.setattr(ahead, "_LOOK", 0.01)
    with pytest.raises(RunFailed, match="a thread of the loader has ended"):
        list(team([int] * 9))


def test_an_error_of_time_is_that_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_LOOK", 0.001)

    def late() -> int:
        time.sleep(0.05)  # a wait for it looks around meanwhile
        return 1

    def times_out() -> None:
        raise TimeoutError("of its own")

    assert list(team([late] * 3)) == [1] * 3
    with pytest.raises(TimeoutError, match="of its own"):
        list(team([times_out]))


def test_threads_that_cannot_start_are_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none)
    with pytest.raises(RunFailed, match="the loader cannot start a thread"):
        list(prefetched([ends]))


HANGS = """
import sys, threading
from smbfast.base import ahead
ahead._LOOK, ahead._ASKED, ahead._LEAVE = 0.01, 0.05, 0.05
asked = []
def hangs():
    asked.append(1)
    threading.Event().wait()
made = ahead.made_ahead([hangs], what="the loader", threads=1, waiting=1, stop=lambda: asked)
try:
    next(made)
except KeyboardInterrupt:
    sys.exit(75)
"""


def test_a_thread_that_hangs_is_left_after_a_signal_and_at_the_end_of_the_program() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith("warning: the loader gives nothing, ")
