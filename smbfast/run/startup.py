"""Two things before the first step: the size of micro-batches, and the self-check.

The self-check compares the shared forward with the reference on the run's own model and data.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smbfast import objective, reference
from smbfast.base import terminal
from smbfast.batch import PackedBatch
from smbfast.data.loader import make_batch, step_windows
from smbfast.data.windows import WindowSet
from smbfast.model.backbone import PatientEncoder
from smbfast.model.memory import (
    MOST,
    Memory,
    checkpoint_bytes,
    choose_micro_tokens,
    free_memory,
    full_batch,
    predict_peak,
)
from smbfast.model.shapes import encoder_on_meta
from smbfast.model.sharding import gathered_bytes, held_bytes
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.objective import Losses
from smbfast.run.step import LossScales, backward
from smbfast.settings import PhaseSettings, TrainSettings
from smbfast.settings.training import Freeze

MOST_ON_CPU = 4096  # tokens: the prediction of a CPU's memory was compared up to here
SLICE = 1024  # tokens of the windows that the self-check compares: our choice
_MISMATCH = "the shared forward and the reference differ on this model"
# Largest relative difference of the losses, of all gradients together, and of any single gradient.
# Correct models differed by at most 3e-7 (losses) and 2e-6 (a gradient) in fp32. In bf16, 24 models
# of 4 layers differed by at most 9e-4 and 8e-2, and the latter grows with depth; 24 whose weights,
# all trained, are fp32, by at most 4e-4 and 3e-2.
# A loss and a gradient smaller than these are compared as if they were of this size: those of a
# model that knows all, or has died, are what rounding leaves of larger numbers. Our choice.
NO_LOSS, NO_GRADIENT = 1e-3, 1e-5
# What differs by less than so many times of what half a rounding of the weights changes in the
# reference itself is no fault of a kernel. Healthy models change by far less than is allowed.
BLUR = 8
FAR = 3.0  # times the SFT loss of a guess, from which a model has diverged: our choice
_GAPS = ("loss", "gradients", "gradient")
_Computed = tuple[Sequence[Tensor | None], dict[str, Tensor]]  # losses, and gradients by parameter
TOLERANCE = {torch.float32: (1e-4, 1e-3, 5e-3), torch.bfloat16: (2e-2, 1e-1, 5e-1)}


def losses_of(settings: TrainSettings) -> Losses:
    """Return the loss function of the path that the settings choose; its caller says what a phase
    freezes."""
    normalize = settings.objective.target_norm == "layer"
    if settings.objective.path == "reference":
        return partial(reference.losses, normalize=normalize)
    return partial(objective.losses, normalize=normalize, recompute=settings.model.recompute)


def checks_itself(settings: TrainSettings) -> bool:
    """Whether `self_check` runs before each phase, which needs the shared path."""
    return settings.objective.self_check and settings.objective.path == "shared"


def micro_tokens(
    settings: TrainSettings,
    encoder: PatientEncoder,
    earlier: int | None = None,
    num_horizons: int = 0,
) -> tuple[int, int]:
    """Return the tokens of a micro-batch, and the predicted peak memory of a step in bytes.

    The tokens are those of the settings; with `auto`, those of an earlier process of this run, or
    as many as fit. The reference path takes any backbone, so there `auto` is a fixed number and the
    peak is not predicted (0). On a CPU the copy of a checkpoint counts in it.

    Args:
        earlier: the tokens that the checkpoint of this run records.
        num_horizons: that positions are paired with; 0 if nothing is predicted within horizons.

    Raises:
        ValueError: if not even the largest window fits.
    """
    chosen = settings.optim.micro_tokens
    if chosen == "auto" and earlier:
        chosen = earlier
    if settings.objective.path == "reference":
        return (MOST_ON_CPU if chosen == "auto" else chosen), 0
    device = encoder.mask_vector.device
    held, whole = held_bytes(encoder), sum(t.nbytes for t in encoder.parameters())
    kinds = heaviest([Kind.of(phase) for phase in settings.phases])
    traced = _traced(settings, encoder, num_horizons)
    extra = gathered_bytes(encoder.decoder) - whole
    if device.type == "cpu":
        extra += copied_bytes(settings, encoder)

    @cache
    def needs(tokens: int) -> int:
        peaks = (peak_memory(settings, traced, k, tokens, num_horizons, device) for k in kinds)
        return max(peak.total for peak in peaks) + extra

    largest = largest_window(settings)  # forms a micro-batch alone if it must
    if chosen != "auto":
        return chosen, needs(max(chosen, largest)) + held
    most = MOST_ON_CPU if device.type == "cpu" else MOST
    chosen = choose_micro_tokens(needs, free_memory(device), least=largest, most=most)
    return chosen, needs(chosen) + held


def _traced(settings: TrainSettings, encoder: PatientEncoder, num_horizons: int) -> PatientEncoder:
    """Return an encoder to trace a step on: one that ranks share is a whole one, as shapes."""
    if not encoder.is_shared_out:
        return encoder
    rows, head = encoder.trained_rows(), encoder.codes
    return encoder_on_meta(
        settings,
        encoder.base.config,
        new_rows=len(rows[0]) if rows else 0,
        num_horizons=num_horizons,
        num_classes=head.class_KE.shape[0] if head else 0,
        device=encoder.mask_vector.device,
    )


def copied_bytes(settings: TrainSettings, encoder: PatientEncoder) -> int:
    """Return the bytes of the host in which the main rank holds a copy of a checkpoint."""
    has_target = any(phase.w_jepa > 0 for phase in settings.phases)
    return checkpoint_bytes(encoder, TargetForm.of(settings.objective) if has_target else None)


def largest_window(settings: TrainSettings) -> int:
    """Return the online tokens of the largest window with its branches."""
    form, window = settings.objective, settings.data.window
    future = min(round((1 - form.context[0]) * window), form.horizon or window)
    branches = form.jepa == "mask" and any(phase.w_jepa > 0 for phase in settings.phases)
    return window + branches * form.cuts * future


class Kind(NamedTuple):
    """What decides the memory of a phase's steps."""

    sft: bool
    jepa: bool
    codes: bool
    freeze: Freeze

    @classmethod
    def of(cls, phase: PhaseSettings) -> "Kind":
        return cls(phase.w_sft > 0, phase.w_jepa > 0, phase.w_codes > 0, phase.freeze)

    def within(self, other: "Kind") -> bool:
        """Whether `other` has all of these losses, and as many gradients."""
        has_all = all(o or not s for s, o in zip(self[:3], other[:3], strict=True))
        return has_all and other.freeze in ("none", self.freeze)


