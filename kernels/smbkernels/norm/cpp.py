"""Residual and RMSNorm on CPUs in C++: `csrc/layer.cpp`."""

import torch
from torch import Tensor

from smbkernels.autograd import rows
from smbkernels.cpp_build import missing
from smbkernels.norm.op import by_hand

__all__ = ["add_rms_norm", "missing"]


def _forward(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    residual_TD = None if residual_TD is None else rows(residual_TD)
    sum_TD, normed_TD, rstd_T = torch.ops.smb_cpp.add_rms_norm(
        rows(x_TD), residual_TD, weight_D.contiguous(), eps
    )
    return x_TD if residual_TD is None else sum_TD, normed_TD, rstd_T


def _backward(
    grad_sum_TD: Tensor | None,
    grad_normed_TD: Tensor,
    sum_TD: Tensor,
    rstd_T: Tensor,
    weight: Tensor,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    grad_sum_TD = None if grad_sum_TD is None else rows(grad_sum_TD)
    return torch.ops.smb_cpp.add_rms_norm_bwd(
        grad_sum_TD, rows(grad_normed_TD), rows(sum_TD), rstd_T, weight.contiguous(), needs_weight
    )


add_rms_norm = by_hand("cpp", _forward, _backward)
