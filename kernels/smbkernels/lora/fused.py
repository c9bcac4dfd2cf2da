"""LoRA linears as few ATen products, with the backward by hand.

Every product is added to the last in place: see `products`.

W beside s B in one matrix, and x beside x A' in one row, would need no second pass over an output,
but either a second resident copy of W or, at each call, copies of W and x.
"""

from collections.abc import Sequence

from torch import Tensor

from smbkernels.lora.op import Group, Needs, by_hand, wider
from smbkernels.lora.products import (
    all_ready,
    chosen,
    input_gradient,
    outputs,
    parts,
    product,
    product_into,
    ready,
    rows,
    stacked,
    summed,
)
from smbkernels.matmul.products import cut


def missing(device: str) -> str | None:
    """It runs wherever torch does."""
    return None


def _forward(x_TK: Tensor, group: Group) -> list[Tensor]:
    lead, T = x_TK.shape[:-1], x_TK.numel() // x_TK.shape[-1]
    x_TK = ready(x_TK)
    low_TS = product(x_TK, stacked(group.a, x_TK.dtype).t())
    *ys, low_TS = (cut(y, T) for y in (*outputs(x_TK, low_TS, group), low_TS))
    return [*(ys if len(lead) == 1 else [y.view(*lead, y.shape[1]) for y in ys]), low_TS]


def _backward(
    dy: Sequence[Tensor], x_TK: Tensor | None, low_TS: Tensor | None, group: Group, needs: Needs
) -> list[Tensor]:
    weight, b, a, scale, _ = group
    needs_x, needs_b, needs_a = needs
    lead, T = dy[0].shape[:-1], dy[0].numel() // dy[0].shape[-1]
    dy = all_ready(dy)
    dtype, n = dy[0].dtype, len(dy)
    dx_TK, db, da_SK = dy[0].new_empty(0), [], dy[0].new_empty(0, dtype=wider(a))
    low = [] if low_TS is None else parts(low_TS, a)
    for i in range(n):
        db.append(b[i].new_empty(b[i].shape if needs_b[i] else 0))
        if needs_b[i]:
            # [R, N] is the faster way round on a CPU
            db[i].copy_(summed(low[i].t(), dy[i][:T], scale[i], b[i].dtype).t())
    wanted = [i for i in range(n) if needs_x or needs_a[i]]
    if wanted:
        a_wanted = [a[i] for i in wanted]
        dlow_TS = dy[0].new_empty((dy[0].shape[0], sum(v.shape[0] for v in a_wanted)))
        for i, dlow_TR in zip(wanted, parts(dlow_TS, a_wanted), strict=True):
            product_into(dlow_TR, dy[i], b[i].to(dtype), scale[i])
        if needs_x:
            dx_TK = cut(input_gradient(dy, dlow_TS, weight, a), T)
            dx_TK = dx_TK.view(*lead, weight[0].shape[1])
        if x_TK is not None and any(needs_a):
            columns_TS = chosen(dlow_TS[:T], a_wanted, [needs_a[i] for i in wanted])
            da_SK = summed(columns_TS.t(), rows(x_TK), 1.0, wider(a)).to(wider(a))
    return [dx_TK, *db, da_SK]


lora_linear = by_hand("fused", _forward, _backward)
