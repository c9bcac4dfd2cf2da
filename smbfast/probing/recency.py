"""Computes counts of codes in windows that end at the prediction time.

Windows are nested: 6 hours, 1, 7, 30 and 365 days, beside the count of ever; our choice, so that
stays of hours and records of years have windows of their own. One is left out where it holds as
many events as the next longer one for all but 1 % of the train nodes: its columns would be those of
that one again. Births and what has no time count in "ever" alone.

Legend: K distinct nodes, C codes, N label rows, V visible (node, event) pairs, E triples of a node,
a code and a window, W windows.
"""

from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix, hstack

from smbfast.data.meds import BIRTH, STATIC
from smbfast.probing.counts import CodeCounts, Piece, VisibleEvents
from smbfast.probing.features import join

WINDOWS = (0.25, 1.0, 7.0, 30.0, 365.0)
"""Lengths in days, ascending; an event as old as a window is outside of it."""
_NEARLY_ALL = 0.99  # of the train nodes: our choice
_DAY = 86_400_000_000  # microseconds


@dataclass(frozen=True)
class CodeRecency:
    """Counts, and of each window those of the codes that no shorter window holds.

    between_WKC: csr float64 [K, C] of each window; older_K: int64, how many events with a time are
    in none, births left out.
    """

    counts: CodeCounts
    between_WKC: list[csr_matrix]
    older_K: np.ndarray

    def features(
        self, subject_N: np.ndarray, time_N: np.ndarray, train_N: np.ndarray
    ) -> csr_matrix:
        """Return float64 [N, F]: the features of `CodeCounts`, then log1p(count) of each window
        that train decides to take, for the codes that occur within it in the train rows."""
        row_N = join(subject_N, time_N, self.counts.subject_K, self.counts.time_K)
        parts = [self.counts.features(subject_N, time_N, train_N)]
        taken = self.windows(row_N[train_N])
        count_NC = csr_matrix((len(row_N), self.counts.count_KC.shape[1]))
        for place, between_KC in enumerate(self.between_WKC):
            count_NC = count_NC + between_KC[row_N]
            if place in taken:
                seen_C = np.unique(count_NC[np.flatnonzero(train_N)].indices)
                parts.append(count_NC[:, seen_C].log1p())
        return hstack(parts, format="csr")

    def windows(self, row_T: np.ndarray) -> list[int]:
        """Return the places in `WINDOWS` of those that are taken, for the train nodes `row_T`."""
        between_WT = [np.asarray(own.sum(1)).ravel()[row_T] for own in self.between_WKC]
        # what each window adds to the one before it, the record as a whole last
        more_WT = [*between_WT[1:], self.older_K[row_T]]
        taken, more_T = [], np.zeros(len(row_T))
        for place in reversed(range(len(WINDOWS))):
            more_T = more_T + more_WT[place]
            if np.mean(more_T == 0) < _NEARLY_ALL:
                taken.append(place)
                more_T = np.zeros(len(row_T))
        return taken[::-1]

    def longest(self, rows: list[np.ndarray]) -> float | None:
        """Return the days of the longest window that is taken for train nodes, given task by task,
        or None."""
        taken = self.windows(np.unique(np.concatenate(rows)))
        return WINDOWS[taken[-1]] if taken else None


@dataclass
class RecencyParts:
    """Counts by window of a pass, piece by piece."""

    parts: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, piece: Piece, events: VisibleEvents) -> None:
        """Count a piece of the pass over `events`."""
        num_codes = max(1, len(events.vocabulary))
        birth_C = np.zeros(num_codes, bool)
        births = [at for code, at in events.vocabulary.items() if code.split("//")[0] == BIRTH]
        birth_C[births] = True
        dated_V = (piece.time_V != STATIC) & ~birth_C[piece.code_V]
        node_V, code_V = piece.node_V[dated_V], piece.code_V[dated_V]
        age_V = events.time_K[node_V] - piece.time_V[dated_V]
        window_V = np.searchsorted(np.array(WINDOWS) * _DAY, age_V, side="right")
        older_V = window_V == len(WINDOWS)
        older, size = np.unique(node_V[older_V], return_counts=True)
        own_V = ~older_V
        pair_V = (window_V * len(events.subject_K) + node_V)[own_V] * num_codes + code_V[own_V]
        pair_E, count_E = np.unique(pair_V, return_counts=True)
        at_E, code_E = np.divmod(pair_E, num_codes)
        self.parts.append((at_E, code_E, count_E, older, size))

    def recency(self, counts: CodeCounts) -> CodeRecency:
        """Return the counts by window beside those of the same pass, after it."""
        none = np.empty(0, np.int64)
        at_E, code_E, count_E, older, size = (
            np.concatenate(part) for part in zip((none,) * 5, *self.parts, strict=True)
        )
        shape = counts.count_KC.shape
        between = []
        for place in range(len(WINDOWS)):
            own_E = at_E // shape[0] == place
            node_E = at_E[own_E] - place * shape[0]
            entries = (count_E[own_E].astype(np.float64), (node_E, code_E[own_E]))
            between.append(csr_matrix(entries, shape=shape))
        older_K = np.zeros(shape[0], np.int64)
        older_K[older] = size  # a node is in one piece
        return CodeRecency(counts, between, older_K)
