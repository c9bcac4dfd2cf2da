"""A linear in fp32 whose products on CUDA may round their operands to TF32.

The predictor is fp32 also beside a bf16 backbone. Its input has the 8 bits of bf16 then, and a
plain fp32 product uses no tensor cores, which multiply several times faster operands that are
rounded to the 11 bits of TF32, with sums in fp32. Weights, outputs and gradients stay fp32. torch
has one switch for all products; it is turned on for these alone, in the forward and in the
backward, and turned back. What it saves has not been measured.

Legend: M rows, D and E widths.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def predictor_linear(states_MD: Tensor, dtype: torch.dtype, otherwise: Linear = F.linear) -> Linear:
    """Return the linear of a predictor of this dtype on these states: in TF32, or `otherwise`.

    TF32 where states are bf16, on CUDA, and the predictor is fp32; not on a CPU, nor beside an fp32
    backbone.
    """
    return linear if _is_narrow(states_MD, dtype) else otherwise


def linear(x_MD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    """x W' + bias, fp32 [M, E], in TF32 on CUDA; so are the products of its gradients."""
    out_ME: Tensor = _Linear.apply(x_MD, weight_ED, bias_E)
    return out_ME


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_MD, weight_ED)
        with _tf32():
            return F.linear(x_MD, weight_ED, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ME: Tensor) -> tuple[Tensor | None, ...]:
        x_MD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        with _tf32():
            return (
                grad_ME @ weight_ED if needs_x else None,
                grad_ME.t() @ x_MD if needs_weight else None,
                grad_ME.sum(0) if needs_bias else None,
            )


def _is_narrow(states_MD: Tensor, dtype: torch.dtype) -> bool:
    return states_MD.is_cuda and (states_MD.dtype, dtype) == (torch.bfloat16, torch.float32)


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    if matmul.fp32_precision == "tf32":  # on already, by whichever switch
        yield
        return
    # the older switch sets the newer one as well; the other way round torch refuses to read it
    before = matmul.allow_tf32, matmul.fp32_precision
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.fp32_precision = before
