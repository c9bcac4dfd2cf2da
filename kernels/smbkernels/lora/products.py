"""Products that both backends of `lora_linear` leave to torch: they add up in place (beta = 1).

There is no [T, K] or [T, N] temporary. The A of a group are stacked, so that x is read once for
x A' and once for dA.

On CUDA the rank-r product comes first: an output is written by the product that waits for memory
and read by the one that computes; the other way round the former reads and writes it. It also
rounds a bf16 output once at full size, not twice. That order is chosen by counting, not measured.
On a CPU the base product comes first, which was measured to be faster, most of all in bf16.

Where `linear` is forced to oneDNN, it multiplies what is read row by row; x and dy are then padded
once for all products of a group (`smbkernels.matmul.products`), and sums over rows stay torch's.

T tokens, K in and N out features, R rank, S the sum of the ranks of a group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from smbkernels.lora.op import Group
from smbkernels.matmul.products import added, forced, padded, padded_rows, times, with_rows

Product = tuple[Tensor, Tensor, float]  # left, right, alpha


def rows(x: Tensor) -> Tensor:
    """[..., C] as [T, C] that a matrix product can read without a copy of its own."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if x.is_contiguous():
        return x
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def ready(x: Tensor) -> Tensor:
    """`rows`, with further ones of zeros where the library that multiplies wants them."""
    x = rows(x)
    return padded(x) if forced(x) else x


def all_ready(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`ready` of tensors that are added up row by row: all get the rows that one of them wants."""
    row_tensors = [rows(x) for x in tensors]
    if not forced(row_tensors[0]):
        return row_tensors
    num_rows = max(padded_rows(*x.shape) for x in row_tensors)
    return [with_rows(x, num_rows) for x in row_tensors]


def product(left_TK: Tensor, right_KN: Tensor) -> Tensor:
    """left right, by the library that `linear` is forced to."""
    return times(left_TK, right_KN) if forced(left_TK) else left_TK @ right_KN


def product_into(out_TN: Tensor, left_TK: Tensor, right_KN: Tensor, alpha: float) -> None:
    """out = alpha left right."""
    if forced(left_TK):
        torch.mul(times(left_TK, right_KN), alpha, out=out_TN)
    else:
        out_TN.addmm_(left_TK, right_KN, beta=0, alpha=alpha)


def stacked(a: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The A of a group below one another, [S, K]: one product reads x once."""
    return (a[0] if len(a) == 1 else torch.cat(list(a))).to(dtype)


def parts(low_TS: Tensor, a: Sequence[Tensor]) -> Sequence[Tensor]:
    """The columns [T, R] that belong to each A of a stack."""
    return [low_TS] if len(a) == 1 else low_TS.split([v.shape[0] for v in a], 1)


def low_first(device: torch.device) -> bool:
    """Whether the rank-r product is computed before the base product is added to it."""
    return device.type == "cuda"


def total(low: Product, base: list[Product], bias: Tensor | None = None) -> Tensor:
    """bias + the sum of alpha left @ right, in one buffer; alpha of a base is 1."""
    if forced(low[0]):
        return _total_by_onednn(low, base, bias)
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


def _total_by_onednn(low: Product, base: list[Product], bias: Tensor | None) -> Tensor:
    (left, right, _), *rest = base
    out = times(left, right, bias)
    for left, right, _ in rest:
        out = added(out, left, right)
    left, right, alpha = low
    # a product of small rank that is added in place was measured to be faster by MKL
    return out.addmm_(left, right, alpha=alpha)


def outputs(x_TK: Tensor, low_TS: Tensor, group: Group) -> list[Tensor]:
    """y of each linear from x and x A'."""
    ys = []
    for i, low_TR in enumerate(parts(low_TS, group.a)):
        low = (low_TR, group.b[i].to(x_TK.dtype).t(), group.scale[i])
        base = (x_TK, group.weight[i].t(), 1.0)
        ys.append(total(low, [base], group.bias[i] if group.bias else None))
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


def summed(left_RT: Tensor, right_TN: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha left right, a sum over tokens, for a gradient of this dtype.

    On CUDA the sum of bf16 products stays in fp32 where the gradient is fp32: it is not rounded to
    bf16 on its way. Elsewhere it comes in the dtype of the operands.
    """
    if _leaves_in_fp32(left_RT, dtype):
        out_RN = torch.mm(left_RT, right_TN, out_dtype=dtype)
        return out_RN if alpha == 1 else out_RN.mul_(alpha)
    out_RN = left_RT.new_empty((left_RT.shape[0], right_TN.shape[1]))
    return out_RN.addmm_(left_RT, right_TN, beta=0, alpha=alpha)


def _leaves_in_fp32(operand: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of narrower operands can be written in fp32: CUDA alone has that."""
    narrow = operand.dtype in (torch.bfloat16, torch.float16)
    return narrow and dtype == torch.float32 and operand.device.type == "cuda"
