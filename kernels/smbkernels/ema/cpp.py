"""Exponential moving average of LoRA-merged weights on CPUs in C++: `csrc/ema_update.cpp`."""

import torch

from smbkernels.cpp_build import missing
from smbkernels.ema.op import Lists, in_place

__all__ = ["ema_update_", "missing"]


def _launch(lists: Lists, tau: float) -> None:
    # adapters are small next to the matrices
    b, a = ([x.float().contiguous() for x in side] for side in (lists.b, lists.a))
    torch.ops.smb_cpp.ema_update(*lists._replace(b=b, a=a), tau)


ema_update_ = in_place("cpp", _launch)
