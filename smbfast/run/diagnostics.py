"""Is the target collapsing, and is the predictor better than knowing nothing? Numbers for the log.

All in fp32 on the masked positions given, on the normalised targets that the loss sees.

Legend: M masked positions, D width.
"""

import torch
from smbkernels.jepa_mse import normalized_target
from torch import Tensor

from smbfast.model.target import JepaStates

RANK_ROWS = 4096  # rows that a rank is computed from: our choice


@torch.no_grad()
def diagnose(states: JepaStates, *, normalize: bool) -> dict[str, float]:
    """Loss, trivial predictors and the spread of the target.

    - `jepa`: the loss; `trivial_mean`: the loss of the mean target of these positions, the best
      constant; `trivial_copy`: that of copying the target state of the last visible token;
      `ratio`: jepa over the better of the two.
    - `target_std`, `target_std_p5`: standard deviation per dimension over positions, its mean and
      5th percentile. `target_rank`, `online_rank`: effective rank, exp of the entropy of the
      normalised singular values after centring (RankMe, arXiv 2210.02885).
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
    """exp(entropy of the singular values, normalised to sum 1) of the centred rows."""
    if len(rows_MD) > RANK_ROWS:
        rows_MD = rows_MD[torch.linspace(0, len(rows_MD) - 1, RANK_ROWS).long()]
    centred = (rows_MD - rows_MD.mean(0)).double()
    values = torch.linalg.svdvals(centred)
    share = values / values.sum().clamp_min(1e-300)
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))


def _mse(prediction_MD: Tensor, target_MD: Tensor) -> float:
    return (prediction_MD - target_MD).square().mean().item()
