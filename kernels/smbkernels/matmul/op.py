"""A linear layer, and with it which library multiplies fp32 matrices on a CPU.

    y = x W' + bias      dx = dy W      dW = dy' x      dbias = sum over rows of dy

torch sends these products to MKL, whose fp32 kernels are slow on processors that are not Intel's.
oneDNN, which torch ships too, has kernels of its own for them. A backend is such a library; which
one is faster differs from machine to machine, so none is chosen without being asked for: a run
measures (`smbkernels.matmul.measure`), and forces the faster one.

T rows, K in and N out features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smbkernels.autograd import autocast_dtype
from smbkernels.operation import Backend, op


def linear_flops(x_TK: Tensor, weight_NK: Tensor, *_args, **_kwargs) -> int:
    """One product: 2 T K N; the bias is left out."""
    return 2 * x_TK.numel() * weight_NK.shape[0]


def _fits(x_TK: Tensor, weight_NK: Tensor, *_args, **_kwargs) -> str | None:
    """Under autocast the product is torch's, in autocast's dtype."""
    if autocast_dtype(x_TK) is None and not x_TK.dtype == weight_NK.dtype == torch.float32:
        return f"dtypes must be fp32, got {x_TK.dtype} and {weight_NK.dtype}"
    return None


@op(
    Backend("onednn", "matmul.onednn", (), _fits),
    Backend("onednn_rows", "matmul.onednn_rows", (), _fits),
    flops=linear_flops,
)
def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W' + bias, [..., N].

    Forced to a backend, `lora_linear` on `fused` and `linear_cross_entropy` on `chunked` multiply
    fp32 matrices on a CPU by the same library.

    Args:
        x_TK: [..., K].
        weight_NK: of the dtype of x.
        bias_N: added to each row.
    """
    return F.linear(x_TK, weight_NK, bias_N)
