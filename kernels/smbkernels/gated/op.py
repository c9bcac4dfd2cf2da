"""The gated activation of an MLP: out = silu(gate) up, silu(g) = g σ(g), σ(g) = 1 / (1 + exp(-g)).

    d gate = dout up σ(gate) (1 + gate (1 - σ(gate)))        d up = dout silu(gate)

In bf16 silu(gate) is rounded before the product, as in transformers.

T tokens, F width of the MLP.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from smbkernels.autograd import ByHand, alike
from smbkernels.operation import Backend, op

_FAST = (torch.float32, torch.bfloat16)


def _fits(*inputs: Tensor, **named: Tensor) -> str | None:
    """The backends compute in fp32; fp64 and mixed dtypes are the reference's."""
    return alike(_FAST, *inputs, *named.values())


def _flops(first: Tensor, *_args, **_kwargs) -> int:
    """Per element: two products."""
    return 2 * first.numel()


@op(
    Backend("triton", "gated.triton", ("cuda",), _fits),
    Backend("cpp", "gated.cpp", ("cpu",), _fits),
    flops=_flops,
)
def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) up, [T, F].

    Args:
        gate_TF: fp32 or bf16 (fp64 in the reference); rows may have gaps between them.
        up_TF: the same.
    """
    return F.silu(gate_TF) * up_TF


def by_hand(
    backend: str,
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, Tensor]],
) -> Callable[[Tensor, Tensor], Tensor]:
    """The operation on a backend whose gradients are the formulas above.

    Both inputs are saved for the backward, and nothing else.

    Args:
        forward: (gate, up) -> the output.
        backward: (dout, gate, up) -> the gradients of both. The custom operations take their
            schemas from the annotations.
    """

    def fake(first, _second):
        return first.new_empty(first.shape)

    def fake_gradients(_grad, *inputs):
        return tuple(x.new_empty(x.shape) for x in inputs)

    def differentiate(ctx, gradients, grad):
        return (None, None) if grad is None else gradients(grad, *ctx.saved_tensors)

    call = ByHand(
        f"swiglu_{backend}",
        forward=(forward, fake),
        backward=(backward, fake_gradients),
        flops=(lambda *args, **_: _flops(*args), lambda grad, *_, **__: 7 * grad.numel()),
        save=lambda ctx, inputs, _output: ctx.save_for_backward(*inputs),
        differentiate=differentiate,
    )

    def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        _check(gate_TF, up_TF)
        return call(gate_TF, up_TF)

    return swiglu


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.dim() != 2 or not gate.shape[1]:
        raise ValueError(f"gate_TF must be [T, F], got {list(gate.shape)}")
    if up.shape != gate.shape:
        raise ValueError(f"up_TF must be {list(gate.shape)}, got {list(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"up_TF must be on {gate.device}, got {up.device}")
