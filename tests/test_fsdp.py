"""A backbone that ranks share gives what one process gives, and no rank waits for another."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.rank_server import ranks_give
from tests.tiny import tiny_lm

CASES = "tests.fsdp_case"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A backbone of five layers' worth of uneven parts: 5 heads' rows divide by no number of ranks."""
    folder = tmp_path_factory.mktemp("base")
    tiny_lm("qwen3", tie=False).save_pretrained(folder)
    return folder


def gap(found: Path, true: Path) -> float:
    """The largest relative difference of a tensor, of tensors that must have the same names."""
    a, b = load_file(f"{found}.safetensors"), load_file(f"{true}.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).norm() / b[n].norm().clamp_min(1e-12)) for n in b)


@pytest.mark.parametrize("world", [2, 4])
def test_first_weights_are_those_of_one_process_and_parts_are_equal(base, tmp_path, world):
    """Bit for bit, tokens new to the backbone and their rows included."""
    ranks_give(0, f"{CASES}:start", base=str(base), out=str(tmp_path / "alone"))
    parts = ranks_give(world, f"{CASES}:start", base=str(base), out=str(tmp_path / "shared"))
    alone, shared = (load_file(tmp_path / f"{n}.safetensors") for n in ("alone", "shared"))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(shared[n], alone[n]) for n in alone)
    assert all(part["shared"] and not part["trained"] for part in parts)
    assert [part["held"] for part in parts] == [parts[0]["frozen"] // world] * world


@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_steps_are_those_of_one_process(base, tmp_path, recompute):
    given = {}
    for world in (0, 2, 4):
        out = {"out": str(tmp_path / str(world)), "recompute": recompute}
        values = ranks_give(world, f"{CASES}:steps", base=str(base), **out)
        given[world] = values[0]
        print(world, values[0])
    for world in (2, 4):
        for n in range(3): print(world, gap(tmp_path / f"{world}-{n}", tmp_path / f"0-{n}"))
