"""Kills and signals: of ranks, of a command on its way out, of a job that Slurm queues again."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smbfast.base.entry import RunFailed, entry
from smbfast.run.folder import write_end, write_status
from smbfast.run.ranks import Ranks, joined
from smbfast.settings import load
from tests.rank_server import run_ranks

ROOT = Path(__file__).resolve().parents[1]
# plays torchrun: starts one rank, and returns 1 however that has ended
TORCHRUN = """#!/bin/bash
echo "$*" >> "$FAKE_SLURM/launched"
bash "$FAKE_SLURM/rank" smbfast.train &
wait $!
"""
# plays a rank, which does what its line of `plan` says
RANK = """
read -r what step < <(sed -n "$((SLURM_RESTART_COUNT + 1))p" "$FAKE_SLURM/plan")
state() {
  printf '{\\n "state": "%s",\\n "step": %s,\\n "command": "c"\\n}' "$1" "$step" > "$RUN/new"
  mv "$RUN/new" "$RUN/status.json"
}
case $what in refused) exit 1 ;; over) exit 0 ;; esac
mkdir -p "$RUN"
if [ "$what" = loads ]; then trap 'exit 75' TERM; else state running; fi
case $what in
  saves) trap 'state preempted; exit 75' TERM ;;
  done) state done; exit 0 ;;
  lingers) state done ;;
  failed) state failed; exit 1 ;;
  stopped) state preempted; exit 75 ;;
  dies) kill -KILL $$ ;;
