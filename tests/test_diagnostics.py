"""Collapse is seen when it happens, and not when it does not."""

import pytest
import torch

from smbfast.model.target import HorizonStates, JepaStates
from smbfast.run.diagnostics import diagnose, diagnose_horizons, effective_rank, spread

M, D = 500, 32


def states(target, prediction=None, previous=None, online=None):
    noise = torch.randn(M, D)
    return JepaStates(
        prediction if prediction is not None else noise,
        online if online is not None else noise,
        target,
        previous if previous is not None else torch.randn(M, D),
    )


def test_effective_rank_of_known_matrices():
    q, _ = torch.linalg.qr(torch.randn(M, 8) - 0.0)
    q = q - q.mean(0)
    q, _ = torch.linalg.qr(q)
    assert effective_rank(q) == pytest.approx(8, rel=1e-3)  # eight equal singular values
    assert effective_rank(torch.randn(M, 1) @ torch.randn(1, D) + 3) == pytest.approx(1, rel=1e-3)


def test_trivial_predictors_by_hand():
    target = torch.randn(M, D) * torch.arange(1, D + 1)
    previous = torch.randn(M, D)
    found = diagnose(states(target, previous=previous), normalize=False)
    mean = ((target - target.mean(0)) ** 2).mean()
    copied = ((previous - target) ** 2).mean()
    assert found["trivial_mean"] == pytest.approx(float(mean), rel=1e-5)
    assert found["trivial_copy"] == pytest.approx(float(copied), rel=1e-5)
    assert found["ratio"] == pytest.approx(found["jepa"] / float(min(mean, copied)), rel=1e-5)
    assert found["target_std"] == pytest.approx(float(target.std(0, correction=0).mean()), rel=1e-5)


def test_a_collapsed_target_is_seen():
    healthy = diagnose(states(torch.randn(M, D)), normalize=True)
    direction = torch.randn(1, D)
    collapsed = diagnose(states(direction + 1e-3 * torch.randn(M, D)), normalize=True)
    assert collapsed["target_std"] < 0.01 * healthy["target_std"]
    flat = diagnose(states(torch.randn(M, 2) @ torch.randn(2, D)), normalize=True)
    assert flat["target_rank"] < 0.2 * healthy["target_rank"]


def test_a_perfect_predictor_has_ratio_zero_and_a_constant_one():
    target = torch.nn.functional.layer_norm(torch.randn(M, D), (D,))
    assert diagnose(states(target, prediction=target), normalize=True)["ratio"] < 1e-6
    constant = target.mean(0, keepdim=True).expand(M, D)
    assert diagnose(states(target, prediction=constant), normalize=True)["ratio"] == pytest.approx(
        1, rel=1e-4
    )


def test_spread_does_not_depend_on_scale_and_sees_constant_states():
    state = torch.randn(M, D)
    measures = spread(state)
    # of independent numbers without a shared mean; both errors are of order M ** -0.5
    assert measures["std"] == pytest.approx(1, abs=M**-0.5)
    # scaling by a power of two changes no digit
    assert spread(state / 1024) == measures
    shared = torch.randn(1, D).expand(M, D)
    assert spread(shared)["std"] < 1e-6  # the rounding of a mean
    assert spread(torch.zeros(M, D))["std"] == 0
    assert spread(shared + 0.005 * state)["std"] < 0.01 < spread(shared + 0.1 * state)["std"]
    state[3, 4] = float("nan")
    assert all(value != value for value in spread(state).values())


def horizon_states(error, *, slope=1.0, target=None):
    """Two horizons of M pairs; the prediction is off by `error` times a standard normal."""
    at = torch.randn(M, D)
    own = torch.randn(M, D) + slope * at if target is None else target
    horizon = torch.arange(2).repeat_interleave(M)
    return HorizonStates(
        torch.cat([own, own]) + error * torch.randn(2 * M, D),
        torch.cat([own, own]),
        torch.cat([at, at]) * 3 + 7,  # copying is judged after a slope and an offset
        horizon,
    )


def test_r2_of_horizons_by_hand():
    states = horizon_states(0.5)
    measures = diagnose_horizons(states, ["30d", "180d"])
    for place, name in enumerate(["30d", "180d"]):
        own = states.horizon_Q == place
        target, left = states.target_QD[own], (states.prediction_QD - states.target_QD)[own]
        total = ((target - target.mean(0)) ** 2).sum()
        assert measures[f"r2_{name}"] == pytest.approx(1 - float(left.square().sum() / total))
        # of each width, the least-squares line leaves 1 - correlation ** 2
        columns = zip(states.at_QD[own].T, target.T, strict=True)
        r_D = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in columns])
        total_D = ((target - target.mean(0)) ** 2).sum(0)
        copied = float((r_D.square() * total_D).sum() / total_D.sum())
        assert measures[f"r2_copy_{name}"] == pytest.approx(copied, rel=1e-4)  # fp32 sums of M
    assert measures["r2"] == pytest.approx((measures["r2_30d"] + measures["r2_180d"]) / 2)
    assert measures["target_rank"] == pytest.approx(effective_rank(states.at_QD[:M]))


def test_a_target_that_equals_its_running_mean_has_r2_zero():
    """Rounding, divided by (sd + 0.01), is no variance that a prediction could explain or miss."""
    rounding = 1e-5 * torch.randn(M, D)
    for target in (torch.zeros(M, D), rounding):
        measures = diagnose_horizons(horizon_states(0.1, target=target), ["1d", "3d"])
        values = [v for k, v in measures.items() if k.startswith("r2")]
        assert values == [0.0] * 6
    good = diagnose_horizons(horizon_states(0.0), ["1d", "3d"])
    assert good["r2"] == 1.0
    constant = horizon_states(0.0)
    constant.prediction_QD[:] = constant.target_QD.mean(0)
    assert diagnose_horizons(constant, ["1d", "3d"])["r2"] == pytest.approx(0, abs=1e-6)


def test_a_horizon_without_two_pairs_has_no_r2():
    measures = diagnose_horizons(horizon_states(0.5), ["1d", "3d", "7d"])
    assert "r2_7d" not in measures and "r2_copy_7d" not in measures
    assert measures["r2"] == pytest.approx((measures["r2_1d"] + measures["r2_3d"]) / 2)
