"""Diagnostics of JEPA: whether the target collapses, and whether the predictor beats trivial ones.

They are computed in fp32 at the given masked tokens, on the normalized targets that the loss reads.

Legend: M masked tokens, D width.
"""

import torch
from smbkernels.jepa_mse import normalized_target
from torch import Tensor

from smbfast.model.target import JepaStates

RANK_ROWS = 4096  # tokens that a rank is computed from, at most: our choice


@torch.no_grad()
def diagnose(states: JepaStates, *, normalize: bool) -> dict[str, float]:
    """Return the loss, the losses of trivial predictors, and the spread of the target.

    - `jepa` is the loss. `trivial_mean` is the loss of predicting the mean target of these tokens,
      the best constant. `trivial_copy` is the loss of copying the target's state of the last
      unmasked token. `ratio` is `jepa` over the smaller of the two.
    - `target_std` and `target_std_p5` are the mean and the 5th percentile over dimensions of the
      standard deviation over tokens.
    - `target_rank` and `online_rank` are effective ranks: exp of the entropy of the normalized
      singular values after centring (RankMe, arXiv 2210.02885).
    """
    target_MD = normalized_target(states.target_MD.float(), normalize=normalize)
    previous_MD = normalized_target(states.previous_MD.float(), normalize=normalize)
    jepa = _mse(states.prediction_MD.float(), target_MD)
    mean = _mse(target_MD.mean(0, keepdim=True).expand_as(target_MD), target_MD)
    copied = _mse(previous_MD, target_MD)
    std_D = target_MD.std(0, correction=0)
    online_MD = normalized_target(states.online_MD.float(), normalize=normalize)
    return {
        "jepa": jepa,
        "trivial_mean": mean,
        "trivial_copy": copied,
        "ratio": jepa / max(min(mean, copied), 1e-12),
        "target_std": std_D.mean().item(),
        "target_std_p5": torch.quantile(std_D, 0.05).item(),
        "target_rank": effective_rank(target_MD),
        "online_rank": effective_rank(online_MD),
    }


def effective_rank(rows_MD: Tensor) -> float:
    """Return exp(entropy) of the centred rows' singular values, normalized to sum 1."""
    if len(rows_MD) > RANK_ROWS:
        rows_MD = rows_MD[torch.linspace(0, len(rows_MD) - 1, RANK_ROWS).long()]
    centred = (rows_MD - rows_MD.mean(0)).double()
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def _mse(prediction_MD: Tensor, target_MD: Tensor) -> float:
    return (prediction_MD - target_MD).square().mean().item()
