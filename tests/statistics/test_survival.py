"""Metrics of time to event against scikit-survival and lifelines, and against counts of all pairs.

A weight is a row repeated, so every rival sees rows repeated. Times and risks have ties, and rows
are censored at times of events.

Legend: N rows, B draws, H times.
"""

import numpy as np
import pandas as pd
import pytest
from lifelines import AalenJohansenFitter, CoxPHFitter, KaplanMeierFitter
from lifelines.utils import concordance_index
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.metrics import (
    brier_score,
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
    integrated_brier_score,
)
from sksurv.nonparametric import cumulative_incidence_competing_risks
from sksurv.util import Surv

from smbfast.statistics import incidence, resample, survival
from smbfast.statistics.incidence import FollowUp

TIMES = np.array([3.0, 5.0, 8.0])
EXACT = 1e-12  # sums of a few hundred terms of order 1 in fp64


def cohort(rows: int, seed: int, competing: bool = False) -> tuple[np.ndarray, FollowUp]:
    """Risks with ties, and durations on a grid of which about 40 % are censored."""
    random = np.random.default_rng(seed)
    risk_N = np.round(random.normal(size=rows), 1)
    event_N = np.floor(random.exponential(8 * np.exp(-0.7 * risk_N))) + 1
    other_N = np.floor(random.exponential(12, rows)) + 1 if competing else np.full(rows, np.inf)
    end_N = np.minimum(np.floor(random.exponential(12, rows)) + 1, 14)
    duration_N = np.minimum(np.minimum(event_N, other_N), end_N)
    died_N = (event_N <= end_N) & (event_N <= other_N)
    gone_N = (other_N <= end_N) & ~died_N
    return risk_N, FollowUp(duration_N, died_N, gone_N if competing else None)


def weights(rows: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).integers(0, 3, (3, rows))
    return np.stack([np.ones(rows, np.int64), *drawn]).astype(np.int32)


def rivals(weight_BN: np.ndarray):
    """Yield for each draw which rows it holds, repeated."""
    for at, weight_N in enumerate(weight_BN):
        yield at, np.repeat(np.arange(len(weight_N)), weight_N)


def by_pairs(risk_N, follow_up, weight_BN, tau=np.inf, censoring=None) -> np.ndarray:
    """Return C from a matrix of all pairs; with `censoring`, Uno's."""
    duration_N, event_N, competing_N = follow_up
    competing_N = np.zeros(len(risk_N), bool) if competing_N is None else competing_N
    case_N = event_N & (duration_N < tau)
    later_NN = (duration_N > duration_N[:, None]) | ((duration_N == duration_N[:, None]) & ~event_N)
    gone_NN = competing_N & ~later_NN
    share_N = np.ones(len(risk_N)) if censoring is None else censoring.at(duration_N)
    share_N = np.where(share_N > 0, share_N, 1.0)
    one_NN = later_NN / share_N[:, None] ** 2 + gone_NN / (share_N[:, None] * share_N)
    one_NN = one_NN * case_N[:, None]
    order_NN = (risk_N[:, None] > risk_N) + 0.5 * (risk_N[:, None] == risk_N)
    pair_BNN = weight_BN[:, :, None] * weight_BN[:, None, :] * one_NN
    return (pair_BNN * order_NN).sum((1, 2)) / pair_BNN.sum((1, 2))


@pytest.mark.parametrize("rows", [6, 50, 201])
def test_harrells_c_is_that_of_lifelines_and_scikit_survival(rows: int) -> None:
    risk_N, follow_up = cohort(rows, rows)
    weight_BN = weights(rows, rows)
    ours_B = survival.harrell_c(risk_N, follow_up)(weight_BN)
    np.testing.assert_array_equal(ours_B, resample.c_index(risk_N, *follow_up[:2])(weight_BN))
    for at, copies in rivals(weight_BN):
        duration_N, event_N, risk = (a[copies] for a in (*follow_up[:2], risk_N))
        assert ours_B[at] == pytest.approx(concordance_index(duration_N, -risk, event_N), abs=1e-6)
        theirs = concordance_index_censored(event_N, duration_N, risk)[0]
        assert ours_B[at] == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("competing", [False, True])
