"""Cross-entropy of `hidden @ weight.T` at labelled rows.

    z = hidden_n . weight_v        loss_n = logsumexp_v(z) - z[label_n]

N labelled tokens, D width, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor

from smbkernels.registry import op


def _flops(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> int:
    return 2 * hidden_ND.shape[0] * weight_VD.numel()


@op(flops=_flops)
def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, label_N: Tensor) -> Tensor:
    """The summed loss, a scalar of at least fp32; every row is labelled."""
    logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype))
    if logits_NV.dtype.itemsize < 4:
        logits_NV = logits_NV.float()
    return F.cross_entropy(logits_NV, label_N, reduction="sum")
