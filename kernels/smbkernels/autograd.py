"""What operations that write their own backward share: autocast, and the factor of a gradient."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

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
