"""Before the first step: how many tokens a forward may have, and whether the shared forward
computes what the reference does.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smbfast import objective, reference
from smbfast.batch import PackedBatch
from smbfast.data.loader import Step, WindowSet, make_batch, step_windows
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import (
    MOST,
    choose_micro_tokens,
    free_memory,
    full_batch,
    predict_peak,
)
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.objective import Losses
from smbfast.run.step import LossScales, backward
from smbfast.settings import PhaseSettings, TrainSettings

MOST_ON_CPU = 4096  # tokens: as far as what a CPU needs was compared with its prediction
SLICE = 1024  # tokens of the windows that are compared: our choice
_MISMATCH = "the shared forward and the reference differ on this model"
# relative, of the losses, of all gradients together, of any one. Right models were within 3e-7 and
# 2e-6 in fp32; in bf16, 24 of 4 layers, within 9e-4 and 8e-2 for any one, which grows with depth
TOLERANCE = {torch.float32: (1e-4, 1e-3, 5e-3), torch.bfloat16: (2e-2, 1e-1, 5e-1)}


def losses_of(settings: TrainSettings) -> Losses:
    """The objective on the path that the settings name."""
    normalize = settings.objective.target_norm == "layer"
    if settings.objective.path == "reference":
        return partial(reference.losses, normalize=normalize)
    return partial(objective.losses, normalize=normalize, recompute=settings.model.recompute)


def checks_itself(settings: TrainSettings) -> bool:
    """Whether `self_check` is made before each phase: there is a shared forward to check."""
    return settings.objective.self_check and settings.objective.path == "shared"


def refuse_empty(step: Step, phase: PhaseSettings) -> None:
    """Raise a ValueError for a step that has nothing to predict."""
    if phase.w_sft == 0 and step.num_masked == 0:
        raise ValueError(
            f"step {step.index + 1} has no masked position and phase `{phase.name}` no SFT: "
            "raise data.window or optim.batch, or lower objective.min_future"
        )


def micro_tokens(
    settings: TrainSettings, encoder: PatientEncoder, before: int | None = None
) -> tuple[int, int]:
    """Tokens of a forward, and the peak memory in bytes that is predicted for a step.

    The tokens are those of the settings, or those that this run had `before`, or as many as fit;
    on the reference path, which takes any backbone, a fixed number, and nothing is predicted (0).

    Raises:
        ValueError: not even the largest window fits.
    """
    chosen = settings.optim.micro_tokens
    if chosen == "auto" and before:
        chosen = before
    if settings.objective.path == "reference":
        return (MOST_ON_CPU if chosen == "auto" else chosen), 0
    device = encoder.mask_vector.device
    free = free_memory(device)
    held = sum(t.numel() * t.element_size() for t in encoder.parameters())
    phases = settings.phases
    sft, jepa = any(p.w_sft > 0 for p in phases), any(p.w_jepa > 0 for p in phases)
    form = settings.objective
    target = TargetForm.of(form) if jepa else None
    run = partial(losses_of(settings), sft_scale=float(sft), jepa_scale=float(jepa))

    @cache
    def needs(tokens: int) -> int:
        batch = full_batch(tokens, settings.data.window, form, sft=sft, jepa=jepa)
        return predict_peak(encoder, batch, run, target=target).total - held

    window = settings.data.window
    future = min(round((1 - form.context[0]) * window), form.horizon or window)
    largest = window + jepa * form.cuts * future  # has a row of its own if it must
    if chosen != "auto":
        return chosen, needs(max(chosen, largest)) + held
    most = MOST_ON_CPU if device.type == "cpu" else MOST
    chosen = choose_micro_tokens(needs, free, least=largest, most=most)
    return chosen, needs(chosen) + held


def self_check(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    windows: WindowSet,
    settings: TrainSettings,
    step: int,
    phase: PhaseSettings,
) -> dict[str, float]:
    """Compare losses and every gradient of the shared forward with the reference's.

    On the shortest windows of the step that have something to predict, up to `SLICE` tokens (one
    at least). Returns the relative differences, nothing where nothing is predicted; the encoder has
    no gradients afterwards.

    Raises:
        ValueError: they are larger than rounding explains.
    """
    batch = _slice(windows, settings, step, phase).to(encoder.mask_vector.device)
    if not (batch.num_labels or batch.num_masked):
        return {}
    scales = LossScales.of(phase.w_sft, phase.w_jepa, batch.num_labels, batch.num_masked)
    normalize = settings.objective.target_norm == "layer"
    results = []
    for path in (partial(reference.losses, normalize=normalize), losses_of(settings)):
        values = path(encoder, target, batch, **scales._asdict())
        backward(values)
        gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        results.append((values, gradients))
        encoder.zero_grad(set_to_none=True)
    (expected, true), (values, own) = results
    differences = _differences(values, expected, own, true)
    allowed = TOLERANCE.get(layer_dtype(encoder), TOLERANCE[torch.float32])
    gaps = (differences.loss, differences.gradients, differences.gradient)
    if not all(gap <= most for gap, most in zip(gaps, allowed, strict=True)):  # NaN fails
        texts = [f"{gap:.1e} (allowed {most:.0e})" for gap, most in zip(gaps, allowed, strict=True)]
        raise ValueError(
            f"{_MISMATCH}: losses by {texts[0]}, all gradients by {texts[1]}, the gradient of "
            f"{differences.worst} by {texts[2]}. Try --kernels=torch to find the kernel, "
            "--objective.path=reference to train without the shared forward, or "
            "--objective.self_check=false to go on all the same"
        )
    return dict(zip(("loss", "gradients", "gradient"), gaps, strict=True))


class _Differences(NamedTuple):
    """Relative: of the losses, of all gradients together, of the worst single one, and its name."""

    loss: float
    gradients: float
    gradient: float
    worst: str


def _differences(
    values: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    own: dict[str, Tensor],
    true: dict[str, Tensor],
) -> _Differences:
    """Of losses and gradients from the reference's."""
    if [v is None for v in values] != [v is None for v in expected]:
        raise ValueError(f"{_MISMATCH}: only one of them has a loss of each kind")
    if true.keys() != own.keys():
        names = ", ".join(sorted(true.keys() ^ own.keys())[:3])
        raise ValueError(f"{_MISMATCH}: only one of them has a gradient of {names}")
    pairs = [(v.item(), e.item()) for v, e in zip(values, expected, strict=True) if v is not None]
    loss = float(torch.tensor([abs(v - e) / max(abs(e), 1e-12) for v, e in pairs] or [0.0]).max())
    size = {n: float(g.norm()) for n, g in true.items()}
    gap = {n: float((own[n] - g).norm()) for n, g in true.items()}
    norm = math.hypot(*size.values())
    # a gradient that hardly counts may be all rounding
    relative = {n: gap[n] / max(size[n] + 1e-3 * norm, 1e-30) for n in true}
    worst = max(relative, key=lambda n: math.inf if math.isnan(relative[n]) else relative[n])
    total = math.hypot(*gap.values()) / max(norm, 1e-30)
    return _Differences(loss, total, relative[worst], worst)


def layer_dtype(encoder: PatientEncoder) -> torch.dtype:
    """The dtype that the layers compute in."""
    return next(encoder.decoder.parameters()).dtype


def _slice(
    windows: WindowSet, settings: TrainSettings, step: int, phase: PhaseSettings
) -> PackedBatch:
    seed, form = settings.run.seed, settings.objective
    order = step_windows(len(windows), settings.optim.batch, seed, step)
    sft, jepa = phase.w_sft > 0, phase.w_jepa > 0
    ones = [
        (window, make_batch([window], form, seed, step, sft=sft, jepa=jepa))
        for window in sorted((windows[i] for i in order), key=len)
    ]
    # without a cut anywhere there is still SFT to compare
    ones = [o for o in ones if o[1].num_masked] or [o for o in ones if o[1].num_labels]
    ends = np.cumsum([one.segments.tokens for _, one in ones])
    chosen = [window for window, _ in ones[: int(np.searchsorted(ends, SLICE)) + 1]]
    return make_batch(chosen, form, seed, step, sft=sft, jepa=jepa)
