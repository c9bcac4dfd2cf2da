"""Commands in forked processes: where they are when a signal comes, what fails inside them, and how
they end. smbfast is imported here, so rows import this module inside their proofs.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from smbkernels import registry
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from smbfast import embed, prepare, probe, train
from smbfast.base import entry, runtime, workers
from smbfast.data import preparing
from smbfast.probing import embedding, run_probe
from smbfast.reporting import figures, page
from smbfast.run import console, loop, preflight
from tests.same_run import comparable, tensors

# imported before any fork, and by their names in `Stage.target`
LOADED = (console, embedding, embed, figures, loop, page, preflight, prepare, preparing, probe)
LOADED += (run_probe, runtime, workers)
STEPS = 4  # of each of the two phases
SETTINGS = [
    "tiny",
    "--data.window=128",
    "--data.workers=1",
    "--cohort.patients=80",
    "--model.hidden=16",
    "--model.layers=1",
    "--model.ffn=32",
    "--optim.batch=2",
    "--optim.micro_tokens=256",
    "--eval.every=3",
    "--run.threads=1",
    "--run.save_every=3",
    "--run.log_every=100",
    f"--phases.0.steps={STEPS}",
    f"--phases.1.steps={STEPS}",
]
PROBES = "--probe.labels=death_3y"
NO_PROBES = "--probe.labels=[]"
LEFT = 300.0  # seconds until a command that is not asked to end counts as hung, at any load
MADE_AT_THE_END = ("final", "embeddings", "predictions", "probe.json", "report.html", "risk.json")
MADE_AT_THE_END += ("risk_functions.safetensors", "sample.json")
Fault = Callable[[], object]


@dataclass(frozen=True)
class Place:
    """The call of a function, "module:name", at which a command says so and waits."""

    name: str
    call: int = 1
    drops: bool = False  # in the callback of a weak reference, where Python drops exceptions


@dataclass(frozen=True)
class Ended:
    """How a process has ended: its status, negative where a signal ended it, None if it has not."""

    status: int | None
    seconds: float  # since the last signal, or since it began
    said: str


@dataclass
class Trial:
    """A command in a forked process, which says when it is at a place and waits there."""

    pid: int
    log: Path
    told: int  # read end of a pipe
    answer: int  # write end of another
    since: float = field(default_factory=time.monotonic)

    def is_there(self, patience: float = LEFT) -> bool:
        """Wait until it is at its place; False where it has ended without."""
        ready, _, _ = select.select([self.told], [], [], patience)
        return bool(ready) and os.read(self.told, 1) == b"."

    def signals(self, number: int, count: int, gaps: Iterator[float]) -> None:
        """Send signals, with gaps between them."""
        for _ in range(count):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            self.since = time.monotonic()
            time.sleep(next(gaps))

    def goes_on(self) -> None:
        """Let it leave its place."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self.answer, b".")

    def end(self, patience: float = LEFT) -> Ended:
        """Wait for the end; a process that goes on for longer is killed."""
        until, status = time.monotonic() + patience, None
        while True:
            done, code = os.waitpid(self.pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                break
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.005)
        os.close(self.told)
        os.close(self.answer)
        said = self.log.read_text(errors="replace")
        return Ended(status, time.monotonic() - self.since, said)