esac
touch "$FAKE_SLURM/ready"
while :; do sleep 0.02; done
"""
PYTHON = """#!/bin/bash
echo "$*" >> "$FAKE_SLURM/launched"
trap 'exit 1' USR1
if [ "$SLURM_RESTART_COUNT" = 1 ]; then exit 0; fi
touch "$FAKE_SLURM/ready"
while :; do sleep 0.02; done
"""


def queued(tmp_path: Path, script: str, words: list[str], turns: list[str], **more: str):
    """Run a batch script of examples/slurm in the fake queue, with programs that play ours."""
    for name, text in (("torchrun", TORCHRUN), ("rank", RANK), ("python", PYTHON)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o700)
    (tmp_path / "turns").write_text("".join(f"{t}\n" for t in turns))
    path = f"{tmp_path}:{ROOT / 'tests' / 'slurm'}:{os.environ['PATH']}"
    environment = {"PATH": path, "FAKE_SLURM": str(tmp_path), "RUN": str(tmp_path / "run"), **more}
    command = ["sbatch", "--time=1", str(ROOT / "examples" / "slurm" / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "processes left" not in done.stdout, done.stdout
    launched = (tmp_path / "launched").read_text().splitlines() if words else []
    return done, launched


@pytest.mark.parametrize(
    ("plan", "status", "said"),
    [
        # the limit is near: all is saved and it goes on, also when it was still loading
        (["saves 3", "loads 3", "saves 5", "done 9"], 0, ""),
        (["dies 3", "done 9"], 0, ""),  # nobody was left to write how it ended
        (["saves 3", "failed 3", "done 9"], 1, "has failed"),
        (["stopped 3", "done 9"], 1, "was stopped"),  # by scancel, not by the limit
        (["refused 0", "done 9"], 1, "ended at its start"),
        (["saves 3", "refused 3", "done 9"], 1, "ended at its start"),
        (["saves 0", "saves 0", "saves 0", "saves 0", "done 9"], 1, "2 turns without a step"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_status_decides_whether_a_job_is_queued_again(plan, status, said, tmp_path: Path):
    (tmp_path / "plan").write_text("".join(f"{p}\n" for p in plan))
    turns = ["USR1 ready"] * (len(plan) - 1)
    words = ["lora", f"--run.dir={tmp_path / 'run'}", "--data.path=a b"]
    done, launched = queued(tmp_path, "train.sbatch", words, turns, TURNS="2", RANKS="4")
    assert done.returncode == status and said in done.stderr, (done.stdout, done.stderr)
    expected = {"failed": 2, "was stopped": 1, "2 turns": 3, "": len(plan)}
    ends = [n for key, n in expected.items() if key and key in said] or [expected[""]]
    if said != "ended at its start":
        assert len(launched) == ends[0], done.stdout
    assert len(launched) == len(set(launched))  # each turn has a rendezvous of its own
    assert launched[0].startswith("--nnodes=1 --nproc-per-node=4 --rdzv-backend=c10d")
    assert launched[0].endswith(f"-m smbfast.train {' '.join(words)}")
    assert not list(tmp_path.glob("run.turns"))


def test_a_job_whose_node_died_when_the_run_was_done_ends_with_0(tmp_path: Path):
    (tmp_path / "plan").write_text("lingers 9\nover 9\n")
    done, launched = queued(
        tmp_path, "train.sbatch", ["lora", f"--run.dir={tmp_path / 'run'}"], ["KILL ready"]
    )
    assert done.returncode == 0 and len(launched) == 2, (done.stdout, done.stderr)


def test_a_job_without_its_folder_is_refused(tmp_path: Path):
    done, _ = queued(tmp_path, "train.sbatch", [], [])
    assert done.returncode == 2 and "--run.dir=FOLDER" in done.stderr


@pytest.mark.parametrize("name", ["prepare", "embed"])
def test_a_task_of_an_array_goes_on_after_its_limit(name: str, tmp_path: Path):
    done, launched = queued(tmp_path, f"{name}.sbatch", ["--out=a b"], ["USR1 ready"])
    assert done.returncode == 0 and len(launched) == 2, (done.stdout, done.stderr)
    assert launched[0].startswith(f"-m smbfast.{name} --out=a b")


def test_an_error_is_written_although_torchrun_ends_the_rank_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys
):
    states: list[str] = []

    def on_end(state: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 0.01)
        states.append(state)

    for error in (RunFailed("another rank has ended"), OSError(28, "No space left on device")):
        with pytest.raises(SystemExit, match=r"^smbfast.name: "):
            with entry("smbfast.name", status=75, on_end=on_end):
                raise error
    assert states == ["failed", "failed"]


def stepping(run: str, dies: int) -> str:
    """Sum gradients in this rank until rank `dies` is killed; return what the command says."""
    settings, parameter = load("tiny", [f"--run.dir={run}"]), nn.Parameter(torch.zeros(3))
    try:
        with entry("smbfast.name"), joined() as ranks:
            ranks.decide(lambda: write_status(Path(run), "running", 7, "the command"))
            with entry("smbfast.name", on_end=partial(write_end, settings)):
                for step in range(100):
                    if step == 3 and ranks.rank == dies:
                        os.kill(os.getpid(), signal.SIGKILL)
                    parameter.grad = torch.ones(3)
                    ranks.summed([parameter], torch.zeros(2), False, bytes(8))
    except SystemExit as stop:
        return str(stop.code)
    return ""


@pytest.mark.parametrize("dies", [0, 1])
def test_the_rank_that_is_left_writes_that_the_run_has_failed(dies: int, tmp_path: Path):
    case = {"run": str(tmp_path), "dies": dies}
    ends = run_ranks(2, "tests.test_ranks_signals:stepping", timeout=60, **case)
    assert ends[dies].error == "killed by signal 9"
    assert f"smbfast.name: rank {dies} has ended" in ends[1 - dies].value, ends
    assert ends[1 - dies].value.startswith("rank 1: ") == (dies == 0)
    status = json.loads((tmp_path / "status.json").read_text())
    assert status.items() >= {"state": "failed", "step": 7, "command": "the command"}.items()


def left(run: str, how: str) -> str:
    """End rank 1 by a signal, then rank 0 by the TERM that torchrun sends it for that."""
    settings = load("tiny", [f"--run.dir={run}"])
    end = partial(write_end, settings)
    try:
        with entry("smbfast.name", status=75), joined() as ranks:
            ranks.decide(lambda: write_status(Path(run), "running", 7, "the command"))
            with entry("smbfast.name", status=75, on_end=end), ranks.loss_is_failure():
                if ranks.is_main:
                    with suppress(RunFailed):
                        ranks.least(0)  # until the other one is gone
                os.kill(os.getpid(), signal.SIGTERM if ranks.is_main else signal.Signals[how])
                signal.pause()
    except SystemExit as stop:
        return str(stop.code)
    return ""


@pytest.mark.parametrize(
    ("how", "said", "state"),
    [
        ("SIGKILL", "smbfast.name: rank 1 has ended", "failed"),
        ("SIGTERM", "75", "preempted"),
    ],
)
def test_a_rank_tells_the_end_of_all_from_the_death_of_one(how, said, state, tmp_path: Path):
    ends = run_ranks(2, "tests.test_ranks_signals:left", timeout=60, run=str(tmp_path), how=how)
    assert ends[0].value is not None and ends[0].value.startswith(said), ends
    assert json.loads((tmp_path / "status.json").read_text())["state"] == state


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (RuntimeError("[x/gloo/transport/tcp/pair.cc:1] Timed out"), RunFailed, "none of them has"),
        (torch.OutOfMemoryError("out of memory"), torch.OutOfMemoryError, "out of memory"),
        (RuntimeError("shapes differ"), RuntimeError, "shapes differ"),
    ],
)
def test_an_error_of_a_message_is_no_death(error, kind, said, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ranks, "_is_gone", lambda *_: False)
    monkeypatch.setattr(dist, "all_gather", partial(raised, error))
    with pytest.raises(kind, match=said) as seen:
        Ranks(0, 2).least(1)
    assert type(seen.value) is kind


def raised(error: Exception, *_words: object) -> None:
    raise error
