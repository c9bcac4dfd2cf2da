"""Jobs of ranks as torchrun starts them, with a death at a chosen moment, and what they leave.

`Job.run` forks a launcher, which holds the store and starts the ranks; it does as torchrun: where
a rank fails it sends TERM to the others, waits, then kills. Each is forked from this process, which
has imported smbfast, so a job costs what its steps cost. A rank can kill or stop itself or its
launcher, the n-th time that it comes to a moment of the program.
"""

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.mutants import ROOT
from tests.ports import free_port

PREEMPTED = 75
ENDS = 90.0  # seconds from a death to the end of a job; a launcher gives its ranks 30 of them
LASTS = 900.0  # seconds until a job in which nobody died counts as hung, at any load
# where a rank can be: module and name of a function that it calls there, or of a method
MOMENTS = {
    "start-up": ("smbfast.run.ranks", "_require_launch"),
    "joining": ("torch.distributed", "init_process_group"),
    "loading": ("smbfast.run.open_run", "prepared_data"),
    "model": ("smbfast.run.open_run", "make_encoder_of"),
    "step": ("smbfast.run.loop", "forward_backward"),
    "collective": ("torch.distributed", "all_reduce"),
    "evaluation": ("smbfast.run.loop", "evaluate_step"),
    "saving": ("smbfast.run.checkpoint", "committed_folder"),  # checkpoints and the best model
    "saved": ("smbfast.run.open_run", "write_status"),
    "end": ("smbfast.run.loop", "probe_run"),
    "report": ("smbfast.run.loop", "write_report"),  # of the main rank, which the others have left
}
ON_MAIN = ("saving", "saved")  # which the others wait for


@dataclass(frozen=True)
class Death:
    """What a rank does at a moment."""

    rank: int
    moment: str
    turn: int = 1  # the how manyth time that it comes there
    what: str = "kill"  # kill, stop, pause, or launcher: kills the process that started it
    slow: float = 1.0  # seconds that this rank then stays there, or that a pause lasts

    def __str__(self) -> str:
        victim = "launcher killed" if self.what == "launcher" else f"rank {self.rank} {self.what}"
        return f"{victim} at {self.moment} {self.turn}"


@dataclass
class Ended:
    """What became of a job."""

    codes: dict[int, int]  # exit codes by rank, negative for a signal
    said: dict[int, str]  # what each rank printed
    launcher: dict[str, int] = field(default_factory=dict)  # codes that it saw, "" if it died
    left: list[int] = field(default_factory=list)  # ranks that had to be ended by the proof
    seconds: float = 0.0  # from the death to the end of the last rank


def adopt() -> None:
    """Let processes whose parent dies become children of this one, so that it sees how they end."""
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER


def train(words: list[str]) -> None:
    """Train by the command, with which this process ends."""
    import smbfast.train as command
    from smbfast.base import entry

    vars(entry)["_is_the_program"] = lambda _name: True
    command.main(words)


def _lighten() -> None:
    """Leave out of this process's training what costs seconds and no rank has a part in."""
    from types import SimpleNamespace

    from smbfast.base.runtime import MatmulRate
    from smbfast.run import loop, startup

    vars(loop)["probe_run"] = _probe_nothing
    vars(loop)["write_report"] = lambda *_words, **_more: None
    vars(loop)["matmul_rate"] = lambda *_: MatmulRate(1.0, "none")
    vars(startup)["predict_peak"] = lambda *_words, **_more: SimpleNamespace(total=0)


def _probe_nothing(*_words: Any, **_more: Any) -> None:
    """Stands in for the embeddings at the end; it is a moment too."""


