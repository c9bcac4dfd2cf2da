"""A residual and the RMSNorm of the sum:

    s_td = x_td + residual_td        y_td = w_d s_td r_t        r_t = 1 / sqrt(mean_d s² + eps)

    d s_td = ds_td + r_t dy_td w_d - r_t³ s_td / D sum_d dy_td w_d s_td
    d w_d  = sum_t dy_td s_td r_t

The sum is rounded to the dtype of the stream, and normed as it is then. As in transformers the mean
square is at least fp32, s r is rounded to that dtype, and so is its product with the weight. The
backward adds what comes from s and from y in one pass; x and the residual share its result.

T tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smbkernels.autograd import ByHand, alike
from smbkernels.operation import Backend, op

WIDEST = 16384
_FAST = (torch.float32, torch.bfloat16)
Outputs = tuple[Tensor, Tensor, Tensor]


def _fits(x_TD: Tensor, *others: Tensor | None, **by_name: Any) -> str | None:
    """The backends compute in fp32; fp64 and mixed dtypes are the reference's."""
    return alike(_FAST, x_TD, *others, by_name.get("residual_TD"), by_name.get("weight_D"))


def _fits_registers(x_TD: Tensor, *others: Tensor, **by_name) -> str | None:
    """A program of the Triton kernels holds a row in registers."""
    if x_TD.shape[-1] > WIDEST:
        return f"the width must be at most {WIDEST}, got {x_TD.shape[-1]}"
    return _fits(x_TD, *others, **by_name)


def _flops(x_TD: Tensor, residual_TD: Tensor | None, *_args, **_kwargs) -> int:
    """Per element: the residual 1, square and sum 2, both products 2."""
    return (4 + (residual_TD is not None)) * x_TD.numel()


@op(
    Backend("triton", "norm.triton", ("cuda",), _fits_registers),
    Backend("cpp", "norm.cpp", ("cpu",), _fits),
    flops=_flops,
)
def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum and its norm, [T, D] each; the sum is x itself where there is no residual.

    Args:
        x_TD: fp32 or bf16 (fp64 in the reference).
        residual_TD: what is added to it; None: nothing.
        weight_D: of the norm; its gradient is made only where it is wanted.
        eps: added to the mean square.
    """
    sum_TD = x_TD if residual_TD is None else residual_TD + x_TD
    wide_TD = sum_TD.float() if sum_TD.dtype.itemsize < 4 else sum_TD
    mean_square_T1 = wide_TD.pow(2).mean(-1, keepdim=True)
    normed_TD = wide_TD * torch.rsqrt(mean_square_T1 + eps)
    return sum_TD, weight_D * normed_TD.to(sum_TD.dtype)


def by_hand(
    backend: str,
    forward: Callable[..., Outputs],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation on a backend whose gradients are the formulas above.

    The sum, 1 / rms in fp32, and a reference to the weight are saved for the backward.

    Args:
        forward: (x, residual, weight, eps) -> the sum, its norm and r [T] in fp32.
        backward: (ds or None, dy, s, r, weight, needs_weight) -> the gradients of s and of the
            weight, which is empty if it is not needed. The custom operations take their schemas
            from the annotations.
    """

    def fake(x_TD, *_inputs):
        rstd_T = x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)
        return x_TD.new_empty(x_TD.shape), x_TD.new_empty(x_TD.shape), rstd_T

    def fake_gradients(_grad_sum_TD, _grad_normed_TD, sum_TD, _rstd_T, weight, needs_weight):
        return sum_TD.new_empty(sum_TD.shape), weight.new_empty(weight.shape if needs_weight else 0)

    def save(ctx, inputs, output) -> None:
        x_TD, residual_TD, weight, _ = inputs
        sum_TD, _, rstd_T = output
        ctx.save_for_backward(x_TD if residual_TD is None else sum_TD, rstd_T, weight)
        ctx.added = residual_TD is not None

    def differentiate(ctx, gradients, grad_sum_TD, grad_normed_TD, _grad_of_rstd):
        needs_weight = ctx.needs_input_grad[2]
        if grad_normed_TD is None:  # nothing reads the norm
            grad_TD, grad_D = grad_sum_TD, None
        else:
            saved = ctx.saved_tensors
            grad_TD, grad_D = gradients(grad_sum_TD, grad_normed_TD, *saved, needs_weight)
        return grad_TD, grad_TD if ctx.added else None, grad_D if needs_weight else None, None

    call = ByHand(
        f"add_rms_norm_{backend}",
        forward=(forward, fake),
        backward=(backward, fake_gradients),
        flops=(lambda *args, **_: _flops(*args), _backward_flops),
        save=save,
        differentiate=differentiate,
    )

    def add_rms_norm(
        x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, *, eps: float
    ) -> tuple[Tensor, Tensor]:
        _check(x_TD, {"residual_TD": residual_TD, "weight_D": weight_D})
        sum_TD, normed_TD, _ = call(x_TD, residual_TD, weight_D, eps)
        return sum_TD, normed_TD

    return add_rms_norm


def _backward_flops(grad_sum_TD, _grad_normed_TD, sum_TD, *saved, **_kwargs) -> int:
    """Per element: sum over the width 3, gradient 4, what comes from the sum 1, of the weight 3."""
    needs_weight = saved[-1]
    return (7 + (grad_sum_TD is not None) + 3 * needs_weight) * sum_TD.numel()


def _check(x_TD: Tensor, others: dict[str, Tensor | None]) -> None:
    if x_TD.dim() != 2 or not x_TD.shape[1]:
        raise ValueError(f"x_TD must be [T, D], got {list(x_TD.shape)}")
    shapes = {"residual_TD": x_TD.shape, "weight_D": x_TD.shape[1:]}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x_TD.device:
            raise ValueError(f"{name} must be on {x_TD.device}, got {tensor.device}")
        if tensor is not None and tensor.shape != shapes[name]:
            raise ValueError(f"{name} must be {list(shapes[name])}, got {list(tensor.shape)}")
