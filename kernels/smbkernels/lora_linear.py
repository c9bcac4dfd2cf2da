"""Linears with LoRA on a frozen base, several that share one input at a time.

    y_i = x W_i' + s_i (x A_i') B_i' + bias_i

    dx   = sum_i dy_i W_i + s_i (dy_i B_i) A_i
    dA_i = s_i (dy_i B_i)' x        dB_i = s_i dy_i' (x A_i')

T tokens, K in and N out features, R rank; i counts the linears of a group: one, Q K V, or gate and
up.
"""

import torch.nn.functional as F
from torch import Tensor

from smbkernels.registry import Backend, op


def lora_flops(
    tokens: int, weight: list[tuple[int, int]], rank: list[int], *, backward: bool
) -> int:
    """Of the matrix products, for [N, K] and R of each linear.

    Forward x W', x A', (x A') B'; backward dy W, dy B, (dy B) A, dA, dB: the frozen base has no
    weight gradient.
    """
    base = sum(2 * tokens * n * k for n, k in weight)
    low = sum(2 * tokens * r * (n + k) for (n, k), r in zip(weight, rank, strict=True))
    return base + (2 if backward else 1) * low


def _flops(x_TK: Tensor, weight: list[Tensor], b: list[Tensor], *_args, **_kwargs) -> int:
    shapes = [tuple(w.shape) for w in weight]
    tokens = x_TK.numel() // x_TK.shape[-1]
    return lora_flops(tokens, shapes, [v.shape[1] for v in b], backward=False)


@op(
    Backend("fused", "fused.lora_linear", ("cuda", "cpu")),
    Backend("triton", "triton.lora_linear", ()),  # not the default before a GPU has shown it pays
    flops=_flops,
)
def lora_linear(
    x_TK: Tensor,
    weight: list[Tensor],
    b: list[Tensor],
    a: list[Tensor],
    *,
    scale: list[float],
    bias: list[Tensor] | None = None,
) -> list[Tensor]:
    """The outputs [..., N_i] of a group, in the dtype of x; W and bias get no gradient.

    Args:
        x_TK: [..., K].
        weight: W_i, [N_i, K], frozen, in the dtype of x.
        b: B_i, [N_i, R_i]; fp32 or the dtype of x.
        a: A_i, [R_i, K].
        scale: s_i.
        bias: [N_i] of every linear, frozen.
    """
    outputs = []
    for i, w_NK in enumerate(weight):
        base_TN = F.linear(x_TK, w_NK.detach(), None if bias is None else bias[i].detach())
        low_TR = F.linear(x_TK, a[i].to(x_TK.dtype))
        outputs.append(base_TN + scale[i] * F.linear(low_TR, b[i].to(x_TK.dtype)))
    return outputs
