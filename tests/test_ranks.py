"""Ranks that train together are one process with the whole batch: losses, weights, state, refusals.

Cases run in processes that one server forks, by the command of training itself.
"""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.rank_server import ROOT, ranks_give, run_ranks
from tests.ranks_case import Case, words_of

pytestmark = pytest.mark.slow

TRAINED = "tests.ranks_case:trained"
STEPS = 20
FACTORS = {
    "world": (1, 2, 4),
    "tokens": (200, 400, 4096),
    "objective": ("mask", "horizon", "codes", "curriculum"),
    "format": ("text", "codes"),
    "kind": ("whole", "merged", "tracked"),
    "recompute": ("none", "mlp", "full"),
}
CASES = [
    Case(1, 200, "mask", "text", "whole", "none"),
    Case(1, 200, "horizon", "text", "tracked", "none"),
    Case(1, 400, "horizon", "codes", "merged", "mlp"),
    Case(1, 400, "codes", "text", "tracked", "none"),
    Case(1, 4096, "codes", "text", "merged", "none"),
    Case(1, 4096, "curriculum", "text", "whole", "full"),
    Case(2, 200, "codes", "text", "whole", "mlp"),
    Case(2, 400, "curriculum", "codes", "tracked", "none"),
    Case(2, 400, "mask", "text", "merged", "full"),
    Case(2, 4096, "horizon", "text", "tracked", "full"),
    Case(4, 200, "codes", "codes", "whole", "full"),
    Case(4, 200, "curriculum", "text", "merged", "mlp"),
    Case(4, 400, "horizon", "text", "whole", "none"),
    Case(4, 4096, "mask", "codes", "tracked", "mlp"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A cohort, prepared, and a backbone for each format."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks_give(0, "tests.ranks_case:make_data", timeout=120, folder=str(folder))
    return folder


def words_for(data: Path, case: Case, run: Path) -> list[str]:
    # a group of one rank has the bits of no group, for which a quarter of the steps is enough
    objective = case.objective if case.world > 1 else f"{case.objective}-brief"
    words = words_of(data, objective, case.format, case.kind)
    more = [f"--optim.micro_tokens={case.tokens}", f"--model.recompute={case.recompute}"]
    return [*words, *more, f"--run.dir={run}"]


def steps_of(run: Path) -> list[dict]:
    """The logged steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def assert_same_run(run: Path, alone: Path, tol: float = 1e-6) -> None:
    """Counts are equal, losses and norms within `tol`, weights within a hundred of it, and state
    is of the same parameters."""
    steps, expected = steps_of(run), steps_of(alone)
    assert [s["step"] for s in steps] == [s["step"] for s in expected]
    for found, true in zip(steps, expected, strict=True):
        for name in ("step", "phase", "lr", "masked", "labels", "pairs"):
            assert found[name] == true[name], (name, found["step"])
        for name in ("sft", "jepa", "codes", "grad_norm"):
            far = abs(found[name] - true[name]) if true[name] is not None else 0.0
            assert far <= tol * abs(true[name] or 0.0), (name, found["step"], far, true[name])
    last = sorted(path.name for path in (alone / "checkpoints").iterdir())[-1]
    one, other = (r / "checkpoints" / last for r in (run, alone))
    records = [json.loads((folder / "record.json").read_text()) for folder in (one, other)]
    for name in ("step", "optimizer_steps", "target_updates"):
        assert records[0][name] == records[1][name]
    tensors, true_tensors = (load_file(folder / "state.safetensors") for folder in (one, other))
    assert tensors.keys() == true_tensors.keys()
    for name, tensor in true_tensors.items():
        # moments are squares of gradients; what truncation lost is a sum of squares near rounding
        if name.startswith(("model.", "target.")) and not name.endswith((".lost", ".discarded")):
            far = torch.linalg.vector_norm((tensors[name] - tensor).double())
            assert far <= 100 * tol * torch.linalg.vector_norm(tensor.double()), (name, float(far))


def flat(steps: list[list[list[str]]]) -> list[list[str]]:
    """The windows of each step, however they share micro-batches."""
    return [sorted(window for micro in step for window in micro) for step in steps]


def test_the_cases_hold_every_pair_of_factors():
    assert len(CASES) <= 16
    for one, other in combinations(FACTORS, 2):
        pairs = {(a, b) for a in FACTORS[one] for b in FACTORS[other]}
        assert pairs == {(getattr(c, one), getattr(c, other)) for c in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_train_as_one_process(case, data, tmp_path):
    alone = ranks_give(0, TRAINED, words=words_for(data, case, tmp_path / "alone"))[0]
    ranks = ranks_give(case.world, TRAINED, words=words_for(data, case, tmp_path / "ranks"))
    together = [[micro for own in step for micro in own] for step in zip(*ranks, strict=True)]
    assert len(alone) == STEPS if case.world > 1 else len(alone) >= STEPS // 5
    assert flat(together) == flat(alone)
    assert_same_run(tmp_path / "ranks", tmp_path / "alone", tol=1e-6 if case.world > 1 else 0.0)


def test_ranks_without_a_window_take_part(data, tmp_path):
    """Of the few windows with a cut, each step has all, and they are fewer than ranks."""
    words = [*words_of(data, "sparse", "text", "whole"), "--optim.micro_tokens=4096"]
    alone = ranks_give(0, TRAINED, words=[*words, f"--run.dir={tmp_path / 'alone'}"])[0]
    ranks = ranks_give(4, TRAINED, words=[*words, f"--run.dir={tmp_path / 'ranks'}"])
    assert 0 < len(alone[-1][0]) < 4
    assert [len(own[0]) for own in ranks] == [1] * 4
    assert [len(own[-1]) for own in ranks] == [1] * len(alone[-1][0]) + [0] * (
        4 - len(alone[-1][0])
    )
    assert_same_run(tmp_path / "ranks", tmp_path / "alone")


def test_all_ranks_plan_with_the_least_that_fits(data, tmp_path):
    words = words_of(data, "first", "text", "whole")
    words += [f"--run.dir={tmp_path / 'ranks'}", "--optim.micro_tokens=auto"]
    ranks = ranks_give(2, TRAINED, words=words, micro_tokens=[4096, 200])
    assert [len(own[0]) for own in ranks] == [3, 3]
    record = json.loads((tmp_path / "ranks/checkpoints/step-000002/record.json").read_text())
    assert record["micro_tokens"] == 200


UNLIKE: dict[str, tuple[dict[str, Any], str]] = {
    "shards": ({"more": ["--data.prepared={data}/shards-text-lora"]}, "the same token shards"),
    "settings": ({"more": ["--optim.clip=2"]}, "the same settings"),
    "plan": ({"seed": 1}, "planned a step otherwise"),
    "weights": ({"moved": True}, "no longer those of rank 0"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_what_ranks_have_otherwise_is_named(what, data, tmp_path):
    unlike, message = UNLIKE[what]
    if "more" in unlike:
        unlike = {"more": [word.format(data=data) for word in unlike["more"]]}
    words = [*words_of(data, "first", "text", "whole"), f"--run.dir={tmp_path}"]
    outcomes = run_ranks(2, TRAINED, words=words, on=1, **unlike)
    assert all(message in (outcome.error or "") for outcome in outcomes), outcomes
    assert not (tmp_path / "checkpoints").exists()


def test_fewer_windows_than_ranks_and_data_not_prepared_are_refused(data, tmp_path):
    words = [*words_of(data, "first", "text", "whole"), f"--run.dir={tmp_path / 'run'}"]
    for more, message in (
        ("--optim.batch=1", "optim.batch must be at least 2"),
        (f"--data.prepared={tmp_path / 'none'}", "python -m smbfast.prepare --path="),
    ):
        outcomes = run_ranks(2, TRAINED, words=[*words, more])
        assert message in (outcomes[0].error or "") and outcomes[1].error, outcomes
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_that_cannot_be_written_ends_all_ranks_behind_the_next_step(data, tmp_path):
    """Also where a forward gathers layers, in which no rank must wait for one that has ended."""
    words = [*words_of(data, "first", "text", "tracked"), f"--run.dir={tmp_path}"]
    words += ["--model.fsdp=true", "--phases.0.steps=9", "--run.save_every=3"]
    ends = run_ranks(2, TRAINED, words=words, on=0, lost=6)
    assert "No space left on device" in (ends[0].error or ""), ends
    assert "SystemExit: 1" in (ends[1].error or ""), ends
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 3)


def test_torchrun_itself(data, tmp_path):
    """The one real launch: one voice, one log, and a command that goes on as it began."""
    words = [*words_of(data, "first", "text", "whole"), f"--run.dir={tmp_path}"]
    launcher = ["--standalone", "--nproc-per-node=2", "-m", "smbfast.train"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *launcher, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [done.stdout.count(f"step {n}/2") for n in (1, 2)] == [1, 1]
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["state"] == "done"
    assert status["command"].startswith(f"torchrun {' '.join(launcher)} {words[0]} ")


def test_a_rank_that_hangs_or_dies_is_named():
    """As otherwise a test of ranks could wait for ever, or pass without one."""
    hung = run_ranks(2, "tests.ranks_case:waits", timeout=1.0, on=1)
    assert [o.error for o in hung] == ["no answer within 1 s"] * 2 and "in waits" in hung[0].printed
    died = run_ranks(2, "tests.ranks_case:waits", on=1, killed=True)
    assert died[1].error == "killed by signal 9" and "Connection" in (died[0].error or "")
