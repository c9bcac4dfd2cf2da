"""Trials of checkpoints that are written while steps go on."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import smbfast.train as entry
from smbfast.base.files import verify_folder
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import checkpoint_bytes
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run import checkpoint, loop
from smbfast.run.background import Buffer, Writer
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import make_optimizer
from smbfast.run.step import Updater
from smbfast.settings import OptimSettings
from tests.factory import tiny_run, write_meds
from tests.tiny import tiny_encoder

LONG = 60.0  # seconds in which anything here has happened, unless something hangs
MOMENT = 0.05  # seconds that a loop which does not wait is given to go on
KINDS = {"scratch": (False, "merged"), "merged": (True, "merged"), "tracked": (True, "tracked")}
SEEN = 4096  # bytes of new memory that a copy may make: counters of a tracked target


@dataclass
class State:
    """A model under training, without data."""

    encoder: PatientEncoder
    target: TargetEncoder
    updater: Updater
    form: TargetForm
    done: int = 0

    @classmethod
    def of(cls, kind: str) -> "State":
        lora, name = KINDS[kind]
        form = TargetForm(name, rank=1, every=3)
        encoder = tiny_encoder(lora=lora)
        target = TargetEncoder(encoder, form)
        return cls(encoder, target, Updater(make_optimizer(encoder, OptimSettings()), 1e9), form)

    def step(self) -> None:
        """Take a step of random gradients."""
        generator = torch.Generator().manual_seed(self.done)
        for parameter in self.encoder.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.updater.step(1e-2, self.target, 0.9)
        self.done += 1

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold, by its names there; the tensors themselves."""
        own = {n: p for n, p in self.encoder.named_parameters() if p.requires_grad}
        tensors = {f"model.{n}": p.detach() for n, p in own.items()}
        for name, parameter in own.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                tensors[f"{kind}.{name}"] = self.updater.optimizer.state[parameter][kind]
        return tensors | {f"target.{n}": w for n, w in self.target.state().items()}

    def taken(self, buffer: Buffer) -> checkpoint.Snapshot:
        """Copy the state."""
        parts = (self.encoder, self.target, self.updater.optimizer)
        return checkpoint.taken(self.done, *parts, {}, buffer)


class Copies(TorchDispatchMode):
    """Counts the bytes that are copied, and those of memory that is new."""

    def __init__(self) -> None:
        super().__init__()
        self.copied = self.made = 0
        self.times: dict[int, int] = {}  # that the memory at an address was read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        pairs = zip(*args[:2], strict=True) if name == "_foreach_copy_" else []
        for to, source in [(args[0], args[1])] if name == "copy_" else pairs:
            self.copied += to.nbytes
            self.times[source.data_ptr()] = self.times.get(source.data_ptr(), 0) + 1
        before = {t.untyped_storage().data_ptr() for t in _tensors(args)}
        for tensor in _tensors(out):
            if tensor.untyped_storage().data_ptr() not in before:
                self.made += tensor.untyped_storage().nbytes()
        return out


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def copied_once(kind: str, steps: int, folder: Path) -> Iterator[str | None]:
    """Save after each step, with steps going on before it is written; say what is wrong, or None.

    The copy is of each tensor once, into memory that was there, and what is written is of the
    moment of the copy.
    """
    from safetensors.torch import save

    state = State.of(kind)
    predicted = checkpoint_bytes(state.encoder, state.form)
    buffer = Buffer(predicted, torch.device("cpu"))
    place = buffer.address
    state.step()  # moments begin with a step
    most = 0
    for _ in range(steps):
        expected = {n: t.clone().contiguous() for n, t in state.tensors().items()}
        size = sum(t.nbytes for t in expected.values())
        most = max(most, size)
        with Copies() as seen:
            snapshot = state.taken(buffer)
        state.step()
        written = checkpoint.write(folder / kind, snapshot, 2) / "state.safetensors"
        at = f"{kind}, step {snapshot.step}"
        if seen.copied != size or max(seen.times.values()) > 1:
            yield f"{at}: {seen.copied} bytes were copied of {size}, one tensor perhaps twice"
        elif seen.made > SEEN or buffer.address != place:
            yield f"{at}: {seen.made} bytes of new memory, buffer moved: {buffer.address != place}"
        elif written.read_bytes() != save(expected):
            yield f"{at}: what was written is not what safetensors writes of that moment"
        else:
            yield None
    fits = most <= predicted <= 1.1 * most + SEEN
    yield None if fits else f"{kind}: {predicted} bytes were predicted, and {most} copied"


