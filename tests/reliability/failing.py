"""Faults in what a run does without, and in what it needs: it never waits for them without end."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX.record_writer import RecordWriter

from smbfast import train
from smbfast.base import ahead, runtime
from smbfast.data import loader
from smbfast.run import background, checkpoint, trackers
from tests.reliability.proof import Proof, Work
from tests.reliability.trials import (
    NO_PROBES,
    Ended,
    Fault,
    Place,
    Twin,
    begun,
    cheap,
    patched,
    state_of,
)

SECRET = "Zebrafinch"  # in the message of every error: no line may say it
PATIENCE = 45.0  # seconds in which a run ends whatever has failed
SECOND_PHASE = Place("smbfast.run.loop:forward_backward", 6)


def full(*_args: object, **_more: object) -> None:
    """A disk without room."""
    raise OSError(28, "No space left on device")


def fills_up() -> None:
    """A disk that is full from the fourth event on."""
    real, left = RecordWriter.write, [1, 2, 3]

    def write(self: RecordWriter, data: bytes) -> None:
        if not left:
            full()
        left.pop()
        real(self, data)

    RecordWriter.write = write


def wrong(*_args: object, **_more: object) -> None:
    """A mistake."""
    raise KeyError(SECRET)


def never(*_args: object, **_more: object) -> None:
    """What does not answer."""
    threading.Event().wait()


class Sink:
    """A tracker that takes everything, but for what is replaced in it."""

    def __init__(self, _about: object, **broken: Callable) -> None:
        self.__dict__ |= broken

    def log(self, values: dict, step: int) -> None:
        """Take numbers."""

    def finish(self, *, done: bool) -> None:
        """End."""


def tracker(**broken: Callable) -> Fault:
    """Let trackers fail in a method; `make` fails when it is opened."""
    make = broken.pop("make", lambda about: Sink(about, **broken))

    def fault() -> None:
        patched("smbfast.settings.decide.find_spec", lambda name: name)()
        trackers.SINKS["wandb"] = make
        trackers.PATIENCE = 0.5

    return fault


def no_git(folder: Path, *, hangs: bool) -> Fault:
    """Let git not be there, or not answer."""

    def fault() -> None:
        patched("smbfast.base.runtime.Path.exists", lambda _path: True)()
        runtime.git_state.cache_clear()
        runtime._GIT_PATIENCE = 0.2
        runtime.subprocess.run = _with_path(folder, runtime.subprocess.run)

    folder.mkdir(exist_ok=True)
    if hangs:
        (folder / "git").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
        (folder / "git").chmod(0o700)
    return fault


def _with_path(folder: Path, run: Callable) -> Callable:
    return lambda words, **more: run([str(folder / words[0]), *words[1:]], **more)


def threads_that_die() -> None:
    """Let one of the loader's threads end with a step in its hands."""
    work, one = ahead._work, [True]

    def worker(jobs: Any) -> None:
        if one:
            one.pop()
            jobs.get()
        else:
            work(jobs)

    ahead._work = worker


