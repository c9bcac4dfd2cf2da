"""The scale on which horizon JEPA compares: mean and deviation of the averaged target states.

A target is (x - mean) / (deviation + 0.01) by horizon and width. Mean and variance are running ones
over steps (decay 0.99, corrected for their start), from fp64 sums of whole steps, and used from the
next step on: so neither the size of micro-batches nor their order changes a loss. Of the first step
of a horizon, its own targets give them. All of it is our choice.

Legend: H horizons, D width, Q pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DECAY = 0.99
FLOOR = 0.01  # added to the deviation
_NAMES = ("weight_H1", "first_HD", "second_HD")


@dataclass
class ScaleSums:
    """Sums over the pairs of a step, fp64: how many, their targets, the squares of these."""

    count_H1: Tensor
    first_HD: Tensor
    second_HD: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """The sums, to add those of other ranks in place."""
        return list(vars(self).values())

    def add(self, mean_QD: Tensor, horizon_Q: Tensor) -> None:
        """Add the averaged target states of some pairs."""
        horizons = torch.arange(len(self.count_H1), device=horizon_Q.device)
        # a product with 0 and 1, as sums by index are in no fixed order on a GPU
        is_of_HQ = (horizons[:, None] == horizon_Q).double()
        exact_QD = mean_QD.double()
        self.count_H1 += is_of_HQ.sum(1, keepdim=True)
        self.first_HD += is_of_HQ @ exact_QD
        self.second_HD += is_of_HQ @ exact_QD.square()


class HorizonScale:
    """Running means and variances of the averaged target states."""

    def __init__(self, horizons: int, width: int, device: torch.device) -> None:
        """Begin without any."""
        zero = torch.zeros(horizons, width, device=device, dtype=torch.float64)
        self._running = ScaleSums(zero[:, :1].clone(), zero, zero.clone())
        self._mean_HD, self._deviation_HD = zero.clone(), torch.ones_like(zero)
        self._known = [False] * horizons

    def new_sums(self) -> ScaleSums:
        """Return sums of nothing, for a step."""
        own = self._running
        return ScaleSums(*(torch.zeros_like(x) for x in vars(own).values()))

    def lacks(self, num_by_horizon: Sequence[int]) -> bool:
        """Whether a step with these numbers of pairs has a horizon whose scale is not known."""
        return any(n and not known for n, known in zip(num_by_horizon, self._known, strict=True))

    def begin(self, sums: ScaleSums) -> None:
        """Take the scale of horizons that have none yet from the sums of the step that comes."""
        mean_HD, deviation_HD = _moments(sums)
        is_new_H1 = torch.tensor([not known for known in self._known])[:, None]
        is_new_H1 = is_new_H1.to(mean_HD.device) & (sums.count_H1 > 0)
        is_new_H1 &= torch.isfinite(sums.second_HD).all()  # that step is skipped
        self._mean_HD = torch.where(is_new_H1, mean_HD, self._mean_HD)
        self._deviation_HD = torch.where(is_new_H1, deviation_HD, self._deviation_HD)

    def update(self, sums: ScaleSums, num_by_horizon: Sequence[int]) -> None:
        """Move the running values by the sums of a step that was made.

        A horizon without pairs stays as it is, and so do all if a state was not finite. This waits
        for a GPU at the first step of a horizon.
        """
        own, count_H1 = self._running, sums.count_H1.clamp_min(1)
        finite = torch.isfinite(sums.second_HD).all()
        moves_H1 = (sums.count_H1 > 0) & finite
        steps = (torch.ones_like(count_H1), sums.first_HD / count_H1, sums.second_HD / count_H1)
        values = (own.count_H1, own.first_HD, own.second_HD)
        moved = [DECAY * v + (1 - DECAY) * s for v, s in zip(values, steps, strict=True)]
        pairs = zip(moved, values, strict=True)
        self._running = ScaleSums(*(torch.where(moves_H1, m, v) for m, v in pairs))
        if self.lacks(num_by_horizon) and bool(finite):
            self._known = [k or n > 0 for k, n in zip(self._known, num_by_horizon, strict=True)]
        self._use()

    def standardised(self, mean_QD: Tensor, horizon_Q: Tensor) -> Tensor:
        """Return averaged target states on the running scale, [Q, D] in their own dtype."""
        dtype = mean_QD.dtype
        centre_QD = self._mean_HD.to(dtype)[horizon_Q]
        return (mean_QD - centre_QD) / (self._deviation_HD.to(dtype) + FLOOR)[horizon_Q]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save in a checkpoint."""
        return dict(zip(_NAMES, vars(self._running).values(), strict=True))

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state`.

        Raises:
            ValueError: if names or shapes are not those of this scale.
        """
        own = self.state()
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in own.items()}:
            raise ValueError(
                f"the scale of the target must be of {len(own['weight_H1'])} horizons of width "
                f"{own['first_HD'].shape[1]}; it is of others"
            )
        device = self._mean_HD.device
        self._running = ScaleSums(*(state[n].to(device, torch.float64) for n in _NAMES))
        self._known = (self._running.count_H1[:, 0] > 0).tolist()
        self._use()

    def _use(self) -> None:
        known_H1 = self._running.count_H1 > 0
        mean_HD, deviation_HD = _moments(self._running)
        self._mean_HD = torch.where(known_H1, mean_HD, self._mean_HD)
        self._deviation_HD = torch.where(known_H1, deviation_HD, self._deviation_HD)


def _moments(sums: ScaleSums) -> tuple[Tensor, Tensor]:
    """Return mean and deviation, [H, D] each."""
    count_H1 = sums.count_H1.clamp_min(1e-300)
    mean_HD = sums.first_HD / count_H1
    variance_HD = sums.second_HD / count_H1 - mean_HD.square()
    return mean_HD, variance_HD.clamp_min(0).sqrt()
