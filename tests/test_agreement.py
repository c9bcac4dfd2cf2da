"""A bit that one rank has otherwise is seen, whatever it is of, and its kind is named."""

from types import SimpleNamespace
from typing import Any

import pytest

from smbfast.base.entry import RunFailed
from smbfast.run.agreement import require_same_state
from smbfast.run.open_run import OpenRun, Progress
from smbfast.run.ranks import Ranks
from tests.reliability.flips import _flip, _holding, _own_tensors

KINDS = {
    "weights": "trained weights",
    "mask vector": "trained weights",
    "exp_avg": "first moments of the optimizer",
    "exp_avg_sq": "second moments of the optimizer",
    "step": "step counts of the optimizer",
    "averages": "averages of the target",
    "scale": "running scale of horizons",
    "frozen": "frozen weights",
}


class Other(Ranks):
    """Rank 1 of two; what rank 0 has is what this one had when it was asked first."""

    def __init__(self) -> None:
        super().__init__(1, 2)
        object.__setattr__(self, "first", None)

    def gathered(self, numbers: list[int]) -> list[list[int]]:
        if self.first is None:
            object.__setattr__(self, "first", numbers)
        same = len(numbers) == len(self.first)  # else they are of the tensors of one kind
        return [self.first if same else [0] * len(numbers), numbers]


@pytest.mark.parametrize("held", [0, 2], ids=["whole", "lora"])
def test_a_flipped_bit_of_any_kind_is_named(held: int) -> None:
    encoder, optimizer, target = _holding(held)
    ranks, kinds = Other(), _own_tensors(encoder, optimizer, target)
    require_same_state(ranks, encoder, optimizer, target)
    for kind, tensors in kinds.items():
        for tensor in (list(tensors.values())[place] for place in (0, -1) if tensors):
            _flip(tensor, tensor.nbytes - 1, 3)
            with pytest.raises(RunFailed, match=f"the {KINDS[kind]} of rank 1 are no longer those"):
                require_same_state(ranks, encoder, optimizer, target)
            _flip(tensor, tensor.nbytes - 1, 3)
    require_same_state(ranks, encoder, optimizer, target)


def test_ranks_are_compared_where_a_step_was_skipped_on_one_of_them() -> None:
    """One that saves would else wait for ever for one that does not."""
    encoder, optimizer, target = _holding(0)
    run: Any = SimpleNamespace(
        ranks=Other(), encoder=encoder, optimizer=optimizer, progress=Progress()
    )
    OpenRun.save(run, target, 1, 0, "", skipped=True)
    assert run.progress.step == 0, "nothing is saved where all skipped it"
    weight = next(iter(_own_tensors(encoder, optimizer, target)["weights"].values()))
    _flip(weight, 0, 3)
    with pytest.raises(RunFailed, match="no longer those of rank 0"):
        OpenRun.save(run, target, 2, 0, "", skipped=True)
