"""Exponential moving average of LoRA-merged weights, in place, for all matrices of a model.

    t = W + s (B A)        w <- w + (1 - tau)(t - w)

Each step rounds once, in this order, in fp32 (B A: fused multiply-adds in order of k); averaging B
and A separately would be another method, because EMA(B) EMA(A) is not EMA(B A).

An average is one fp32 tensor, or a bf16 high half (what the GEMMs read) and an int16 remainder that
together are exactly that fp32 tensor. The high half rounds half *up*: to nearest even, an exact tie
on an even half would need the remainder +32768, which int16 does not hold.

N out, K in features, R rank.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.operation import Backend, op


def _fits(
    average: list[Tensor], weight: list[Tensor], b=None, a=None, *_args, **_kwargs
) -> str | None:
    """The backends compute in fp32."""
    known = (torch.float32, torch.bfloat16)
    for tensor in (*average, *weight, *(b or ()), *(a or ())):
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
    Backend("triton", "ema.triton", ("cuda",), _fits),
    Backend("cpp", "ema.cpp", ("cpu",), _fits),
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
            any shape where there is no adapter. They share no memory: all are written at once.
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
            with torch.autocast(full.device.type, enabled=False):
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
    # a NaN of a GPU is 0x7FFFFFFF, which rounding up would carry over into -0
    bits = torch.where(full.isnan(), 0x7FC00000, bits)
    high = ((bits.to(torch.int64) + 0x8000) >> 16) & 0xFFFF
    high = torch.where(high >= 0x8000, high - 0x10000, high).to(torch.int16)
    remainder = (bits - (high.to(torch.int32) << 16)).to(torch.int16)
    return high.view(torch.bfloat16), remainder


def join(high: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 tensor of which `split` made two halves."""
    bits = (high.contiguous().view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


class Lists(NamedTuple):
    """The lists of one call, an entry for each matrix.

    `remainder`, `b` and `a` are empty where there are none; `scale` is given.
    """

    average: Sequence[Tensor]
    remainder: Sequence[Tensor]
    weight: Sequence[Tensor]
    b: Sequence[Tensor]
    a: Sequence[Tensor]
    scale: Sequence[float]


def in_place(backend: str, launch: Callable[[Lists, float], None]) -> Callable[..., None]:
    """The operation on a backend that updates all matrices.

    Args:
        launch: what updates the averages in place, given all lists and tau.
    """

    @custom_op(f"smb::ema_update_{backend}", mutates_args=("average", "remainder"))
    def update(
        average: Sequence[Tensor],
        remainder: Sequence[Tensor],
        weight: Sequence[Tensor],
        b: Sequence[Tensor],
        a: Sequence[Tensor],
        scale: Sequence[float],
        tau: float,
    ) -> None:
        launch(Lists(average, remainder, weight, b, a, scale), tau)

    @update.register_fake
    def _(*_inputs):
        return None

    packet = getattr(torch.ops.smb, f"ema_update_{backend}")

    @register_flop_formula(packet, get_raw=True)
    def _(average, _remainder, weight, b, a, *_args, **_kwargs):
        return _flops(average, weight, b or None, a or None)

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
        pairs = {"weight": weight, "b": b, "a": a, "remainder": remainder, "scale": scale}
        _check_lengths(len(average), pairs)
        scale = [1.0] * len(average) if scale is None else scale
        lists = Lists(average, remainder or [], weight, b or [], a or [], scale)
        _check(lists)
        if average:
            update(*lists, tau)

    return ema_update_


def _check_lengths(num_averages: int, lists: Mapping[str, Sequence | None]) -> None:
    for name, values in lists.items():
        if values is not None and len(values) != num_averages:
            raise ValueError(
                f"{name} must have one entry for each of {num_averages} averages, got {len(values)}"
            )
    if (lists["b"] is None) != (lists["a"] is None):
        raise ValueError("b and a must be given together, got one of them")


def _check(lists: Lists) -> None:
    average, remainder, weight, b, a, _ = lists
    for name, tensors in {"weight": weight, "b": b, "a": a, "remainder": remainder}.items():
        for i, (high, x) in enumerate(zip(average, tensors, strict=False)):
            if x.device != high.device:
                raise ValueError(f"{name}[{i}] must be on {high.device}, got {x.device}")
    kind = torch.bfloat16 if remainder else torch.float32
    for i, (high, w) in enumerate(zip(average, weight, strict=True)):
        if high.dtype != kind:
            raise ValueError(f"average[{i}] must be {kind}, got {high.dtype}")
        if w.shape != high.shape:
            raise ValueError(f"weight[{i}] must be {list(high.shape)}, got {list(w.shape)}")
        for name, x in (("average", high), ("weight", w)):
            if not x.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous, got strides {x.stride()}")
        if remainder:
            low = remainder[i]
            if low.dtype != torch.int16 or low.shape != high.shape or not low.is_contiguous():
                raise ValueError(
                    f"remainder[{i}] must be contiguous int16 {list(high.shape)}, got {low.dtype} "
                    f"{list(low.shape)}"
                )
        if b:
            shapes = [list(b[i].shape), list(a[i].shape)]
            rank = b[i].shape[-1] if b[i].dim() else 0
            if high.dim() != 2 or shapes != [[high.shape[0], rank], [rank, high.shape[1]]]:
                raise ValueError(
                    f"b[{i}] and a[{i}] must be [N, R] and [R, K] for {list(high.shape)}, got "
                    f"{shapes[0]} and {shapes[1]}"
                )
