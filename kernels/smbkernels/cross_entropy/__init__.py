"""`linear_cross_entropy`: its reference is in `op`, its backends in `chunked` and `triton`."""

from smbkernels.cross_entropy.op import chunk_rows, head_flops, linear_cross_entropy

__all__ = ["chunk_rows", "head_flops", "linear_cross_entropy"]
