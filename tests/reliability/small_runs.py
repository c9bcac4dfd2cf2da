"""Whole training runs of half a second: begun in forked processes, killed, compared with twins.

A run is the command itself, `smbfast.train.main`, without what costs seconds and has no part in
what it trains. The processes of a run have a group of their own, which is killed as one, and the
kernel kills them with the process that began them.
"""

import ctypes
import gc
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

import smbfast.train as entry
from smbfast.base.files import write_text
from smbfast.base.runtime import MatmulRate
from smbfast.run import loop
from tests.factory import write_meds
from tests.ports import free_port

PREEMPTED = 75  # the exit code of a run that was stopped and saved
PATIENCE = 300.0  # seconds after which a run has hung
SAVE_EVERY = 3
COMMON = [
    "--data.window=128",
    "--data.vocab_size=400",
    "--data.delimiters=text",  # a backbone does not know them: LoRA trains rows for them
    "--optim.batch=2",
    "--optim.micro_tokens=130",  # a window alone: each step adds up two micro-batches
    "--optim.weight_decay=0.1",
    "--model.hidden=8",
    "--model.layers=1",
    "--model.ffn=8",
    "--lora.r=2",
    "--eval.every=4",
    "--eval.windows=2",
    "--run.log_every=1",
    f"--run.save_every={SAVE_EVERY}",
    "--run.keep=3",
    "--run.threads=1",
    "--probe.labels=[]",
    "--objective.tau_end=1.0",
    "--objective.tracked_every=3",
    "--objective.tracked_rank=1",
]
_PHASE = '[[phases]]\nname = "{}"\nsteps = {}\nw_sft = {}\nw_jepa = {}\nw_codes = {}\nwarmup = 2\n'
_AHEAD = '[objective]\njepa = "horizon"\nhorizons = ["2d", "5d"]\npositions = 8\n'


def _phases(*phases: tuple, head: str = "") -> str:
    return 'base = "tiny"\n' + head + "".join(_PHASE.format(*map(_number, p)) for p in phases)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, float) else value


# twelve windows, two of them a step: an epoch ends after each sixth step
OBJECTIVES = {
    "sft": _phases(("sft", 7, 1.0, 0.0, 0.0), ("slow", 5, 0.5, 0.0, 0.0)),
    "mask": _phases(("sft", 5, 1.0, 0.0, 0.0), ("jepa", 7, 0.0, 1.0, 0.0)),
    "hybrid": _phases(("sft", 2, 1.0, 0.0, 0.0), ("both", 10, 1.0, 1.0, 0.0)),
    "codes": _phases(("sft", 4, 1.0, 0.0, 0.0), ("codes", 8, 0.5, 0.0, 1.0), head=_AHEAD),
    "horizon": _phases(
        ("sft", 4, 1.0, 0.0, 0.0),
        ("ahead", 5, 0.1, 1.0, 0.5),
        ("jepa", 3, 0.0, 1.0, 0.0),
        head=_AHEAD,
    ),
}
TOTAL = 12  # steps of each
# what a clock, a memory meter or a path decides
_CLOCKS = {"tokens_per_s", "masked_per_s", "matmul", "wait", "eta", "memory_gib", "seconds"}
_CLOCKS |= {"metrics_offset", "time", "created", "pid"}
# the manifest has digests of what names the run; the others have clocks
_CLOCKED = ("manifest.json", "README.md", "verified.json")
# who it is, which is random, and what is asked of the same run in other words
_WHO = {"run", "identity", "settings"}


@dataclass(frozen=True)
class Shape:
    """What is trained, and how."""

    format: str  # of the data: codes or text
    kind: str  # whole; or LoRA with a merged or a tracked target
    objective: str
    world: int = 1
    prepares: bool = False  # whether each run prepares its data itself

    def __str__(self) -> str:
        ranks = f"-{self.world}-ranks" if self.world > 1 else ""
        return f"{self.format}-{self.kind}-{self.objective}{ranks}"


@dataclass(frozen=True)
class Aim:
    """The moment at which a run is killed.

    kind: "time", after `share` of the seconds of its twin; "write", when it calls the system about
    a file that is not committed for the n-th time, or a little later; "step", in its n-th step.
    """

    kind: str
    n: int = 0
    seconds: float = 0.0  # after the start, or after that call


@dataclass
class Begun:
    """A run that was started."""

    pids: list[int]  # of its ranks; the first is the group
    heard: int  # a pipe, on which it says that the moment has come
    log: Path


