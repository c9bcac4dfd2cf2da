"""python -m tests.harm_proof: what `tests/test_harm.py` says in small, with whole runs.

Runs are forked from a process that has imported everything, so that a trial takes seconds; where
imports matter, processes are started anew. Prints a line for each proof, and fails if one does.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from smbfast import check, embed, prepare, probe, report, simulate, train
from smbfast.base import runtime
from smbfast.data import loader
from smbfast.probing import embedding, run_probe
from smbfast.reporting import figures, page
from smbfast.run import console, loop, preflight

SETTINGS = [
    "tiny",
    "--data.window=128",
    "--cohort.patients=60",
    "--model.hidden=16",
    "--model.layers=1",
    "--model.ffn=32",
    "--optim.batch=2",
    "--run.threads=1",
    "--run.save_every=3",
    "--run.log_every=1",
    "--phases.0.steps=4",
    "--phases.1.steps=4",
    "--probe.labels=[]",
]
LOADED = (console, embedding, figures, loop, page, preflight, run_probe)  # before any fork
DOUBLES, PATIENCE, BLOCKED = 30, 2.0, 10.0  # starts; seconds
BUSY: dict[int, float] = {}  # seconds that a process ran or waited for a core that others had
PACKED = loader._packed  # as it is without a fault
Command = Callable[[list[str]], None]


def forked(command: Command, argv: list[str], log: Path, fault: Callable[[], object] | None = None):
    """Run a command in a forked process, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    with suppress(BaseException), log.open("w") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            if fault:
                fault()
            command(argv)
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            if isinstance(stop.code, str):
                print(stop.code)
        except BaseException as error:
            print(f"Traceback: {error!r}")
    os._exit(status)


