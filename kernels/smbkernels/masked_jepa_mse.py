"""Squared error of masked-position predictions against normalised targets.

    L = sum over m, mean over d, of (prediction_md - T(target[row_m])_d)^2

T is a layer norm without parameters in fp32, or the identity.

M masked positions, D width, T rows of the target encoder.
"""

import torch.nn.functional as F
from torch import Tensor


def masked_jepa_mse(
    prediction_MD: Tensor, target_TD: Tensor, row_M: Tensor, *, normalize: bool = True
) -> Tensor:
    """The sum over positions of the mean over the width, a scalar of at least fp32."""
    target_MD = normalized_target(target_TD[row_M].detach(), normalize=normalize)
    error_MD = prediction_MD.to(target_MD.dtype) - target_MD
    return error_MD.square().mean(-1).sum()


def normalized_target(target_MD: Tensor, *, normalize: bool) -> Tensor:
    """T of the formula; at least fp32."""
    target_MD = target_MD.float() if target_MD.dtype.itemsize < 4 else target_MD
    return F.layer_norm(target_MD, target_MD.shape[-1:]) if normalize else target_MD