@contextmanager
def lean(*, report: bool = False) -> Iterator[None]:
    """Leave out what takes seconds: speed and memory are not measured, no report is drawn."""
    with ExitStack() as stack:
        for name, value in (
            ("smbfast.run.loop.matmul_rate", lambda *_: MatmulRate(1.0, "none")),
            ("smbfast.run.startup.predict_peak", lambda *_, **__: SimpleNamespace(total=0)),
        ):
            stack.enter_context(mock.patch(name, value))
        if not report:
            stack.enter_context(mock.patch.object(loop, "write_report", lambda *_, **__: None))
        yield


class Flag:
    """Stands for the flag of a signal, which a loop reads once in a step; it is up from the n-th.

    Then it calls `then`, if that is given.
    """

    name = "SIGTERM"

    def __init__(self, n: int, then: Callable[[], object] | None = None) -> None:
        """Count down from `n`."""
        self._left, self._then = n, then

    def __enter__(self) -> "Flag":
        return self

    def __exit__(self, *_error: object) -> None:
        return None

    def __bool__(self) -> bool:
        self._left -= 1
        if self._left == 0 and self._then is not None:
            self._then()
        return self._left <= 0


def make_data(root: Path, shapes: list[Shape]) -> None:
    """Write a dataset, settings, shards and backbones that runs of these shapes read."""
    write_meds(root / "meds")
    for name, text in OBJECTIVES.items():
        (root / f"{name}.toml").write_text(text)
    (root / "first.toml").write_text(_phases(("sft", 1, 1.0, 0.0, 0.0)))
    # runs here, so that what they load is there in the processes that are forked
    gc.collect()
    gc.freeze()
    forms = sorted({s.format for s in shapes})
    for form in forms:
        _train_first(root, Shape(form, "whole", "first"))
    # several ranks begin with shards; other runs make them as they begin
    for form in sorted({s.format for s in shapes if s.kind != "whole" and s.world > 1}):
        _train_first(root, Shape(form, "merged", "first"))
    gc.freeze()


def _train_first(root: Path, shape: Shape) -> None:
    run = root / (shape.format if shape.kind == "whole" else str(shape))
    run_here(words_of(root, shape, run), run)


def run_here(words: list[str], run: Path, stop_after: int | None = None) -> bool:
    """Train in this process, and return whether it has come to its end.

    Args:
        words: of the command.
        run: its folder; what it prints goes to a file beside it.
        stop_after: the number of further steps after which it is asked to stop, as by a signal.

    Raises:
        SystemExit: if it fails, or does not stop then.
    """
    with ExitStack() as stack:
        out = stack.enter_context(run.with_name(f"{run.name}.log").open("a"))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(out))
        stack.enter_context(lean())
        if stop_after is not None:
            patch = mock.patch.object(loop, "stop_on_signals", lambda: Flag(stop_after))
            stack.enter_context(patch)
        try:
            entry.main(words)
        except SystemExit as stop:
            if stop.code != PREEMPTED or stop_after is None:
                raise
            return False
    return True


def words_of(root: Path, shape: Shape, run: Path) -> list[str]:
    """The arguments of a run."""
    words = [str(root / f"{shape.objective}.toml"), f"--data.path={root / 'meds'}", *COMMON]
    words += [f"--data.format={shape.format}", f"--run.dir={run}"]
    if not shape.prepares:
        kind = "whole" if shape.kind == "whole" else "lora"
        words.append(f"--data.prepared={root / f'shards-{shape.format}-{kind}'}")
    if shape.kind == "whole":
        return words
    words += [f"--model.path={root / shape.format / 'final'}", "--model.train=lora"]
    words.remove("--data.vocab_size=400")
    return [*words, f"--objective.target_form={shape.kind}"]


def begin(
    words: list[str], run: Path, aim: Aim | None = None, *, world: int = 1, report: bool = False
) -> Begun:
    """Start a run in forked processes.

    Args:
        words: of the command.
        run: its folder; what it prints goes to a file beside it.
        aim: when it is killed; None never.
        world: its ranks.
        report: whether it draws its report.
    """
    log = run.with_name(f"{run.name}.log")
    heard, tell = os.pipe()
    pids: list[int] = []
    port = free_port()
    sys.stdout.flush()
    for rank in range(world):
        pid = os.fork()
        if not pid:
            os.close(heard)
            ranks = _as_torchrun(rank, world, port) if world > 1 else {}
            _be_run(words, run, log, aim, tell, pids[0] if pids else 0, ranks, report)
        with suppress(OSError):  # the child does it too, and may be first
            os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    os.close(tell)
    return Begun(pids, heard, log)


