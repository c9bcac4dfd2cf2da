"""Timeline attention in two calls of the flash attention that is part of torch.

It is in every CUDA build: FlashAttention 2, or what `torch.nn.attention.
activate_flash_attention_impl` has put in its place (FA3, FA4). Neither call has a window, which
FA4's backward refuses in torch 2.11. Masks are of sequences with as many queries as keys, or none,
so that it makes no difference where they are aligned.

Gradients of queries are added up by atomics: the same inputs may give other bits, unless
`torch.use_deterministic_algorithms(True)` asks for the slower way. It has not run on a GPU yet, and
so runs only where it is asked for.
"""

import functools
from typing import cast

import torch
from torch import Tensor

from smbkernels.attention.engines import Engine, differs
from smbkernels.attention.op import timeline_attention as attention
from smbkernels.attention.two_calls import decomposed

# a batch of single queries would be computed in another layout, of as many sequences as queries
_LEAST_QUERIES = 2
_TENSORS, _BOUNDS = ("query", "key", "value"), ("cum_seq_q", "cum_seq_k", "max_q", "max_k")
FORWARD = (*_TENSORS, *_BOUNDS, "dropout_p", "is_causal", "return_debug_mask")
BACKWARD = (
    *("grad_out", *_TENSORS, "out", "logsumexp", *_BOUNDS),
    *("dropout_p", "is_causal", "rng_state", "unused"),
)


def missing(device: str) -> str | None:
    """Why it cannot run on this kind of device here, or None."""
    if device != "cuda":
        return f"tensors are on {device}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability must be 8.0 or higher, got {major}.{minor}"
    engine_or_reason = engine()
    return engine_or_reason if isinstance(engine_or_reason, str) else None


@functools.cache
def engine() -> Engine | str:
    """Torch's operations, or why they cannot be called as here."""
    if torch.version.hip:
        return "flash attention of torch has another log-sum-exp on ROCm"
    aten = torch.ops.aten
    reason = differs(aten._flash_attention_forward, FORWARD, "scale")
    reason = reason or differs(aten._flash_attention_backward, BACKWARD, "scale")
    if reason:
        return f"flash attention of torch {torch.__version__}: {reason}"
    return Engine("flash attention of torch", _forward, _backward)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    bounds = (cu_q, cu_k, max(max_q, _LEAST_QUERIES), max_k)
    no_dropout, no_mask = 0.0, False
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, no_dropout, causal, no_mask, scale=scale
    )
    return out, lse


def _backward(*tensors_and_sizes) -> tuple[Tensor, Tensor, Tensor]:
    *tensors_and_bounds, causal, scale = tensors_and_sizes
    query = tensors_and_bounds[1]
    # the state of dropout, which is not read without any
    states = (query.new_empty(2, dtype=torch.uint64), query.new_empty(0))
    return torch.ops.aten._flash_attention_backward(
        *tensors_and_bounds, 0.0, causal, *states, scale=scale
    )


def _installed() -> Engine:
    """What `missing` has made sure of."""
    return cast(Engine, engine())


timeline_attention = decomposed("flash", _installed)
timeline_attention.__doc__ = attention.__doc__