def thread_ends(real: Callable) -> Callable:
    """Let a function end the thread that calls it, unless it is the main one."""

    def ends(*words: Any, **more: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return real(*words, **more)
        raise SystemExit(3)

    return ends


def slow(real: Callable) -> Callable:
    """Let a function take its time."""

    def slowly(*words: Any, **more: Any) -> Any:
        time.sleep(0.1)
        return real(*words, **more)

    return slowly


def hangs(real: Callable) -> Callable:
    """Let a function hang in other threads than the main one."""
    return lambda *w, **m: (
        real(*w, **m) if threading.current_thread() is threading.main_thread() else never()
    )


def no_thread(*_args: object) -> None:
    """A system that starts no more threads."""
    raise RuntimeError("can't start new thread")


def looks_often() -> None:
    """Shorten the waits that are long where a program is at work."""
    ahead._LOOK = ahead._LEAVE = background._LOOK = 0.1
    ahead._ASKED = 0.5


PACKED, WRITE, LOADED = loader._packed, checkpoint.write, "smbfast.data.loader._packed"
RECORD = "tensorboardX.record_writer.RecordWriter"
# what a run goes on without, and the word by which a line names it; none where it is no failure
GOES_ON: dict[str, tuple[Fault, str]] = {
    "TensorBoard's file": (patched("smbfast.run.board.EventsWriter", full), "TensorBoard"),
    "TensorBoard's first write": (patched(f"{RECORD}.write", full), "TensorBoard"),
    "TensorBoard's write": (fills_up, "TensorBoard"),
    "TensorBoard's flush": (patched(f"{RECORD}.flush", full), "TensorBoard"),
    "TensorBoard's close": (patched(f"{RECORD}.close", wrong), "TensorBoard"),
    "a scalar": (patched("smbfast.run.board.scalar", wrong), "TensorBoard"),
    "a tracker's start": (tracker(make=wrong), "wandb"),
    "a tracker's log": (tracker(log=wrong), "wandb"),
    "a tracker's end": (tracker(finish=wrong), "wandb"),
    "a tracker that hangs": (tracker(log=never), "wandb"),
    "a tracker that never opens": (tracker(make=never), "wandb"),
    "the profile's begin": (patched("smbfast.run.profile.profile", wrong), "profile"),
    "the profile's file": (patched("smbfast.run.profile.committed_folder", full), "profile"),
    "the report": (patched("smbfast.run.loop.write_report", wrong), "report"),
    "the sample": (patched("smbfast.run.probes.sample_of", wrong), "sample"),
    "the sample's file": (patched("smbfast.run.probes.write_text", full), "sample"),
    "old checkpoints": (patched("smbfast.base.replace.discard", full), ""),
    "a slow loader": (patched(LOADED, slow(PACKED)), ""),
    "a slow checkpoint": (patched("smbfast.run.checkpoint.write", slow(WRITE)), ""),
}
# what ends a run, with a word of its last line
ENDS: dict[str, tuple[Fault, str]] = {
    "the loader is wrong": (patched("smbfast.run.open_run.make_step", full), "space"),
    "the loader's thread ends": (patched(LOADED, thread_ends(PACKED)), "loader"),
    "one of its threads dies": (threads_that_die, "loader"),
    "no thread starts": (patched("threading.Thread.start", no_thread), "thread"),
    "a checkpoint's disk is full": (patched("smbfast.run.checkpoint.write", full), "space"),
    "its thread ends": (patched("smbfast.run.checkpoint.write", thread_ends(WRITE)), "checkpoint"),
    "its thread dies": (
        patched("smbfast.run.background.Writer._run", lambda *_: None),
        "checkpoint",
    ),
}
TOGETHER = (
    "TensorBoard's write",
    "a tracker that hangs",
    "the profile's file",
    "the report",
    "the sample",
    "old checkpoints",
    "a slow loader",
)


class Trials:
    """Runs with faults, and what went wrong in them."""

    def __init__(self, work: Work) -> None:
        self.work, self.twin = work, Twin(work.folder, NO_PROBES)
        self.bad: list[str] = []
        self.count = 0
        self.slowest = 0.0
        self.patience = 20.0 if work.size == "mutant" else PATIENCE

    def run(
        self, name: str, faults: list[Fault], *, asked: bool = False, place: Place | None = None
    ) -> tuple[Ended, Path]:
        """Train with faults; with `asked`, a SIGTERM comes in the second phase or at `place`."""
        run = self.work.folder / f"run-{self.count}-{len(self.bad)}-{asked}"
        self.twin.beginning(run)
        more = ["--run.track=wandb"] if "tracker" in name else []
        more += ["--run.profile=2"] if "profile" in name else []
        at = (place or SECOND_PHASE) if asked else None
        words, log = [*self.twin.words(run), *more], self.work.folder / "log"
        own = (cheap, looks_often, *faults)
        trial = begun(train.main, words, log, place=at, faults=own)
        if asked and trial.is_there():
            trial.signals(signal.SIGTERM, 1, iter([0.0]))
            trial.goes_on()
        end = trial.end(self.patience)
        self.slowest = max(self.slowest, end.seconds)
        return end, run

    def judge(self, name: str, end: Ended, status: int, words: list[str]) -> None:
        """Note what is wrong about an end."""
        lines = [line for line in end.said.splitlines() if not line.startswith("warning: 0")]
        if end.status != status:
            how = "has not ended" if end.status is None else f"ended with {end.status}"
            self.bad.append(f"{name}: it {how}: {end.said[-300:]}")
        for word in ("Traceback", SECRET):
            if word in end.said:
                self.bad.append(f"{name}: it said {word}: {end.said[-500:]}")
        named = [x for x in lines if x.startswith("warning: ") or x.startswith("smbfast.train: ")]
        for word in words:
            if not any(word in line for line in named[1:]):
                self.bad.append(f"{name}: no line names it by {word}: {end.said[-300:]}")

    def goes_on(self, name: str, parts: dict[str, tuple[Fault, str]]) -> None:
        """A run with faults that it goes on without."""
        self.count += len(parts)
        faults = [fault for fault, _ in parts.values()]
        end, run = self.run(name, faults)
        self.judge(name, end, 0, [word for _, word in parts.values() if word])
        if end.status == 0 and self.twin.unlike(run):
            self.bad.append(f"{name}: it has learned otherwise: {self.twin.unlike(run)[:3]}")

    def stops(self, name: str, faults: list[Fault]) -> None:
        """The same, and a SIGTERM while it trains."""
        self.count += 1
        end, run = self.run(name, faults, asked=True)
        self.judge(f"{name}, SIGTERM", end, 75, [])
        if state_of(run) != ("preempted", SECOND_PHASE.call):
            self.bad.append(f"{name}, SIGTERM: the status is {state_of(run)}")

    def ends(self, name: str, fault: Fault, word: str) -> None:
        """A run that cannot go on."""
        self.count += 1
        end, run = self.run(name, [fault])
        self.judge(name, end, 1, [word])
        if (state_of(run) or ("failed", 0))[0] != "failed":
            self.bad.append(f"{name}: the status is {state_of(run)}")

    def hangs(self) -> None:
        """A loader whose disk answers no more, and one SIGTERM."""
        self.count += 1
        name, place = "the loader hangs", Place("smbfast.base.ahead:_taken", 1)
        end, run = self.run(name, [patched(LOADED, hangs(PACKED))], asked=True, place=place)
        self.judge(name, end, 75, ["loader"])
        if state_of(run) != ("preempted", 0):
            self.bad.append(f"{name}: the status is {state_of(run)}")


def prove(work: Work) -> Proof:
    """Trials of the size that is asked for."""
    trials, git = Trials(work), work.folder / "bin"
    hung = {"git hangs": (no_git(git, hangs=True), "git")}
    together = {name: GOES_ON[name] for name in TOGETHER} | hung
    trials.goes_on(" and ".join(together), together)
    if work.size == "mutant":
        trials.ends("its thread dies", *ENDS["its thread dies"])
    elif work.size == "push":
        trials.stops(" and ".join(together), [fault for fault, _ in together.values()])
        for name in ("one of its threads dies", "its thread dies"):
            trials.ends(name, *ENDS[name])
        trials.hangs()
    else:
        missing = {"git is missing": (no_git(work.folder / "none", hangs=False), "git")}
        for name, (fault, word) in (GOES_ON | hung | missing).items():
            trials.goes_on(name, {name: (fault, word)})
            trials.stops(name, [fault])
            work.say(f"{trials.count} {name} {len(trials.bad)} bad")
        for name, (fault, word) in ENDS.items():
            trials.ends(name, fault, word)
        trials.hangs()
    figure = f"the slowest run took {trials.slowest:.0f} s"
    return Proof(trials.count, "faults", trials.bad, figure)
