"""Survival probe: Cox proportional hazards on all features, with a ridge that tuning chooses.

Features are scaled on train (`scaling`), and the regression is fitted on train alone. Ties are
Efron's (1977). Source: Cox (1972); lifelines fits the same model with a Hessian, which takes a
minute with the features of an embedding. Shape suffixes: N rows, F features, T rows of train, R
rows of one partial likelihood, E rows of it with an event, G distinct times of events.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from smbfast.judging.risk_function import RiskFunction
from smbfast.probing.features import Features
from smbfast.probing.ridge import fit_path
from smbfast.probing.scaling import Scaling, chunks, directions, scaling, scores

_SLACK = 0.5  # nats an event above the least tuning loss that end the path: our choice


@dataclass(frozen=True)
class CoxProbe:
    """risk_N float64: the log partial hazard of every row given (higher = earlier event).

    tuning_loss: negative log partial likelihood, nats an event; 0 without an event. penalty: C;
    at_border, converged: see `RidgeFit`. risk: what was fitted, without any baseline.
    """

    risk_N: np.ndarray
    tuning_loss: float
    penalty: float
    at_border: bool
    converged: bool
    risk: RiskFunction


def not_measurable(
    duration_N: np.ndarray, event_N: np.ndarray, split_N: np.ndarray, judged: str = "held_out"
) -> str | None:
    """Return why a time-to-event task cannot be measured on the split `judged`, or None."""
    if not event_N[split_N == "train"].any():
        return "train has no event"
    duration_N, event_N = duration_N[split_N == judged], event_N[split_N == judged]
    if not event_N.any():
        return f"{judged} has no event"
    first = duration_N[event_N].min()
    outlives = (duration_N > first) | ((duration_N == first) & ~event_N)
    return None if outlives.any() else f"{judged} has no two rows that can be compared"


def fit_cox(
    feature_NF: Features,
    duration_N: np.ndarray,
    event_N: np.ndarray,
    split_N: np.ndarray,
    progress: Callable[[str], None] = lambda _: None,
    *,
    standardise: bool = False,
) -> CoxProbe:
    """Fit on train, choose C by the partial likelihood of tuning, and score every row.

    Of equal penalties the stronger one is taken, so the strongest if tuning has no event.

    Args:
        feature_NF: float [N, F], dense, sparse or in a file, which is read twice for each step;
            duration_N: float64; event_N: bool, False = censored; split_N: str, where rows that are
            neither `train` nor `tuning` are scored alone. standardise: see `scaling`.

    Raises:
        ValueError: train has no event.
    """
    train_N, tuning_N = split_N == "train", split_N == "tuning"
    if not event_N[train_N].any():
        raise ValueError("a Cox regression needs events in train; it has none")
    train = feature_NF[train_N]
    scaled = scaling(train, standardise=standardise)
    likelihood = PartialLikelihood(duration_N[train_N], event_N[train_N])
    judge = PartialLikelihood(duration_N[tuning_N], event_N[tuning_N])
    # the curvature of an event's loss is a variance of features over those at risk
    basis = directions(train, scaled, np.ones(train.shape[0]))
    fit = fit_path(
        partial(_objective, train=train, likelihood=likelihood, scaled=scaled),
        np.zeros(feature_NF.shape[1]),
        np.ones(feature_NF.shape[1]),
        likelihood.num_events,
        score=lambda weight_F: scores(feature_NF, scaled, weight_F),
        tuning_loss=lambda risk_N: judge.loss(risk_N[tuning_N])[0],
        slack=_SLACK,
        progress=progress,
        basis=lambda _: basis,
    )
    risk = RiskFunction(*scaled.weights(fit.weight_W))
    return CoxProbe(fit.score_N, fit.tuning_loss, fit.penalty, fit.at_border, fit.converged, risk)


def _objective(
    weight_F: np.ndarray, train: Features, likelihood: "PartialLikelihood", scaled: Scaling
) -> tuple[float, np.ndarray]:
    loss, slope_T = likelihood.loss(scores(train, scaled, weight_F))
    product_F = np.zeros(len(weight_F))
    for part, chunk_CF in chunks(train):
        product_F += slope_T[part] @ chunk_CF
    return loss, scaled.gradient(product_F, float(slope_T.sum()))


class PartialLikelihood:
    """The partial likelihood of rows with these durations and events, ties after Efron.

    At a time with m events, event number l (from 0) has the hazards of all rows at risk less l / m
    of those of the m events as its denominator. A row is at risk up to its own duration, included.
    """

    def __init__(self, duration_R: np.ndarray, event_R: np.ndarray) -> None:
        """Sort the rows once: duration_R float64, event_R bool."""
        self._order_R = np.argsort(duration_R, kind="stable")
        time_R = duration_R[self._order_R]
        self._event_E = np.flatnonzero(event_R[self._order_R])
        time_G, first_G, size_G = np.unique(
            time_R[self._event_E], return_index=True, return_counts=True
        )
        self.num_events = len(self._event_E)
        self._first_G = first_G
        self._group_E = np.repeat(np.arange(len(time_G)), size_G)
        self._share_E = (np.arange(self.num_events) - first_G[self._group_E]) / np.repeat(
            size_G, size_G
        )
        self._at_risk_G = np.searchsorted(time_R, time_G)  # the first row that is at risk
        self._past_R = np.searchsorted(time_G, time_R, side="right")  # times it is at risk at

    def loss(self, risk_R: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the negative log partial likelihood, nats an event, and its gradient by the log
        hazard of each row, [R]; zeros without an event.

        Sums of hazards are held as logarithms, so that none overflows or vanishes.
        """
        if self.num_events == 0:
            return 0.0, np.zeros(len(risk_R))
        risk_S = risk_R[self._order_R]  # in order of time
        own_E = risk_S[self._event_E]
        sum_G = np.logaddexp.accumulate(risk_S[::-1])[::-1][self._at_risk_G]
        tied_G = np.logaddexp.reduceat(own_E, self._first_G)
        part_E = self._share_E * np.exp((tied_G - sum_G)[self._group_E])
        denominator_E = sum_G[self._group_E] + np.log1p(-part_E)
        # log of the sum of 1 / denominator over the events of a time, and over times so far
        inverse_G = np.logaddexp.reduceat(-denominator_E, self._first_G)
        so_far_G = np.append(-np.inf, np.logaddexp.accumulate(inverse_G))
        slope_S = np.exp(risk_S + so_far_G[self._past_R])
        with np.errstate(divide="ignore"):
            less_E = np.log(self._share_E) - denominator_E
        less_G = np.logaddexp.reduceat(less_E, self._first_G)
        slope_S[self._event_E] -= 1 + np.exp(own_E + less_G[self._group_E])
        slope_R = np.empty(len(risk_R))
        slope_R[self._order_R] = slope_S / self.num_events
        return float((denominator_E - own_E).sum()) / self.num_events, slope_R
