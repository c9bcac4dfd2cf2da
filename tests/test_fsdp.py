"""A backbone that ranks share gives what one process gives, and no rank waits for another.

Tolerances: a gradient is a sum of a few hundred terms in fp32, which ranks and micro-batches sum in
another order. Each order differs by some roundings of 6e-8; the largest difference that was seen
was 8e-7 of a single gradient after three steps, and 2e-7 of a loss.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from smbfast.run.folder import compared_settings, settings_of_ranks
from smbfast.settings import TrainSettings
from tests.fsdp_case import PHASE
from tests.rank_server import ranks_give, run_ranks
from tests.tiny import tiny_lm

CASES, STEPS = "tests.fsdp_case", 3
HANGS = 60.0  # seconds: a case takes two, and a rank that waits for a forward waits for hours


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A backbone whose head is its own, so that new tokens have rows in both tables."""
    folder = tmp_path_factory.mktemp("base")
    tiny_lm("qwen3", tie=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> tuple[Path, list]:
    """The steps of one process, without recomputing."""
    out = tmp_path_factory.mktemp("alone") / "steps"
    return out, ranks_give(0, f"{CASES}:steps", base=str(base), out=str(out), recompute="none")[0]


@pytest.mark.parametrize("world", [2, 4])
def test_first_weights_are_those_of_one_process_and_parts_are_equal(base, tmp_path, world):
    """Bit for bit, with rows of tokens new to the backbone; nothing that is trained is shared."""
    ranks_give(0, f"{CASES}:start", base=str(base), out=str(tmp_path / "alone"))
    parts = ranks_give(world, f"{CASES}:start", base=str(base), out=str(tmp_path / "shared"))
    alone, shared = (load_file(tmp_path / f"{n}.safetensors") for n in ("alone", "shared"))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(shared[n], alone[n]) for n in alone)
    assert all(part["shared"] and not part["trained"] for part in parts)
    assert [part["held"] for part in parts] == [parts[0]["frozen"] // world] * world


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("recompute", ["none", "mlp", "full"])
def test_steps_are_those_of_one_process(base, alone, tmp_path, world, recompute):
    """Rows that no number of ranks divides; then what evaluations and the self-check compute."""
    true_out, true = alone
    out = tmp_path / "shared"
    given = ranks_give(world, f"{CASES}:steps", base=str(base), out=str(out), recompute=recompute)
    numbers = [[step[2] for step in rank[:STEPS]] for rank in given]
    assert numbers == [numbers[0]] * world and numbers[0][0] < true[0][2]
    for number in range(STEPS):
        losses, norm, _ = given[0][number]
        assert losses == pytest.approx(true[number][0], rel=1e-6)
        assert norm == pytest.approx(true[number][1], rel=1e-6)
        found, expected = (load_file(f"{o}-{number}.safetensors") for o in (out, true_out))
        assert found.keys() == expected.keys()
        for name, grad in expected.items():
            assert float((found[name] - grad).norm() / grad.norm()) < 2e-6, name
    assert given[0][STEPS] == pytest.approx(true[STEPS], rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("horizons", [0, 2])
@pytest.mark.parametrize("world", [2, 4])
def test_no_rank_waits_for_one_without_rows_or_without_masks(base, world, horizons):
    words = {"base": str(base), "horizons": horizons}
    true = ranks_give(0, f"{CASES}:uneven", **words)[0]
    for losses, norms, sizes in ranks_give(world, f"{CASES}:uneven", timeout=HANGS, **words):
        assert losses == pytest.approx(true[0], rel=1e-6)
        assert [n is None for n in norms] == [n is None for n in true[1]]
        assert [n or 0.0 for n in norms] == pytest.approx([n or 0.0 for n in true[1]], rel=2e-6)
        assert sizes == true[2]


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_dies_while_layers_are_gathered_is_named(base, dies):
    ends = run_ranks(2, f"{CASES}:gathering", base=str(base), dies=dies, timeout=HANGS)
    assert ends[dies].error == "killed by signal 9"
    assert ends[1 - dies].value.startswith(f"rank {dies} has ended"), ends


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        ({"model": {"fsdp": True}}, "LoRA (model.path"),
        ({"objective": {"target_form": "merged"}}, "objective.target_form=tracked"),
        ({"objective": {"path": "reference"}}, "objective.path=shared"),
        ({"run": {"export": "merged"}}, "run.export=none"),
    ],
)
def test_settings_that_ranks_cannot_share_are_refused(words, way_out):
    values = {"model": {"path": "x", "fsdp": True}, "phases": [PHASE], "preset": "x"} | words
    with pytest.raises(ValueError, match=re.escape(way_out)):
        TrainSettings.model_validate(values)


@pytest.mark.parametrize(
    "unlike",
    [{"model": {"path": "x", "fsdp": False}}, {"eval": {"nodes": 7}}, {"probe": {"tokens": 999}}],
)
def test_what_would_leave_ranks_waiting_is_compared(unlike):
    """A run may resume with it changed, but all ranks must have it alike."""
    values = {"model": {"path": "x", "fsdp": True}, "phases": [PHASE], "preset": "x"}
    settings, other = (TrainSettings.model_validate(v) for v in (values, values | unlike))
    assert compared_settings(settings) == compared_settings(other)
    assert settings_of_ranks(settings) != settings_of_ranks(other)
    moved = TrainSettings.model_validate(values | {"run": {"threads": 3, "dir": "elsewhere"}})
    assert settings_of_ranks(settings) == settings_of_ranks(moved)


def test_without_torchrun_it_is_refused(base):
    words = {"base": str(base), "out": "", "fsdp": True}
    (outcome,) = run_ranks(0, f"{CASES}:start", **words)
    assert "torchrun --nproc-per-node=2" in (outcome.error or "")


@pytest.mark.parametrize("what", ["quantised", "family", "missing", "shape"])
def test_a_backbone_that_cannot_be_shared_is_refused_by_every_rank(base, tmp_path, what):
    folder = tmp_path / "base"
    expected = {
        "quantised": "quantised",
        "family": "qwen3, got gpt2",
        "missing": "model.layers.1.mlp.up_proj.weight",
        "shape": "got one of [24, 8]",
    }[what]
    if what == "family":
        config = GPT2Config(vocab_size=61, n_positions=128, n_embd=16, n_layer=1, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(folder)
    else:
        lm = tiny_lm("qwen3", tie=False)
        state = lm.state_dict()
        name = "model.layers.1.mlp.up_proj.weight"
        weight = state.pop(name)
        if what != "missing":
            state[name] = weight[:, :8].contiguous() if what == "shape" else weight
        if what == "quantised":
            lm.config.quantization_config = {"quant_method": "fp8"}
        lm.config.save_pretrained(folder)
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    outcomes = run_ranks(2, f"{CASES}:start", base=str(folder), out="", timeout=HANGS)
    assert all(expected in (o.error or "") for o in outcomes), outcomes
