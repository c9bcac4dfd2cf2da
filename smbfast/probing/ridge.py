"""Fits a linear model under a path of L2 penalties, and takes the one that serves tuning best.

The penalties are half a decade apart, strongest first, and a fit starts from the one before. Where
the curvature of the objective is roughly known (`Basis`), a fit goes along its directions in steps
that fit them, which takes a fifth of the passes over train: our choice. Weak penalties lead far
from where it was known, so that it is found again there. Shape suffixes: N rows, W
weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

PENALTIES = tuple(float(10.0**power) for power in np.arange(-6, 4.5, 0.5))
"""Inverse strengths C, strongest penalty first."""
TOL = 1e-6  # no component of the gradient is larger when a fit has converged
FTOL = 64 * float(np.finfo(np.float64).eps)  # or no step gains more, relative to the objective
_ITERATIONS = 1000
_MANY = 30  # passes over train for one penalty after which the curvature is looked at anew
_GAIN = 1e-6  # nats; what a fit's stopping rule leaves is no reason for a weaker penalty


@dataclass(frozen=True)
class RidgeFit:
    """score_N: of every row; tuning_loss: in nats; penalty: C. at_border: whether C is the first or
    last of the grid, so that one outside of it might be better. converged: False if the fit stopped
    at the iteration limit. weight_W: of the scaled features."""

    score_N: np.ndarray
    tuning_loss: float
    penalty: float
    at_border: bool
    converged: bool
    weight_W: np.ndarray


@dataclass(frozen=True)
class Basis:
    """Orthogonal directions of the weights, the columns of turn_WW (float64), and about how much
    the objective curves along each, curve_W. Weights with and without a penalty do not mix."""

    turn_WW: np.ndarray
    curve_W: np.ndarray


def fit_path(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start_W: np.ndarray,
    penalised_W: np.ndarray,
    num_terms: int,
    *,
    score: Callable[[np.ndarray], np.ndarray],
    tuning_loss: Callable[[np.ndarray], float],
    slack: float,
    progress: Callable[[str], None],
    basis: Callable[[np.ndarray], Basis | None] = lambda _: None,
) -> RidgeFit:
    """Minimise `objective + |penalised weights|² / (2 C num_terms)` for each C, and return the fit
    with the least tuning loss; of equal ones that of the stronger penalty.

    Args:
        objective: weights -> mean loss of the `num_terms` terms of train, and its gradient.
        penalised_W: 1.0 where the penalty holds, else 0.0.
        score: weights -> score of every row; tuning_loss: those -> nats.
        slack: nats above the least tuning loss at which the path ends: what is weaker overfits
            more, and takes the longest.
        basis: weights -> how the objective curves there, without its penalty. It changes the way
            to the minimum and not the minimum; `TOL` then holds for steps along its directions.
    """

    def penalised(weight_W: np.ndarray, ridge_W: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient_W = objective(weight_W)
        pull_W = ridge_W * weight_W
        return loss + float(weight_W @ pull_W) / 2, gradient_W + pull_W

    best, weight_W, along = None, start_W, basis(start_W)
    for penalty in PENALTIES:
        progress(f"C = {penalty:.2g}")
        ridge_W = penalised_W / (penalty * num_terms)
        weight_W, status, num_passes = _minimum(penalised, weight_W, ridge_W, along)
        along = basis(weight_W) if num_passes > _MANY else along
        score_N = score(weight_W)
        loss = tuning_loss(score_N)
        if best is None or loss < best.tuning_loss - _GAIN:
            border = penalty in (PENALTIES[0], PENALTIES[-1])
            best = RidgeFit(score_N, loss, penalty, border, status == 0, weight_W)
        elif loss > best.tuning_loss + slack:
            break
    assert best is not None
    return best


def _minimum(
    penalised: Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]],
    start_W: np.ndarray,
    ridge_W: np.ndarray,
    basis: Basis | None,
) -> tuple[np.ndarray, int, int]:
    """Return the weights at the minimum, the status of the solver and its passes over train."""
    if basis is not None:
        step_W = 1 / np.sqrt(basis.curve_W + ridge_W)

    def along(step_lengths_W: np.ndarray) -> tuple[float, np.ndarray]:
        if basis is None:
            return penalised(step_lengths_W, ridge_W)
        loss, gradient_W = penalised(basis.turn_WW @ (step_W * step_lengths_W), ridge_W)
        return loss, step_W * (gradient_W @ basis.turn_WW)

    solved = minimize(
        along,
        start_W if basis is None else (start_W @ basis.turn_WW) / step_W,
        method="L-BFGS-B",
        jac=True,
        options={"maxiter": _ITERATIONS, "maxls": 50, "gtol": TOL, "ftol": FTOL},
    )
    if basis is None:
        return solved.x, solved.status, solved.nfev
    return basis.turn_WW @ (step_W * solved.x), solved.status, solved.nfev