@pytest.mark.parametrize("rows", [2, 7, 120])
def test_c_is_the_count_of_all_pairs(rows: int, competing: bool) -> None:
    risk_N, follow_up = cohort(rows, rows, competing)
    weight_BN = weights(rows, rows)
    with np.errstate(invalid="ignore"):  # of two rows, one may be all that a draw has
        expected_B = by_pairs(risk_N, follow_up, weight_BN)
    np.testing.assert_allclose(
        survival.harrell_c(risk_N, follow_up)(weight_BN), expected_B, atol=EXACT
    )
    censoring = incidence.censoring(follow_up)
    with np.errstate(invalid="ignore"):
        expected_B = by_pairs(risk_N, follow_up, weight_BN, TIMES[-1], censoring)
    ours_B = survival.uno_c(risk_N, follow_up, censoring, TIMES[-1])(weight_BN)
    np.testing.assert_allclose(ours_B, expected_B, atol=EXACT)


def test_a_competing_event_keeps_a_row_in_the_risk_set_to_the_end() -> None:
    """Of a row that left early by another event, the later event's higher risk is right."""
    follow_up = FollowUp(np.array([1.0, 5.0]), np.array([False, True]), np.array([True, False]))
    whole_1N = np.ones((1, 2), np.int32)
    for risk_N, expected in (([0.0, 1.0], 1.0), ([1.0, 0.0], 0.0), ([1.0, 1.0], 0.5)):
        risk_N = np.array(risk_N)
        assert survival.harrell_c(risk_N, follow_up)(whole_1N)[0] == expected
        censoring = incidence.censoring(follow_up)
        assert survival.dynamic_auc(risk_N, follow_up, 6.0, censoring)(whole_1N)[0] == expected
    alone = FollowUp(*follow_up[:2])
    assert np.isnan(survival.harrell_c(np.array([0.0, 1.0]), alone)(whole_1N)[0])


@pytest.mark.parametrize("rows", [60, 250])
def test_ipcw_metrics_are_those_of_scikit_survival(rows: int) -> None:
    risk_N, follow_up = cohort(rows, rows)
    _, reference = cohort(400, 1)
    # scikit-survival asks for a chance above 0 at every event, so one row outlives all
    reference = FollowUp(np.append(reference.duration_N, 99.0), np.append(reference.event_N, True))
    train = Surv.from_arrays(reference.event_N, reference.duration_N)
    censoring = incidence.censoring(reference)
    free_NH = np.exp(-np.exp(risk_N)[:, None] * TIMES / 12)
    weight_BN = weights(rows, rows)
    auc_HB = [survival.dynamic_auc(risk_N, follow_up, t, censoring)(weight_BN) for t in TIMES]
    mean_B = survival.mean_dynamic_auc(risk_N, follow_up, TIMES, censoring)(weight_BN)
    one_B = survival.mean_dynamic_auc(risk_N, follow_up, TIMES[:1], censoring)(weight_BN)
    np.testing.assert_array_equal(one_B, auc_HB[0])
    brier_HB = [
        survival.brier_ipcw(1 - free_NH[:, h], follow_up, t, censoring)(weight_BN)
        for h, t in enumerate(TIMES)
    ]
    whole_B = survival.integrated_brier(1 - free_NH, follow_up, TIMES, censoring)(weight_BN)
    uno_B = survival.uno_c(risk_N, follow_up, censoring, 9.0)(weight_BN)
    for at, copies in rivals(weight_BN):
        test = Surv.from_arrays(follow_up.event_N[copies], follow_up.duration_N[copies])
        auc_H, mean = cumulative_dynamic_auc(train, test, risk_N[copies], TIMES)
        assert [auc_B[at] for auc_B in auc_HB] == pytest.approx(auc_H, abs=1e-6)
        assert mean_B[at] == pytest.approx(mean, abs=1e-6)
        _, brier_H = brier_score(train, test, free_NH[copies], TIMES)
        assert [brier_B[at] for brier_B in brier_HB] == pytest.approx(brier_H, abs=1e-6)
        theirs = integrated_brier_score(train, test, free_NH[copies], TIMES)
        assert whole_B[at] == pytest.approx(theirs, abs=1e-6)
        theirs = concordance_index_ipcw(train, test, risk_N[copies], tau=9.0)[0]
        assert uno_B[at] == pytest.approx(theirs, abs=1e-6)


