"""What the tests of operations with gradients share: values and gradients of a call, and the three
calls that are compared.

T tokens.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from smbkernels.operation import Op
from torch import Tensor

from tests.oracle import assert_no_worse

Given = Sequence[Tensor | None]


def runnable(operation: Op, backend: str, device: str) -> Callable:
    """A backend of an operation; skips the test where it cannot run."""
    device = "cpu" if backend == "cpp" else device
    entry = next(b for b in operation.backends if b.name == backend)
    reason = operation.missing(entry, device)
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return operation.on(backend)


def outcome(function: Callable, given: Given, grads: Given) -> list[Tensor]:
    """Outputs of a call, and the gradients of the inputs that want one; None is left out.

    Args:
        grads: of the outputs; None: the output is not read.
    """
    leaves = [
        None if x is None else x.detach().clone().requires_grad_(x.requires_grad) for x in given
    ]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    read = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward([y for y, _ in read], [g for _, g in read])
    found = [x.grad for x in leaves if x is not None and x.requires_grad]
    return [y.detach() for y in outputs] + [g for g in found if g is not None]


def compare(
    function: Callable, reference: Callable, given: Given, grads: Given, tol: Sequence[float]
) -> list[Tensor]:
    """The outcome of a backend, after a comparison with eager and with fp64.

    Args:
        tol: for each output and gradient; the last for all that follow.
    """

    def exactly(tensors: Given) -> Given:
        return [
            None if x is None else x.detach().double().requires_grad_(x.requires_grad)
            for x in tensors
        ]

    found = outcome(function, given, grads)
    eager = outcome(reference, given, grads)
    truth = outcome(reference, exactly(given), exactly(grads))
    assert len(found) == len(eager) == len(truth)
    for i, triple in enumerate(zip(found, eager, truth, strict=True)):
        assert_no_worse(*triple, tol[min(i, len(tol) - 1)])
    return found


def assert_saved_bytes(call: Callable[[], object], expected: int) -> None:
    """A forward saves tensors of so many bytes for its backward, each counted once."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()
    assert sum(saved.values()) == expected, saved
    del result
