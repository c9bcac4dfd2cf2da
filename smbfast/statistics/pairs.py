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
    upto_K: np.ndarray | None  # int32 where those above it begin; None if no risks are equal


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
        self._all = not self._greater_C.any()  # every case is compared with every control

    def sums(self, case_BC: np.ndarray, control_BN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weight of pairs in the right order, and of all, float64 [B] each.

        A pair weighs the product of its two weights. Whole weights give exact sums (of halves below
        2**53).

        Args:
            case_BC, control_BN: whole or real weights >= 0, a row for each draw.
        """
        right_B, all_B = np.empty(len(case_BC)), np.empty(len(case_BC))
        sum_N = np.zeros(control_BN.shape[1] + 1)  # room for all running sums
        for draw, (case_C, control_N) in enumerate(zip(case_BC, control_BN, strict=True)):
            case_C = case_C.astype(np.float64)
            if self._all:
                all_B[draw] = case_C.sum() * control_N.sum(dtype=np.float64)
            else:
                _run(control_N, self._by_key_N, sum_N)
                all_B[draw] = case_C @ (sum_N[-1] - sum_N.take(self._greater_C))
            right_B[draw] = sum(_right(bit, case_C, control_N, sum_N) for bit in self._bits)
        return right_B, all_B


def _right(bit: _Bit, case_C: np.ndarray, control_N: np.ndarray, sum_N: np.ndarray) -> float:
    """Return the weight of the pairs that meet at a bit and are in the right order."""
    _run(control_N, bit.control_M, sum_N)
    below_K = sum_N.take(bit.below_K)
    if bit.upto_K is not None:
        below_K += sum_N.take(bit.upto_K)
        below_K *= 0.5
    below_K -= sum_N.take(bit.first_K)
    return float(case_C.take(bit.case_K) @ below_K)


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
    first_K = np.searchsorted(place_M, first_K, "left").astype(np.int32)
    below_K = np.searchsorted(place_M, place_K, "left").astype(np.int32)
    upto_K = np.searchsorted(place_M, place_K, "right").astype(np.int32)
    return _Bit(
        control_M[by_place_M].astype(np.int32),
        case_K[by_place_K].astype(np.int32),
        first_K,
        below_K,
        None if np.array_equal(below_K, upto_K) else upto_K,
    )


def _run(weight_N: np.ndarray, order_M: np.ndarray, sum_N: np.ndarray) -> None:
    """Write the sums of the weights before each place of the order, M + 1 of them; the first is 0.

    One draw at a time: its weights lie in a cache, which those of many draws do not.
    """
    np.cumsum(weight_N.take(order_M), dtype=np.float64, out=sum_N[1 : len(order_M) + 1])
