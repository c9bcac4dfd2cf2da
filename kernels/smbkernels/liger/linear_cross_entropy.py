"""Liger's fused linear cross-entropy: chunks as in ours, the loss by a Triton kernel.

It counts labels on the host, and so waits for the GPU once a call.
"""

from importlib.util import find_spec

from torch import Tensor

from smbkernels.linear_cross_entropy import one_pass, wide
from smbkernels.triton import platform


def missing(device: str) -> str | None:
    """Why Liger cannot run on this kind of device here, or None."""
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return platform.missing(device)


def _launch(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    label_N: Tensor,
    _token_R: None,
    _token_weight_RD: None,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    _needs_tokens: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # seconds to import, and only where it is asked for
    from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

    if not len(hidden_ND):  # its grid may not be empty
        loss = hidden_ND.new_zeros((), dtype=wide(hidden_ND.dtype))
        found = hidden_ND.new_zeros(hidden_ND.shape), weight_VD.new_zeros(weight_VD.shape)
    else:
        loss, _, _, _, *found, _ = fused_linear_cross_entropy_forward(
            hidden_ND.contiguous(),
            weight_VD.to(hidden_ND.dtype),
            label_N,
            reduction="sum",
            accum_dtype=wide(hidden_ND.dtype),
            compute_gradients=needs_hidden or needs_weight,
            weight_requires_grad=needs_weight,
        )
    dhidden_ND = found[0].mul_(scale) if needs_hidden else hidden_ND.new_empty(0)
    dweight_VD = weight_VD.new_empty(0)
    if needs_weight:
        dweight_VD = found[1].mul_(scale).to(weight_VD.dtype)
    return loss * scale, dhidden_ND, dweight_VD, hidden_ND.new_empty(0)


linear_cross_entropy = one_pass("liger", _launch)
