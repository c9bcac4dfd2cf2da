"""SwiGLU on CPUs in C++: `csrc/layer.cpp`."""

import torch
from torch import Tensor

from smbkernels.autograd import rows
from smbkernels.cpp_build import missing
from smbkernels.gated.op import by_hand

__all__ = ["missing", "swiglu"]


def _forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return torch.ops.smb_cpp.swiglu(rows(gate_TF), rows(up_TF))


def _backward(grad_TF: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.smb_cpp.swiglu_bwd(rows(grad_TF), rows(gate), rows(up))


swiglu = by_hand("cpp", _forward, _backward)
