"""The vectorised metrics against scikit-learn and lifelines, and what a draw of patients is."""

import numpy as np
import pytest
from lifelines.utils import concordance_index
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from smbfast.statistics import resample


def scored(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, outcomes, and weights of 5 draws, some zero."""
    rng = np.random.default_rng(seed)
    score_N = rng.integers(0, 12, rows) / 12
    true_N = rng.random(rows) < score_N
    return score_N, true_N, rng.integers(0, 4, (5, rows)).astype(np.int32)


@pytest.mark.parametrize("rows", [8, 60, 400])
def test_binary_metrics_are_those_of_sklearn(rows: int) -> None:
    score_N, true_N, weight_BN = scored(rows, rows)
    for ours, theirs in (
        (resample.auroc, roc_auc_score),
        (resample.auprc, average_precision_score),
        (
            resample.brier,
            lambda y, p, sample_weight: brier_score_loss(y, p, sample_weight=sample_weight),
        ),
    ):
        expected_B = [theirs(true_N, score_N, sample_weight=w) for w in weight_BN]
        np.testing.assert_allclose(ours(score_N, true_N)(weight_BN), expected_B, atol=1e-12)


@pytest.mark.parametrize("rows", [6, 50, 200])
def test_c_index_is_that_of_lifelines_with_rows_repeated(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(resample, "_CELLS", 3000)  # several blocks of events
    rng = np.random.default_rng(rows)
    duration_N = rng.integers(0, 15, rows).astype(float)  # ties between events and censorings
    event_N = rng.random(rows) < 0.6
    risk_N = np.round(-duration_N / 5 + rng.normal(size=rows), 1)
    weight_BN = np.stack([np.ones(rows, np.int32), *rng.integers(0, 3, (4, rows))])
    ours_B = resample.c_index(risk_N, duration_N, event_N)(weight_BN)
    for ours, weight_N in zip(ours_B, weight_BN, strict=True):
        copies = np.repeat(np.arange(rows), weight_N)
        theirs = concordance_index(duration_N[copies], -risk_N[copies], event_N[copies])
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_draw_with_one_class_is_not_defined_and_left_out() -> None:
    weight_BN = np.array([[1, 1, 0], [1, 1, 1]])
    drawn_B = resample.auroc(np.array([0.1, 0.9, 0.5]), np.array([False, False, True]))(weight_BN)
    assert np.isnan(drawn_B[0]) and drawn_B[1] == 0.5
    assert resample.interval(0.5, drawn_B) == (0.5, 0.5, 0.5)
    assert resample.interval(0.5, np.array([np.nan, np.nan, 1.0])) == (0.5, None, None)
    assert resample.interval(0.5, np.empty(0)) == (0.5, None, None)


def test_all_rows_of_a_patient_move_together() -> None:
    subject_N = np.array([7, 3, 7, 9, 3, 7])
    weight_BN = resample.patient_weights(subject_N, range(200), seed=1)
    for subject in np.unique(subject_N):
        rows_BN = weight_BN[:, subject_N == subject]
        assert (rows_BN == rows_BN[:, :1]).all()
    first_BP = weight_BN[:, [0, 1, 3]]  # one row of each patient
    assert (first_BP.sum(1) == 3).all()
    assert len(np.unique(first_BP, axis=0)) > 3
    seen = []

    def sees(weight_BN: np.ndarray) -> np.ndarray:
        seen.append(weight_BN)
        return weight_BN.mean(1)

    resample.resampled({"mean": sees}, subject_N, 200, seed=1)
    np.testing.assert_array_equal(np.concatenate(seen[1:]), weight_BN)  # after that of all rows


def test_draws_do_not_depend_on_chunks(monkeypatch) -> None:
    score_N, true_N, _ = scored(40, 0)
    subject_N = np.arange(40) // 4
    metrics = {"auroc": resample.auroc(score_N, true_N)}
    _, whole = resample.resampled(metrics, subject_N, 50, seed=3)
    monkeypatch.setattr(resample, "_CELLS", 100)
    _, pieces = resample.resampled(metrics, subject_N, 50, seed=3)
    np.testing.assert_array_equal(whole["auroc"], pieces["auroc"])
    _, other = resample.resampled(metrics, subject_N, 50, seed=4)
    assert not np.array_equal(whole["auroc"], other["auroc"])


def test_clustered_rows_get_wider_intervals_than_rows_alone() -> None:
    rng = np.random.default_rng(0)
    score_P, true_P = rng.random(40), rng.random(40) < 0.5
    score_N, true_N = np.repeat(score_P, 20), np.repeat(true_P, 20)
    metrics = {"auroc": resample.auroc(score_N, true_N)}
    widths = []
    for subject_N in (np.repeat(np.arange(40), 20), np.arange(800)):
        values, drawn = resample.resampled(metrics, subject_N, 300, seed=0)
        _, low, high = resample.interval(values["auroc"], drawn["auroc"])
        widths.append(high - low)
    assert widths[0] > 3 * widths[1]


def test_differences_are_paired() -> None:
    score_N, true_N, _ = scored(80, 2)
    same = resample.auroc(2 * score_N, true_N)
    metrics = {"one": resample.auroc(score_N, true_N), "other": same}
    _, drawn = resample.resampled(metrics, np.arange(80) // 2, 100, seed=0)
    np.testing.assert_array_equal(drawn["one"], drawn["other"])
    assert drawn["one"].std() > 0
