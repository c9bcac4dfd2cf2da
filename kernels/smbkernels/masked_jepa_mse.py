"""Squared error of masked-position predictions against normalised targets.

    n(x)_d = w_d x_d / sqrt(mean_d x² + eps)        the target's final RMSNorm, if w is given
    L = scale * sum over m, mean over d, of (prediction_md - T(n(target[row_m]))_d)²

T is a layer norm without parameters in fp32 (eps 1e-5), or the identity. The gradient,
2 scale / D (prediction - T), goes to the prediction alone.

M masked positions, D width, T rows of the target encoder.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from smbkernels.registry import Backend, op

LAYER_NORM_EPS = 1e-5
_FAST = (torch.float32, torch.bfloat16)


def _fits(prediction_MD: Tensor, target_TD: Tensor, *_args, **_kwargs) -> str | None:
    """The backends compute in fp32; fp64 and mixed widths are the reference's."""
    if prediction_MD.dtype not in _FAST or target_TD.dtype not in _FAST:
        return f"dtypes must be fp32 or bf16, got {prediction_MD.dtype} and {target_TD.dtype}"
    return None


def _flops(prediction_MD: Tensor, *_args, **_kwargs) -> int:
    """Per element: RMSNorm 4, layer norm 6, error and square 3, gradient 1."""
    return 14 * prediction_MD.numel()


@op(
    Backend("triton", "triton.masked_jepa_mse", ("cuda",), _fits),
    Backend("cpp", "cpp.masked_jepa_mse", ("cpu",), _fits),
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