def test_competing_events_are_controls_weighed_at_their_own_time() -> None:
    """By all pairs; and at no censoring, what a plain AUC and Brier score of the outcome give."""
    risk_N, follow_up = cohort(150, 4, competing=True)
    duration_N, event_N, competing_N = follow_up
    weight_BN = weights(150, 4)
    censoring = incidence.censoring(follow_up)
    probability_N = 1 / (1 + np.exp(-risk_N))
    for time in TIMES:
        case_N, gone_N = (x & (duration_N <= time) for x in (event_N, competing_N))
        inverse_N = 1 / censoring.at(np.minimum(duration_N, time))
        one_N, other_N = case_N * inverse_N, ((duration_N > time) | gone_N) * inverse_N
        pair_BNN = (weight_BN * one_N)[:, :, None] * (weight_BN * other_N)[:, None, :]
        order_NN = (risk_N[:, None] > risk_N) + 0.5 * (risk_N[:, None] == risk_N)
        np.testing.assert_allclose(
            survival.dynamic_auc(risk_N, follow_up, time, censoring)(weight_BN),
            (pair_BNN * order_NN).sum((1, 2)) / pair_BNN.sum((1, 2)),
            atol=EXACT,
        )
        square_N = (probability_N - case_N) ** 2 * (one_N + other_N)
        np.testing.assert_allclose(
            survival.brier_ipcw(probability_N, follow_up, time, censoring)(weight_BN),
            (weight_BN * square_N).sum(1) / weight_BN.sum(1),
            atol=EXACT,
        )


def test_curves_are_those_of_lifelines_and_scikit_survival() -> None:
    _, follow_up = cohort(300, 2)
    theirs = KaplanMeierFitter().fit(follow_up.duration_N, follow_up.event_N)
    ours_H = incidence.kaplan_meier(*follow_up[:2], TIMES)
    assert ours_H == pytest.approx(theirs.predict(TIMES).to_numpy(), abs=1e-6)
    _, follow_up = cohort(300, 3, competing=True)
    kind_N = follow_up.event_N + 2 * follow_up.competing_N
    time_U, share_KU = cumulative_incidence_competing_risks(kind_N, follow_up.duration_N)
    at_H = np.searchsorted(time_U, TIMES, side="right") - 1
    event_H, other_H = incidence.aalen_johansen(follow_up, TIMES)
    assert event_H == pytest.approx(share_KU[1][at_H], abs=1e-6)
    assert other_H == pytest.approx(share_KU[2][at_H], abs=1e-6)
    # lifelines moves ties at random: durations without ties
    apart_N = follow_up.duration_N + np.random.default_rng(0).random(300) / 2
    fitter = AalenJohansenFitter(calculate_variance=False).fit(apart_N, kind_N, 1)
    event_H, _ = incidence.aalen_johansen(FollowUp(apart_N, *follow_up[1:]), TIMES)
    assert event_H == pytest.approx(fitter.predict(TIMES).to_numpy().ravel(), abs=1e-6)


def test_curves_under_weights_are_those_of_rows_repeated() -> None:
    _, follow_up = cohort(80, 5, competing=True)
    weight_BN = weights(80, 5)
    ours_BH = incidence.cumulative_incidence(follow_up, TIMES, weight_BN)
    for at, copies in rivals(weight_BN):
        own = FollowUp(*(a[copies] for a in follow_up))
        np.testing.assert_allclose(ours_BH[at], incidence.aalen_johansen(own, TIMES)[0], atol=EXACT)


def test_breslows_hazard_is_that_of_lifelines_and_scikit_survival() -> None:
    risk_N, follow_up = cohort(300, 6)
    y = Surv.from_arrays(follow_up.event_N, follow_up.duration_N)
    theirs = CoxPHSurvivalAnalysis(ties="efron").fit(risk_N[:, None], y)
    log_hazard_N = risk_N * theirs.coef_[0]
    baseline = incidence.breslow(log_hazard_N, follow_up)
    hazard_H = theirs.cum_baseline_hazard_(TIMES)
    assert baseline.cumulative_hazard(TIMES) == pytest.approx(hazard_H, abs=1e-6)
    free_NH = np.stack([f(TIMES) for f in theirs.predict_survival_function(risk_N[:, None])])
    ours_NH = baseline.probability(log_hazard_N, TIMES)
    np.testing.assert_allclose(ours_NH, 1 - free_NH, atol=1e-6)
    table = pd.DataFrame({"x": risk_N, "t": follow_up.duration_N, "e": follow_up.event_N})
    cox = CoxPHFitter().fit(table, "t", "e")
    log_hazard_N = cox.predict_log_partial_hazard(table).to_numpy()
    theirs_H = [cox.baseline_cumulative_hazard_.loc[:time].iloc[-1, 0] for time in TIMES]
    ours_H = incidence.breslow(log_hazard_N, follow_up).cumulative_hazard(TIMES)
    assert ours_H == pytest.approx(theirs_H, abs=1e-6)


