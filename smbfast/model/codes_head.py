"""The head of codes to come: which codes occur within a horizon behind a position.

    logit = C (A_H z) + b_H,   A_H [E, D], C [K, E], b_H [K]

A_H is a matrix for each horizon, so that patient and horizon interact. The loss of a pair of a
position and a horizon is the binary cross-entropy summed over codes, over 10 (after MOTOR's time to
event, arXiv 2301.03150; the form is our choice).

Legend: H horizons, E inner width, D width, K classes, N positions, P pairs, Z codes that come, R
rows of a chunk.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smbfast.batch import FuturePairs

SHARE = 0.1  # of the summed cross-entropy that counts: our choice
_INNER = 256  # largest inner width
_RARE = 1e-3  # prevalence below which a code weighs no more
_CHUNK = 1 << 24  # logits, or numbers of gathered rows, that are held at once: 64 MiB


class CodesHead(nn.Module):
    """The head's parameters, fp32; its logits start at the prevalence of each code."""

    weight_HK: Tensor | None
    prevalence_HK: Tensor  # its logits, at which the bias begins

    def __init__(self, width: int, prevalence_HK: np.ndarray, weighted: bool = False) -> None:
        """Make a head for [H, K] prevalences, each above 0 and below 1.

        Args:
            weighted: whether a code weighs prevalence^-1/2 in place of 1.
        """
        super().__init__()
        prevalence = torch.from_numpy(np.asarray(prevalence_HK, np.float64))
        horizons, classes = prevalence.shape
        inner = min(width, _INNER)
        self.inner_HED = nn.Parameter(torch.randn(horizons, inner, width) * width**-0.5)
        self.class_KE = nn.Parameter(torch.randn(classes, inner) * 0.02)
        self.bias_HK = nn.Parameter(torch.logit(prevalence).float())
        self.register_buffer("prevalence_HK", self.bias_HK.detach().clone(), persistent=False)
        weight = prevalence.clamp_min(_RARE).rsqrt().float() if weighted else None
        self.register_buffer("weight_HK", weight, persistent=False)

    @classmethod
    def of_state(cls, state: dict[str, Tensor], width: int) -> "CodesHead":
        """Return a head with saved parameters, whose shapes are compared before it is made.

        Raises:
            KeyError: a parameter is missing.
            RuntimeError: shapes or names are not those of a head of this width.
        """
        shapes = [tuple(state[name].shape) for name in ("inner_HED", "class_KE", "bias_HK")]
        horizons, classes = (*shapes[2], 0, 0)[:2]
        inner = min(width, _INNER)
        if shapes != [(horizons, inner, width), (classes, inner), (horizons, classes)]:
            raise RuntimeError(f"tensors of {shapes} are no head of width {width}")
        head = cls(width, torch.sigmoid(state["bias_HK"].double()).numpy())
        head.load_state_dict(state)
        return head

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return self.class_KE.dtype

    def parts(self, frozen: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return A, C and b; detached if `frozen`."""
        if frozen:
            return self.inner_HED.detach(), self.class_KE.detach(), self.bias_HK.detach()
        return self.inner_HED, self.class_KE, self.bias_HK


def codes_sum(
    head: CodesHead, state_ND: Tensor, pairs: FuturePairs, *, frozen: bool = False
) -> Tensor:
    """Return the summed loss of all pairs, a scalar; logits exist for a chunk of pairs at a time.

    The binary cross-entropy of targets that are mostly 0 is softplus(logit) of every class, less
    the logit of each that occurs.

    Args:
        state_ND: the online states at the positions.
        frozen: whether the head's own weights get no gradient.
    """
    inner_HED, class_KE, bias_HK = head.parts(frozen)
    horizons, inner, _ = inner_HED.shape
    own_NHE = F.linear(state_ND.to(head.dtype), inner_HED.flatten(0, 1)).unflatten(
        -1, (horizons, inner)
    )
    place_P = pairs.position_P * horizons + pairs.horizon_P
    own_PE = F.embedding(place_P, own_NHE.flatten(0, 1))
    every = partial(_every, weight_HK=head.weight_HK)
    occurring = partial(_occurring, weight_HK=head.weight_HK)
    total = own_PE.new_zeros(())
    rows = max(_CHUNK // len(class_KE), 1)
    for first in range(0, len(own_PE), rows):
        part = slice(first, first + rows)
        total = total + _recomputed(every, own_PE[part], class_KE, bias_HK, pairs.horizon_P[part])
    rows = max(_CHUNK // inner, 1)
    for first in range(0, len(pairs.pair_Z), rows):
        part = slice(first, first + rows)
        where = (pairs.pair_Z[part], pairs.class_Z[part], pairs.horizon_P)
        total = total - _recomputed(occurring, own_PE, class_KE, bias_HK, *where)
    return total * SHARE


@torch.no_grad()
def prevalence_sum(head: CodesHead, pairs: FuturePairs) -> Tensor:
    """Return the summed loss of a head that predicts the prevalence for every patient, a scalar."""
    logit_HK = head.prevalence_HK
    weight_HK = torch.ones_like(logit_HK) if head.weight_HK is None else head.weight_HK
    device = logit_HK.device
    horizon_P, class_Z = pairs.horizon_P.to(device), pairs.class_Z.to(device)
    every_H = (F.softplus(logit_HK) * weight_HK).double().sum(1)
    occurring_Z = (logit_HK * weight_HK)[horizon_P[pairs.pair_Z.to(device)], class_Z]
    return (every_H[horizon_P].sum() - occurring_Z.double().sum()) * SHARE


def _recomputed(function: partial, *inputs: Tensor) -> Tensor:
    """Call a function whose inner results are computed again in the backward."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def _every(
    own_RE: Tensor, class_KE: Tensor, bias_HK: Tensor, horizon_R: Tensor, weight_HK: Tensor | None
) -> Tensor:
    loss_RK = F.softplus(own_RE @ class_KE.T + F.embedding(horizon_R, bias_HK))
    if weight_HK is not None:
        loss_RK = loss_RK * weight_HK[horizon_R]
    return loss_RK.sum()


def _occurring(
    own_PE: Tensor,
    class_KE: Tensor,
    bias_HK: Tensor,
    pair_Z: Tensor,
    class_Z: Tensor,
    horizon_P: Tensor,
    weight_HK: Tensor | None,
) -> Tensor:
    horizon_Z = horizon_P[pair_Z]
    place_Z = horizon_Z * len(class_KE) + class_Z
    logit_Z = (F.embedding(pair_Z, own_PE) * F.embedding(class_Z, class_KE)).sum(-1)
    logit_Z = logit_Z + F.embedding(place_Z, bias_HK.reshape(-1, 1))[:, 0]
    if weight_HK is not None:
        logit_Z = logit_Z * weight_HK.flatten()[place_Z]
    return logit_Z.sum()
