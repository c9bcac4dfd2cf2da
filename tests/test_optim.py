"""Schedules as functions of the step, and what AdamW decays."""

import math

import pytest

from smbfast.run.optim import learning_rate, make_optimizer, place, tau, total_steps
from smbfast.settings import OptimSettings, PhaseSettings, load
from tests.tiny import tiny_encoder

SETTINGS = load(
    "tiny", ["phases.0.steps=10", "phases.0.lr=1.0", "phases.0.warmup=4", "phases.1.steps=20"]
)


def rates():
    return [learning_rate(SETTINGS, place(SETTINGS, s)) for s in range(total_steps(SETTINGS))]


def test_warm_up_and_cosine_by_hand():
    first = rates()[:10]
    assert first[:4] == [0.25, 0.5, 0.75, 1.0]
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 5)) for i in range(6)]
    assert first[4:] == pytest.approx(expected)
    assert first[-1] == pytest.approx(0.1)


def test_every_phase_warms_up_again():
    assert total_steps(SETTINGS) == 30
    at = place(SETTINGS, 10)
    assert (at.phase_index, at.phase_step, at.begins_phase, at.phase.name) == (1, 0, True, "jepa")
    assert rates()[10] == pytest.approx(1e-3 / 2)  # default peak of a model trained whole
    assert max(rates()[10:]) == pytest.approx(1e-3)


def test_a_phase_of_one_step_is_its_peak():
    settings = load("tiny", ["phases.0.steps=1", "phases.0.lr=0.5"])
    assert learning_rate(settings, place(settings, 0)) == pytest.approx(0.5)


def test_tau_is_fixed_or_linear():
    assert {tau(SETTINGS, s) for s in range(30)} == {0.996}
    moving = load("tiny", ["objective.tau=0.9", "objective.tau_end=1.0"])
    values = [tau(moving, s) for s in range(total_steps(moving)) if place(moving, s).phase.w_jepa]
    expected = [0.9 + 0.1 * i / (len(values) - 1) for i in range(len(values))]
    assert values == pytest.approx(expected) and values[0] == 0.9


def test_tau_moves_at_steps_with_jepa_alone():
    """Two phases with JEPA, one without before, between and after them."""
    counts = [(3, 0.0), (4, 1.0), (5, 0.0), (2, 0.5), (1, 0.0)]
    phases = [
        PhaseSettings(name=f"p{i}", steps=steps, w_sft=1.0, w_jepa=w_jepa)
        for i, (steps, w_jepa) in enumerate(counts)
    ]
    moving = load("tiny", ["objective.tau=0.5", "objective.tau_end=1.0"])
    moving = moving.model_copy(update={"phases": phases})
    with_jepa = [3, 4, 5, 6, 12, 13]
    assert [tau(moving, s) for s in with_jepa] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    alone = load("tiny", ["objective.tau=0.5", "objective.tau_end=1.0", "phases.1.steps=1"])
    assert tau(alone, total_steps(alone) - 1) == 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_weight_decay_spares_lora_norms_biases_and_the_mask_vector(lora):
    encoder = tiny_encoder(lora=lora)
    optimizer = make_optimizer(encoder, OptimSettings(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in decay
            continue
        spared = any(
            k in name for k in ("lora_", "norm", "bias", "mask_vector", "trainable_tokens")
        )
        assert decay[id(parameter)] == (0.0 if spared else 0.5), name
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
