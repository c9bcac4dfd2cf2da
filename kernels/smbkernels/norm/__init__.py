"""`add_rms_norm`: its reference is in `op`, its backends in `triton` and `cpp`."""

from smbkernels.norm.op import add_rms_norm

__all__ = ["add_rms_norm"]
