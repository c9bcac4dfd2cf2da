"""Settings that hold for every test of an operation."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that an operation allocates and does not write is NaN (or the largest integer)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _compiled_anew(request):
    """All operations share the code that dispatches them, and torch compiles it eight times."""
    if "compile" in request.node.name:
        torch._dynamo.reset()


@pytest.fixture
def device() -> str:
    """Kernels run on a GPU where there is one, else interpreted."""
    return "cuda" if torch.cuda.is_available() else "cpu"
