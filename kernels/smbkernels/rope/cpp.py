"""Norms of heads and RoPE on CPUs in C++: `csrc/layer.cpp`."""

import torch
from torch import Tensor

from smbkernels.autograd import rows
from smbkernels.cpp_build import missing
from smbkernels.rope.op import Four, by_hand

__all__ = ["missing", "qk_norm_rope"]


def _forward(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    cos_TC: Tensor,
    sin_TC: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    weights = _whole(q_weight_C), _whole(k_weight_C)
    return torch.ops.smb_cpp.qk_norm_rope(
        rows(q_THC), rows(k_TGC), *weights, rows(cos_TC), rows(sin_TC), eps
    )


def _backward(
    grad_q_THC: Tensor,
    grad_k_TGC: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos_TC: Tensor,
    sin_TC: Tensor,
    eps: float,
    needs_weights: bool,
) -> Four:
    heads = (None if q is None else rows(q), None if k is None else rows(k))
    weights = _whole(q_weight), _whole(k_weight)
    angles = rows(cos_TC), rows(sin_TC)
    return torch.ops.smb_cpp.qk_norm_rope_bwd(
        rows(grad_q_THC), rows(grad_k_TGC), *heads, *weights, *angles, eps, needs_weights
    )


def _whole(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


qk_norm_rope = by_hand("cpp", _forward, _backward)
