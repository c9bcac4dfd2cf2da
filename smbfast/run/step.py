"""One optimizer step: scaled losses, backward, finite guard, clipping, AdamW, EMA of the target.

Training, its preflight, the self-check, the benchmarks and the tests of the loop call these
functions. Only `Updater.report_skips` waits for a GPU.

Gradient accumulation: each summed loss is divided by the count of the whole step before the
backward, so the gradient is that of one large batch, however the step is cut into micro-batches.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smbfast.base.entry import RunFailed
from smbfast.base.parts import part
from smbfast.batch import PackedBatch
from smbfast.data.loader import Step
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder
from smbfast.objective import Losses, latent_target
from smbfast.reporting.signals import Watch
from smbfast.run.ranks import ALONE, Ranks
from smbfast.settings import PhaseSettings

PATIENCE = 3  # steps in a row with a gradient that is not finite before a run gives up


class LossScales(NamedTuple):
    """The factors of the summed losses of a micro-batch: weight / count in the whole step."""

    sft_scale: float
    jepa_scale: float
    codes_scale: float = 0.0

    @classmethod
    def of(
        cls,
        w_sft: float,
        w_jepa: float,
        num_labels: int,
        num_masked: int,
        w_codes: float = 0.0,
        num_pairs: int = 0,
    ) -> "LossScales":
        """Compute them from the weights of a phase and the counts of a step."""
        counts = (num_labels, num_masked, num_pairs)
        weights = zip((w_sft, w_jepa, w_codes), counts, strict=True)
        return cls(*(weight / max(count, 1) for weight, count in weights))

    @classmethod
    def of_batch(cls, phase: PhaseSettings, batch: PackedBatch | Step) -> "LossScales":
        """Compute them for a phase and a step, or a batch that is a step of its own."""
        num_masked = batch.num_masked
        if isinstance(batch, PackedBatch):
            num_masked += batch.num_latent
        counts = (batch.num_labels, num_masked, phase.w_codes, batch.num_pairs)
        return cls.of(phase.w_sft, phase.w_jepa, *counts)


class StepLosses(NamedTuple):
    """Scaled losses of a step, summed over its micro-batches: detached scalars on the device."""

    sft: Tensor
    jepa: Tensor
    codes: Tensor


def backward(losses: Sequence[Tensor | None]) -> None:
    """Run the backward of those losses that are not None, in one pass; gradients accumulate."""
    present = [loss for loss in losses if loss is not None]
    if present:
        torch.autograd.backward(present)


def forward_backward(
    losses: Losses,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    micro_batches: Sequence[PackedBatch],
    scales: LossScales,
    *,
    num_by_horizon: Sequence[int] | None = None,
    ranks: Ranks = ALONE,
) -> StepLosses:
    """Run all micro-batches of a step forward and backward; gradients accumulate in the encoder.

    The scale on which horizon JEPA compares moves by the averaged target states of the step, which
    are compared on the scale before it.

    Args:
        losses: `smbfast.objective.losses` or `smbfast.reference.losses`, with their options bound.
        target: may be None where `scales.jepa_scale` is 0.
        micro_batches: on any device; of several ranks, those of this one.
        num_by_horizon: pairs of the whole step; None counts those of `micro_batches`.
        ranks: those that share the step. The scale is one; gradients and losses are each rank's.
    """
    device = encoder.mask_vector.device
    if num_by_horizon is None:
        own = [m.pairs.num_by_horizon for m in micro_batches if m.pairs and m.num_latent]
        num_by_horizon = [sum(numbers) for numbers in zip(*own, strict=True)]
    has_scale = target is not None and num_by_horizon and scales.jepa_scale != 0
    scale = target.scale if target is not None and has_scale else None
    if scale and scale.lacks(num_by_horizon):
        sums = scale.new_sums()
        for micro in micro_batches:
            latent_target(target, micro.to(device), sums)
        ranks.add(sums.tensors)
        scale.begin(sums)
    options = scales._asdict() | ({"sums": scale.new_sums()} if scale else {})
    total = [torch.zeros((), device=device)] * len(StepLosses._fields)
    for micro in micro_batches:
        terms = losses(encoder, target, micro.to(device), **options)
        backward(terms)
        total = [
            sum_ if term is None else sum_ + term.detach()
            for sum_, term in zip(total, terms, strict=True)
        ]
    if scale:
        ranks.add(options["sums"].tensors)
        scale.update(options["sums"], num_by_horizon)
    return StepLosses(*total)


class Updater:
    """The part of a step after the backward: clipping, finite guard, AdamW, EMA of the target.

    The optimizer's own kernel skips a step whose gradient norm is not finite. Then weights and
    moments stay, and the target's average moves towards the unchanged weights once more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """Take over an optimizer.

        Args:
            optimizer: a fused AdamW, which reads `found_inf` on the device.
            clip: the largest norm that all gradients together may have.
        """
        self.optimizer: Any = optimizer  # torch does not declare `found_inf`
        self.clip = clip
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norms: list[Tensor] = []  # of the steps since the last report, on the device
        self._in_a_row = 0  # skipped steps up to the last report

    def step(
        self, lr: float | None = None, target: TargetEncoder | None = None, tau: float = 1.0
    ) -> Tensor:
        """Take a step with the accumulated gradients, and clear them.

        Args:
            lr: the learning rate of all groups; None leaves them as they are.
            target: moved towards the new weights, with EMA decay `tau`.

        Returns:
            The norm of all gradients before clipping, a scalar on the device.
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        with part("optimizer"):
            grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
            self.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
            self._norms.append(grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if target is not None:
            with part("ema"):
                target.update(tau)
        return grad_norm

    def report_skips(self, step: int, phase: str, watch: Watch | None = None) -> bool:
        """Print how many steps were skipped since the last call; this waits for a GPU.

        Args:
            step: number of steps done, for the message.
            phase: name of the phase, for the message.
            watch: takes note of gradients that were not finite, or exactly 0.

        Returns:
            Whether the latest step was skipped.

        Raises:
            RunFailed: if `PATIENCE` steps in a row were skipped.
        """
        norms = torch.stack(self._norms).tolist() if self._norms else []
        self._norms, longest = [], 0
        for norm in norms:
            self._in_a_row = 0 if math.isfinite(norm) else self._in_a_row + 1
            longest = max(longest, self._in_a_row)
        skipped = sum(not math.isfinite(norm) for norm in norms)
        if watch is not None:
            watch.count_gradients(zero=norms.count(0.0), skipped=skipped)
        if skipped:
            print(
                f"step {step} of phase {phase}: gradient not finite, steps skipped since the last "
                f"line: {skipped}",
                file=sys.stderr,
            )
        if longest >= PATIENCE:
            raise RunFailed(
                f"the gradient was not finite in {longest} steps in a row, up to step {step} "
                f"(phase `{phase}`), so a loss or a state was not either; nothing of them was "
                "saved, and checkpoints before them stay. Lower the learning rate or lengthen the "
                "warm-up, and begin again in another --run.dir; if it is so from the first step, "
                "the weights of the backbone hold numbers that are not finite, or far too large"
            )
        return self._in_a_row > 0
