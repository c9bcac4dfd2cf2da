"""`swiglu`: its reference is in `op`, its backends in `triton` and `cpp`."""

from smbkernels.gated.op import swiglu

__all__ = ["swiglu"]
