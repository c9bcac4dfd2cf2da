"""The memory that the C++ kernels hold for gradients; no number depends on it.

M masked positions, D width, T rows of the target.
"""

import pytest
import torch
from smbkernels import masked_jepa_mse
from smbkernels.cpp_build import missing

from tests.rank_server import ranks_give


def loss_and_grad(function, prediction_MD, *args):
    leaf = prediction_MD.detach().clone().requires_grad_()
    loss = function(leaf, *args)
    loss.backward()
    return loss.detach(), leaf.grad


def use_memory_again() -> None:
    """A block that became free holds the next gradient, unless a larger one became free."""
    target_TD = torch.randn(2, 4096)

    def gradient(rows):
        prediction_MD, row_M = torch.randn(rows, 4096), torch.randint(0, 2, (rows,))
        args = (prediction_MD, target_TD, row_M)
        grad_MD = loss_and_grad(masked_jepa_mse.on("cpp"), *args)[1]
        torch.testing.assert_close(grad_MD, loss_and_grad(masked_jepa_mse.reference, *args)[1])
        return grad_MD

    first = gradient(150)
    kept, place = first.clone(), first.data_ptr()
    second = gradient(150)
    assert torch.equal(first, kept) and second.data_ptr() != place
    del first
    # smaller ones fit, and a view keeps its memory
    part = gradient(130)[3:5]
    assert part.data_ptr() == place + 3 * 4096 * 4
    kept = part.clone()
    third = gradient(140)
    assert torch.equal(part, kept)
    # the larger of two free blocks stays
    del third, part, second
    assert gradient(160).data_ptr() % 2**21 == 0


def test_the_memory_of_a_large_gradient_is_used_again_when_it_is_free():
    """In a process of its own: a larger block that another test left would be held instead."""
    if missing("cpu"):
        pytest.skip(missing("cpu"))
    ranks_give(0, "tests.ops.test_cpp_memory:use_memory_again")