def run_job(
    world: int,
    words: list[str],
    folder: Path,
    death: Death | None = None,
    *,
    grace: float = 30.0,
    work: Callable[[list[str]], None] = train,
    before: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a job to its end.

    Args:
        folder: new; what ranks print is there.
        grace: seconds that the launcher gives ranks that it has asked to stop.
        work: what a rank does with `words`.
        before: called in each rank first.
    """
    folder.mkdir(parents=True)
    port = free_port()
    launcher = os.fork()
    if not launcher:
        try:
            _launch(world, words, folder, death, grace, port, work, before)
        finally:
            os._exit(1)
    began, codes, left = time.monotonic(), {}, []
    pids: dict[int, int] = {}
    while launcher or len(codes) < len(pids):
        if not pids and (folder / "pids").is_file():
            pids = {p: r for r, p in enumerate(json.loads((folder / "pids").read_text()))}
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == launcher:
            launcher = 0
            if not pids and (folder / "pids").is_file():
                pids = {p: r for r, p in enumerate(json.loads((folder / "pids").read_text()))}
            seen = _launcher_saw(folder)
            codes |= {int(r): code for r, code in seen.items()}
        elif pid in pids:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
        elif not pid:
            died = _died_at(folder)
            if death and death.what == "pause" and died and time.monotonic() - died > death.slow:
                with suppress(ProcessLookupError):
                    os.kill(next(p for p, r in pids.items() if r == death.rank), signal.SIGCONT)
            spent = time.monotonic() - (began if died is None else died)
            if spent > (LASTS if died is None else ENDS):
                left = [r for p, r in pids.items() if r not in codes]
                for p, r in pids.items():
                    if r in left:
                        with suppress(ProcessLookupError):
                            os.kill(p, signal.SIGKILL)
                began = time.monotonic()
            time.sleep(0.01)
    died = _died_at(folder)
    said = {r: (folder / str(r)).read_text(errors="replace") for r in pids.values()}
    spent = time.monotonic() - died if died is not None else 0.0
    return Ended(codes, said, _launcher_saw(folder), left, spent)


def _died_at(folder: Path) -> float | None:
    with suppress(OSError, ValueError):
        return float((folder / "died").read_text())
    return None


def _launcher_saw(folder: Path) -> dict[str, int]:
    with suppress(OSError, ValueError):
        return json.loads((folder / "launcher").read_text())
    return {}


def _launch(
    world: int,
    words: list[str],
    folder: Path,
    death: Death | None,
    grace: float,
    port: int,
    work: Callable[[list[str]], None],
    before: Callable[[], None],
) -> None:
    """Do as torchrun does, in a forked process, which ends here."""
    pids: list[int] = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            _be_rank(rank, world, words, folder, death, port, work, before)
        pids.append(pid)
    (folder / "new").write_text(json.dumps(pids))
    os.rename(folder / "new", folder / "pids")
    import torch.distributed as dist

    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    codes: dict[int, int] = {}
    asked = 0.0
    while len(codes) < world:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
            (folder / "new").write_text(json.dumps(codes))
            os.rename(folder / "new", folder / "launcher")
        alive = [p for r, p in enumerate(pids) if r not in codes]
        if any(codes.values()) and not asked:
            asked = time.monotonic()
            for p in alive:
                os.kill(p, signal.SIGTERM)
        if asked and time.monotonic() - asked > grace:
            for p in alive:
                os.kill(p, signal.SIGKILL)
        time.sleep(0.005)
    del store
    os._exit(0 if not any(codes.values()) else 1)


def _be_rank(
    rank: int,
    world: int,
    words: list[str],
    folder: Path,
    death: Death | None,
    port: int,
    work: Callable[[list[str]], None],
    before: Callable[[], None],
) -> None:
    """Train as a rank in a forked process, which ends here."""
    file = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "job",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    code = 1
    try:
        _lighten()
        before()
        if death is not None and death.rank == rank:
            _arm(death, folder)
        work(words)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            os.write(2, f"{end.code}\n".encode())
    except BaseException:  # whatever it is, this process must not go on as its parent would
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _arm(death: Death, folder: Path) -> None:
    """Let this rank do what it is to do when it comes to the moment."""
    import importlib

    module, name = MOMENTS[death.moment]
    place = vars(importlib.import_module(module))
    real, launcher, turns = place[name], os.getppid(), [0]

    def reached(*own: Any, **more: Any) -> Any:
        turns[0] += 1
        if turns[0] == death.turn:
            (folder / "died").write_text(str(time.monotonic()))
            if death.what == "launcher":
                os.kill(launcher, signal.SIGKILL)
                time.sleep(death.slow)
            else:
                is_kill = death.what == "kill"
                os.kill(os.getpid(), signal.SIGKILL if is_kill else signal.SIGSTOP)
        return real(*own, **more)

    place[name] = reached


def torchrun(world: int, words: list[str], log: Path) -> subprocess.Popen:
    """Start the real one, in a group of its own."""
    launcher = ["--standalone", f"--nproc-per-node={world}", "-m", "smbfast.train"]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [int(word) for word in text.split()]
    return []


def status_of(run: Path) -> dict[str, Any]:
    """The status of a run; empty where none was written."""
    with suppress(OSError, ValueError):
        return json.loads((run / "status.json").read_text())
    return {}


def logged(run: Path) -> list[dict[str, Any]]:
    """Steps and evaluations of a run, without what a clock or a memory meter says."""
    unlike = ("tokens_per_s", "masked_per_s", "matmul", "wait", "eta", "memory_gib")
    with suppress(OSError):
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [
            {k: v for k, v in row.items() if k not in unlike}
            for row in rows
            if row["kind"] in ("step", "eval")
        ]
    return []


def digests(run: Path) -> dict[str, str]:
    """SHA-256 of all tensors that a run left: final, best, and the newest checkpoint."""
    files = [*run.glob("final/*.safetensors"), *run.glob("best/*/*.safetensors")]
    newest = sorted(run.glob("checkpoints/step-*"))[-1:]
    files += [folder / "state.safetensors" for folder in newest]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
    }
