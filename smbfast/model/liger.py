"""Liger's RMSNorm, RoPE and SwiGLU in the place of transformers' own, for the fast path on a GPU.

They are handed out as patches, which `smbfast.model.packed` puts in their place while a layer runs:
`forward` of an instance, and the function that an attention module looks up in its modeling module.
Outside nothing has changed, and the reference path runs transformers' code.

Each call looks at its tensors: Liger returns the dtype it is given, where transformers promotes; so
mixed dtypes, fp64, and tensors that are not on a GPU go through transformers' own code.

A graph through them is good for one backward: SwiGLU's writes gradients over what it kept, RoPE's
and the norms' over the gradient that comes in, and RoPE rotates in place.

Legend: T tokens, H heads, G key and value heads, C head dim, F width of the MLP.
"""

import functools
import logging
import sys
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Patch = tuple[MutableMapping[str, Any], str, Any]  # what stands under a name while a layer runs
DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float32)
FAMILIES = {
    "transformers.models.llama.modeling_llama": "Llama",
    "transformers.models.mistral.modeling_mistral": "Mistral",
    "transformers.models.qwen2.modeling_qwen2": "Qwen2",
    "transformers.models.qwen3.modeling_qwen3": "Qwen3",
}
ROPE = "apply_rotary_pos_emb"
log = logging.getLogger("smbfast")


def liger_patches(module: nn.Module) -> list[Patch]:
    """Of a decoder layer or a norm of `FAMILIES` on a GPU; elsewhere none.

    Why there are none on a GPU is logged once.
    """
    weight = next(module.parameters(), None)
    if weight is None or weight.device.type != DEVICE:
        return []
    patches: list[Patch] = []
    for part in module.modules():
        kind = _kind(part)
        if kind == "RMSNorm":
            # inside a layer nobody else reads the gradient of a norm's output
            forward = partial(_norm, part, part is not module)
            patches.append((vars(part), "forward", forward))
        elif kind == "MLP" and part.config.hidden_act in ("silu", "swish"):
            patches.append((vars(part), "forward", partial(_mlp, part)))
        elif kind == "Attention":
            modeling = vars(sys.modules[type(part).__module__])
            patches.append((modeling, ROPE, partial(_rope, modeling[ROPE])))
    if not patches:
        _say(f"{type(module).__name__} is not a layer of a known family")
    return patches if patches and _kernels() else []


def _kind(part: nn.Module) -> str | None:
    """RMSNorm, MLP, Attention and so on, of the families that are known here."""
    name, family = type(part).__name__, FAMILIES.get(type(part).__module__)
    return name.removeprefix(family) if family else None


@functools.cache
def _kernels() -> tuple[type[torch.autograd.Function], ...] | None:
    """Of RMSNorm, RoPE and SwiGLU; None where they cannot be imported."""
    try:  # takes seconds, and only where there is a GPU
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    except ImportError as error:
        _say(str(error))
        return None
    return LigerRMSNormFunction, LigerRopeFunction, LigerSiLUMulFunction


@functools.cache
def _say(reason: str) -> None:
    log.warning("Liger's RMSNorm, RoPE and SwiGLU are not used: %s", reason)


def _fits(*tensors: Tensor) -> bool:
    dtype = tensors[0].dtype
    alike = all(x.dtype == dtype and x.device.type == DEVICE for x in tensors)
    return alike and dtype in DTYPES


def _norm(module: nn.Module, in_place: bool, x: Tensor) -> Tensor:
    """[..., D] to the same; the mean square in fp32, the weight in the dtype of x."""
    if not _fits(x, module.weight):
        return type(module).forward(module, x)
    options = (module.variance_epsilon, 0.0, "llama", in_place)
    return _kernels()[0].apply(x, module.weight, *options)


def _mlp(module: nn.Module, x: Tensor) -> Tensor:
    """[..., D] to the same, through the module's own linears."""
    gate_TF, up_TF = module.gate_proj(x), module.up_proj(x)
    if _fits(gate_TF, up_TF):
        return module.down_proj(_kernels()[2].apply(gate_TF, up_TF))
    return module.down_proj(module.act_fn(gate_TF) * up_TF)


def _rope(
    own: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """q [1, H, T, C] and k [1, G, T, C] in place, by cos and sin [1, T, C]."""
    if unsqueeze_dim != 1 or not _fits(q, k, cos, sin):
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return _kernels()[1].apply(q, k, cos, sin)
