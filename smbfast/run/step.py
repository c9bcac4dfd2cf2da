"""One optimizer step: scaled losses, backward, the finite guard, clipping, AdamW, the EMA target.

Training, its preflight, the self-check, the benchmarks and the tests of the loop call what stands
here. Nothing in it waits for a GPU but `Updater.report_skips`.

A step divides each summed loss by the count of the whole step before the backward (gradient
accumulation), so that the gradient is that of one large batch however the step is cut into
micro-batches.
"""

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from smbfast.base.entry import RunFailed
from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder
from smbfast.objective import Losses

PATIENCE = 3  # steps in a row with a gradient that is not finite before a run gives up


class LossScales(NamedTuple):
    """What the summed losses of a micro-batch are multiplied by: weight / count of the step."""

    sft_scale: float
    jepa_scale: float

    @classmethod
    def of(cls, w_sft: float, w_jepa: float, labels: int, masked: int) -> "LossScales":
        """From the weights of a phase, and the labelled tokens and masked positions of a step."""
        return cls(w_sft / max(labels, 1), w_jepa / max(masked, 1))


class StepLosses(NamedTuple):
    """Scaled losses of a step, summed over its micro-batches: scalars on the device, detached."""

    sft: Tensor
    jepa: Tensor


def backward(losses: Sequence[Tensor | None]) -> None:
    """Add the gradients of those losses that there are."""
    present = [loss for loss in losses if loss is not None]
    if present:
        torch.autograd.backward(present)


def forward_backward(
    losses: Losses,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    micro_batches: Sequence[PackedBatch],
    scales: LossScales,
) -> StepLosses:
    """Forward and backward of all micro-batches of a step; gradients add up in the encoder.

    Args:
        losses: `smbfast.objective.losses` or `smbfast.reference.losses`, with what they need bound.
        target: not needed where `scales.jepa_scale` is 0.
    """
    device = encoder.mask_vector.device
    sft = jepa = torch.zeros((), device=device)
    for micro in micro_batches:
        micro_sft, micro_jepa = losses(encoder, target, micro.to(device), **scales._asdict())
        backward((micro_sft, micro_jepa))
        sft = sft if micro_sft is None else sft + micro_sft.detach()
        jepa = jepa if micro_jepa is None else jepa + micro_jepa.detach()
    return StepLosses(sft, jepa)


class Updater:
    """What follows the backward: clip, guard against gradients that are not finite, AdamW, EMA.

    A step whose gradient norm is not finite is skipped by the optimizer's own kernel: no weight and
    no moment moves, and the target's average takes the unchanged weights once more.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        """For a fused AdamW, which reads `found_inf` on the device; `clip`: largest norm."""
        self.optimizer, self.clip = optimizer, clip
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        zero = torch.zeros((), device=self._parameters[0].device)
        self._in_a_row = self._longest = self._total = zero

    def step(
        self, lr: float | None = None, target: TargetEncoder | None = None, tau: float = 1.0
    ) -> Tensor:
        """Take the step that the gradients ask for, and clear them.

        Args:
            lr: learning rate of all groups; None: as they are.
            target: moved towards the new weights, with decay `tau`.

        Returns:
            The norm of all gradients before clipping, a scalar on the device.
        """
        if lr is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
        skipped = (~torch.isfinite(grad_norm)).float()
        self.optimizer.found_inf = skipped
        self._in_a_row = (self._in_a_row + 1) * skipped
        self._longest = torch.maximum(self._longest, self._in_a_row)
        self._total = self._total + skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if target is not None:
            target.update(tau)
        return grad_norm

    def report_skips(self, step: int, phase: str) -> bool:
        """Print how many steps were skipped since the last call; here a GPU is waited for.

        Args:
            step: steps done, for the message.
            phase: name of the phase, for the message.

        Returns:
            Whether the latest step was skipped.

        Raises:
            RunFailed: `PATIENCE` steps in a row were skipped.
        """
        counts = torch.stack([self._total, self._longest, self._in_a_row]).tolist()
        total, longest, in_a_row = map(int, counts)
        self._total = self._longest = torch.zeros_like(self._total)
        if total:
            text = f"step {step}: gradient not finite, steps skipped since the last line: {total}"
            print(text, file=sys.stderr)
        if longest >= PATIENCE:
            raise RunFailed(
                f"the gradient was not finite in {longest} steps in a row, up to step {step} "
                f"(phase `{phase}`); the last good checkpoint is kept"
            )
        return in_a_row > 0
