"""`linear` by oneDNN, with the backward by hand."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.autograd import autocast_dtype, is_traced, no_autocast
from smbkernels.matmul.op import linear_flops
from smbkernels.matmul.products import missing, times, times_over_rows

__all__ = ["linear", "missing"]


def by_hand(backend: str, *, weight_gradient: bool) -> Callable[..., Tensor]:
    """The operation on a backend.

    Args:
        weight_gradient: whether dW, a sum over rows, is oneDNN's as well; y and dx are.
    """
    name = f"smb::linear_{backend}"

    def forward(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None) -> Tensor:
        lead, K = x_TK.shape[:-1], x_TK.shape[-1]
        y_TN = times(x_TK if len(lead) == 1 else x_TK.reshape(-1, K), w_NK.t(), bias)
        # a view would refuse to be written into
        return y_TN if len(lead) == 1 else y_TN.view(*lead, w_NK.shape[0])

    def backward(
        dy_TN: Tensor, x_TK: Tensor | None, w_NK: Tensor, needs_x: bool, needs_bias: bool
    ) -> list[Tensor]:
        """dx, dW if x is given, and dbias; empty where none is wanted."""
        lead, (N, K) = dy_TN.shape[:-1], w_NK.shape
        dy_TN = dy_TN.reshape(-1, N)
        dx_TK = times(dy_TN, w_NK).view(*lead, K) if needs_x else dy_TN.new_empty(0)
        dw_NK, dbias_N = dy_TN.new_empty(0), dy_TN.new_empty(0)
        if x_TK is not None:
            x_TK = x_TK.reshape(-1, K)
            dw_NK = times_over_rows(dy_TN, x_TK) if weight_gradient else dy_TN.t() @ x_TK
        if needs_bias:
            dbias_N = dy_TN.sum(0)
        return [dx_TK, dw_NK, dbias_N]

    output = custom_op(name, mutates_args=())(forward)
    gradients = custom_op(f"{name}_bwd", mutates_args=())(backward)

    @output.register_fake
    def _(x_TK, w_NK, _bias):
        return x_TK.new_empty((*x_TK.shape[:-1], w_NK.shape[0]))

    @gradients.register_fake
    def _(dy_TN, x_TK, w_NK, needs_x, needs_bias):
        shapes = (
            (*dy_TN.shape[:-1], w_NK.shape[1]) if needs_x else (0,),
            (0,) if x_TK is None else w_NK.shape,
            w_NK.shape[:1] if needs_bias else (0,),
        )
        return [dy_TN.new_empty(shape) for shape in shapes]

    def save(ctx, inputs, output) -> None:
        x_TK, w_NK, bias = inputs
        ctx.needs = (x_TK.requires_grad, bias is not None and bias.requires_grad)
        ctx.needs_w = w_NK.requires_grad
        ctx.save_for_backward(x_TK if ctx.needs_w else None, w_NK)

    def differentiate(ctx, dy_TN: Tensor) -> tuple[Tensor | None, ...]:
        compute = gradients if is_traced() else backward
        with no_autocast(dy_TN):
            grads = compute(dy_TN, *ctx.saved_tensors, *ctx.needs)
        needs_x, needs_bias = ctx.needs
        wanted = (needs_x, ctx.needs_w, needs_bias)
        return tuple(g if needed else None for g, needed in zip(grads, wanted, strict=True))

    output.register_autograd(differentiate, setup_context=save)
    _count_flops(f"linear_{backend}")

    class Eager(torch.autograd.Function):
        # the same without the layers of Python around a custom op, which a small product feels
        @staticmethod
        def forward(ctx, *inputs):
            save(ctx, inputs, None)
            return forward(*inputs)

        @staticmethod
        @once_differentiable
        def backward(ctx, dy_TN):
            return differentiate(ctx, dy_TN)

    def linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
        if autocast_dtype(x_TK) is not None:
            return F.linear(x_TK, weight_NK, bias_N)
        inputs = (x_TK, weight_NK, bias_N)
        _check(*inputs)
        if is_traced() or x_TK.is_meta:
            return output(*inputs)
        return Eager.apply(*inputs) if torch.is_grad_enabled() else forward(*inputs)

    return linear


def _count_flops(name: str) -> None:
    @register_flop_formula(getattr(torch.ops.smb, name), get_raw=True)
    def _(x_TK, w_NK, *_args, **_kwargs):
        return linear_flops(x_TK, w_NK)

    @register_flop_formula(getattr(torch.ops.smb, f"{name}_bwd"), get_raw=True)
    def _(dy_TN, x_TK, w_NK, needs_x, *_args, **_kwargs):
        return 2 * dy_TN.numel() * w_NK.shape[1] * (needs_x + (x_TK is not None))


def _check(x_TK: Tensor, w_NK: Tensor, bias: Tensor | None) -> None:
    if w_NK.dim() != 2 or w_NK.shape[1] != x_TK.shape[-1]:
        raise ValueError(f"weight_NK must be [N, {x_TK.shape[-1]}], got {list(w_NK.shape)}")
    if bias is not None and bias.shape != w_NK.shape[:1]:
        raise ValueError(f"bias_N must be [{len(w_NK)}], got {list(bias.shape)}")
    for name, other in (("weight_NK", w_NK), ("bias_N", bias)):
        if other is not None and other.device != x_TK.device:
            raise ValueError(f"{name} must be on {x_TK.device}, got {other.device}")


linear = by_hand("onednn", weight_gradient=True)