def peak_memory(
    settings: TrainSettings,
    encoder: PatientEncoder,
    kind: Kind,
    tokens: int,
    num_horizons: int,
    device: torch.device | None = None,
) -> Memory:
    """Return the memory at the peak of a step of such a phase.

    Args:
        device: that the step is traced on; None is that of the encoder.
    """
    form = settings.objective
    ahead = kind.codes or (kind.jepa and form.jepa == "horizon")
    batch = full_batch(
        tokens,
        settings.data.window,
        form,
        sft=kind.sft,
        jepa=kind.jepa,
        num_horizons=num_horizons if ahead else 0,
    )
    run = partial(
        losses_of(settings),
        sft_scale=float(kind.sft),
        jepa_scale=float(kind.jepa),
        codes_scale=float(kind.codes),
        freeze=kind.freeze,
    )
    target = TargetForm.of(form) if kind.jepa else None
    return predict_peak(encoder, batch, run, target=target, device=device)


def heaviest(kinds: list[Kind]) -> list[Kind]:
    """Return the kinds that are within no other, each once; a prediction takes a second."""
    kinds = list(dict.fromkeys(kinds))
    return [k for k in kinds if not any(k.within(o) for o in kinds if o != k)]


def self_check(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    windows: WindowSet,
    settings: TrainSettings,
    step: int,
    phase: PhaseSettings,
) -> dict[str, float]:
    """Compare losses and every gradient of the shared forward with those of the reference.

    It uses the shortest windows of the step that have something to predict, at least one and up to
    `SLICE` tokens. The encoder has no gradients afterwards.

    Returns:
        The relative differences; empty where nothing is predicted.

    Raises:
        ValueError: if they are larger than rounding explains (`TOLERANCE`, or `BLUR` of a model
            that magnifies it), or the reference's own losses or gradients are not finite.
    """
    batch = _slice(windows, settings, step, phase).to(encoder.mask_vector.device)
    if not (batch.num_labels or batch.num_masked or batch.num_pairs):
        return {}
    scales = LossScales.of_batch(phase, batch)._asdict()
    normalize = settings.objective.target_norm == "layer"

    def computed(path: Losses) -> _Computed:
        values = path(encoder, target, batch, freeze=phase.freeze, **scales)
        backward(values)
        gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
        encoder.zero_grad(set_to_none=True)
        return values, gradients

    judge = partial(reference.losses, normalize=normalize)
    truth = expected, expected_grads = computed(judge)
    for what, tensors in (("losses", expected), ("gradients", expected_grads.values())):
        if not all(math.isfinite(float(t.detach().norm())) for t in tensors if t is not None):
            raise ValueError(
                f"the {what} of the reference must be finite before step {step + 1}, the first of "
                f"phase {phase.name} here; they are not, so weights of "
                f"{settings.model.path or 'the model'} hold NaN, infinities or far too large "
                "numbers. Begin with others, or, if the steps before made them so, again in "
                "another --run.dir with a lower learning rate"
            )
    differences = _differences(computed(losses_of(settings)), truth)
    allowed = TOLERANCE.get(layer_dtype(encoder), TOLERANCE[torch.float32])
    if not _within(gaps := differences[:3], allowed):
        _require_trainable(encoder, expected[0], phase, step)
        with _nudged(encoder):
            blur = _differences(computed(judge), truth)[:3]
        blurred = [math.inf if math.isnan(b) else BLUR * b for b in blur]
        if _within(gaps, list(map(max, allowed, blurred))):
            terminal.warn(
                f"phase {phase.name}: rounding alone changes the gradients of this model by "
                f"{blur[2]:.1e}, so its forwards cannot be compared. It knows all that these "
                "records can teach it, or its weights have grown far too large: see its losses"
            )
            return dict(zip(_GAPS, gaps, strict=True))
        raise ValueError(_mismatch(gaps, allowed, differences.worst))
    return dict(zip(_GAPS, gaps, strict=True))


