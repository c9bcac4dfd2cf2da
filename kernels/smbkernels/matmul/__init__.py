"""`linear`: its reference is in `op`, its backends in `onednn` and `onednn_rows`.

`products` are the same choice for operations that multiply matrices inside a backend of their own.
"""

from smbkernels.matmul.op import linear

__all__ = ["linear"]
