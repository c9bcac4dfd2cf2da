"""Ranks that train together are one process with the whole batch: losses, weights, state, refusals.

Cases run in processes that one server forks, by the command of training itself.
"""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rank_server import ranks_give
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
    words = words_of(data, case.objective, case.format, case.kind)
    more = [f"--optim.micro_tokens={case.tokens}", f"--model.recompute={case.recompute}"]
    return [*words, *more, f"--run.dir={run}"]


def steps_of(run: Path) -> list[dict]:
    """The logged steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def assert_same_run(run: Path, alone: Path, tol: float = 1e-6) -> None:
    """Counts are equal, losses and norms within `tol`, weights within 1e-4, and state is of the
    same parameters."""
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
    for name in ("step", "optimizer_steps", "target_updates", "best"):
        assert name == "best" or records[0][name] == records[1][name]
    tensors, true_tensors = (load_file(folder / "state.safetensors") for folder in (one, other))
    assert tensors.keys() == true_tensors.keys()
    for name, tensor in true_tensors.items():
        if name.startswith(("model.", "target.")):
            far = torch.linalg.vector_norm((tensors[name] - tensor).double())
            assert far <= 1e-4 * torch.linalg.vector_norm(tensor.double()), (name, float(far))


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
    assert len(alone) == STEPS and flat(together) == flat(alone)
    assert_same_run(tmp_path / "ranks", tmp_path / "alone")
