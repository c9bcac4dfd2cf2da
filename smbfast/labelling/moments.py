"""When the events of a code set happen, and which is the next or the last at a moment.

Legend: N events of a batch, S its subjects, X events of one set, Q moments that are asked about.
Times are int64 microseconds since 1970. A subject is its place in the batch, not its id.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from smbfast.data.meds import BIRTH, STATIC, EventBatch
from smbfast.settings.tasks import CodeSet

NEVER = int(np.iinfo(np.int64).max)  # the time of what does not come
LONG_AGO = STATIC  # the time of what never was; smaller than any time, as that of static events


class SetsOfCodes:
    """Which sets hold which codes, decided once for each code."""

    def __init__(self, sets: Mapping[str, CodeSet]) -> None:
        """Take the sets by name."""
        self.sets = dict(sets)
        self._held: dict[str, list[bool]] = {}  # by code, in the order of the sets

    def held(self, codes: list[str]) -> dict[str, np.ndarray]:
        """Return which of `codes` each set holds, bool [C] by its name."""
        for code in codes:
            if code not in self._held:
                self._held[code] = [one.holds(code) for one in self.sets.values()]
        table = np.array([self._held[code] for code in codes], bool)
        table = table.reshape(len(codes), len(self.sets))
        return {name: table[:, at] for at, name in enumerate(self.sets)}


class Moments:
    """The events of one set in a batch, by subject and time.

    subject_X, time_X: in order; static_S: whether a subject has such an event without a time.
    """

    def __init__(
        self, subject_X: np.ndarray, time_X: np.ndarray, static_S: np.ndarray, clock: "Clock"
    ) -> None:
        """Take the events of a set, of which none is static."""
        self.subject_X, self.time_X, self.static_S = subject_X, time_X, static_S
        self._clock = clock
        self._key_X = clock.key(subject_X, time_X)

    def first_after(self, subject_Q: np.ndarray, time_Q: np.ndarray) -> np.ndarray:
        """Return the time of the first event later than each moment; NEVER if there is none."""
        at_Q = np.searchsorted(self._key_X, self._clock.key(subject_Q, time_Q), side="right")
        return self._taken(at_Q, subject_Q, NEVER)

    def last_upto(self, subject_Q: np.ndarray, time_Q: np.ndarray) -> np.ndarray:
        """Return the time of the last event at or before each moment; LONG_AGO if none."""
        at_Q = np.searchsorted(self._key_X, self._clock.key(subject_Q, time_Q), side="right") - 1
        return self._taken(at_Q, subject_Q, LONG_AGO)

    def num_upto(self, subject_Q: np.ndarray, time_Q: np.ndarray) -> np.ndarray:
        """Return how many events are at or before each moment, int64 [Q]; static ones left out."""
        key_Q = self._clock.key(subject_Q, time_Q)
        begin_Q = np.searchsorted(self.subject_X, subject_Q, side="left")
        return np.searchsorted(self._key_X, key_Q, side="right") - begin_Q

    def known(self, subject_Q: np.ndarray, time_Q: np.ndarray) -> np.ndarray:
        """Return whether an event at or before each moment, or a static one, exists: bool [Q]."""
        return (self.last_upto(subject_Q, time_Q) != LONG_AGO) | self.static_S[subject_Q]

    def first_of(self) -> tuple[np.ndarray, np.ndarray]:
        """Return subject and time of the first event of each subject that has one."""
        subject_F, at_F = np.unique(self.subject_X, return_index=True)
        return subject_F, self.time_X[at_F]

    def _taken(self, at_Q: np.ndarray, subject_Q: np.ndarray, otherwise: int) -> np.ndarray:
        inside_Q = (at_Q >= 0) & (at_Q < len(self.time_X))
        at_Q = np.where(inside_Q, at_Q, 0)
        if not len(self.time_X):
            return np.full(len(at_Q), otherwise)
        own_Q = inside_Q & (self.subject_X[at_Q] == subject_Q)
        return np.where(own_Q, self.time_X[at_Q], otherwise)


@dataclass(frozen=True)
class Clock:
    """The distinct times of a batch, so that subject and time become one number that sorts."""

    time_U: np.ndarray

    def key(self, subject_Q: np.ndarray, time_Q: np.ndarray) -> np.ndarray:
        """Return int64 [Q], larger for a later subject, and within it for a later time.

        A moment between two times of the batch has the key of the earlier.
        """
        rank_Q = np.searchsorted(self.time_U, time_Q, side="right")
        return subject_Q.astype(np.int64) * (len(self.time_U) + 1) + rank_Q


@dataclass(frozen=True)
class Record:
    """A batch of whole subjects as moments.

    subject_S: their ids; first_S, last_S: times of the first and last event that has a time, a
    birth not among them (NEVER and LONG_AGO without one); birth_S: LONG_AGO if unknown.
    """

    subject_S: np.ndarray
    first_S: np.ndarray
    last_S: np.ndarray
    birth_S: np.ndarray
    moments: dict[str, Moments]

    @classmethod
    def of(cls, batch: EventBatch, sets: SetsOfCodes) -> "Record":
        """Read the moments of each set from a batch."""
        num_subjects = len(batch.offset_S1) - 1
        place_N = np.repeat(np.arange(num_subjects), np.diff(batch.offset_S1))
        timed_N = batch.time_N != STATIC
        clock = Clock(np.unique(batch.time_N[timed_N]))
        birth_N = np.array([c.split("//")[0] == BIRTH for c in batch.codes], bool)[batch.code_N]
        birth_S = np.full(num_subjects, LONG_AGO)
        born = np.flatnonzero(birth_N & timed_N)[::-1]
        birth_S[place_N[born]] = batch.time_N[born]  # the first of several
        lived = np.flatnonzero(timed_N & ~birth_N)
        first_S, last_S = np.full(num_subjects, NEVER), np.full(num_subjects, LONG_AGO)
        last_S[place_N[lived]] = batch.time_N[lived]  # sorted by time: the last assigned stays
        first_S[place_N[lived[::-1]]] = batch.time_N[lived[::-1]]
        moments = {}
        for name, held_C in sets.held(batch.codes).items():
            held_N = held_C[batch.code_N] & _within(batch.value_N, sets.sets[name])
            static_S = np.zeros(num_subjects, bool)
            static_S[place_N[held_N & ~timed_N]] = True
            at = np.flatnonzero(held_N & timed_N)
            moments[name] = Moments(place_N[at], batch.time_N[at], static_S, clock)
        subject_S = batch.subject_N[batch.offset_S1[:-1]]
        return cls(subject_S, first_S, last_S, birth_S, moments)


def _within(value_N: np.ndarray, bounds: CodeSet) -> np.ndarray:
    """Return which events have a number within the bounds of a set; all where it has none."""
    within_N = np.ones(len(value_N), bool)
    if bounds.at_least is not None:
        within_N &= value_N >= np.float32(bounds.at_least)
    if bounds.at_most is not None:
        within_N &= value_N <= np.float32(bounds.at_most)
    return within_N
