"""What no section rule maps, by family of code, and whether ten subjects stand behind a family.

Legend: C codes of a batch, K events of codes without a rule, U their distinct codes, R distinct
pairs of a family and a subject.
"""

from collections import Counter
from typing import Any, Self

import numpy as np

from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.meds import EventBatch
from smbfast.data.sections import family

RARE = "(rare)"


class Unmapped:
    """Events by family of code, and the ids of up to ten subjects who have them."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.subjects: dict[str, set[int]] = {}

    def add(self, batch: EventBatch, ruled_C: np.ndarray) -> None:
        """Count the events of a batch whose code has no rule (`ruled_C` is bool [C])."""
        row_K = np.flatnonzero(~ruled_C[batch.code_N])
        if not len(row_K):
            return
        used_U, code_K = np.unique(batch.code_N[row_K], return_inverse=True)
        names_U = [family(batch.codes[c]) for c in used_U.tolist()]
        place = {name: i for i, name in enumerate(dict.fromkeys(names_U))}
        family_K = np.array([place[name] for name in names_U])[code_K]
        num_subjects = len(batch.offset_S1) - 1
        subject_K = np.searchsorted(batch.offset_S1, row_K, side="right") - 1
        pair_R = np.unique(family_K * num_subjects + subject_K)
        id_R = batch.subject_N[batch.offset_S1[pair_R % num_subjects]]
        bounds = np.searchsorted(pair_R, np.arange(len(place) + 1) * num_subjects)
        counts = np.bincount(family_K)
        for name, i in place.items():
            ids = id_R[bounds[i] : min(bounds[i + 1], bounds[i] + MIN_SUBJECTS)].tolist()
            self._add(name, int(counts[i]), ids)

    def clear(self) -> None:
        """Forget everything."""
        self.events.clear()
        self.subjects.clear()

    def record(self) -> dict[str, Any]:
        """Return everything as JSON values, which name subjects: for private files alone."""
        return {name: [n, sorted(self.subjects[name])] for name, n in self.events.items()}

    def update(self, record: dict[str, Any]) -> Self:
        """Add what another one recorded."""
        for name, (events, subjects) in record.items():
            self._add(name, events, subjects)
        return self

    def shown(self) -> dict[str, int]:
        """Return events by family, most first, where ten subjects have it.

        The others are one, `(rare)`, which is left out unless ten subjects have it.
        """
        large = [(k, n) for k, n in self.events.most_common() if self._ten(k)]
        rare = {k: n for k, n in self.events.items() if not self._ten(k)}
        behind = {s for k in rare for s in self.subjects[k]}
        pooled = {RARE: sum(rare.values())} if len(behind) >= MIN_SUBJECTS else {}
        return dict(large) | pooled

    def _add(self, name: str, events: int, subjects: list[int]) -> None:
        self.events[name] += events
        known = self.subjects.setdefault(name, set())
        if len(known) < MIN_SUBJECTS:  # more of them would tell nothing
            known.update(subjects)

    def _ten(self, name: str) -> bool:
        return len(self.subjects[name]) >= MIN_SUBJECTS
