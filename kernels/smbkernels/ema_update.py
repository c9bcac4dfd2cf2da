"""Exponential moving average of LoRA-merged weights, in place.

    t = W + s B A        w <- w + (1 - tau)(t - w)

Each step rounds once, in this order; averaging B and A apart would be another method, because
EMA(B) EMA(A) is not EMA(B A).

N out, K in features, R rank.
"""

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(
    average_NK: Tensor,
    weight_NK: Tensor,
    b_NR: Tensor | None = None,
    a_RK: Tensor | None = None,
    *,
    scale: float = 1.0,
    tau: float,
) -> Tensor:
    """Move `average_NK` (fp32 or fp64, any shape without an adapter) towards W + scale B A."""
    effective_NK = weight_NK.to(average_NK.dtype)
    if b_NR is not None and a_RK is not None:
        delta_NK = b_NR.to(average_NK.dtype) @ a_RK.to(average_NK.dtype)
        effective_NK = effective_NK + scale * delta_NK
    return average_NK.add_((effective_NK - average_NK) * (1 - tau))
