"""RMSNorm, RoPE and SwiGLU of a packed layer: by Liger on a GPU, by transformers elsewhere.

Each call looks at its tensors: Liger returns the dtype it is given, where transformers promotes; so
mixed dtypes, fp64, and tensors that are not on a GPU go through transformers' own code, and so does
everything under `use("torch")`.

A graph through Liger is good for one backward: SwiGLU writes gradients over what it stored, RoPE
and the norms over the gradient that comes in, and RoPE rotates in place.

Legend: T tokens, H heads, G key and value heads, C head dim, F width of the MLP.
"""

import functools
import logging

import torch
from smbkernels.registry import REFERENCE, everywhere
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # all families share it

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float32)
log = logging.getLogger("smbfast")


def rms_norm(module: nn.Module, x: Tensor, *, in_place: bool = False) -> Tensor:
    """[..., D] to the same; the mean square in fp32, the weight in the dtype of x.

    Args:
        in_place: the backward may write over the gradient of the output; right where nobody else
            reads it, as inside a layer.
    """
    if not _fits(x, module.weight):
        return module(x)
    options = (module.variance_epsilon, 0.0, "llama", in_place)
    return _kernels()[0].apply(x, module.weight, *options)


def rope(q_THC: Tensor, k_TGC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated queries and keys; by Liger in place."""
    if not _fits(q_THC, k_TGC, cos_TC, sin_TC):
        return apply_rotary_pos_emb(q_THC, k_TGC, cos_TC, sin_TC, unsqueeze_dim=1)
    q_1HTC, k_1GTC = (x.transpose(0, 1)[None] for x in (q_THC, k_TGC))
    q_1HTC, k_1GTC = _kernels()[1].apply(q_1HTC, k_1GTC, cos_TC[None], sin_TC[None])
    return q_1HTC[0].transpose(0, 1), k_1GTC[0].transpose(0, 1)


def swiglu(mlp: nn.Module, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """act(gate) up, [T, F], with the activation of the MLP."""
    if mlp.config.hidden_act in ("silu", "swish") and _fits(gate_TF, up_TF):
        return _kernels()[2].apply(gate_TF, up_TF)
    return mlp.act_fn(gate_TF) * up_TF


def _fits(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    alike = all(x.dtype == dtype and x.device.type == DEVICE for x in tensors)
    return alike and dtype in DTYPES and everywhere() != REFERENCE and _kernels() is not None


@functools.cache
def _kernels() -> tuple[type[torch.autograd.Function], ...] | None:
    """Liger's functions for RMSNorm, RoPE and SwiGLU; None, logged once, if they do not import."""
    try:  # takes seconds, and only where there is a GPU
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        log.warning("Liger's RMSNorm, RoPE and SwiGLU are not used: %s", error)
        return None
    return LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction
