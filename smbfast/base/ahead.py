"""What threads make before it is asked for, in order: one that ends or hangs blocks nobody.

The threads are daemons, for the interpreter waits at its end for those of a `ThreadPoolExecutor`,
also for one that reads from a disk which answers no more.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from itertools import islice
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Generic, TypeVar

from smbfast.base.entry import RunFailed
from smbfast.base.helpers import reason
from smbfast.base.terminal import warn

_LOOK = 1.0  # seconds after which a wait looks at its threads
_ASKED = 15.0  # seconds that a wait goes on after a signal asked to stop: our choice
_LEAVE = 5.0  # seconds in which threads may finish what they are at: our choice

T = TypeVar("T")


def made_ahead(
    make: Iterable[Callable[[], T]],
    *,
    what: str,
    threads: int,
    waiting: int,
    stop: Callable[[], object] = lambda: False,
) -> Generator[T, None, None]:
    """Yield the results of the callables `make`, in their order whoever of them is done first.

    Args:
        what: whose threads they are, in words, such as "the loader".
        threads: that call them; without any, each is called when it is asked for.
        waiting: results that are made before they are asked for, at most.
        stop: whether a signal asked to stop. A result is then not waited for without end.

    Raises:
        RunFailed: if a thread has ended, or none can be started. What a callable raises is raised
            where its result is asked for.
        KeyboardInterrupt: if a result does not come after a signal.
    """
    if not threads:
        for one in make:
            yield one()
        return
    left, jobs = iter(make), SimpleQueue[_Job[T] | None]()
    team = [Thread(target=_work, args=(jobs,), name=what, daemon=True) for _ in range(threads)]
    ready: deque[_Job[T]] = deque()
    try:
        _start(team, what)
        _submit(jobs, ready, islice(left, waiting))
        while ready:
            made = _taken(ready.popleft(), team, what, stop)
            _submit(jobs, ready, islice(left, 1))
            yield made
    finally:
        _leave(team, jobs)


class _Job(Generic[T]):
    """A call that a thread makes, and what came of it."""

    made: T

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self.is_done = make, Event()
        self.error: BaseException | None = None

    def do(self) -> None:
        try:
            self.made = self._make()
        except BaseException as error:  # also what would end the thread is for who waits to hear
            self.error = error
        self.is_done.set()


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        job.do()
        del job  # what it has made is not held while this thread waits


def _start(team: list[Thread], what: str) -> None:
    for thread in team:
        try:
            thread.start()
        except RuntimeError as error:  # the system starts no more threads
            raise RunFailed(f"{what} cannot start a thread: {reason(error)}") from None


def _submit(
    jobs: "SimpleQueue[_Job[T] | None]", ready: deque[_Job[T]], make: Iterable[Callable[[], T]]
) -> None:
    for one in make:
        ready.append(_Job(one))
        jobs.put(ready[-1])


def _taken(job: _Job[T], team: list[Thread], what: str, stop: Callable[[], object]) -> T:
    """Wait for a result, and look now and then whether anybody makes it and anybody wants it."""
    asked: float | None = None
    while not job.is_done.wait(_LOOK):
        if not all(thread.is_alive() for thread in team) and not job.is_done.is_set():
            raise RunFailed(f"a thread of {what} has ended without what it was to make")
        if asked is None and stop():
            asked = time.monotonic()
        if asked is not None and time.monotonic() - asked > _ASKED:
            warn(f"{what} gives nothing, {_ASKED:.0f} s after the signal; it is left")
            raise KeyboardInterrupt
    if isinstance(job.error, SystemExit | GeneratorExit):
        raise RunFailed(f"a thread of {what} ended: {reason(job.error)}") from None
    if job.error is not None:
        raise job.error
    return job.made


def _leave(team: list[Thread], jobs: "SimpleQueue[_Job[T] | None]") -> None:
    """Let threads end after what they are at; those that do not are left behind."""
    with suppress(Empty):
        while True:
            jobs.get_nowait()
    for _ in team:
        jobs.put(None)
    until = time.monotonic() + _LEAVE
    for thread in team:
        if thread.ident is not None:  # it was started
            thread.join(max(0.0, until - time.monotonic()))
