"""Varlen attention of installed libraries behind one signature: flash-attn, else torch's own.

    forward(query, key, value, cu_q, cu_k, max_q, max_k, scale) -> out, lse [H, Tq] in fp32
    backward(grad_out, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, scale) -> 3 gradients

Sequence i has queries [cu_q[i], cu_q[i + 1]) and keys [cu_k[i], cu_k[i + 1]), int32 on the device.
Causal, aligned bottom right: of L queries and P keys, query j sees keys [0, P - L + j]. Both
libraries run FlashAttention 2's kernels, whose mask is `column < row + 1 + P - L` (`mask.h` since
2.1). Their backward adds up the gradient of the queries by atomics unless they are asked to be
deterministic; here they always are, so that the same inputs give the same bits.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CAUSAL = (-1, 0)  # keys to the left without limit, none to the right of the diagonal


@dataclass(frozen=True)
class Engine:
    """A library's varlen attention, forward and backward as in the module's docstring."""

    name: str
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


@functools.cache
def engine() -> Engine | str:
    """What is installed here, or why nothing fits."""
    reasons = []
    for find in (_installed_flash, _installed_torch):
        engine_or_reason = find()
        if isinstance(engine_or_reason, Engine):
            return engine_or_reason
        reasons.append(engine_or_reason)
    return "; ".join(reasons)


def _installed_flash() -> Engine | str:
    try:
        import flash_attn
        from flash_attn import flash_attn_interface as interface
    except ImportError as error:
        return f"flash-attn cannot be imported: {error}"
    names = ("flash_attn_varlen_func", "_flash_attn_varlen_backward")
    return flash_engine(flash_attn.__version__, *(getattr(interface, n, None) for n in names))


def _installed_torch() -> Engine | str:
    if torch.version.hip:
        return "torch's varlen_attn has another log-sum-exp on ROCm"
    try:
        from torch.nn.attention import varlen
    except ImportError as error:
        return f"torch's varlen_attn cannot be imported: {error}"
    backward = getattr(torch.ops.torch_attn, "_varlen_attn_backward", None)
    return torch_engine(varlen.varlen_attn, backward, varlen.AuxRequest(lse=True))


def flash_engine(
    version: str, attend: Callable | None, attend_backward: Callable | None
) -> Engine | str:
    """flash-attn 2.7 or newer: before, the log-sum-exp was padded."""
    if tuple(int(n) for n in version.split(".")[:2]) < (2, 7):
        return f"flash-attn must be 2.7 or newer, got {version}"
    # a right window of 0 keeps a batch of single queries from being computed in another layout
    forward_options = {"causal": True, "window_size": _CAUSAL, "return_attn_probs": True}
    backward_options = {
        "dropout_p": 0.0,
        "causal": True,
        "window_size_left": _CAUSAL[0],
        "window_size_right": _CAUSAL[1],
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": True,
    }
    if attend is None or attend_backward is None:
        return f"flash-attn {version}: a function is not there"
    lacks = _lacks(attend, 7, (*forward_options, "softmax_scale")) or _lacks(
        attend_backward, 13, (*backward_options, "softmax_scale")
    )
    if lacks:
        return f"flash-attn {version}: {lacks}"

    def forward(*tensors_and_sizes, scale):
        out, lse, *_ = attend(*tensors_and_sizes, softmax_scale=scale, **forward_options)
        return out, lse

    def backward(grad_out, query, key, value, out, lse, *sequences, scale):
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        tensors = (grad_out, query, key, value, out, lse, *grads)
        attend_backward(*tensors, *sequences, softmax_scale=scale, **backward_options)
        return grads

    return Engine(f"flash-attn {version}", _by_position(forward), _by_position(backward))


def torch_engine(attend: Callable, attend_backward: Callable | None, aux) -> Engine | str:
    """torch's `varlen_attn`, whose options differ by version.

    2.10 has `is_causal` and no scale and is refused. From 2.11 on a window says what is causal.
    From 2.12 on fewer key heads must be asked for by `enable_gqa`; 2.11 takes them as they are.

    Args:
        attend: `varlen_attn`.
        attend_backward: the operation behind its autograd.
        aux: what asks for the log-sum-exp.
    """
    if attend_backward is None:
        return f"varlen_attn of torch {torch.__version__}: a function is not there"
    options = {"window_size": _CAUSAL, "return_aux": aux}
    lacks = _lacks(attend, 7, (*options, "scale"))
    named = ("is_causal", "rng_state", "scale", "window_size")
    lacks = lacks or _lacks(attend_backward, 10, named)
    if lacks:
        return f"varlen_attn of torch {torch.__version__}: {lacks}"
    if "enable_gqa" in _parameters(attend):
        options["enable_gqa"] = True

    def forward(*tensors_and_sizes, scale):
        return attend(*tensors_and_sizes, scale=scale, **options)

    def backward(*tensors_and_sizes, scale):
        unused = torch.zeros(2, dtype=torch.uint64, device=tensors_and_sizes[0].device)
        with _deterministic():
            return attend_backward(
                *tensors_and_sizes,
                is_causal=True,
                rng_state=unused,
                scale=scale,
                window_size=list(_CAUSAL),
            )

    return Engine("torch varlen_attn", _by_position(forward), _by_position(backward))


def _by_position(function: Callable) -> Callable:
    return lambda *args: function(*args[:-1], scale=args[-1])


@contextmanager
def _deterministic() -> Iterator[None]:
    """FlashAttention in torch asks this global switch; only while its backward is launched."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # its attribute is made at run time
    fill = switches.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    switches.fill_uninitialized_memory = fill and strict
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(strict, warn_only=warn_only)
        switches.fill_uninitialized_memory = fill


def _lacks(function: Callable, positions: int, options: tuple[str, ...]) -> str | None:
    """Why a call with so many arguments by position and these by name would fail, or None."""
    needed = _parameters(function)
    names = list(needed)
    absent = [n for n in options if n not in names[positions:]]
    if len(names) < positions or absent:
        return f"no argument {', '.join(absent) or positions}"
    more = [n for n in names[positions:] if needed[n] and n not in options]
    return f"argument {', '.join(more)} is not known here" if more else None


def differs(operation: Any, by_position: tuple[str, ...], *options: str) -> str | None:
    """Why an operation of torch cannot be called with these arguments in this order, or None."""
    arguments = {a.name: not a.has_default_value() for a in operation.default._schema.arguments}
    names = list(arguments)
    first, rest = tuple(names[: len(by_position)]), names[len(by_position) :]
    if first != by_position:
        return f"arguments must be {', '.join(by_position)}, got {', '.join(first)}"
    absent = [n for n in options if n not in rest]
    if absent:
        return f"no argument {', '.join(absent)}"
    more = [n for n in rest if arguments[n] and n not in options]
    return f"argument {', '.join(more)} is not known here" if more else None


def _parameters(function: Callable) -> dict[str, bool]:
    """Arguments of a function or of a custom operation, and whether each must be given."""
    overload = getattr(function, "default", None)
    if isinstance(overload, torch._ops.OpOverload):
        return {a.name: not a.has_default_value() for a in overload._schema.arguments}
    parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return {name: p.default is p.empty for name, p in parameters.items()}
