"""Finds when a record ends, and which events are terminal: codes after which nothing is to come.

Legend: N events, S subjects (S1 = S + 1 offsets), C codes.
"""

import re
from collections.abc import Iterable, Sequence

import numpy as np

from smbfast.batch import UNKNOWN
from smbfast.data.meds import STATIC, EventBatch

_BOUNDARY = re.compile(r"[^A-Z0-9]")  # as in section rules


def are_terminal(codes: Iterable[str], rules: Sequence[str]) -> np.ndarray:
    """Return which codes are one of `rules`, whole or up to a boundary such as `//`: bool [C].

    As in section rules, neither case nor what follows the boundary makes a difference.
    """
    ruled = [rule.upper() for rule in rules if rule]
    return np.array([any(_begins(c.upper(), rule) for rule in ruled) for c in codes], bool)


def _begins(code: str, rule: str) -> bool:
    rest = code[len(rule) : len(rule) + 1]
    return code.startswith(rule) and (not rest or _BOUNDARY.match(rest) is not None)


def endings(batch: EventBatch, rules: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the time of each subject's last event and of its first terminal one, both int64 [S].

    Times are microseconds since 1970. UNKNOWN stands for a subject without events that have a time,
    and for one without a terminal event.
    """
    begin_S, end_S = batch.offset_S1[:-1], batch.offset_S1[1:]
    last_S = np.full(len(begin_S), UNKNOWN)
    filled_S = end_S > begin_S
    last_S[filled_S] = batch.time_N[end_S[filled_S] - 1]  # STATIC is UNKNOWN
    terminal_S = np.full(len(begin_S), UNKNOWN)
    at = np.flatnonzero(are_terminal(batch.codes, rules)[batch.code_N] & (batch.time_N != STATIC))
    subject = np.searchsorted(batch.offset_S1, at, side="right") - 1
    terminal_S[subject[::-1]] = batch.time_N[at[::-1]]  # the first of several
    return last_S, terminal_S
