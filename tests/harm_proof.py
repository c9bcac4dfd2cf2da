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
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

from smbfast import check, embed, prepare, probe, report, simulate, train
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
DOUBLES, PATIENCE = 30, 2.0  # starts; seconds
Command = Callable[[list[str]], None]


def forked(command: Command, argv: list[str], log: Path) -> int:
    """Run a command in a forked process, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    with suppress(BaseException), log.open("w") as out, redirect_stdout(out), redirect_stderr(out):
        try:
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
    wanted = sys.argv[1:] or ["doubles", "foreign", "disk"]
    root = Path(tempfile.mkdtemp(prefix="harm-"))
    alone, seconds = single(root)
    proofs: dict[str, Callable[[], str]] = {
        "doubles": lambda: double_starts(root, alone, seconds),
        "foreign": lambda: foreign_files(root, alone),
        "disk": lambda: full_disk(root, alone),
    }
    for name in wanted:
        print(proofs[name](), flush=True)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
