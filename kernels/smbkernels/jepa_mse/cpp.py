"""Masked JEPA MSE on CPUs in C++: `csrc/masked_jepa_mse.cpp`."""

import torch
from torch import Tensor

from smbkernels.cpp_build import missing
from smbkernels.jepa_mse.op import one_pass

__all__ = ["masked_jepa_mse", "missing"]


def _launch(
    prediction_MD: Tensor,
    target_TD: Tensor,
    row_M: Tensor,
    norm_weight_D: Tensor | None,
    normalize: bool,
    norm_eps: float,
    scale: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    weight_D = None if norm_weight_D is None else norm_weight_D.float().contiguous()
    return torch.ops.smb_cpp.masked_jepa_mse(
        _rows(prediction_MD),
        _rows(target_TD),
        row_M.contiguous(),
        weight_D,
        normalize,
        norm_eps,
        scale,
        needs_grad,
    )


def _rows(x_ND: Tensor) -> Tensor:
    """A tensor whose rows are contiguous; there may be gaps between them."""
    return x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()


masked_jepa_mse = one_pass("cpp", _launch)
