"""One optimizer step: scaled losses, backward, finite guard, clipping, AdamW, EMA of the target.

Training, its preflight, the self-check, the benchmarks and the tests of the loop call these
functions. Only `Updater.report_skips` waits for a GPU.

Gradient accumulation: each summed loss is divided by the count of the whole step before the
backward, so the gradient is that of one large batch, however the step is cut into micro-batches.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smbfast.base.entry import RunFailed
from smbfast.base.parts import part
from smbfast.batch import PackedBatch
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder
from smbfast.objective import Losses

PATIENCE = 3  # steps in a row with a gradient that is not finite before a run gives up


class LossScales(NamedTuple):
    """The factors of the summed losses of a micro-batch: weight / count in the whole step."""

    sft_scale: float
    jepa_scale: float

    @classmethod
    def of(cls, w_sft: float, w_jepa: float, num_labels: int, num_masked: int) -> "LossScales":
        """Compute them from the weights of a phase and the counts of a step."""
        return cls(w_sft / max(num_labels, 1), w_jepa / max(num_masked, 1))


class StepLosses(NamedTuple):
    """Scaled losses of a step, summed over its micro-batches: detached scalars on the device."""

    sft: Tensor
    jepa: Tensor


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
) -> StepLosses:
    """Run all micro-batches of a step forward and backward; gradients accumulate in the encoder.

    Args:
        losses: `smbfast.objective.losses` or `smbfast.reference.losses`, with their options bound.
        target: may be None where `scales.jepa_scale` is 0.
        micro_batches: on any device.
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
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        zero = torch.zeros((), device=self._parameters[0].device)
        self._in_a_row = self._longest = self._total = zero

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
            grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.clip)
            skipped = (~torch.isfinite(grad_norm)).float()
            self.optimizer.found_inf = skipped
            self._in_a_row = (self._in_a_row + 1) * skipped
            self._longest = torch.maximum(self._longest, self._in_a_row)
            self._total = self._total + skipped
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if target is not None:
            with part("ema"):
                target.update(tau)
        return grad_norm

    def report_skips(self, step: int, phase: str) -> bool:
        """Print how many steps were skipped since the last call; this waits for a GPU.

        Args:
            step: number of steps done, for the message.
            phase: name of the phase, for the message.

        Returns:
            Whether the latest step was skipped.

        Raises:
            RunFailed: if `PATIENCE` steps in a row were skipped.
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
                f"(phase `{phase}`); nothing of them was saved, and checkpoints before them stay"
            )
        return in_a_row > 0
