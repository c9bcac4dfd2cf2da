"""Steps that threads make ahead, in their order; workers that die."""

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

from smbfast import prepare, train
from smbfast.base import ahead, dividing, workers
from smbfast.base.entry import RunFailed
from smbfast.data import loader
from tests.reliability.failing import LOADED, PACKED, hangs, looks_often
from tests.reliability.proof import Proof, Work
from tests.reliability.trials import NO_PROBES, Ended, Fault, Place, Twin, begun, cheap, patched

WORKERS = (0, 1, 2, 5)  # threads; twice as many steps are made ahead
PATIENCE = 30.0
MOST = 0.004  # seconds that a call takes
DIES_AT = ("at once", "after a while")


def orders(draw: random.Random, number: int) -> list[str]:
    """Results of calls that take unlike times: of each list, whether it is in their order."""
    bad = []
    for trial in range(number):
        team, length = WORKERS[trial % len(WORKERS)], draw.randrange(1, 30)
        times = [draw.random() * MOST for _ in range(length)]

        def make(index: int, times: list[float] = times) -> int:
            time.sleep(times[index])
            return index

        got = list(loader.prefetched([partial(make, i) for i in range(length)], workers=team))
        if got != list(range(length)):
            bad.append(f"{team} threads gave {got}")
    return bad


def failures(draw: random.Random, number: int) -> list[str]:
    """A call that fails, at a random place: what came before it, and the error, are those of it."""
    bad = []
    for trial in range(number):
        team, length = WORKERS[trial % len(WORKERS)], draw.randrange(1, 20)
        fails = draw.randrange(length)
        error = (ValueError("window 3"), OSError(5, "x"), TimeoutError("x"))[trial % 3]

        def make(index: int, fails: int = fails, error: Exception = error) -> int:
            time.sleep(draw.random() * MOST)
            if index == fails:
                raise error
            return index

        got, raised = [], None
        try:
            for one in loader.prefetched([partial(make, i) for i in range(length)], workers=team):
                got.append(one)
        except Exception as caught:
            raised = caught
        if got != list(range(fails)) or raised is not error:
            bad.append(f"{team} threads gave {got} and {raised!r}, not {error!r} at {fails}")
    return bad


def deaths(draw: random.Random, number: int) -> list[str]:
    """A thread that ends with a call in its hands: the others' results, then words."""
    bad, work, look = [], ahead._work, ahead._LOOK
    ahead._LOOK = 0.02
    for trial in range(number):
        team, takes = WORKERS[1 + trial % 3], draw.randrange(5)
        first, gone = [True], Event()

        def worker(
            jobs: Any, first: list[bool] = first, gone: Event = gone, takes: int = takes
        ) -> None:
            if not first:
                gone.wait(5.0)  # else it could do all before the other has taken its own
                work(jobs)
                return
            first.pop()
            for _ in range(takes):
                jobs.get().do()
            jobs.get()
            gone.set()

        ahead._work = worker
        got, words = [], ""
        # an alarm: a thread that is waited for would hold the proof
        signal.signal(signal.SIGALRM, _too_long)
        signal.setitimer(signal.ITIMER_REAL, 60.0)
        try:
            for one in loader.prefetched([partial(int, i) for i in range(40)], workers=team):
                got.append(one)
                time.sleep(MOST / 4)  # so that each of the threads has its turn
        except RunFailed as error:
            words = str(error)
        except TimeoutError:
            words = "it is waited for"
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        if "has ended" not in words or got != list(range(len(got))):
            bad.append(f"one of {team} threads dies: {got[-3:]}, {words!r}")
            break
    ahead._work, ahead._LOOK = work, look
    return bad


def _too_long(*_words: object) -> None:
    raise TimeoutError


def runs(work: Work, twin: Twin, teams: tuple[int, ...]) -> list[str]:
    """Whole runs whose steps take unlike times to make: the bits of one without that."""
    bad = []
    for team in teams:
        run = work.folder / f"run-{team}"
        twin.beginning(run)
        faults = (
            cheap,
            patched("smbfast.data.loader._packed", _at_random(loader._packed, team)),
            patched("smbfast.run.loop.prefetched", partial(loader.prefetched, workers=team)),
        )
        end = begun(train.main, twin.words(run), work.folder / "log", faults=faults).end()
        unlike = [f"it ended with {end.status}"] if end.status else twin.unlike(run)
        bad += [f"{team} threads: {name} is otherwise" for name in unlike[:2]]
    return bad


