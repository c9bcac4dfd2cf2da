"""What follows the backward where a gradient is not finite: nothing moves, and a run gives up."""

import pytest
import torch

from smbfast.base.entry import RunFailed
from smbfast.run.step import PATIENCE, Updater, backward


def make_updater() -> Updater:
    parameters = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(4))]
    return Updater(torch.optim.AdamW(parameters, lr=0.1, fused=True), clip=1.0)


def take_step(updater: Updater, value: float) -> torch.Tensor:
    """A step whose gradients are ones, but for one element."""
    parameters = updater.optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad[1, 2] = value
    return updater.step()


def held_of(updater: Updater) -> list[torch.Tensor]:
    """Copies of weights, moments and counts of steps."""
    optimizer = updater.optimizer
    weights = optimizer.param_groups[0]["params"]
    state = [value for weight in weights for value in optimizer.state[weight].values()]
    return [value.detach().clone() for value in [*weights, *state]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_no_weight_and_no_moment(value):
    updater = make_updater()
    take_step(updater, 1.0)
    before = held_of(updater)
    assert not torch.isfinite(take_step(updater, value))
    assert len(before) == 8 and all(map(torch.equal, held_of(updater), before))
    assert torch.isfinite(take_step(updater, 1.0))
    assert not any(map(torch.equal, held_of(updater), before))


def test_a_step_without_anything_to_predict_has_no_gradient():
    """As of JEPA alone where no token is masked: the run goes on, and such steps are counted."""
    parameter = torch.nn.Parameter(torch.ones(2))
    backward([None, None])
    assert parameter.grad is None
    backward([None, parameter.sum()])
    assert parameter.grad is not None


def test_a_run_gives_up_after_steps_in_a_row_alone(capsys):
    updater, nan = make_updater(), float("nan")
    for value in [nan] * (PATIENCE - 1) + [1.0] + [nan] * (PATIENCE - 1):
        take_step(updater, value)
    assert updater.report_skips(9, "sft")
    assert f"steps skipped since the last line: {2 * (PATIENCE - 1)}" in capsys.readouterr().err
    take_step(updater, nan)
    with pytest.raises(RunFailed, match=f"in {PATIENCE} steps in a row, up to step 10"):
        updater.report_skips(10, "sft")