def _require_trainable(
    encoder: PatientEncoder, sft: Tensor | None, phase: PhaseSettings, step: int
) -> None:
    """Refuse a model that has diverged: there each rounding of a huge number is another gradient.

    Args:
        sft: the weighted loss of the reference.
    """
    guess = math.log(encoder.base.config.vocab_size)
    if sft is not None and sft.item() > FAR * phase.w_sft * guess:
        raise ValueError(
            f"the SFT loss before step {step + 1}, the first of phase {phase.name} here, must be "
            f"that of a model that can be trained; it is {sft.item() / phase.w_sft:.3g}, and a "
            f"guess has {guess:.3g}: weights are far too large. Begin with others, or, if the "
            "steps before made them so, again in another --run.dir with a lower learning rate"
        )


def _mismatch(gaps: Sequence[float], allowed: Sequence[float], worst: str) -> str:
    texts = [f"{gap:.1e} (allowed {most:.0e})" for gap, most in zip(gaps, allowed, strict=True)]
    return (
        f"{_MISMATCH}: losses by {texts[0]}, all gradients by {texts[1]}, the gradient of {worst} "
        f"by {texts[2]}. Try --kernels=torch to find the kernel, --objective.path=reference to "
        "train without the shared forward, or --objective.self_check=false to train anyway"
    )