def _at_random(real: Callable, seed: int) -> Callable:
    draw = random.Random(seed)

    def slowly(*words: Any, **more: Any) -> Any:
        time.sleep(draw.random() * 5 * MOST)
        return real(*words, **more)

    return slowly


def hung_thread(work: Work, twin: Twin) -> list[str]:
    """A thread that hangs for ever: a signal ends the process, its end too."""
    run = work.folder / "hung"
    twin.beginning(run)

    place = Place("smbfast.base.ahead:_taken")
    faults = (cheap, looks_often, patched(LOADED, hangs(PACKED)))
    words, log = twin.words(run), work.folder / "log"
    trial = begun(train.main, words, log, place=place, faults=faults)
    if trial.is_there():
        trial.signals(signal.SIGTERM, 1, iter([0.0]))
        trial.goes_on()
    end = trial.end(15.0 if work.size == "mutant" else PATIENCE)
    return [] if end.status == 75 else [f"a hung thread: status {end.status}: {end.said[-200:]}"]


def worker_trials(work: Work, twin: Twin, *, few: bool) -> list[tuple[str, str]]:
    """Workers of `prepare` that are killed, or hang until a signal: trials and what is wrong."""
    seen = []
    for after in DIES_AT[:1] if few else DIES_AT:
        end = _prepared(work, twin, _killed(0.0 if after == "at once" else 0.15))
        last = (end.said.splitlines() or [""])[-1]
        right = end.status == 1 and "a worker process was killed" in last
        seen.append((f"a worker is killed {after}", "" if right else _how(end)))
    for number in (signal.SIGTERM,) if few else (signal.SIGTERM, signal.SIGINT):
        end = _prepared(work, twin, lambda: time.sleep(3600), number)
        right = end.status == 75 and "Traceback" not in end.said
        seen.append((f"workers hang, {number.name}", "" if right else _how(end)))
    return seen


def _killed(after: float) -> Fault:
    def dies() -> None:
        if after:
            threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    return dies


def _how(end: Ended) -> str:
    return f"status {end.status}: {end.said[-300:]}"


def _prepared(work: Work, twin: Twin, begins: Fault, number: int | None = None) -> Ended:
    """Prepare with two workers, each of which calls `begins` first."""
    out = Path(work.folder / f"shards-{len(list(work.folder.iterdir()))}")

    def fault() -> None:
        fork = multiprocessing.get_context("fork")  # a worker that is spawned imports for seconds
        patched("smbfast.base.workers.get_context", lambda _way: fork)()
        patched("smbfast.data.preparing.worth_processes", lambda *_: True)()  # of so little data
        first = workers._begin

        def begin() -> None:
            first()
            begins()

        workers._begin = begin
        real = dividing.attempt
        if begins.__name__ == "dies":

            def slowly(*words: Any) -> bool:
                time.sleep(0.3)
                return real(*words)

            slowly.__module__, slowly.__qualname__ = real.__module__, real.__qualname__
            dividing.attempt = slowly

    words = [f"--path={twin.cohort}", f"--out={out}", "--window=128", "--workers=2"]
    place = None if number is None else Place("smbfast.base.dividing:as_completed")
    trial = begun(prepare.main, words, work.folder / "log", place=place, faults=(fault,))
    if number is not None and trial.is_there():
        trial.goes_on()
        time.sleep(0.2)
        trial.signals(number, 1, iter([0.0]))
    return trial.end(PATIENCE)


def prove(work: Work) -> Proof:
    """Trials of the size that is asked for."""
    draw = random.Random(work.seed)
    number = work.pick(push=12, recorded=200)
    bad = orders(draw, number) + failures(draw, number)
    died = work.pick(push=4, recorded=40)
    bad += deaths(draw, died)
    twin = Twin(work.folder, NO_PROBES)
    teams = work.pick(push=(5,), recorded=WORKERS)
    bad += runs(work, twin, teams)
    bad += hung_thread(work, twin)
    count = 2 * number + died + len(teams) + 1
    if work.size != "mutant":
        seen = worker_trials(work, twin, few=work.size == "push")
        bad += [f"{name}: {text}" for name, text in seen if text]
        count += len(seen)
    return Proof(
        count, "trials", bad, f"0 to {2 * max(WORKERS)} steps ahead, workers of prepare too"
    )
