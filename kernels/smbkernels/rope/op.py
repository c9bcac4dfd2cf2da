"""Norms of queries and keys, head by head, and RoPE:

    n_c = w_c x_c / sqrt(mean_c x² + eps)        or x_c, where there is no weight
    y_c = n_c cos_c - n_(c + C/2) sin_c          for the first half of a head,
    y_c = n_c cos_c + n_(c - C/2) sin_c          for the second

    dn is dy turned back: cos_c dy_c + sin_(c + C/2) dy_(c + C/2), and cos_c dy_c - sin_(c - C/2)
    dy_(c - C/2); dx and dw are those of the norm.

As in transformers the norm of a head is rounded to the dtype of the stream, and so is its product
with the weight; the mean square is at least fp32. Cosines and sines get no gradient.

T tokens, H query and G key heads, C head dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from smbkernels.autograd import ByHand, alike
from smbkernels.norm.op import add_rms_norm
from smbkernels.operation import Backend, op

_FAST = (torch.float32, torch.bfloat16)
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _fits(*tensors: Tensor | None, **named: Tensor | float | None) -> str | None:
    """The backends compute in fp32; fp64 and mixed dtypes are the reference's."""
    named_tensors = (t for t in named.values() if isinstance(t, Tensor))
    return alike(_FAST, *tensors, *named_tensors)


def _flops(q_THC: Tensor, k_TGC: Tensor, *weights: Tensor | None, **_kwargs) -> int:
    """Per element: two products and a sum; with a norm square, sum and both products as well."""
    has_norm = weights[0] is not None
    return (3 + 4 * has_norm) * (q_THC.numel() + k_TGC.numel())


