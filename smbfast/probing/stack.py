"""Puts two fitted models together: does the embedding say what the best baseline does not?

The score is a weighted sum of the two calibrated logits (log hazards), with weights of 0 and above
(Breiman 1996, Stacked regressions). They are fitted on tuning, of which neither model has fitted
more than a penalty and a calibration: on train both look better than they are, and the one that
overfits more would get the weight. A ridge pulls the weights to 1/2 each, as firmly as ten rows
pull a slope of logits: our choice, as tuning is small. Figures on tuning are therefore in part
those of a fit. Shape suffixes: N rows, S rows of tuning, W weights.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from smbfast.data.labels import Labels
from smbfast.probing.survival import PartialLikelihood

RIDGE = 10.0  # of (weight - 1/2)² / 2, in nats of all tuning rows together
Likelihood = Callable[[np.ndarray], tuple[float, np.ndarray]]


def stacked(
    labels: Labels, own_N: np.ndarray, other_N: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the logit or log hazard of every row, float64 [N], and the weights for the record.

    Without a row or an event of tuning both weights are 1/2.

    Args:
        own_N, other_N: calibrated logits of a binary task, log hazards otherwise.
    """
    tuning_N = labels.split_N == "tuning"
    binary = labels.kind == "binary"
    row_NW = np.stack([own_N, other_N, *([np.ones(len(own_N))] if binary else [])], 1)
    row_SW, likelihood = row_NW[tuning_N], _likelihood(labels.take(tuning_N))

    def objective(weight_W: np.ndarray) -> tuple[float, np.ndarray]:
        loss, slope_S = likelihood(row_SW @ weight_W)
        pull_W = np.append(weight_W[:2] - 0.5, np.zeros(len(weight_W) - 2))
        return loss + RIDGE * float(pull_W @ pull_W) / 2, slope_S @ row_SW + RIDGE * pull_W

    solved = minimize(
        objective,
        np.array([0.5, 0.5, 0.0][: row_NW.shape[1]]),
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, None), (0, None), (None, None)][: row_NW.shape[1]],
        options={"gtol": 1e-8, "ftol": 1e-15},
    )
    weights = [float(weight) for weight in solved.x]
    return row_NW @ solved.x, {"weights": weights[:2], "intercept": sum(weights[2:])}


def _likelihood(tuning: Labels) -> Likelihood:
    """Return the negative log likelihood of scores, nats in all, and its gradient by them."""
    if tuning.kind != "binary":
        partial = PartialLikelihood(*tuning.survival_N)

        def of_hazards(score_S: np.ndarray) -> tuple[float, np.ndarray]:
            loss, slope_S = partial.loss(score_S)
            return loss * partial.num_events, slope_S * partial.num_events

        return of_hazards
    true_S = tuning.binary_N.astype(np.float64)

    def of_logits(score_S: np.ndarray) -> tuple[float, np.ndarray]:
        return float((np.logaddexp(0, score_S) - true_S * score_S).sum()), expit(score_S) - true_S

    return of_logits
