"""What operations that write their own backward share: autocast, the factor of a gradient, and a
forward and a backward that become one differentiable call."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

AUTOCAST = ("cpu", "cuda")  # devices whose autocast is honoured


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast would cast this input of a matrix product, or None."""
    kind = x.device.type
    if kind not in AUTOCAST or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def no_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on the device of `x`."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if kind in AUTOCAST else nullcontext()


def scaled(grad: Tensor, grad_loss: Tensor, *, in_place: bool) -> Tensor:
    """A gradient that the forward computed, times the gradient of its loss.

    Args:
        grad: of an input, for a loss whose own gradient is 1.
        grad_loss: a scalar.
        in_place: the gradient is so large that it is multiplied where it lies, unless somebody
            will ask for it again; the factor of a product out of place is rounded to its dtype.
    """
    # subclasses stand in for tensors while a graph is traced
    is_plain = type(grad_loss) is Tensor and not torch.compiler.is_compiling()
    is_retained = is_plain and torch._C._autograd._get_current_graph_task_keep_graph()
    # reading a scalar on a GPU would wait for it; on a CPU it saves a pass over the gradient
    if is_plain and grad_loss.device.type == "cpu" and float(grad_loss) == 1.0:
        # what is handed out belongs to the caller: a graph that is retained needs its own
        return grad.clone() if is_retained else grad
    if not in_place:
        return grad * grad_loss
    if is_plain and not is_retained:
        return grad.mul_(grad_loss)
    return grad * grad_loss.to(grad.dtype)


class ByHand:
    """A forward and a backward as custom ops `smb::<name>` and `smb::<name>_bwd`.

    Called with all arguments of the forward by position, it is differentiable. Each part is a pair
    of a function and its fake. A forward may return an input; the custom op, which must not, gives
    a copy of it.

    Args:
        forward: annotated, for the schema: inputs -> a tuple of tensors, or one.
        backward: annotated: what `differentiate` gives it.
        flops: of the forward and of the backward, from their own arguments.
        save: (ctx, inputs, output); through `ctx.save_for_backward`.
        differentiate: (ctx, backward, *gradients of the outputs) -> a gradient or None for each
            input; gradients of outputs that nothing reads are None.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: tuple[Callable[..., Any], Callable[..., Any]],
        backward: tuple[Callable[..., Any], Callable[..., Any]],
        flops: tuple[Callable[..., int], Callable[..., int]],
        save: Callable[..., None],
        differentiate: Callable[..., tuple],
    ) -> None:
        self.forward = forward[0]
        self.traced = custom_op(f"smb::{name}", _copying(forward[0]), mutates_args=())
        gradients = custom_op(f"smb::{name}_bwd", backward[0], mutates_args=())
        for made, (_, fake), count in zip(
            (self.traced, gradients), (forward, backward), flops, strict=True
        ):
            made.register_fake(fake)
            packet = getattr(torch.ops.smb, made._name.removeprefix("smb::"))
            register_flop_formula(packet, get_raw=True)(count)

        def saved(ctx: Any, inputs: tuple, output: Any) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)

        def derived(ctx: Any, *grads: Tensor | None) -> tuple:
            return differentiate(ctx, gradients if is_traced() else backward[0], *grads)

        self.traced.register_autograd(derived, setup_context=saved)

        class Eager(torch.autograd.Function):
            # the same without the layers of Python around a custom op, which take longer than a
            # layer of a small model does; a second derivative is refused only if the gradient that
            # comes in has one
            @staticmethod
            def forward(ctx: Any, *inputs: Any) -> Any:
                output = forward[0](*inputs)
                saved(ctx, inputs, output)
                return output

            @staticmethod
            @once_differentiable
            def backward(ctx: Any, *grads: Tensor | None) -> tuple:
                return derived(ctx, *grads)

        self.eager = Eager

    def __call__(self, *inputs: Any) -> Any:
        """The outputs of the forward."""
        if is_traced():
            return self.traced(*inputs)
        return self.eager.apply(*inputs) if torch.is_grad_enabled() else self.forward(*inputs)


def _copying(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*inputs: Any) -> Any:
        output = function(*inputs)
        if isinstance(output, Tensor):
            return output
        return tuple(y.clone() if any(y is x for x in inputs) else y for y in output)

    return call


def is_traced() -> bool:
    """Whether a graph is being made, or FLOPs are counted: then an op has to be one call."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def rows(x: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous; the others may have gaps."""
    return x if x.stride(-1) == 1 else x.contiguous()


def alike(dtypes: tuple[torch.dtype, ...], *tensors: Tensor | None) -> str | None:
    """Why tensors are not all of one of these dtypes, or None; what is None is not asked."""
    given = {t.dtype for t in tensors if t is not None}
    if len(given) == 1 and given <= {*dtypes}:
        return None
    names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    received = ", ".join(sorted(str(d).removeprefix("torch.") for d in given))
    return f"dtypes must be one of {names}, got {received}"