def ended(pid: int, patience: float = 120.0) -> tuple[int, float]:
    """Wait; return the exit status, or minus the signal, and when it ended."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        with suppress(OSError, ValueError):
            BUSY[pid] = sum(map(int, Path(f"/proc/{pid}/schedstat").read_text().split()[:2])) / 1e9
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still running after {patience:.0f} s")


def lines(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines())


def weights(run: Path) -> dict[str, str]:
    files = sorted((run / "final").glob("*.safetensors"))
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def single(root: Path) -> tuple[Path, float]:
    """A run without a disturbance, and its seconds."""
    start = time.monotonic()
    run = root / "single"
    status, end = ended(forked(train.main, [*SETTINGS, f"--run.dir={run}"], root / "single.log"))
    assert status == 0, (root / "single.log").read_text()
    return run, end - start


def blocked(pid: int, seconds: float) -> float:
    """The seconds of those that a process lived in which it waited for anything but a core."""
    return seconds - BUSY[pid]


def double_starts(root: Path, alone: Path, seconds: float) -> str:
    draw, slowest, late = random.Random(0), 0.0, 0
    for trial in range(DOUBLES):
        run = root / f"double-{trial}"
        argv = [*SETTINGS, f"--run.dir={run}"]
        logs = [root / f"double-{trial}.{i}.log" for i in range(2)]
        anew = trial % 10 == 9
        first = forked(train.main, argv, logs[0])
        time.sleep(draw.random() * seconds * (0.1 if anew else 0.4))
        start = time.monotonic()
        if anew:
            with logs[1].open("w") as out:
                command = [sys.executable, "-m", "smbfast.train", *argv]
                second = subprocess.Popen(command, stdout=out, stderr=out).pid
        else:
            second = forked(train.main, argv, logs[1])
        ends = [ended(second), ended(first)]
        texts = [log.read_text() for log in (logs[1], logs[0])]
        if ends[0][0] == 0 and "is finished" in texts[0]:  # the first one was quicker than alone
            late += 1
        else:
            refused = [i for i in range(2) if ends[i][0] == 1 and "is in use by" in texts[i]]
            assert len(refused) == 1 and ends[1 - refused[0]][0] == 0, (trial, ends, texts)
            took = ends[refused[0]][1] - start
            slowest = max(slowest, took if not anew else 0.0)
            assert took < PATIENCE + (3.0 if anew else 0.0), (trial, took)
        assert lines(run) == lines(alone) and weights(run) == weights(alone), trial
        shutil.rmtree(run)
    return (
        f"{DOUBLES} double starts: {DOUBLES - late} of them refused one, the slowest after "
        f"{slowest:.2f} s; {late} began after the first had ended"
    )


def full(*_args: object, **_more: object) -> None:
    raise OSError(28, "No space left on device")


def wrong(*_args: object, **_more: object) -> None:
    raise KeyError("Zebrafinch")


def patched(name: str, value: object) -> Callable[[], object]:
    return mock.patch(name, value).start


def hangs(root: Path) -> Callable[[], object]:
    (root / "bin").mkdir()
    (root / "bin" / "git").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    (root / "bin" / "git").chmod(0o700)

    def fault() -> None:
        runtime.git_state.cache_clear()
        os.environ["PATH"] = f"{root / 'bin'}:{os.environ['PATH']}"

    return fault


def faults(root: Path) -> str:
    missing = {"PATH": str(root / "none")}
    helpers: dict[str, Callable[[], object]] = {
        "TensorBoard's file is not made": patched("smbfast.run.board.EventsWriter", full),
        "TensorBoard's write": patched("tensorboardX.record_writer.RecordWriter.write", full),
        "TensorBoard's flush": patched("tensorboardX.record_writer.RecordWriter.flush", full),
        "TensorBoard's close": patched("tensorboardX.record_writer.RecordWriter.close", wrong),
        "a scalar": patched("smbfast.run.board.scalar", wrong),
        "git is missing": lambda: (runtime.git_state.cache_clear(), os.environ.update(missing)),
        "git hangs": hangs(root),
        "the profile does not begin": patched("smbfast.run.profile.profile", wrong),
        "the profile is not written": patched("smbfast.run.profile.committed_folder", full),
        "the report": patched("smbfast.run.loop.write_report", wrong),
        "the report's figures": patched("smbfast.reporting.page.render", wrong),
        "the sample": patched("smbfast.run.probes.sample_of", wrong),
        "the sample is not written": patched("smbfast.run.probes.write_text", full),
        "old checkpoints stay": patched("smbfast.base.replace.discard", full),
        "a loader's thread ends": patched("smbfast.data.loader.make_micro_batches", full),
        "no thread starts": patched("threading.Thread.start", no_thread),
        "the loader's threads are gone": patched("smbfast.data.loader._packed", thread_ends),
    }
    slowest, stopped = 0.0, 0
    for number, (name, fault) in enumerate(helpers.items()):
        run, log = root / f"fault-{number}", root / f"fault-{number}.log"
        more = ["--run.profile=2"] if "profile" in name else []
        start = time.monotonic()
        pid = forked(train.main, [*SETTINGS, *more, f"--run.dir={run}"], log, fault)
        status, end = ended(pid)
        text = log.read_text()
        assert "Traceback" not in text and "Zebrafinch" not in text, (name, text)
        if name.startswith(("a loader", "no thread", "the loader")):
            assert status == 1 and text.splitlines()[-1].startswith("smbfast.train: "), (name, text)
            stopped += 1
        else:
            assert status == 0 and lines(run) >= 9, (name, status, text)
            named = text.count("warning: ") - text.count("warning: 0") > 0
            assert named or name == "old checkpoints stay", (name, text)
        slowest = max(slowest, waited := blocked(pid, end - start))
        assert waited < BLOCKED, (name, waited)
    return (
        f"{len(helpers)} faults in helpers: {stopped} end the run with a line, the others are said "
        f"and it goes on; at most {slowest:.1f} s of waiting in a run"
    )


def no_thread(*_args: object) -> None:
    raise RuntimeError("can't start new thread")


def thread_ends(*args: Any, **more: Any) -> Any:
    if threading.current_thread() is threading.main_thread():
        return PACKED(*args, **more)  # evaluation packs batches too
    raise SystemExit(3)


def tree_hash(names: dict[Path, str]) -> str:
    """A hash of files of others, by name and content."""
    parts = [(str(path), path.read_text() if path.is_file() else None) for path in sorted(names)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def foreign_files(root: Path, alone: Path) -> str:
    run, shards, others = root / "run", root / "shards", root / "others"
    cohort = next(alone.glob("cohort-*"))
    shutil.copytree(alone, run)
    places = [
        *(run / n for n in ("notes.md", "final.tmp/a", "final.old/a", "final/thesis.docx")),
        *(run / n for n in ("final/deep/er/b", "best/sft/c", "checkpoints/step-000003.trash/d")),
        *(run / n for n in ("checkpoints/step-000006/e", "final.0123456789abcdef.tmp/f")),
        *(run / n for n in ("probe.json.tmp", "tensorboard/mine", "merged.tmp/g", "predictions/h")),
        *(others / n for n in ("keep.txt", "final/keep.txt", "data/train/0.parquet")),
        *(root / n for n in ("e.parquet.tmp", "e.parquet.old", "simulated.tmp/i", "mine.parquet")),
        *(root / n for n in ("shards.tmp/j", "shards.old/k")),
    ]
    names = {path: path.name for path in places}
    for path in names:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine " + path.name)
    before = tree_hash(names)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    same = [*SETTINGS, f"--run.dir={run}"]
    task = "death_1y"
    model = [f"--model={run / 'final'}", f"--data={cohort}", f"--labels={task}"]
    table = [f"--embeddings={root / 'e.parquet'}", f"--data={cohort}", f"--labels={task}"]
    commands: list[tuple[Command, list[str], int]] = [
        (train.main, same, 0),
        (train.main, [*same, "--export=merged"], 0),
        (check.main, same, 0),
        (report.main, [f"--run={run}"], 0),
        (simulate.main, [f"--out={root / 'simulated'}", "--patients=60"], 0),
        (prepare.main, [f"--path={cohort}", f"--out={shards}", "--window=128"], 0),
        (embed.main, [*model, f"--out={root / 'e.parquet'}"], 0),
        (embed.main, [*model, f"--out={root / 'e.parquet'}"], 0),
        (probe.main, [*table, f"--out={run}", "--bootstraps=10"], 0),
        (train.main, [*SETTINGS, f"--run.dir={others}"], 1),
        (check.main, [*SETTINGS, f"--run.dir={others}"], 1),
        (prepare.main, [f"--path={cohort}", f"--out={others}"], 1),
        (prepare.main, [f"--path={cohort}", f"--out={others / 'data'}"], 1),
        (simulate.main, [f"--out={others}", "--patients=60"], 1),
        (embed.main, [*model, f"--out={root / 'mine.parquet'}"], 1),
    ]
    for number, (command, argv, expected) in enumerate(commands):
        log = root / f"foreign-{number}.log"
        status, _ = ended(forked(command, argv, log))
        assert status == expected, (command.__module__, argv, status, log.read_text())
        assert tree_hash(names) == before, (command.__module__, argv)
    left = [
        p for p in root.rglob("*.tmp") if p not in names and not any(q.parent == p for q in names)
    ]
    assert not left, left
    return f"{len(names)} files of others: unchanged by {len(commands)} commands"


def signals(root: Path, alone: Path, seconds: float) -> str:
    draw, statuses = random.Random(1), {0: 0, 75: 0}
    trials = [(n, c) for n in ("SIGUSR1", "SIGTERM", "SIGINT") for c in (1, 2, 5)] * 3
    for number, (name, count) in enumerate(trials):
        run, log = root / f"signal-{number}", root / f"signal-{number}.log"
        argv = [*SETTINGS, f"--run.dir={run}"]
        pid = forked(train.main, argv, log)
        time.sleep(0.05 + draw.random() * seconds * 0.95)
        for _ in range(count):
            with suppress(ProcessLookupError):
                os.kill(pid, getattr(signal, name))
            time.sleep(0.02 * draw.random())
        sent = time.monotonic()
        status, end = ended(pid)
        assert end - sent < BLOCKED, (name, count, end - sent)
        # after the command has ended, its forked process knows no handler
        late = status == -getattr(signal, name) and "total" in log.read_text()
        assert status in statuses or late, (name, count, status, log.read_text())
        statuses[0 if late else status] += 1
        status, _ = ended(forked(train.main, argv, log))
        assert status == 0, log.read_text()
        assert weights(run) == weights(alone), (name, count)
        assert not list(run.rglob("*.tmp")), list(run.rglob("*.tmp"))
        shutil.rmtree(run)
    return f"{len(trials)} runs with 1 to 5 signals: exits {statuses}, then the weights of one run"


def full_disk(root: Path, alone: Path) -> str:
    disk, said = root / "disk", []
    disk.mkdir()
    shown, twin = "no tmpfs could be mounted", root / "twin"
    made = [*SETTINGS, "--run.keep=3", f"--data.path={next(alone.glob('cohort-*'))}"]
    made += [f"--data.prepared={root / 'shards-of-disk'}"]
    status, _ = ended(forked(train.main, [*made, f"--run.dir={twin}"], root / "twin.log"))
    assert status == 0, (root / "twin.log").read_text()
    for size in ("300k", "500k", "700k", "900k"):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "t", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return f"full disk: {shown}"
        try:
            argv = [*made, f"--run.dir={disk / 'run'}"]
            log = root / f"disk-{size}.log"
            status, _ = ended(forked(train.main, argv, log))
            text = log.read_text()
            if status == 0:
                said.append(f"{size} suffices")
                continue
            last = text.splitlines()[-1]
            assert status == 1 and "Traceback" not in text, (size, text)
            assert last.startswith(f"smbfast.train: No space left on device: {disk}"), (size, text)
            status_file = disk / "run" / "status.json"
            state = (
                json.loads(status_file.read_text())["state"] if status_file.is_file() else "none"
            )
            assert state in ("failed", "none"), (size, state)
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            status, _ = ended(forked(train.main, argv, log))
            assert status == 0 and weights(disk / "run") == weights(twin), log.read_text()
            said.append(f"{size}: {state}, one line, then the weights of one run")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
    return f"full disk: {'; '.join(said)}"


def main() -> None:
    """Run the proofs that are named, or all."""
    torch.set_num_threads(1)
    wanted = sys.argv[1:] or ["doubles", "faults", "foreign", "signals", "disk"]
    root = Path(tempfile.mkdtemp(prefix="harm-"))
    alone, seconds = single(root)
    proofs: dict[str, Callable[[], str]] = {
        "doubles": lambda: double_starts(root, alone, seconds),
        "faults": lambda: faults(root),
        "foreign": lambda: foreign_files(root, alone),
        "signals": lambda: signals(root, alone, seconds),
        "disk": lambda: full_disk(root, alone),
    }
    for name in wanted:
        print(proofs[name](), flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
