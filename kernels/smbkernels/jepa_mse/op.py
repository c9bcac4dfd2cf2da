"""Squared error of masked-position predictions against normalised targets.

    n(x)_d = w_d x_d / sqrt(mean_d x² + eps)        the target's final RMSNorm, if w is given
    L = scale * sum over m, mean over d, of (prediction_md - T(n(target[row_m]))_d)²

T is a layer norm without parameters in fp32 (eps 1e-5), or the identity. The gradient,
2 scale / D (prediction - T), goes to the prediction alone.

M masked positions, D width, T rows of the target encoder.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.autograd import scaled
from smbkernels.operation import Backend, op

LAYER_NORM_EPS = 1e-5
WIDEST = 16384
_FAST = (torch.float32, torch.bfloat16)


def _fits(prediction_MD: Tensor, target_TD: Tensor, *_args, **_kwargs) -> str | None:
    """The backends compute in fp32; fp64 and mixed widths are the reference's."""
    if prediction_MD.dtype not in _FAST or target_TD.dtype not in _FAST:
        return f"dtypes must be fp32 or bf16, got {prediction_MD.dtype} and {target_TD.dtype}"
    return None


def _fits_registers(prediction_MD: Tensor, target_TD: Tensor, *_args, **_kwargs) -> str | None:
    """A program of the Triton kernel holds a row in registers."""
    if prediction_MD.shape[-1] > WIDEST:
        return f"the width must be at most {WIDEST}, got {prediction_MD.shape[-1]}"
    return _fits(prediction_MD, target_TD)


def _flops(prediction_MD: Tensor, *_args, **_kwargs) -> int:
    """Per element: RMSNorm 4, layer norm 6, error and square 3, gradient 1."""
    return 14 * prediction_MD.numel()


@op(
    Backend("triton", "jepa_mse.triton", ("cuda",), _fits_registers),
    Backend("cpp", "jepa_mse.cpp", ("cpu",), _fits),
    flops=_flops,
)
def masked_jepa_mse(
    prediction_MD: Tensor,
    target_TD: Tensor,
    row_M: Tensor,
    norm_weight_D: Tensor | None = None,
    *,
    normalize: bool = True,
    norm_eps: float = 1e-6,
    scale: float = 1.0,
) -> Tensor:
    """The scaled sum over positions of the mean over the width, a scalar of at least fp32.

    Args:
        prediction_MD: fp32 or bf16 (fp64 in the reference).
        target_TD: the target encoder's hidden states; before its final norm if that is given.
        row_M: int64, the row of `target_TD` that each prediction is compared with; may repeat.
        norm_weight_D: weight of the target encoder's final RMSNorm; None: `target_TD` is normed.
        normalize: T is a layer norm; False: the identity.
        norm_eps: of the RMSNorm.
        scale: of loss and gradient, such as w_jepa / masked positions of the step; given here, not
            multiplied after, the gradient is complete in one pass.
    """
    target_MD = target_TD[row_M].detach()
    if norm_weight_D is not None:
        target_MD = _wide(target_MD)
        mean_square_M1 = target_MD.square().mean(-1, keepdim=True)
        target_MD = target_MD * torch.rsqrt(mean_square_M1 + norm_eps) * norm_weight_D.detach()
    target_MD = normalized_target(target_MD, normalize=normalize)
    error_MD = prediction_MD.to(target_MD.dtype) - target_MD
    return error_MD.square().mean(-1).sum() * scale


def normalized_target(target_MD: Tensor, *, normalize: bool) -> Tensor:
    """T of the formula; at least fp32."""
    target_MD = _wide(target_MD)
    if not normalize:
        return target_MD
    return F.layer_norm(target_MD, target_MD.shape[-1:], eps=LAYER_NORM_EPS)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype.itemsize < 4 else x


def one_pass(backend: str, launch: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """The operation on a backend that computes loss and gradient in one pass.

    Args:
        launch: (prediction, target, row, norm_weight, normalize, norm_eps, scale, needs_grad) ->
            the loss, an fp32 scalar, and its gradient like the prediction (empty if not needed).
            The custom operation takes its schema from the annotations.
    """
    loss_and_grad = custom_op(f"smb::masked_jepa_mse_{backend}", launch, mutates_args=())

    @loss_and_grad.register_fake
    def _(prediction_MD, *_inputs_and_options):
        *_, needs_grad = _inputs_and_options
        loss = prediction_MD.new_empty((), dtype=torch.float32)
        shape = prediction_MD.shape if needs_grad else (0,)
        return loss, prediction_MD.new_empty(shape)

    def save(ctx, inputs, output) -> None:
        ctx.save_for_backward(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx, grad_loss, _grad_of_grad):
        if grad_loss is None:
            raise NotImplementedError(
                f"masked_jepa_mse on {backend} has no second derivative; its reference has"
            )
        return scaled(ctx.saved_tensors[0], grad_loss, in_place=False), *[None] * 7

    loss_and_grad.register_autograd(backward, setup_context=save)
    packet = getattr(torch.ops.smb, f"masked_jepa_mse_{backend}")
    register_flop_formula(packet, get_raw=True)(lambda p, *_, **__: _flops(p))

    def masked_jepa_mse(
        prediction_MD: Tensor,
        target_TD: Tensor,
        row_M: Tensor,
        norm_weight_D: Tensor | None = None,
        *,
        normalize: bool = True,
        norm_eps: float = 1e-6,
        scale: float = 1.0,
    ) -> Tensor:
        _check(prediction_MD, target_TD, row_M, norm_weight_D)
        needs_grad = torch.is_grad_enabled() and prediction_MD.requires_grad
        norm = None if norm_weight_D is None else norm_weight_D.detach()
        return loss_and_grad(
            prediction_MD, target_TD.detach(), row_M, norm, normalize, norm_eps, scale, needs_grad
        )[0]

    return masked_jepa_mse


def _check(
    prediction_MD: Tensor, target_TD: Tensor, row_M: Tensor, norm_weight_D: Tensor | None
) -> None:
    if prediction_MD.dim() != 2 or not prediction_MD.shape[1]:
        raise ValueError(f"prediction_MD must be [M, D], got {list(prediction_MD.shape)}")
    M, D = prediction_MD.shape
    others = {"target_TD": target_TD, "row_M": row_M, "norm_weight_D": norm_weight_D}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != prediction_MD.device:
            raise ValueError(f"{name} must be on {prediction_MD.device}, got {tensor.device}")
    if target_TD.dim() != 2 or target_TD.shape[1] != D:
        raise ValueError(f"target_TD must be [T, {D}], got {list(target_TD.shape)}")
    if row_M.shape != (M,) or row_M.dtype != torch.int64:
        raise ValueError(
            f"row_M must be int64 of shape [{M}], got {row_M.dtype} of {list(row_M.shape)}"
        )
    if norm_weight_D is not None and norm_weight_D.shape != (D,):
        raise ValueError(f"norm_weight_D must be [{D}], got {list(norm_weight_D.shape)}")