def begun(
    command: Callable[[list[str]], None],
    words: list[str],
    log: Path,
    *,
    place: Place | None = None,
    faults: tuple[Fault, ...] = (),
    environment: dict[str, str] | None = None,
) -> Trial:
    """Begin a command in a forked process.

    Args:
        place: where it waits.
        faults: called there before the command.
    """
    told, tell = os.pipe()
    hear, answer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(tell)
        os.close(hear)
        return Trial(pid, log, told, answer)
    status = 70
    with contextlib.suppress(BaseException), log.open("w", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        os.close(told)
        os.close(answer)
        sys.stdout = sys.stderr = sys.__stderr__ = out
        torch.set_num_threads(1)
        os.environ |= environment or {}
        is_the_command()
        for fault in (*faults, *([lambda: _waits(place, tell, hear)] if place else [])):
            fault()
        status = _status(command, words)
        threading._shutdown()  # as the interpreter does: it waits for threads
    os._exit(status)


def _status(command: Callable[[list[str]], None], words: list[str]) -> int:
    """Run a command, and return its exit status; what it says at its end is printed."""
    try:
        command(words)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code)
        return stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def _waits(place: Place, tell: int, hear: int) -> None:
    """Let a call of a function say so, and wait for the answer."""
    calls, (module, _, attribute) = [0], place.name.partition(":")
    *owners, last = attribute.split(".")
    owner: Any = sys.modules[module]
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, last)

    def meets(*_reference: object) -> None:
        os.write(tell, b".")
        os.read(hear, 1)

    def watched(*words: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == place.call:
            if place.drops:
                thing = {place.name}
                reference = weakref.ref(thing, meets)
                del thing
                assert reference() is None
            else:
                meets()
        return real(*words, **more)

    setattr(owner, last, watched)


def patched(name: str, value: object) -> Fault:
    """What replaces a name by another value until the process ends."""
    return mock.patch(name, value).start


def cheap() -> None:
    """Leave out what takes time and is not what is proven: two measures, the drawing of a page."""
    rate = runtime.MatmulRate(1e9, "none")
    needs = SimpleNamespace(total=0)
    patched("smbfast.run.startup.predict_peak", lambda *_, **_more: needs)()
    patched("smbfast.run.loop.matmul_rate", lambda *_: rate)()
    patched("smbfast.run.loop.write_report", lambda *_, **_more: None)()


def warm() -> None:
    """Load what every run would load again."""
    torch.set_num_threads(1)
    registry.load("cpu")
    get_checkpoint_conversion_mapping("qwen3")  # kept by transformers: 900 patterns


def is_the_command() -> None:
    """Let this process end with its command, as one that a user starts: until then signals stay
    with the command, and do not kill behind it."""
    vars(entry)["_is_the_program"] = lambda _name: True


def each_counts() -> None:
    """Let every signal be a request of its own, however soon it follows."""
    entry.MOMENT = 0.0


class Twin:
    """A run that nothing disturbs, from which trials begin and with which they are compared."""

    def __init__(self, folder: Path, *more: str) -> None:
        """Make it.

        Raises:
            AssertionError: it fails.
        """
        warm()
        self.more, self.folder = more, folder / "twin"
        end = begun(train.main, self.words(self.folder), folder / "twin.log", faults=(cheap,)).end()
        assert end.status == 0, end.said
        self.content = content(self.folder)

    def words(self, run: Path) -> list[str]:
        """The words of the command that trains in a folder."""
        return [*SETTINGS, *self.more, f"--run.dir={run}"]

    @property
    def cohort(self) -> Path:
        """The simulated patients."""
        return next(self.folder.glob("cohort-*"))

    def beginning(self, run: Path, *, data: bool = True) -> None:
        """Make a folder with patients and, with `data`, shards, in which nothing has begun."""
        run.mkdir()
        shutil.copytree(self.cohort, run / self.cohort.name)
        if data:
            shutil.copytree(self.folder / "prepared", run / "prepared")

    def trained(self, run: Path) -> None:
        """Make a folder in which all steps are done and nothing that comes behind them."""
        shutil.copytree(self.folder, run)
        for name in MADE_AT_THE_END:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "state": "preempted"}))

    def unlike(self, run: Path) -> list[str]:
        """What of a run that is done is otherwise than in this one."""
        own, theirs = content(run), self.content
        # the first step of a process has a line of its own
        names = [k for k in own.keys() ^ theirs.keys() if not k.startswith("step ")]
        return sorted([*names, *(k for k in own.keys() & theirs.keys() if own[k] != theirs[k])])


def content(run: Path) -> dict[str, object]:
    """All that a run has learned: its tensors to the bit, and what it logged about each step."""
    last = max((run / "checkpoints").glob("step-*"), default=run).name
    named: dict[str, object] = {
        name: (tensor.dtype, tensor.shape, tensor.numpy(force=True).tobytes())
        for name, tensor in tensors(run).items()
        if not name.startswith("checkpoints/") or name.startswith(f"checkpoints/{last}/")
    }
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["kind"] in ("step", "eval"):
            named[f"{line['kind']} {line['step']} {line['phase']}"] = comparable(line)
    return named


def state_of(run: Path) -> tuple[str, int] | None:
    """State and step of `status.json`; None where there is none."""
    file = run / "status.json"
    if not file.is_file():
        return None
    status = json.loads(file.read_text())
    return status["state"], status["step"]
