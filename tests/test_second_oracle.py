"""Training steps of the shared forward and of the reference, against `tests.second_oracle`."""

from functools import partial

import numpy as np
import pytest
import torch

from smbfast import objective, reference
from smbfast.data.loader import make_batch
from smbfast.data.masking import cut_points, future_end, masked_tokens
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.run.optim import make_optimizer
from smbfast.run.step import LossScales, Updater, forward_backward
from smbfast.settings import ObjectiveSettings, OptimSettings
from tests.second_oracle import AdamW, Oracle, Patient
from tests.tiny import random_window
from tests.two_paths import CASES, FP64, make_encoder, twin

WINDOWS = [random_window(s, buckets=b, start=f) for s, b, f in ((1, 6, 0), (2, 5, 3), (3, 7, 0))]
PATHS = {"shared": objective.losses, "reference": reference.losses}
WEIGHTS, LRS, TAUS = (0.7, 1.3), (1e-3, 2e-3, 5e-4), (0.9, 0.8, 0.5)


def patients_of(form: ObjectiveSettings, step: int) -> list[Patient]:
    """What the loader draws for the windows of a step, said once more for the oracle."""
    patients = []
    for window in WINDOWS:
        cuts = cut_points(window, form, 0, step)
        # demographics that are repeated in a later window were predicted in an earlier one
        first = window.header if window.start else 1
        first = cuts[0] if form.sft_labels == "future" else first
        masks = []
        for k, cut in enumerate(cuts):
            end, masked = (
                future_end(window, cut, form),
                masked_tokens(window, cut, form, 0, step, k),
            )
            replaced = masked
            if form.skeleton == "hidden":
                pairs = zip(window.line_start_L, window.line_end_L, strict=True)
                events = {p for start, stop in pairs for p in range(start, stop)}
                others = [p for p in range(cut, end) if p not in events]
                replaced = np.sort(np.append(masked, others))
            masks.append((end, masked, replaced.astype(np.int64)))
        patients.append(Patient(window.ids_T, np.arange(first, len(window)), masks))
    return patients


def decays(encoder: torch.nn.Module) -> dict[torch.nn.Parameter, float]:
    """0.01 for matrices that are trained whole."""
    return {
        p: 0.01 if p.ndim > 1 and "lora_" not in n and "trainable" not in n else 0.0
        for n, p in encoder.named_parameters()
        if p.requires_grad
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_three_steps_are_those_of_transformers_and_peft(kind, case, path):
    """Losses, gradient norms, every weight and the average, through three steps in fp64."""
    norm = case.tie
    labels = "all" if kind == "qwen3" else "future"
    form = ObjectiveSettings(
        min_future=4,
        cuts=2,
        sft_labels=labels,
        horizon=None if norm else 9,
        skeleton="hidden" if case.lora == norm else "visible",
    )
    encoder = make_encoder(kind, lora=case.lora, tie=case.tie, dtype=FP64)
    other = twin(encoder)
    # of full rank, so that a tracked average discards nothing
    target = TargetEncoder(encoder, TargetForm(case.form, rank=64, every=2))
    updater = Updater(make_optimizer(encoder, OptimSettings(clip=0.5)), clip=0.5)
    losses = partial(PATHS[path], normalize=norm)
    layers = [m for m in other.predictor if isinstance(m, torch.nn.Linear)]
    oracle = Oracle(other.lm, layers, other.mask_vector)
    adamw = AdamW(decays(other), (0.9, 0.95), clip=0.5)
    for step, (lr, tau) in enumerate(zip(LRS, TAUS, strict=True)):
        batch = make_batch(WINDOWS, form, 0, step, jepa=True)
        scales = LossScales.of(*WEIGHTS, batch.num_labels, batch.num_masked)
        summed = forward_backward(losses, encoder, target, [batch], scales)
        grad_norm = updater.step(lr, target, tau)
        total = oracle.loss(patients_of(form, step), *WEIGHTS, norm)
        total.backward()
        assert float(summed.sft + summed.jepa) == pytest.approx(float(total.detach()), rel=1e-11)
        assert float(grad_norm) == pytest.approx(adamw.step(lr), rel=1e-9)
        oracle.average(tau)
    for (name, own), theirs in zip(encoder.named_parameters(), other.parameters(), strict=True):
        # where a gradient is next to nothing AdamW makes a whole step of its rounding
        assert float((own - theirs).detach().norm()) <= 1e-8 * float(theirs.norm()), name
    teacher = dict(oracle.teacher.base_model.named_parameters())
    averages = target.exact()
    rows = averages.pop("token_rows", None)
    for name, average in averages.items():
        expected = teacher[name.replace(".base_layer", "")]
        assert float((average - expected).norm()) <= 1e-8 * float(expected.norm()), name
    if rows is not None:
        ids, _ = encoder.trained_rows()
        torch.testing.assert_close(rows, teacher["embed_tokens.weight"][ids], rtol=0, atol=1e-9)