def _as_torchrun(rank: int, world: int, port: int) -> dict[str, str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, map(str, (rank, world, rank, world, "127.0.0.1", port)), strict=True))


def _be_run(
    words: list[str],
    run: Path,
    log: Path,
    aim: Aim | None,
    tell: int,
    group: int,
    ranks: dict[str, str],
    report: bool,
) -> None:
    """Be a rank of a run in a forked process, which ends here."""
    parent, status = os.getppid(), 70
    try:
        os.setpgid(0, group)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ |= ranks
        # what is drawn without a seed differs from process to process, also from forked ones
        torch.seed()
        np.random.seed()
        random.seed()
        with lean(report=report), _aimed(aim, run, tell):
            entry.main(words)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if not isinstance(stop.code, int):
            print(stop.code)
    except BaseException:  # whatever it is, this process must not go on as its parent would
        traceback.print_exc()
    with suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


@contextmanager
def _aimed(aim: Aim | None, run: Path, tell: int) -> Iterator[None]:
    """Kill this process and its group at the moment that is aimed at, or tell when it comes."""
    if aim is None or aim.kind == "time":
        yield
    elif aim.kind == "step":
        with mock.patch.object(loop, "stop_on_signals", lambda: Flag(aim.n, _kill_own_group)):
            yield
    else:
        left = _watch_writes(aim, run, tell)
        yield
        if os.getpid() == os.getpgrp():  # the first rank, which writes
            _count_of(run).write_text(str(aim.n - left[0]))


def _kill_own_group() -> None:
    os.killpg(0, signal.SIGKILL)
    time.sleep(PATIENCE)


def num_writes(run: Path) -> int:
    """The calls about uncommitted files that a run has made which was aimed at one of them."""
    return int(_count_of(run).read_text())


def _count_of(run: Path) -> Path:
    return run.with_name(f"{run.name}.writes")


def _watch_writes(aim: Aim, run: Path, tell: int) -> list[int]:
    """Count the calls about uncommitted files of a run down; at the n-th, be killed or tell."""
    left, inside = [aim.n], str(run)

    def hook(event: str, arguments: tuple) -> None:
        if not event.startswith(("open", "os.", "shutil.")):
            return
        if any(isinstance(a, str) and inside in a and ".tmp" in a for a in arguments[:2]):
            left[0] -= 1
            if left[0] == 0:
                if aim.seconds == 0.0:
                    _kill_own_group()
                os.write(tell, b"!")

    sys.addaudithook(hook)
    return left


