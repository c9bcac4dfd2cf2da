"""Weighted counts of ordered pairs, exactly and in N log N, for many weightings at once.

Everything that ranks is such a count: of the pairs of a case and a control that may be compared,
those in which the case has the higher risk; equal risks count one half. Which pairs may be compared
follows from one whole number a row: a case with those controls whose key is greater than its own.

Keys are halved as a tree of bits halves them. At each bit, cases in the lower half of a node meet
the controls in its upper half, and every pair of unequal keys meets at exactly one bit. Controls of
a node lie in the order of risk, so what a case leads is a difference of two running sums. The order
does not depend on weights: it is found once, and a draw costs one running sum for each bit.

Shape suffixes: C cases, N controls, B draws (weightings), M and K the controls and cases that meet
at one bit.
"""

from typing import NamedTuple

import numpy as np


class _Bit(NamedTuple):
    """Who meets at one bit. Places are among the controls of the bit, in the order of risk."""

    control_M: np.ndarray  # int32 which controls, by node and risk
    case_K: np.ndarray  # int32 which cases
    first_K: np.ndarray  # int32 where the controls of the case's node begin
    below_K: np.ndarray  # int32 where those that are not below it in risk begin
    upto_K: np.ndarray  # int32 where those above it begin


class Pairs:
    """The comparable pairs of cases and controls, and which of them are in the right order."""

    def __init__(
        self,
        case_risk_C: np.ndarray,
        case_key_C: np.ndarray,
        control_risk_N: np.ndarray,
        control_key_N: np.ndarray,
    ) -> None:
        """Sort once.

        Args:
            case_risk_C, control_risk_N: float, no nan.
            case_key_C, control_key_N: whole numbers >= 0; a pair is compared if the control's is
                greater.
        """
        risk = np.concatenate([case_risk_C, control_risk_N])
        values, rank = np.unique(risk, return_inverse=True)
        case_rank_C, control_rank_N = np.split(rank.astype(np.int64), [len(case_risk_C)])
        highest = max(case_key_C.max(initial=0), control_key_N.max(initial=0))
        self._bits = [
            _bit(bit, len(values), case_rank_C, case_key_C, control_rank_N, control_key_N)
            for bit in range(int(highest).bit_length())
        ]
        self._case_key_C = case_key_C
        # controls by key: how much may be compared with a case is a running sum over them
        self._by_key_N = np.argsort(control_key_N, kind="stable").astype(np.int32)
        self._greater_C = np.searchsorted(
            control_key_N[self._by_key_N], case_key_C, side="right"
        ).astype(np.int32)

    def sums(self, case_CB: np.ndarray, control_NB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of pairs in the right order, and of all, float64 [B] each.

        A pair weighs the product of its two weights. Whole weights give exact sums (of halves below
        2**53).

        Args:
            case_CB, control_NB: whole or real weights >= 0, a column for each draw.
        """
        case_CB = np.ascontiguousarray(case_CB, np.float64)
        right_B = np.zeros(case_CB.shape[1])
        for bit in self._bits:
            sum_MB = _running(control_NB, bit.control_M)
            twice_KB = sum_MB.take(bit.below_K, 0)
            twice_KB += sum_MB.take(bit.upto_K, 0)
            twice_KB -= 2 * sum_MB.take(bit.first_K, 0)
            right_B += np.einsum("kb,kb->b", case_CB.take(bit.case_K, 0), twice_KB)
        sum_NB = _running(control_NB, self._by_key_N)
        all_CB = sum_NB[-1] - sum_NB.take(self._greater_C, 0)
        return right_B / 2, np.einsum("cb,cb->b", case_CB, all_CB)


def _bit(
    bit: int,
    num_ranks: int,
    case_rank_C: np.ndarray,
    case_key_C: np.ndarray,
    control_rank_N: np.ndarray,
    control_key_N: np.ndarray,
) -> _Bit:
    case_K = np.flatnonzero((case_key_C >> bit) & 1 == 0)
    control_M = np.flatnonzero((control_key_N >> bit) & 1 == 1)
    first_K = (case_key_C[case_K].astype(np.int64) >> (bit + 1)) * num_ranks
    place_K = first_K + case_rank_C[case_K]
    place_M = (control_key_N[control_M].astype(np.int64) >> (bit + 1)) * num_ranks
    place_M += control_rank_N[control_M]
    # cases in the order of their places: what is looked up lies close together
    by_place_K, by_place_M = np.argsort(place_K, kind="stable"), np.argsort(place_M, kind="stable")
    first_K, place_K, place_M = first_K[by_place_K], place_K[by_place_K], place_M[by_place_M]
    return _Bit(
        *(
            at.astype(np.int32)
            for at in (
                control_M[by_place_M],
                case_K[by_place_K],
                np.searchsorted(place_M, first_K),
                np.searchsorted(place_M, place_K),
                np.searchsorted(place_M, place_K, side="right"),
            )
        )
    )


def _running(weight_NB: np.ndarray, order_M: np.ndarray) -> np.ndarray:
    """Return the sums of the weights before each place of the order, float64 [M + 1, B]."""
    sum_MB = np.zeros((len(order_M) + 1, weight_NB.shape[1]))
    np.cumsum(weight_NB.take(order_M, 0), axis=0, out=sum_MB[1:])
    return sum_MB
