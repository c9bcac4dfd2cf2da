"""Calibration and skill under weights against scikit-learn, with rows repeated.

Legend: N rows, B draws.
"""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from smbfast.statistics import binary


def scored(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities that are too extreme, outcomes, and weights of 4 draws."""
    random = np.random.default_rng(seed)
    score_N = np.round(random.normal(-1, 1.5, rows), 1)
    true_N = random.random(rows) < expit(0.6 * score_N + 0.3)
    weight_BN = np.stack([np.ones(rows, np.int64), *random.integers(0, 4, (3, rows))])
    return expit(score_N), true_N, weight_BN.astype(np.int32)


@pytest.mark.parametrize("rows", [80, 500])
def test_slope_is_that_of_a_logistic_regression(rows: int) -> None:
    probability_N, true_N, weight_BN = scored(rows, rows)
    ours_B = binary.slope(probability_N, true_N)(weight_BN)
    for ours, weight_N in zip(ours_B, weight_BN, strict=True):
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
        model.fit(logit(probability_N)[:, None], true_N, weight_N)
        assert ours == pytest.approx(model.coef_[0, 0], abs=1e-6)


@pytest.mark.parametrize("rows", [80, 500])
def test_the_intercept_makes_the_mean_prediction_the_prevalence(rows: int) -> None:
    """That is the likelihood's equation with slope 1. The last step of Newton's method is at most
    1e-5, and leaves its square times half of |f''| / f' <= 1; means move by p (1 - p) <= 1/4 of
    that: 1.25e-11."""
    probability_N, true_N, weight_BN = scored(rows, rows)
    ours_B = binary.intercept(probability_N, true_N)(weight_BN)
    shifted_BN = expit(logit(probability_N) + ours_B[:, None])
    np.testing.assert_allclose(
        (weight_BN * shifted_BN).sum(1) / weight_BN.sum(1),
        (weight_BN * true_N).sum(1) / weight_BN.sum(1),
        atol=1.25e-11,
    )


def test_calibration_without_a_solution_is_not_defined() -> None:
    whole_1N = np.ones((1, 4), np.int32)
    score_N, true_N = np.array([0.1, 0.2, 0.7, 0.8]), np.array([False, False, True, True])
    assert np.isnan(binary.slope(score_N, true_N)(whole_1N)[0])  # separated
    assert np.isfinite(binary.intercept(score_N, true_N)(whole_1N)[0])
    assert np.isnan(binary.slope(np.full(4, 0.3), true_N)(whole_1N)[0])
    for metric in (binary.slope, binary.intercept, binary.brier_skill):
        assert np.isnan(metric(score_N, np.zeros(4, bool))(whole_1N)[0])
    assert np.isfinite(binary.intercept(np.array([0.0, 1.0, 0.0, 1.0]), true_N)(whole_1N)[0])


def test_probabilities_of_0_and_1_have_a_slope() -> None:
    """By hand: two predictions, so the line goes through the logits of both shares, 0.6 and 0.2;
    1e-9 from 0 and 1 their own logits are 2 log(1e9 - 1) from each other. A 0 that is wrong, among
    other predictions, has a long lever."""
    whole_1N = np.ones((1, 50), np.int32)
    probability_N = np.repeat([0.0, 1.0], 25)
    true_N = np.where(probability_N > 0, np.arange(50) % 5 < 3, np.arange(50) % 5 < 1)
    expected = (logit(0.6) - logit(0.2)) / (2 * np.log(1e9 - 1))
    assert binary.slope(probability_N, true_N)(whole_1N)[0] == pytest.approx(expected, abs=1e-6)
    probability_N, true_N, weight_BN = scored(200, 3)
    probability_N, true_N = np.r_[probability_N[:-1], 0.0], np.r_[true_N[:-1], True]
    score_N = logit(np.clip(probability_N, 1e-9, 1))
    ours_B = binary.slope(probability_N, true_N)(weight_BN)
    for ours, weight_N in zip(ours_B, weight_BN, strict=True):
        model = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-10)
        model.fit(score_N[:, None] / score_N.std(), true_N, weight_N)
        assert ours == pytest.approx(model.coef_[0, 0] / score_N.std(), abs=1e-6)


def test_skill_is_against_the_prevalence_of_the_draw() -> None:
    probability_N, true_N, weight_BN = scored(300, 1)
    ours_B = binary.brier_skill(probability_N, true_N)(weight_BN)
    for ours, weight_N in zip(ours_B, weight_BN, strict=True):
        own, none = (
            brier_score_loss(true_N, p, sample_weight=weight_N)
            for p in (probability_N, np.full(300, np.average(true_N, weights=weight_N)))
        )
        assert ours == pytest.approx(1 - own / none, abs=1e-12)
    constant = binary.brier_skill(np.full(300, true_N.mean()), true_N)(weight_BN[:1])
    assert constant == pytest.approx(0, abs=1e-12)


def test_the_curve_is_of_deciles_with_wilsons_interval_of_people() -> None:
    random = np.random.default_rng(0)
    probability_N = random.permutation(4000) / 4000
    true_N, subject_N = random.random(4000) < probability_N, np.arange(4000) // 2
    bins = binary.curve(probability_N, true_N, np.arange(4000))
    assert [b["num"] for b in bins] == [400] * 10
    for number, own in enumerate(bins):
        rows = (probability_N * 10).astype(int) == number
        assert own["predicted"] == pytest.approx(probability_N[rows].mean())
        assert own["observed"] == pytest.approx(true_N[rows].mean())
        wilson = binomtest(int(true_N[rows].sum()), 400).proportion_ci(method="wilson")
        assert (own["low"], own["high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-12)
    # two rows of a patient count once: fewer people, wider intervals
    people = binary.curve(probability_N, true_N, subject_N)
    assert all(b["num"] < 400 for b in people)
    assert all(
        b["high"] - b["low"] > a["high"] - a["low"] for a, b in zip(bins, people, strict=True)
    )


def test_bins_that_tell_of_ten_people_or_fewer_join() -> None:
    """A share of a bin with 1 to 10 people of an outcome would tell how many they are."""
    random = np.random.default_rng(1)
    probability_N = random.permutation(300) / 300
    true_N = random.random(300) < probability_N**2
    for subject_N in (np.arange(300), np.arange(300) // 3):
        parts = binary.bins(probability_N, true_N, subject_N)
        assert len(parts) >= 2 and len(np.concatenate(parts)) == 300
        for rows in parts:
            for kind in (rows[true_N[rows]], rows[~true_N[rows]]):
                assert not 0 < len(np.unique(subject_N[kind])) <= 10
            assert len(np.unique(subject_N[rows])) > 10
    assert len(binary.curve(np.full(50, 0.2), np.arange(50) < 9, np.arange(50))) == 1
    assert binary.curve(np.empty(0), np.empty(0, bool), np.empty(0)) == []
    assert [
        b["num"] for b in binary.curve(probability_N[:4], probability_N[:4] > 0, np.arange(4))
    ] == [4]
