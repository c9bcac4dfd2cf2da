"""LoRA linears as few ATen products, with the backward by hand.

Every product is added to the last in place (beta = 1): there is no [T, K] or [T, N] temporary. The
A of a group are stacked, so that x is read once for x A' and once for dA.

On CUDA the rank-r product comes first: an output is written by the product that waits for memory
and read by the one that computes; the other way round the former reads and writes it. It also
rounds a bf16 output once at full size, not twice. That order is chosen by counting, not measured.
On a CPU the base product comes first, which was measured to be faster, most of all in bf16.

W beside s B in one matrix, and x beside x A' in one row, would need no second pass over an output,
but either a second resident copy of W or, at each call, copies of W and x.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from smbkernels.lora_linear import by_hand, wider


def missing(device: str) -> str | None:
    """It runs wherever torch does."""
    return None


def rows(x: Tensor) -> Tensor:
    """[..., C] as [T, C] that a matrix product can read without a copy of its own."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if x.is_contiguous():
        return x
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of a group below one another, [S, K]: one product reads x once."""
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype)


def parts(low_TS: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns [T, R] that belong to each A of a stack."""
    return [low_TS] if len(a) == 1 else low_TS.split([v.shape[0] for v in a], 1)


def low_first(device: torch.device) -> bool:
    """Whether the rank-r product is computed before the base product is added to it."""
    return device.type == "cuda"


Product = tuple[Tensor, Tensor, float]  # left, right, alpha


def total(low: Product, base: list[Product], bias: Tensor | None = None) -> Tensor:
    """bias + the sum of alpha left @ right, in one buffer."""
    order = [low, *base] if low_first(low[0].device) else [*base, low]
    (left, right, alpha), *rest = order
    out = left.new_empty((left.shape[0], right.shape[1]))
    if bias is None:
        out.addmm_(left, right, beta=0, alpha=alpha)
    else:
        torch.addmm(bias, left, right, alpha=alpha, out=out)
    for left, right, alpha in rest:
        out.addmm_(left, right, alpha=alpha)
    return out


def outputs(
    x_TK: Tensor,
    low_TS: Tensor,
    weight: Sequence[Tensor],
    b: Sequence[Tensor],
    a: Sequence[Tensor],
    scale: Sequence[float],
    bias: Sequence[Tensor],
) -> list[Tensor]:
    """y of each linear from x and x A'."""
    ys = []
    for i, low_TR in enumerate(parts(low_TS, a)):
        low = (low_TR, b[i].to(x_TK.dtype).t(), scale[i])
        ys.append(total(low, [(x_TK, weight[i].t(), 1.0)], bias[i] if bias else None))
    return ys


def input_gradient(
    dy: Sequence[Tensor], dlow_TS: Tensor, weight: Sequence[Tensor], a: Sequence[Tensor]
) -> Tensor:
    """dx from dy and s (dy B)."""
    base = [(dy_TN, w_NK, 1.0) for dy_TN, w_NK in zip(dy, weight, strict=True)]
    return total((dlow_TS, stacked(a, dlow_TS.dtype), 1.0), base)


def chosen(dlow_TS: Tensor, a: Sequence[Tensor], needs_a: Sequence[bool]) -> Tensor:
    """The columns of those A that need a gradient."""
    if all(needs_a):
        return dlow_TS
    return torch.cat([d for d, n in zip(parts(dlow_TS, a), needs_a, strict=True) if n], 1)


def _forward(x_TK, weight, b, a, scale, bias) -> list[Tensor]:
    lead = x_TK.shape[:-1]
    x_TK = rows(x_TK)
    low_TS = x_TK @ stacked(a, x_TK.dtype).t()
    ys = outputs(x_TK, low_TS, weight, b, a, scale, bias)
    return [*(ys if len(lead) == 1 else [y.view(*lead, y.shape[1]) for y in ys]), low_TS]


def _backward(dy, x_TK, low_TS, weight, b, a, scale, needs_x, needs_b, needs_a) -> list[Tensor]:
    lead = dy[0].shape[:-1]
    dy = [rows(v) for v in dy]
    dtype, n = dy[0].dtype, len(dy)
    dx_TK, db, da_SK = dy[0].new_empty(0), [], dy[0].new_empty(0, dtype=wider(a))
    low = parts(low_TS, a) if any(needs_b) else []
    for i in range(n):
        db.append(b[i].new_empty(b[i].shape if needs_b[i] else 0))
        if needs_b[i]:
            # [R, N] is the faster way round on a CPU
            db_RN = dy[i].new_empty(b[i].shape[::-1])
            db_RN.addmm_(low[i].t(), dy[i], beta=0, alpha=scale[i])
            db[i].copy_(db_RN.t())
    wanted = [i for i in range(n) if needs_x or needs_a[i]]
    if wanted:
        a_wanted = [a[i] for i in wanted]
        dlow_TS = dy[0].new_empty((dy[0].shape[0], sum(v.shape[0] for v in a_wanted)))
        for i, dlow_TR in zip(wanted, parts(dlow_TS, a_wanted), strict=True):
            dlow_TR.addmm_(dy[i], b[i].to(dtype), beta=0, alpha=scale[i])
        if needs_x:
            dx_TK = input_gradient(dy, dlow_TS, weight, a).view(*lead, weight[0].shape[1])
        if any(needs_a):
            columns_TS = chosen(dlow_TS, a_wanted, [needs_a[i] for i in wanted])
            da_SK = (columns_TS.t() @ rows(x_TK)).to(wider(a))
    return [dx_TK, *db, da_SK]


lora_linear = by_hand("fused", _forward, _backward)
