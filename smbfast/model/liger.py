"""RMSNorm, RoPE and SwiGLU of a packed layer: by Liger on a GPU, by transformers elsewhere.

Each call decides by its tensors. Liger returns the dtype it is given where transformers promotes,
so mixed dtypes, fp64, and tensors outside a GPU go through transformers' own code, as does
everything under `use("torch")`.

An autograd graph through Liger supports one backward only: SwiGLU overwrites what it stored, RoPE
and the norms overwrite the incoming gradient, and RoPE rotates in place.

Legend: T tokens, H heads, G key and value heads, C head dim, F width of the MLP.
"""

import functools
import logging
from typing import Any, NamedTuple

import torch
from smbkernels.registry import REFERENCE, everywhere
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # all families share it

from smbfast.base.parts import is_part

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float32)
log = logging.getLogger("smbfast")


class LigerFunctions(NamedTuple):
    """Liger's autograd functions."""

    rms_norm: type[torch.autograd.Function]
    rope: type[torch.autograd.Function]
    swiglu: type[torch.autograd.Function]


@is_part("norm")
def rms_norm(module: Any, x: Tensor, *, in_place: bool = False) -> Tensor:
    """Apply an RMSNorm module to [..., D]; the mean square is fp32, the weight in the dtype of x.

    Args:
        in_place: whether the backward may overwrite the gradient of the output. That is right
            where nothing else reads it, as inside a layer.
    """
    liger = _liger_for(x, module.weight)
    if liger is None:
        return module(x)
    return liger.rms_norm.apply(x, module.weight, module.variance_epsilon, 0.0, "llama", in_place)


def rope(q_THC: Tensor, k_TGC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated queries [T, H, C] and keys [T, G, C]; Liger rotates in place."""
    liger = _liger_for(q_THC, k_TGC, cos_TC, sin_TC)
    if liger is None:
        return apply_rotary_pos_emb(q_THC, k_TGC, cos_TC, sin_TC, unsqueeze_dim=1)
    q_1HTC, k_1GTC = (x.transpose(0, 1)[None] for x in (q_THC, k_TGC))
    q_1HTC, k_1GTC = liger.rope.apply(q_1HTC, k_1GTC, cos_TC[None], sin_TC[None])
    return q_1HTC[0].transpose(0, 1), k_1GTC[0].transpose(0, 1)


def swiglu(mlp: Any, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """Return act(gate) * up, [T, F], with the activation of the MLP."""
    liger = _liger_for(gate_TF, up_TF) if mlp.config.hidden_act in ("silu", "swish") else None
    return mlp.act_fn(gate_TF) * up_TF if liger is None else liger.swiglu.apply(gate_TF, up_TF)


def _liger_for(*tensors: Tensor) -> LigerFunctions | None:
    """Return Liger's functions if they apply to these tensors and can be imported, else None."""
    return _kernels() if _fits(*tensors) else None


def _fits(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    alike = all(x.dtype == dtype and x.device.type == DEVICE for x in tensors)
    return alike and dtype in DTYPES and everywhere() != REFERENCE


@functools.cache
def _kernels() -> LigerFunctions | None:
    """Import Liger's functions; return None, logged once, if that fails."""
    try:  # takes seconds, so only where there is a GPU
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        log.warning("Liger's RMSNorm, RoPE and SwiGLU are not used: %s", error)
        return None
    return LigerFunctions(LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction)
