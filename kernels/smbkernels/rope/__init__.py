"""`qk_norm_rope`: its reference is in `op`, its backends in `triton` and `cpp`."""

from smbkernels.rope.op import qk_norm_rope

__all__ = ["qk_norm_rope"]
