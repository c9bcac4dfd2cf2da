"""Timeline attention on CPUs in C++: `csrc/timeline_attention.cpp`.

All segments are one call, which computes in fp32 and holds the scores of a block alone.
"""

import torch
from torch import Tensor

from smbkernels.attention.op import Inputs, forward_backward
from smbkernels.attention.op import timeline_attention as attention
from smbkernels.cpp_build import missing as _not_built


@torch.compiler.assume_constant_result
def missing(device: str) -> str | None:
    """Why it cannot run on this kind of device here, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device == "cpu" and capability not in ("AVX2", "AVX512"):
        return f"this CPU must have AVX2 or AVX-512 for it to pay, torch says {capability}"
    return _not_built(device)


def _forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return torch.ops.smb_cpp.timeline_attention(*_contiguous(*inputs[:3]), *inputs[3:])


def _backward(
    grad_out_THC: Tensor, out_THC: Tensor, lse_HT: Tensor, inputs: Inputs
) -> tuple[Tensor, ...]:
    tensors = (*_contiguous(grad_out_THC, *inputs[:3]), out_THC, lse_HT)
    return torch.ops.smb_cpp.timeline_attention_bwd(*tensors, *inputs[3:])


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose heads are contiguous; rows and heads may lie anywhere."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


timeline_attention = forward_backward("cpp", _forward, _backward)
timeline_attention.__doc__ = attention.__doc__