def kill(begun: Begun, aim: Aim) -> bool:
    """Kill a run at the moment that is aimed at; return False if it ended before by itself.

    Raises:
        AssertionError: if it failed, or hangs.
    """
    if aim.kind == "time":
        _ends_within(begun, aim.seconds)
    elif aim.kind == "write" and aim.seconds:
        ready, _, _ = select.select([begun.heard], [], [], PATIENCE)
        if ready and os.read(begun.heard, 1):
            time.sleep(aim.seconds)
    else:
        _ends_within(begun, PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(begun.pids[0], signal.SIGKILL)
    statuses = _statuses(begun)
    assert all(status in (0, -signal.SIGKILL) for status in statuses), _shown(begun, statuses)
    return -signal.SIGKILL in statuses


def end(begun: Begun) -> list[int]:
    """Wait until all ranks have ended; return their exit codes, negative of a signal."""
    _ends_within(begun, PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(begun.pids[0], signal.SIGKILL)
    return _statuses(begun)


def require_end(begun: Begun) -> None:
    """Wait until a run has ended.

    Raises:
        AssertionError: unless it has trained to its end.
    """
    statuses = end(begun)
    assert not any(statuses), _shown(begun, statuses)


def _ends_within(begun: Begun, seconds: float) -> bool:
    """Wait until every rank has ended, or one was killed, for at most some seconds."""
    until = time.monotonic() + seconds
    while True:
        states = [os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in begun.pids]
        if all(states) or any(s and s.si_code != os.CLD_EXITED for s in states):
            return True
        if any(s and s.si_status for s in states):
            time.sleep(1.0)  # for what the others say of it
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(min(0.002, max(0.0, until - time.monotonic())))


def _statuses(begun: Begun) -> list[int]:
    os.close(begun.heard)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in begun.pids]


def _shown(begun: Begun, statuses: list[int]) -> str:
    text = begun.log.read_text(errors="replace")[-600:] if begun.log.is_file() else ""
    return f"{begun.log.stem} ended with {statuses}: {text}"


def lines_of(run: Path) -> list[dict]:
    """The log of a run; none before it has begun."""
    log = run / "metrics.jsonl"
    if not log.is_file():
        return []
    lines: list[dict] = []
    for line in log.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            lines.append({"kind": "no JSON", "step": 0, "text": line})
    return lines


def last_step(run: Path) -> int:
    """The last step in the log of a run."""
    return max((line["step"] for line in lines_of(run) if line["kind"] == "step"), default=0)


def checkpoints(run: Path) -> list[Path]:
    """The committed checkpoints of a run, the newest last."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(f for f in folders if f.name.removeprefix("step-").isdigit())


def step_of(checkpoint: Path) -> int:
    """The steps that were done when a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def without_mask(run: Path) -> list[int]:
    """The steps of phases with JEPA in which nothing was predicted."""
    steps = [line for line in lines_of(run) if line["kind"] == "step"]
    bad = [s["step"] for s in steps if s["jepa"] is not None and not s["masked"] > 0]
    return bad + [s["step"] for s in steps if s["phase"] in ("jepa", "both") and s["jepa"] is None]


def differences(twin: Path, run: Path) -> list[str]:
    """What two finished runs of one command left differently, in words."""
    return different_ends(twin, run) + _different_folders(twin, run, "checkpoints/step-*")


def different_ends(twin: Path, run: Path) -> list[str]:
    """The same, but for the checkpoints."""
    bad = _different_lines(twin, run)
    for pattern in ("final", "best/*"):
        bad += _different_folders(twin, run, pattern)
    return bad + _left(run)


def _left(run: Path) -> list[str]:
    """What killed writes have left, also after a next write beside it."""
    for folder in list(run.rglob("*.tmp")):
        # one that does not say whose it is may be of a process that goes on: not for a minute
        os.utime(folder, (time.time() - 120,) * 2)
        write_text(folder.parent / "next", "")
        (folder.parent / "next").unlink()
    left = [p for kind in ("tmp", "old", "trash") for p in run.rglob(f"*.{kind}")]
    return [f"{p.relative_to(run)} is left" for p in left]


def _different_folders(twin: Path, run: Path, pattern: str) -> list[str]:
    ours, theirs = (
        {f.relative_to(r) for f in r.glob(pattern) if f.suffix != ".tmp"} for r in (twin, run)
    )
    bad = [f"{name} is in one run alone" for name in sorted(ours ^ theirs)]
    for name in sorted(ours & theirs):
        bad += different_files(twin / name, run / name)
    return bad


def _different_lines(twin: Path, run: Path) -> list[str]:
    ours, theirs = (_comparable_lines(r) for r in (twin, run))
    if len(ours) != len(theirs):
        return [f"metrics.jsonl has {len(theirs)} lines, and {len(ours)} without a kill"]
    pairs = zip(ours, theirs, strict=True)
    return [_different_line(a, b) for a, b in pairs if a != b]


def _different_line(ours: dict, theirs: dict) -> str:
    names = [n for n in sorted(ours | theirs) if ours.get(n) != theirs.get(n)]
    values = [f"{n} {theirs.get(n)} and not {ours.get(n)}" for n in names]
    return f"metrics.jsonl, {ours['kind']} of step {ours.get('step')}: {', '.join(values)}"


def _comparable_lines(run: Path) -> list[dict]:
    # a run that is resumed says again what it is, and checks itself again
    lines = [line for line in lines_of(run) if line["kind"] not in ("header", "self_check")]
    return [comparable(line) for line in lines]


def comparable(value: Any) -> Any:
    """A record without what a clock decides, and without the random name of its run."""
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if k not in _CLOCKS | _WHO}
    return [comparable(v) for v in value] if isinstance(value, list) else value


def different_files(one: Path, other: Path) -> list[str]:
    """What differs between two committed folders, by file."""
    ours, theirs = ({f.relative_to(d) for f in d.rglob("*") if f.is_file()} for d in (one, other))
    bad = [f"{other.name}/{name} is in one folder alone" for name in sorted(ours ^ theirs)]
    for name in sorted(ours & theirs):
        if name.name not in _CLOCKED and not _same(one / name, other / name):
            bad.append(f"{other.parent.name}/{other.name}/{name} differs")
    return bad


def _same(one: Path, other: Path) -> bool:
    if one.read_bytes() == other.read_bytes():
        return True
    if one.suffix != ".json":
        return False
    return comparable(json.loads(one.read_text())) == comparable(json.loads(other.read_text()))