def died_writing(kind: str, call: int, folder: Path) -> str | None:
    """Kill a process at a system call of its writer while steps go on; None if nothing is lost.

    A run that goes on finds the checkpoint before or the new one, whole, and its next save leaves
    nothing of the write that was killed. "over" stands for a write that has no such call.
    """
    run = folder / f"{kind}-{call}"
    pid = os.fork()
    if not pid:
        _die_writing(State.of(kind), run, call)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        return "over" if os.WEXITSTATUS(status) == 3 else f"call {call}: ended with {status}"
    newest, damaged = checkpoint.latest(run)
    if newest is None or damaged or newest.step not in (1, 2):
        return f"{kind}, call {call}: {newest and newest.step}, damaged {damaged}"
    other = State.of(kind)
    target = checkpoint.load(newest, other.encoder, other.updater.optimizer)
    parts = (other.encoder, target, other.updater.optimizer)
    checkpoint.save(run, 3, *parts, {}, 2)
    # a folder in which nothing had begun yet is the matter of R1
    left = sorted(f.name for f in (run / "checkpoints").iterdir() if any(f.iterdir()))
    names = {f"step-{step:06d}" for step in (1, 2, 3)}
    if set(left) - names or not {"step-000003"} < set(left):
        return f"{kind}, call {call}: {left} after the next save"
    return None


def _die_writing(state: State, run: Path, call: int) -> None:
    """Save after steps 1 and 2, and kill this process at a system call of the second write."""
    calls = {"left": -1}

    def counted(real: Callable) -> Callable:
        def called(*words: Any, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and calls["left"] >= 0:
                calls["left"] -= 1
                if calls["left"] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)

        return called

    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    Buffer.write = counted(Buffer.write)  # type: ignore[method-assign]
    try:
        with Writer(
            Buffer(checkpoint_bytes(state.encoder, state.form), torch.device("cpu"))
        ) as own:
            for step in (1, 2):
                state.step()
                own.wait()
                snapshot = state.taken(own.buffer)
                calls["left"] = call if step == 2 else -1
                own.begin(lambda taken=snapshot: checkpoint.write(run, taken, 1))
            while not own._idle.wait(0):
                state.step()
        os._exit(3)
    except BaseException:
        os._exit(4)


@dataclass
class Seen:
    """What a run did."""

    folder: Path
    code: object = 0
    said: str = ""
    steps: list[int] = field(default_factory=list)  # that it began
    at_most: int = 0  # writes at a time
    wrong: list[str] = field(default_factory=list)

    def status(self) -> dict:
        """What the run says of itself."""
        return json.loads((self.folder / "status.json").read_text())

    def checkpoints(self) -> dict[str, tuple[bytes, dict]]:
        """State and record of every checkpoint, but for what a clock says, verified."""
        seen = {}
        for folder in checkpoint.folders(self.folder):
            verify_folder(folder)
            record = json.loads((folder / "record.json").read_text())
            record |= {"seconds": 0, "metrics_offset": 0, "identity": 0}  # the log holds a clock
            seen[folder.name] = ((folder / "state.safetensors").read_bytes(), record)
        return seen


