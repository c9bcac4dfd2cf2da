"""Exponential moving average of LoRA-merged weights, in place, for all matrices of a model.

    t = W + s (B A)        w <- w + (1 - tau)(t - w)

Each step rounds once, in this order, in fp32 (B A: fused multiply-adds in order of k); averaging B
and A apart would be another method, because EMA(B) EMA(A) is not EMA(B A).

An average is one fp32 tensor, or a bf16 high half (what the GEMMs read) and an int16 remainder that
together are exactly that fp32 tensor. The high half rounds half *up*: to nearest even, an exact tie
on an even half would need the remainder +32768, which int16 does not hold.

N out, K in features, R rank.
"""

import torch
from torch import Tensor

from smbkernels.registry import Backend, op


def _fits(average: list[Tensor], weight: list[Tensor], *_args, **_kwargs) -> str | None:
    """The backends compute in fp32."""
    known = (torch.float32, torch.bfloat16)
    for tensor in (*average, *weight):
        if tensor.dtype not in known:
            return f"dtypes must be fp32 or bf16, got {tensor.dtype}"
    return None


def _flops(average: list[Tensor], weight: list[Tensor], b=None, a=None, *_args, **_kwargs) -> int:
    """2 R per element for B A, then scale, add, subtract, multiply, add."""
    total = 0
    for i, w in enumerate(weight):
        total += w.numel() * (3 if b is None else 2 * b[i].shape[1] + 5)
    return total


@op(
    Backend("triton", "triton.ema_update", ("cuda",), _fits),
    Backend("cpp", "cpp.ema_update", ("cpu",), _fits),
    flops=_flops,
)
@torch.no_grad()
def ema_update_(
    average: list[Tensor],
    weight: list[Tensor],
    b: list[Tensor] | None = None,
    a: list[Tensor] | None = None,
    *,
    remainder: list[Tensor] | None = None,
    scale: list[float] | None = None,
    tau: float,
) -> None:
    """Move every average towards W + s B A.

    Args:
        average: fp32 (fp64 in the reference) without `remainder`, else bf16 high halves; [N, K],
            any shape where there is no adapter.
        weight: W of each, fp32 or bf16, of the shape of its average.
        b: B of each, [N, R]; None: no matrix has an adapter. fp32 or bf16.
        a: A of each, [R, K].
        remainder: int16 low halves.
        scale: s of each; None: 1.
        tau: decay, in [0, 1].
    """
    for i, (w, high) in enumerate(zip(weight, average, strict=True)):
        full = high if remainder is None else join(high, remainder[i])
        target = w.to(full.dtype)
        if b is not None and a is not None:
            delta = b[i].to(full.dtype) @ a[i].to(full.dtype)
            target = target + (1.0 if scale is None else scale[i]) * delta
        full = full.add((target - full) * (1 - tau))
        if remainder is None:
            high.copy_(full)
        else:
            new_high, new_remainder = split(full)
            high.copy_(new_high)
            remainder[i].copy_(new_remainder)


def split(full: Tensor) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as its bf16 high half, rounded half up, and the int16 remainder."""
    bits = full.contiguous().view(torch.int32)
    high = ((bits.to(torch.int64) + 0x8000) >> 16) & 0xFFFF
    high = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16)
    remainder = (bits - (high.to(torch.int32) << 16)).to(torch.int16)
    return high.view(torch.bfloat16), remainder


def join(high: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor of which `split` made two halves."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)
