"""`linear` by oneDNN, but for the gradient of the weight.

That is a sum over rows, for which oneDNN copies a factor first; some processors are slower with it.
"""

from smbkernels.matmul.onednn import by_hand
from smbkernels.matmul.products import missing

__all__ = ["linear", "missing"]

linear = by_hand("onednn_rows", weight_gradient=False)