@op(
    Backend("triton", "rope.triton", ("cuda",), _fits),
    Backend("cpp", "rope.cpp", ("cpu",), _fits),
    flops=_flops,
)
def qk_norm_rope(
    q_THC: Tensor,
    k_TGC: Tensor,
    q_weight_C: Tensor | None,
    k_weight_C: Tensor | None,
    cos_TC: Tensor,
    sin_TC: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Normed and turned queries [T, H, C] and keys [T, G, C], in memory of their own.

    Args:
        q_THC: queries, fp32 or bf16 (fp64 in the reference); C is even. Gaps between tokens and
            between heads cost nothing, so that a view of what a linear returns is read as it is.
        k_TGC: keys.
        q_weight_C: of the norm of each head of queries; None: no norm, of keys neither.
        k_weight_C: of the norm of each head of keys.
        cos_TC: of the positions, as transformers makes them: frequencies stand twice in a row.
        sin_TC: the same.
        eps: added to the mean square.
    """
    turned = []
    for x_TNC, weight_C in ((q_THC, q_weight_C), (k_TGC, k_weight_C)):
        if weight_C is not None:
            _, x_TNC = add_rms_norm.reference(x_TNC, None, weight_C, eps=eps)
        first, second = x_TNC.chunk(2, dim=-1)
        half_turned_TNC = torch.cat((-second, first), dim=-1)
        cos_T1C, sin_T1C = cos_TC.detach()[:, None], sin_TC.detach()[:, None]
        turned.append(x_TNC * cos_T1C + half_turned_TNC * sin_T1C)
    return turned[0], turned[1]


def by_hand(
    backend: str, forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., Four]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation on a backend whose gradients are the formulas above.

    With a norm queries and keys are saved for the backward, which finds 1 / rms again; else nothing
    of the size of a head is.

    Args:
        forward: (q, k, q_weight, k_weight, cos, sin, eps) -> turned queries and keys.
        backward: (dq, dk, q, k, q_weight, k_weight, cos, sin, eps, needs_weights) -> the gradients
            of queries, keys and both weights, which are empty if they are not needed; q and k are
            None without a norm. The custom operations take their schemas from the annotations.
    """

    def fake(q_THC, k_TGC, *_inputs):
        return q_THC.new_empty(q_THC.shape), k_TGC.new_empty(k_TGC.shape)

    def fake_gradients(grad_q_THC, grad_k_TGC, *inputs):
        C = grad_q_THC.shape[-1] if inputs[-1] else 0
        like = (grad_q_THC.shape, grad_k_TGC.shape, C, C)
        return tuple(grad_q_THC.new_empty(shape) for shape in like)

    def save(ctx, inputs, _output) -> None:
        *heads, cos_TC, sin_TC, ctx.eps = inputs
        ctx.shapes = [x_TNC.shape for x_TNC in heads[:2]]
        heads = heads if heads[2] is not None else [None] * 4
        ctx.save_for_backward(*heads, cos_TC, sin_TC)

    def differentiate(ctx, gradients, *grads):
        known = next((g for g in grads if g is not None), None)
        if known is None:
            return (None,) * 7
        # an output that nothing reads counts as one with a gradient of zero
        pair = [
            known.new_zeros(shape) if g is None else g
            for g, shape in zip(grads, ctx.shapes, strict=True)
        ]
        needs = ctx.needs_input_grad[2:4]
        *heads, grad_qw_C, grad_kw_C = gradients(*pair, *ctx.saved_tensors, ctx.eps, any(needs))
        weights = (grad_qw_C if needs[0] else None, grad_kw_C if needs[1] else None)
        return *heads, *weights, None, None, None

    call = ByHand(
        f"qk_norm_rope_{backend}",
        forward=(forward, fake),
        backward=(backward, fake_gradients),
        flops=(lambda *args, **_: _flops(*args), _backward_flops),
        save=save,
        differentiate=differentiate,
    )

    def qk_norm_rope(
        q_THC: Tensor,
        k_TGC: Tensor,
        q_weight_C: Tensor | None,
        k_weight_C: Tensor | None,
        cos_TC: Tensor,
        sin_TC: Tensor,
        *,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        inputs = (q_THC, k_TGC, q_weight_C, k_weight_C, cos_TC.detach(), sin_TC.detach())
        _check(*inputs)
        return call(*inputs, eps)

    return qk_norm_rope


def _backward_flops(grad_q_THC, grad_k_TGC, *inputs, **_kwargs) -> int:
    """Per element: turning 3; of a norm two sums 5, the gradient 4, that of the weight 3."""
    has_norm, needs_weights = inputs[0] is not None, inputs[-1]
    return (3 + 9 * has_norm + 3 * needs_weights) * (grad_q_THC.numel() + grad_k_TGC.numel())


def _check(*inputs: Tensor | None) -> None:
    q_THC, k_TGC, *weights, _cos_TC, _sin_TC = inputs
    assert q_THC is not None and k_TGC is not None
    if q_THC.dim() != 3 or not q_THC.shape[2] or q_THC.shape[2] % 2:
        raise ValueError(f"q_THC must be [T, H, C] with an even C, got {list(q_THC.shape)}")
    T, _, C = q_THC.shape
    if k_TGC.dim() != 3 or (k_TGC.shape[0], k_TGC.shape[2]) != (T, C):
        raise ValueError(f"k_TGC must be [{T}, G, {C}], got {list(k_TGC.shape)}")
    if (weights[0] is None) != (weights[1] is None):
        given = [name for name, w in zip("qk", weights, strict=True) if w is not None]
        raise ValueError(f"q_weight_C and k_weight_C must both be given, got that of {given[0]}")
    names = ("k_TGC", "q_weight_C", "k_weight_C", "cos_TC", "sin_TC")
    shapes = (k_TGC.shape, (C,), (C,), (T, C), (T, C))
    for name, tensor, shape in zip(names, inputs[1:], shapes, strict=True):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        if tensor is not None and tensor.device != q_THC.device:
            raise ValueError(f"{name} must be on {q_THC.device}, got {tensor.device}")
