"""Exponential moving average of LoRA-merged weights on CPUs in C++: `csrc/ema_update.cpp`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from smbkernels.cpp.build import missing
from smbkernels.ema_update import in_place

__all__ = ["ema_update_", "missing"]


def _launch(
    average: Sequence[Tensor],
    remainder: Sequence[Tensor],
    weight: Sequence[Tensor],
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    scale: Sequence[float],
    tau: float,
) -> None:
    # adapters are small next to the matrices
    b, a = ([x.float().contiguous() for x in side] for side in (b, a))
    torch.ops.smb_cpp.ema_update(average, remainder, weight, b, a, scale, tau)


ema_update_ = in_place("cpp", _launch)
