"""Collapse is seen when it happens, and not when it does not."""

import pytest
import torch

from smbfast.reference import JepaStates
from smbfast.run.diagnostics import diagnose, effective_rank

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