def _within(gaps: Sequence[float], allowed: Sequence[float]) -> bool:
    """Whether no difference is larger than allowed; one that is not a number is."""
    return all(gap <= most for gap, most in zip(gaps, allowed, strict=True))


@contextmanager
def _nudged(encoder: PatientEncoder) -> Iterator[None]:
    """Change all trained weights by half of a rounding, up or down, and give them back."""
    half = torch.finfo(layer_dtype(encoder)).eps / 2
    weights = [p for p in encoder.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for weight in weights:  # which way is a matter of its last digits, and draws nothing
            weight.add_(weight * half * torch.sign(torch.sin(weight * 1e6)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, saved in zip(weights, before, strict=True):
                weight.copy_(saved)


class _Differences(NamedTuple):
    """Relative differences of the shared forward from the reference."""

    loss: float  # the larger of both losses
    gradients: float  # of all gradients together
    gradient: float  # of the worst single gradient
    worst: str  # name of its parameter


def _differences(own: _Computed, of_reference: _Computed) -> _Differences:
    """Compare losses and gradients with those of the reference."""
    (values, grads), (expected, expected_grads) = own, of_reference
    if [v is None for v in values] != [v is None for v in expected]:
        raise ValueError(f"{_MISMATCH}: they do not have the same losses")
    if expected_grads.keys() != grads.keys():
        names = ", ".join(sorted(expected_grads.keys() ^ grads.keys())[:3])
        raise ValueError(f"{_MISMATCH}: only one of them has a gradient of {names}")
    present = [(v, e) for v, e in zip(values, expected, strict=True) if v is not None]
    pairs = [(v.item(), e.item()) for v, e in present if e is not None]
    gaps = [abs(v - e) / max(abs(e), NO_LOSS) for v, e in pairs]
    loss = float(torch.tensor(gaps or [0.0]).max())
    size = {n: float(g.norm()) for n, g in expected_grads.items()}
    gap = {n: float((grads[n] - g).norm()) for n, g in expected_grads.items()}
    norm = math.hypot(*size.values())
    # the summand allows a very small gradient to be mostly rounding
    relative = {n: gap[n] / max(size[n] + 1e-3 * norm, NO_GRADIENT) for n in size}
    relative = {n: math.inf if math.isnan(r) else r for n, r in relative.items()}
    worst = max(relative, key=relative.__getitem__, default="none")  # where all is frozen
    total = math.hypot(*gap.values()) / max(norm, NO_GRADIENT)
    return _Differences(loss, total, relative.get(worst, 0.0), worst)


def layer_dtype(encoder: PatientEncoder) -> torch.dtype:
    """Return the dtype that the layers compute in."""
    return encoder.dtype


def _slice(
    windows: WindowSet, settings: TrainSettings, step: int, phase: PhaseSettings
) -> PackedBatch:
    seed, form = settings.run.seed, settings.objective
    jepa = phase.w_jepa > 0
    order = step_windows(windows, form, settings.optim.batch, seed, step, jepa=jepa)
    make = partial(
        make_batch,
        objective=form,
        seed=seed,
        step=step,
        sft=phase.w_sft > 0,
        jepa=jepa,
        codes=phase.w_codes > 0,
        horizons=windows.horizons,
    )
    by_length = sorted((windows[i] for i in order.tolist()), key=len)
    singles = [(window, make([window])) for window in by_length]
    usable = [s for s in singles if s[1].num_masked or s[1].num_labels or s[1].num_pairs]
    ends = np.cumsum([batch.segments.tokens for _, batch in usable])
    return make([window for window, _ in usable[: int(np.searchsorted(ends, SLICE)) + 1]])
