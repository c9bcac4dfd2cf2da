"""Searches for codes that give an outcome away alone, as a billing code of the outcome would.

For each code the number of its events at or before the prediction time is taken as the only
predictor of the label on train. Its AUROC, ties as halves, in either direction:

    P(count | true > count | false) + P(count | true = count | false) / 2

A code is named where that is 0.98 or more with 20 positives and more than 10 patients who have the
code: our choice. Of a task at most 20,000 rows of train are looked at, spread over all.

Legend: N label rows, K rows that are looked at, E events of a batch, V visible (row, event) pairs,
C codes, B numbers of events (0 .. 15, and more).
"""

from collections import Counter

import numpy as np

from smbfast.base.counts import FEW
from smbfast.data.labels import Labels
from smbfast.data.meds import EventBatch

AUROC = 0.98
POSITIVES = 20
MOST_ROWS = 20_000
_BINS = 16  # numbers of events that are told from one another: 0 to 14, and more
_PAIRS = 4_000_000  # held at once


class Giveaways:
    """Counts of each code before the true and the false rows of train of one task."""

    def __init__(self, labels: Labels) -> None:
        """Choose the rows that are looked at."""
        order_N = np.lexsort((labels.time_N, labels.subject_N))
        train = order_N[labels.split_N[order_N] == "train"]
        if len(train) > MOST_ROWS:
            train = train[np.linspace(0, len(train) - 1, MOST_ROWS).astype(np.int64)]
        true_N = labels.binary_N if labels.kind == "binary" else labels.survival_N[1]
        self.task = labels.task
        self.subject_K, self.time_K = labels.subject_N[train], labels.time_N[train]
        self.true_K = true_N[train]
        self._seen_K = np.zeros(len(train), bool)
        self._place: dict[str, int] = {}
        self._cells: Counter[int] = Counter()  # by (code, number of events, truth)
        self._people: Counter[int] = Counter()  # by code

    def add(self, batch: EventBatch) -> None:
        """Take the rows whose subjects are in a batch."""
        begin_S, end_S = batch.offset_S1[:-1], batch.offset_S1[1:]
        subject_S = batch.subject_N[begin_S]
        order_S = np.argsort(subject_S, kind="stable")
        at_K = np.searchsorted(subject_S[order_S], self.subject_K)
        place_K = order_S[np.minimum(at_K, len(order_S) - 1)]
        rows = np.flatnonzero(subject_S[place_K] == self.subject_K)
        if not len(rows):
            return
        self._seen_K[rows] = True
        code_C = np.array([self._place.setdefault(c, len(self._place)) for c in batch.codes])
        code_E = code_C[batch.code_N]
        start, stop = begin_S[place_K[rows]], end_S[place_K[rows]]
        for k, row in enumerate(rows.tolist()):  # events are in order of time: what is seen begins
            piece = batch.time_N[start[k] : stop[k]]
            stop[k] = start[k] + np.searchsorted(piece, self.time_K[row], side="right")
        people: set[tuple[int, int]] = set()
        size = stop - start
        part_K = np.cumsum(size) // _PAIRS
        for part in np.unique(part_K):
            mine = part_K == part
            pair = self._pairs(code_E, rows[mine], start[mine], size[mine])
            people.update(pair)
        self._people.update(code for code, _ in people)

    def _pairs(
        self, code_E: np.ndarray, rows: np.ndarray, start_K: np.ndarray, size_K: np.ndarray
    ) -> list[tuple[int, int]]:
        """Count the codes of the visible events of rows; return each (code, subject) once."""
        first_K = np.cumsum(size_K) - size_K
        event_V = np.arange(size_K.sum()) - np.repeat(first_K - start_K, size_K)
        key_V = np.repeat(np.arange(len(rows)), size_K) * len(self._place) + code_E[event_V]
        key, number = np.unique(key_V, return_counts=True)
        row, code = np.divmod(key, len(self._place))
        cell = (code * _BINS + np.minimum(number, _BINS - 1)) * 2 + self.true_K[rows[row]]
        cells, times = np.unique(cell, return_counts=True)
        for one, count in zip(cells.tolist(), times.tolist(), strict=True):
            self._cells[one] += count
        both = np.unique(np.stack([code, self.subject_K[rows[row]]], 1), axis=0)
        return [(int(c), int(s)) for c, s in both]

    def auroc(self) -> dict[str, float]:
        """Return the AUROC of each code in its better direction; empty below 20 positives."""
        num_true = int((self.true_K & self._seen_K).sum())
        num_false = int((~self.true_K & self._seen_K).sum())
        if num_true < POSITIVES or not num_false:
            return {}
        table = np.zeros((len(self._place), _BINS, 2))
        for cell, count in self._cells.items():
            table.reshape(-1)[cell] = count
        table[:, 0] = np.array([num_false, num_true]) - table.sum(1)
        false_CB, true_CB = table[:, :, 0] / num_false, table[:, :, 1] / num_true
        below_CB = np.cumsum(false_CB, axis=1) - false_CB
        area_C = (true_CB * (below_CB + false_CB / 2)).sum(1)
        both = np.maximum(area_C, 1 - area_C).tolist()
        return dict(zip(self._place, both, strict=True))

    def sentences(self) -> list[str]:
        """Return a sentence for each code that gives the outcome away."""
        given = [(area, code) for code, area in self.auroc().items() if area >= AUROC]
        named = [(a, c) for a, c in given if self._people[self._place[c]] > FEW]
        texts = [
            f"Events of the code {code} up to the prediction time give the outcome away in train "
            f"(AUROC {area:.3f} alone); if they record the outcome itself, move the prediction "
            "times before them or leave the code out."
            for area, code in sorted(named, key=lambda item: (-item[0], item[1]))[:10]
        ]
        if unnamed := len(given) - len(named):
            texts.append(
                f"{unnamed} codes of at most {FEW} patients each give the outcome away in train."
            )
        return texts