class _Watch:
    """Stands between a run and its writer."""

    def __init__(
        self, seen: Seen, *, held: bool, fails: int | None, not_finite: int | None
    ) -> None:
        self.seen, self.held, self.fails, self.not_finite = seen, held, fails, not_finite
        self.goes_on: dict[int, threading.Event] = {}  # by step, whether the loop waits for it
        self.writers: list[Writer] = []
        self.active = 0
        self.write, self.rate, self.real = checkpoint.write, loop.learning_rate, dict(vars(OpenRun))

    def patches(self) -> Iterator[Any]:
        """Yield what stands in for what while a run is watched."""
        yield patch.object(checkpoint, "write", self.written)
        yield patch.object(loop, "learning_rate", self.stepped)
        yield patch.object(loop, "write_report", lambda *_run, **_more: None)
        yield patch.object(loop, "probe_run", lambda *_run, **_more: None)
        yield patch.object(OpenRun, "save", lambda *words, **more: self.saved(*words, **more))
        for name in ("settle", "save_model"):
            yield patch.object(OpenRun, name, self.waiting(name))

    def written(self, run: Path, snapshot: Any, keep: int) -> Path:
        seen, step = self.seen, snapshot.step
        self.active += 1
        seen.at_most = max(seen.at_most, self.active)
        try:
            if self.held and not self.goes_on[step].wait(LONG):
                seen.wrong.append(f"step {step}: the loop did not go on")
            if self.held:
                threading.Event().wait(MOMENT)
            if step == self.fails:
                raise OSError(28, "No space left on device", str(run / "checkpoints"))
            if seen.status()["step"] >= step:
                seen.wrong.append(f"status.json names step {step} before it is written")
            return self.write(run, snapshot, keep)
        finally:
            self.active -= 1

    def saved(self, run: OpenRun, target: Any, step: int, *words: Any, **more: Any) -> None:
        self.wait()
        self.goes_on[step] = threading.Event()
        self.writers = [run.writer] if run.writer is not None else []
        if step == self.not_finite:
            next(iter(run.optimizer.state.values()))["exp_avg_sq"].view(-1)[-1] = float("inf")
        self.real["save"](run, target, step, *words, **more)

    def wait(self) -> None:
        for event in self.goes_on.values():
            event.set()

    def waiting(self, method: str) -> Callable:
        def called(*words: Any) -> Any:
            self.wait()
            return self.real[method](*words)

        return called

    def stepped(self, settings: Any, at: Any) -> float:
        done = len(self.seen.steps)
        if done in (self.fails, self.not_finite):  # the writer has failed before the next step
            late = [w for w in self.writers if not w._idle.wait(LONG)]
            self.seen.wrong += ["the writer did not end" for _ in late]
        self.seen.steps.append(done + 1)
        return self.rate(settings, at)


def trained(
    folder: Path,
    name: str,
    *more: str,
    foreground: bool = False,
    held: bool = False,
    fails: int | None = None,
    not_finite: int | None = None,
) -> Seen:
    """Train a tiny run in this process.

    Args:
        foreground: whether the loop waits for its saves.
        held: whether each write waits until the loop comes to the next save, or to the end.
        fails: the step whose checkpoint cannot be written; the step behind it waits for that.
        not_finite: the step whose moments are not finite when they are saved; likewise.
    """
    seen = Seen(folder / name)
    if not (folder / "meds").is_dir():
        write_meds(folder / "meds")
    with ExitStack() as stack:
        out = stack.enter_context(redirect_stdout(StringIO()))
        err = stack.enter_context(redirect_stderr(StringIO()))
        for patched in _Watch(seen, held=held, fails=fails, not_finite=not_finite).patches():
            stack.enter_context(patched)
        if foreground:
            alone = patch.object(OpenRun, "saves_in_background", lambda _run: nullcontext())
            stack.enter_context(alone)
        try:
            entry.main([*tiny_run(folder / "meds", seen.folder), "--kernels=linear:torch", *more])
        except SystemExit as end:
            seen.code = end.code
        seen.said = out.getvalue() + err.getvalue()
    return seen


def same(one: Seen, other: Seen) -> Iterator[str | None]:
    """Compare every checkpoint of two runs; say what differs, or None."""
    first, second = one.checkpoints(), other.checkpoints()
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            yield f"{name} is in one of the runs alone: {one.said[-300:]} {other.said[-300:]}"
        elif first[name][0] != second[name][0]:
            yield f"{name}: the state differs from the one that the loop waits for"
        elif first[name][1] != second[name][1]:
            yield f"{name}: the record differs from the one that the loop waits for"
        else:
            yield None


def ended_at_once(seen: Seen, lost: int, before: int, words: str) -> str | None:
    """Check a run whose checkpoint of step `lost` could not be written, the one before of `before`.

    Returns None if it ended with the step behind, in words, and what was there before is there.
    """
    status, last = seen.status(), max(seen.steps)
    newest = max((checkpoint._step_of(f) for f in checkpoint.folders(seen.folder)), default=0)
    if words not in str(seen.code) or "Traceback" in seen.said:
        return f"step {lost} was lost: the run ended with {seen.code!r}"
    if last > lost + 1:
        return f"step {lost} was lost: the run went on to step {last}"
    if newest != before or seen.checkpoints() is None:
        return f"step {lost} was lost: the newest checkpoint is of step {newest}"
    if (status["state"], status["step"]) != ("failed", before):
        return f"step {lost} was lost: the status is {status['state']} at step {status['step']}"
    return None