def test_the_incidence_under_competing_events_is_that_of_the_cohort() -> None:
    """With one log hazard for all, the predicted incidence is about Aalen-Johansen's: the two
    differ by how a step h of the hazard is taken, h or 1 - exp(-h): at most its square a step."""
    _, follow_up = cohort(400, 7, competing=True)
    follow_up = follow_up._replace(duration_N=follow_up.duration_N + np.arange(400) / 800)
    baseline = incidence.breslow(np.zeros(400), follow_up)
    ours_NH = baseline.probability(np.zeros(3), TIMES)
    event_H, _ = incidence.aalen_johansen(follow_up, TIMES)
    slack = ((baseline.event_U + baseline.competing_U)[baseline.time_U <= TIMES[-1]] ** 2).sum()
    np.testing.assert_allclose(ours_NH, np.tile(event_H, (3, 1)), atol=slack)
    without = baseline.cumulative_hazard(TIMES)
    assert (ours_NH[0] < 1 - np.exp(-without)).all()  # those who left cannot have it
    # between the risks at which it is summed up, it is read off: compared with the sum itself
    risk_N = np.array([-2.0, 0.3217, 2.0])
    between_NH = baseline.probability(risk_N, TIMES)
    alone_NH = np.concatenate([baseline.probability(risk_N[[at]], TIMES) for at in range(3)])
    np.testing.assert_allclose(between_NH, alone_NH, atol=1e-6)


@pytest.mark.parametrize("competing", [False, True])
def test_log_hazards_in_the_thousands_have_probabilities(competing: bool) -> None:
    """Of few rows that a fit separates: exp of a log hazard is no number. Whoever was judged most
    at risk has the event at once, whoever was judged least has it never."""
    _, follow_up = cohort(40, 8, competing=competing)
    risk_N = np.linspace(3000.0, -3000.0, 40)
    with np.errstate(all="raise", under="ignore"):
        chance_NH = incidence.breslow(risk_N, follow_up).probability(risk_N, TIMES)
    assert ((chance_NH >= 0) & (chance_NH <= 1)).all()
    assert (np.diff(chance_NH, axis=0) <= 0).all()
    assert chance_NH[-1, -1] < 1e-6 < chance_NH[0, -1]


def test_follow_up_that_cannot_be_is_refused() -> None:
    one = np.array([True, False])
    with pytest.raises(ValueError, match="1 rows with both"):
        survival.harrell_c(np.zeros(2), FollowUp(np.ones(2), one, one))
    with pytest.raises(ValueError, match="finite and not negative"):
        incidence.kaplan_meier(np.array([-1.0, 2.0]), one, TIMES)
    with pytest.raises(ValueError, match="same rows"):
        incidence.censoring(FollowUp(np.ones(3), one))
    for times in ([], [2.0, 1.0]):
        with pytest.raises(ValueError, match="at least 1 and ascend"):
            survival.mean_dynamic_auc(np.zeros(2), FollowUp(np.ones(2), one), times, None)
    with pytest.raises(ValueError, match="at least 2 and ascend"):
        survival.integrated_brier(np.zeros((2, 1)), FollowUp(np.ones(2), one), [1.0], None)


def test_where_censoring_leaves_nobody_a_metric_is_not_defined() -> None:
    """The last of the reference is censored at 2: what comes at 3 cannot be weighed."""
    censoring = incidence.censoring(FollowUp(np.array([1.0, 2.0]), np.array([True, False])))
    follow_up = FollowUp(np.array([1.0, 3.0, 4.0]), np.array([True, True, False]))
    whole_1N, risk_N = np.ones((1, 3), np.int32), np.array([2.0, 1.0, 0.0])
    assert np.isnan(survival.uno_c(risk_N, follow_up, censoring)(whole_1N)[0])
    assert survival.uno_c(risk_N, follow_up, censoring, tau=3.0)(whole_1N)[0] == 1.0
    assert np.isnan(survival.dynamic_auc(risk_N, follow_up, 3.5, censoring)(whole_1N)[0])
    assert np.isnan(survival.brier_ipcw(risk_N / 2, follow_up, 2.5, censoring)(whole_1N)[0])
