"""`linear_cross_entropy`: its reference is in `op`, its backend in `chunked`."""

from smbkernels.cross_entropy.op import chunk_rows, head_flops, linear_cross_entropy

__all__ = ["chunk_rows", "head_flops", "linear_cross_entropy"]
