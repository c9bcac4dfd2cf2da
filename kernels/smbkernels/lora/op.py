"""Linears with LoRA on a frozen base, several that share one input at a time.

    y_i = x W_i' + s_i (x A_i') B_i' + bias_i

    dx   = sum_i dy_i W_i + s_i (dy_i B_i) A_i
    dA_i = s_i (dy_i B_i)' x        dB_i = s_i dy_i' (x A_i')

T tokens, K in and N out features, R rank; i counts the linears of a group: one, Q K V, or gate and
up. In backends x A' of a whole group is one [T, S] buffer, S the sum of the ranks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from smbkernels.autograd import autocast_dtype, no_autocast
from smbkernels.autograd import is_traced as _is_traced
from smbkernels.operation import Backend, op


def lora_flops(
    tokens: int,
    weight: list[tuple[int, int]],
    rank: list[int],
    *,
    backward: bool,
    needs_x: bool = True,
    needs_b: Sequence[bool] | None = None,
    needs_a: Sequence[bool] | None = None,
) -> int:
    """Of the matrix products, for [N, K] and R of each linear.

    Forward x W', x A', (x A') B'; backward dy W, dy B, (dy B) A, dA, dB: the frozen base has no
    weight gradient. `needs_*` leave out what no gradient is wanted of; None: of all.
    """
    total = 0
    for i, ((n, k), r) in enumerate(zip(weight, rank, strict=True)):
        if not backward:
            total += n * k + r * k + n * r
            continue
        wants_a = needs_a is None or needs_a[i]
        wants_b = needs_b is None or needs_b[i]
        total += needs_x * (n * k + r * k) + (needs_x or wants_a) * n * r
        total += wants_a * r * k + wants_b * n * r
    return 2 * tokens * total


def _flops(x_TK: Tensor, weight: list[Tensor], b: list[Tensor], *_args, **_kwargs) -> int:
    shapes = [(w.shape[0], w.shape[1]) for w in weight]
    tokens = x_TK.numel() // x_TK.shape[-1]
    return lora_flops(tokens, shapes, [v.shape[1] for v in b], backward=False)


def _fits_triton(x_TK: Tensor, *_args, **_kwargs) -> str | None:
    if x_TK.dtype not in (torch.float32, torch.bfloat16):
        return f"dtype must be fp32 or bf16, got {x_TK.dtype}"
    return None


@op(
    Backend("fused", "lora.fused", ("cuda", "cpu")),
    # not the default before a GPU has shown that it pays
    Backend("triton", "lora.triton", (), _fits_triton),
    flops=_flops,
)
def lora_linear(
    x_TK: Tensor,
    weight: list[Tensor],
    b: list[Tensor],
    a: list[Tensor],
    *,
    scale: list[float],
    bias: list[Tensor] | None = None,
) -> list[Tensor]:
    """The outputs [..., N_i] of a group, in the dtype of x; W and bias get no gradient.

    Factors in fp32 beside x in bf16 are rounded to bf16, and so are x A' and the outputs; sums are
    fp32. Gradients come in the dtype of the factor: here, what was rounded to bf16 and cast back.

    Args:
        x_TK: [..., K].
        weight: W_i, [N_i, K], frozen, in the dtype of x.
        b: B_i, [N_i, R_i]; fp32 or the dtype of x.
        a: A_i, [R_i, K].
        scale: s_i.
        bias: [N_i] of every linear, frozen.
    """
    outputs = []
    for i, w_NK in enumerate(weight):
        base_TN = F.linear(x_TK, w_NK.detach(), None if bias is None else bias[i].detach())
        low_TR = F.linear(x_TK, a[i].to(x_TK.dtype))
        outputs.append(base_TN + scale[i] * F.linear(low_TR, b[i].to(x_TK.dtype)))
    return outputs


class Group(NamedTuple):
    """The linears of a call; `bias` is empty where there is none, as it is in a backward."""

    weight: Sequence[Tensor]
    b: Sequence[Tensor]
    a: Sequence[Tensor]
    scale: Sequence[float]
    bias: Sequence[Tensor] = ()


class Needs(NamedTuple):
    """Which gradients are wanted: of the input, and of each B and each A."""

    x: bool
    b: Sequence[bool]
    a: Sequence[bool]


Forward = Callable[[Tensor, Group], list[Tensor]]
Backward = Callable[[Sequence[Tensor], Tensor | None, Tensor | None, Group, Needs], list[Tensor]]


def by_hand(backend: str, forward: Forward, backward: Backward) -> Callable[..., list[Tensor]]:
    """The operation on a backend, whose gradients are the formulas above.

    What is saved for the backward: x if an A needs a gradient, x A' if a B does, and references to
    parameters; nothing of size N.

    Args:
        forward: (x, group) -> the outputs and x A', [T, S].
        backward: (dy, x, low, group, needs) -> dx, dB of each, and dA of those that need one,
            stacked [S', K]; empty where none is needed. Gradients of factors are in their dtype,
            dA in the wider one if they differ.
    """
    name = f"smb::lora_linear_{backend}"

    @custom_op(name, mutates_args=())
    def outputs_and_low(
        x_TK: Tensor,
        weight: Sequence[Tensor],
        b: Sequence[Tensor],
        a: Sequence[Tensor],
        scale: Sequence[float],
        bias: Sequence[Tensor],
    ) -> list[Tensor]:
        return forward(x_TK, Group(weight, b, a, scale, bias))

    @outputs_and_low.register_fake
    def _(x_TK, weight, _b, a, *_scale_and_bias):
        *lead, K = x_TK.shape
        low_TS = x_TK.new_empty((x_TK.numel() // K, sum(v.shape[0] for v in a)))
        return [*(x_TK.new_empty((*lead, w.shape[0])) for w in weight), low_TS]

    @custom_op(f"{name}_bwd", mutates_args=())
    def gradients(
        dy: Sequence[Tensor],
        x_TK: Tensor | None,
        low_TS: Tensor | None,
        weight: Sequence[Tensor],
        b: Sequence[Tensor],
        a: Sequence[Tensor],
        scale: Sequence[float],
        needs_x: bool,
        needs_b: Sequence[bool],
        needs_a: Sequence[bool],
    ) -> list[Tensor]:
        needs = Needs(needs_x, needs_b, needs_a)
        return backward(dy, x_TK, low_TS, Group(weight, b, a, scale), needs)

    @gradients.register_fake
    def _(dy, _x_TK, _low_TS, weight, b, a, _scale, needs_x, needs_b, needs_a):
        lead, K = dy[0].shape[:-1], weight[0].shape[1]
        dx_TK = dy[0].new_empty((*lead, K) if needs_x else (0,))
        db = [v.new_empty(v.shape if n else (0,)) for v, n in zip(b, needs_b, strict=True)]
        rank = sum(v.shape[0] for v, n in zip(a, needs_a, strict=True) if n)
        return [dx_TK, *db, dy[0].new_empty((rank, K) if rank else (0,), dtype=wider(a))]

    def save(ctx, inputs, output) -> None:
        x_TK, weight, b, a, scale, bias = inputs
        needs = Needs(x_TK.requires_grad, *([v.requires_grad for v in g] for g in (b, a)))
        x_TK = x_TK if any(needs.a) else None
        low_TS = output[-1] if any(needs.b) else None
        ctx.save_for_backward(x_TK, low_TS, *weight, *b, *a)
        ctx.needs, ctx.scale, ctx.num_biases = needs, scale, len(bias)
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grads):
        x_TK, low_TS, *parameters = ctx.saved_tensors
        weight, b, a = _in_three(parameters)
        known = next((g for g in grads if g is not None), None)
        if known is None:
            none = [None] * len(weight)
            return None, none, none, none, None, [None] * ctx.num_biases
        # an output that no loss reads counts as one with a gradient of zero
        dy = [
            known.new_zeros((*known.shape[:-1], w.shape[0])) if g is None else g
            for g, w in zip(grads, weight, strict=False)
        ]
        group, needs = Group(weight, b, a, ctx.scale), ctx.needs
        with no_autocast(known):
            if _is_traced():
                results = gradients(dy, x_TK, low_TS, *group[:4], *needs)
            else:
                results = backward(dy, x_TK, low_TS, group, needs)
        dx_TK, *db, da_SK = results
        rows = [v.shape[0] for v, needed in zip(a, needs.a, strict=True) if needed]
        da = iter(da_SK.split(rows) if len(rows) > 1 else (da_SK,))
        return (
            dx_TK if needs.x else None,
            [None] * len(weight),
            [g if needed else None for g, needed in zip(db, needs.b, strict=True)],
            [next(da).to(v.dtype) if n else None for v, n in zip(a, needs.a, strict=True)],
            None,
            [None] * ctx.num_biases,
        )

    outputs_and_low.register_autograd(differentiate, setup_context=save)

    class Eager(torch.autograd.Function):
        # the same without the layers of Python around a custom op with lists, which cost 0.2 ms
        # a call forward and backward: more than the products of a small model
        @staticmethod
        def forward(ctx, x_TK, scale, bias, *parameters):
            group = Group(*_in_three(parameters), scale, bias)
            result = forward(x_TK, group)
            save(ctx, (x_TK, *group), result)
            return tuple(result)

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            dx_TK, dw, db, da, *_ = differentiate(ctx, grads)
            return dx_TK, None, None, *dw, *db, *da

    @register_flop_formula(getattr(torch.ops.smb, f"lora_linear_{backend}"), get_raw=True)
    def _(x_TK, weight, b, *_args, **_kwargs):
        return _flops(x_TK, weight, b)

    @register_flop_formula(getattr(torch.ops.smb, f"lora_linear_{backend}_bwd"), get_raw=True)
    def _(dy, _x_TK, _low_TS, weight, b, _a, _scale, needs_x, needs_b, needs_a, **_kwargs):
        shapes = [tuple(w.shape) for w in weight]
        needs = {"needs_x": needs_x, "needs_b": needs_b, "needs_a": needs_a}
        tokens = dy[0].numel() // shapes[0][0]
        return lora_flops(tokens, shapes, [v.shape[1] for v in b], backward=True, **needs)

    def lora_linear(
        x_TK: Tensor,
        weight: list[Tensor],
        b: list[Tensor],
        a: list[Tensor],
        *,
        scale: list[float],
        bias: list[Tensor] | None = None,
    ) -> list[Tensor]:
        group = Group(weight, b, a, scale, bias or [])
        dtype = autocast_dtype(x_TK)
        if dtype is not None:
            # as autocast does it for each linear; factors in fp32 are cast by the operation
            x_TK = x_TK.to(dtype)
            group = group._replace(
                weight=[w.to(dtype) for w in weight], bias=[v.to(dtype) for v in group.bias]
            )
        _check(x_TK, group)
        with no_autocast(x_TK):
            if _is_traced():
                return outputs_and_low(x_TK, *group)[:-1]
            if torch.is_grad_enabled():
                parameters = (*group.weight, *b, *a)
                return list(Eager.apply(x_TK, scale, group.bias, *parameters)[:-1])
            return forward(x_TK, group)[:-1]

    return lora_linear


def _in_three(values: Sequence) -> tuple[Sequence, Sequence, Sequence]:
    n = len(values) // 3
    return values[:n], values[n : 2 * n], values[2 * n :]


def wider(factors: Sequence[Tensor]) -> torch.dtype:
    """The widest dtype of a group's factors."""
    dtype = factors[0].dtype
    for factor in factors[1:]:
        dtype = torch.promote_types(dtype, factor.dtype)
    return dtype


def _check(x_TK: Tensor, group: Group) -> None:
    weight, b, a, scale, bias = group
    if not weight:
        raise ValueError("weight must hold at least one linear, got an empty list")
    for name, values in {"b": b, "a": a, "scale": scale, "bias": bias or None}.items():
        if values is not None and len(values) != len(weight):
            raise ValueError(
                f"{name} must have one entry for each of {len(weight)} linears, got {len(values)}"
            )
    K, known = x_TK.shape[-1], (x_TK.dtype, torch.float32)
    for i, w in enumerate(weight):
        if w.dim() != 2 or w.shape[1] != K or w.dtype != x_TK.dtype:
            raise ValueError(
                f"weight[{i}] must be {x_TK.dtype} [N, {K}], got {w.dtype} {list(w.shape)}"
            )
        for name, factor in (("weight", w), ("b", b[i]), ("a", a[i])):
            if factor.device != x_TK.device:
                raise ValueError(f"{name}[{i}] must be on {x_TK.device}, got {factor.device}")
        N, R = w.shape[0], a[i].shape[0]
        if b[i].shape != (N, R) or a[i].shape != (R, K):
            raise ValueError(
                f"b[{i}] and a[{i}] must be [{N}, R] and [R, {K}], got {list(b[i].shape)} and "
                f"{list(a[i].shape)}"
            )
        if b[i].dtype not in known or a[i].dtype not in known:
            raise ValueError(
                f"b[{i}] and a[{i}] must be fp32 or {x_TK.dtype}, got {b[i].dtype} and {a[i].dtype}"
            )
        if bias and (bias[i].shape != (N,) or bias[i].dtype != x_TK.dtype):
            raise ValueError(
                f"bias[{i}] must be {x_TK.dtype} [{N}], got {bias[i].dtype} {list(bias[i].shape)}"
            )
