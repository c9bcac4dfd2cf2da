"""What evaluations say of states: how far they spread, and whether JEPA beats trivial predictors.

Everything is computed in fp32 at least, on what the losses read.

Legend: N rows of states, M masked tokens, Q pairs of a position and a horizon, D width.
"""

import math
from collections.abc import Sequence

import torch
from smbkernels.jepa_mse import normalized_target
from torch import Tensor

from smbfast.model.target import HorizonStates, JepaStates

RANK_ROWS = 1024  # states that a rank is computed from, at most: our choice
# Standardized targets have a mean square near 1. Below this there is nothing to predict, and the
# rounding of constant states, divided by (sd + 0.01), stays below it: our choice.
NO_SPREAD = 1e-4


@torch.no_grad()
def spread(state_ND: Tensor) -> dict[str, float]:
    """Return how far states lie from each other, whatever their scale.

    - `std` is the mean over width of the standard deviation over rows, divided by the root mean
      square of all numbers: 0 where all states are the same, at most 1.
    - `rank` is their effective rank.

    Both are NaN where a state is not finite or there is none.
    """
    rows_ND = state_ND.float()
    if not len(rows_ND) or not bool(rows_ND.isfinite().all()):
        return {"std": float("nan"), "rank": float("nan")}
    size = float(rows_ND.square().mean().sqrt())
    std = float(rows_ND.std(0, correction=0).mean()) / size if size > 0 else 0.0
    return {"std": std, "rank": effective_rank(rows_ND)}


@torch.no_grad()
def diagnose(states: JepaStates, *, normalize: bool) -> dict[str, float]:
    """Return the loss of mask JEPA, those of trivial predictors, and the spread of the target.

    - `jepa` is the loss. `trivial_mean` is the loss of predicting the mean target of these tokens,
      the best constant. `trivial_copy` is the loss of copying the target's state of the last
      unmasked token. `ratio` is `jepa` over the smaller of the two.
    - `target_std` and `target_std_p5` are the mean and the 5th percentile over dimensions of the
      standard deviation over tokens.
    - `target_rank` is the effective rank.
    """
    target_MD = normalized_target(states.target_MD.float(), normalize=normalize)
    previous_MD = normalized_target(states.previous_MD.float(), normalize=normalize)
    jepa = _mse(states.prediction_MD.float(), target_MD)
    mean = _mse(target_MD.mean(0, keepdim=True).expand_as(target_MD), target_MD)
    copied = _mse(previous_MD, target_MD)
    std_D = target_MD.std(0, correction=0)
    return {
        "jepa": jepa,
        "trivial_mean": mean,
        "trivial_copy": copied,
        "ratio": jepa / max(min(mean, copied), 1e-12),
        "target_std": std_D.mean().item(),
        "target_std_p5": torch.quantile(std_D, 0.05).item(),
        "target_rank": effective_rank(target_MD),
    }


@torch.no_grad()
def diagnose_horizons(states: HorizonStates, names: Sequence[str]) -> dict[str, float]:
    """Return the loss of horizon JEPA, its R² by horizon, and the spread of the target.

    - `jepa` is the loss, the mean over pairs and width of the squared error.
    - `r2_<name>` is 1 - sum (u - t)² / sum (t - mean t)² over the pairs of a horizon and the width,
      with t the standardized target and the mean over pairs by width: 0 is what the best constant
      reaches. It is 0 too where the target has no spread, so that there is nothing to predict.
    - `r2_copy_<name>` is that of the target's state at p itself, after the slope and the offset
      of least squares for each width, which these very pairs give.
    - `r2` and `r2_copy` are means over horizons with at least two pairs; others have no value.
    - `target_std` and `target_rank` are those of `spread`, of the target's states at p, each
      position once.

    Args:
        names: of the horizons, in the order of `horizon_Q`.
    """
    prediction_QD, target_QD = states.prediction_QD.float(), states.target_QD.float()
    at_QD = states.at_QD.float()
    measures = {"jepa": _mse(prediction_QD, target_QD)}
    own = [states.horizon_Q == h for h in range(len(names))]
    own_of = {name: own_Q for name, own_Q in zip(names, own, strict=True) if int(own_Q.sum()) > 1}
    for name, own_Q in own_of.items():
        target, left = target_QD[own_Q], prediction_QD[own_Q] - target_QD[own_Q]
        measures[f"r2_{name}"] = _r2(left, target)
        measures[f"r2_copy_{name}"] = _r2(_regressed(at_QD[own_Q], target), target)
    for key in ("r2", "r2_copy") if own_of else ():
        measures[key] = sum(measures[f"{key}_{name}"] for name in own_of) / len(own_of)
    # a position has at most one pair of each horizon
    most_Q = max(own, key=lambda own_Q: int(own_Q.sum()))
    return measures | {f"target_{k}": v for k, v in spread(at_QD[most_Q]).items()}


def effective_rank(rows_ND: Tensor) -> float:
    """Return exp(entropy) of the centred rows' singular values, normalized to sum 1.

    This is RankMe (arXiv 2210.02885) of at most `RANK_ROWS` rows, spread evenly. The squares of the
    values are eigenvalues of the smaller of both Gram matrices, in fp64. A value that should be 0
    is then some 1e-8 of the largest, which adds 3e-4 to the entropy if there are a thousand. It is
    nan where a value is not finite.
    """
    if len(rows_ND) > RANK_ROWS:
        rows_ND = rows_ND[torch.linspace(0, len(rows_ND) - 1, RANK_ROWS).long()]
    rows_ND = rows_ND.double()
    centred = rows_ND - rows_ND.mean(0)
    gram = centred @ centred.T if len(centred) <= centred.shape[1] else centred.T @ centred
    if not bool(gram.isfinite().all()):
        return math.nan
    values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = values / values.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def _regressed(at_QD: Tensor, target_QD: Tensor) -> Tensor:
    """Return what a slope and an offset for each width leave of the target."""
    at_QD, target_QD = at_QD - at_QD.mean(0), target_QD - target_QD.mean(0)
    slope_D = (at_QD * target_QD).sum(0) / at_QD.square().sum(0).clamp_min(1e-30)
    return slope_D * at_QD - target_QD


def _r2(left_QD: Tensor, target_QD: Tensor) -> float:
    spread_QD = target_QD - target_QD.mean(0)
    variance = float(spread_QD.square().mean())
    return 1.0 - float(left_QD.square().mean()) / variance if variance > NO_SPREAD else 0.0


def _mse(prediction_MD: Tensor, target_MD: Tensor) -> float:
    return (prediction_MD - target_MD).square().mean().item()
