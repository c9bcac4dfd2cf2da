"""Turns events into tokens in the format `codes`: one token an event, a batch at a time.

A subject begins with its static events, by section, code, value and text, and its age at its first
moment. Then come its moments, the distinct times, in order. Before the events of a moment stand, if
due, the time since the previous moment (a gap token) and the age. The events of a moment are in the
order of section, code, value and text, so that a moment is the same in whatever order they came.
That order and the fixed alphabet are our choice.

A moment ends with its last event, so every moment is a prefix: there are no tails, and a record at
a decision node is the timeline cut after a moment.

Legend: N events, T tokens, M moments (static events are one, before a subject's first), K events
whose place is tied, C codes, S subjects (S1 = S + 1 offsets).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from smbfast.base.files import digest_of
from smbfast.batch import UNKNOWN, Timeline
from smbfast.data.births import births, without_late_births
from smbfast.data.codes.alphabet import GAP_EDGES
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.endings import endings
from smbfast.data.meds import STATIC, EventBatch
from smbfast.data.sections import SECTIONS
from smbfast.data.timelines import MOST_YEARS, YEAR, Preamble
from smbfast.data.unmapped import Unmapped

VERSION = 1  # of the format `codes`: part of every fingerprint
_LATEST = int(np.iinfo(np.int64).max)


class CodeSerializer:
    """Turns event batches into `Timeline`s, and counts what is left out in `counts`.

    Args:
        vocabulary: with the parents of the codes that will be encoded.
        gap_floor: microseconds; a shorter time between two moments has no token.
        terminal: codes after which nothing is to come (`data.terminal`).
    """

    def __init__(
        self, vocabulary: CodeVocabulary, *, gap_floor: int, terminal: Sequence[str] = ()
    ) -> None:
        if gap_floor < 0:
            raise ValueError(f"`gap_floor` must be 0 microseconds or more, got {gap_floor}")
        self.vocabulary = vocabulary
        self.gap_floor, self.terminal = gap_floor, tuple(terminal)
        self.counts: Counter[str] = Counter()
        self.unmapped = Unmapped()  # events of codes that only the fallback rule maps
        self.preamble = code_preamble(vocabulary)
        self._ruled: dict[str, bool] = {}

    def fingerprint(self) -> str:
        """Return a digest that changes when the same events would give other tokens."""
        return digest_of(
            VERSION,
            self.vocabulary.fingerprint(),
            self.vocabulary.parents,
            self.gap_floor,
            self.terminal,
        )

    def timelines(self, batch: EventBatch) -> list[Timeline]:
        """Return one Timeline per subject of the batch, in order; a bucket is a moment."""
        self.counts["nonfinite_values"] += batch.nonfinite
        batch, birth_N = without_late_births(batch, self.counts)
        self.counts["events"] += len(batch.time_N)
        last_S, terminal_S = endings(batch, self.terminal)
        subject_S, birth_S = batch.subject_N[batch.offset_S1[:-1]], births(batch, birth_N)
        about_S4 = np.stack([subject_S, birth_S, last_S, terminal_S], 1)
        if birth_N.any():
            num_before_N1 = np.concatenate([[0], np.cumsum(~birth_N)])
            batch = batch.rows(np.flatnonzero(~birth_N), num_before_N1[batch.offset_S1])
        encoded = self.vocabulary.encode(batch)
        self.counts.update(encoded.counts)
        self._count_unmapped(batch)
        moments = _Moments.of(batch, birth_S)
        order_N = _order(batch, moments, encoded.section_N)
        token_N, section_N = encoded.token_N[order_N], encoded.section_N[order_N]
        lead = self._leads(moments)
        return _cut(batch, about_S4, moments, lead, token_N, section_N)

    @property
    def text_chars(self) -> int:
        """The length to which a text value is cut."""
        return self.vocabulary.text_chars

    def texts(self, batch: EventBatch) -> list[list[str]]:
        """Return the names of each subject's tokens."""
        first, tokens = self.vocabulary.first_id, self.vocabulary.tokens
        return [[tokens[i - first].name for i in t.ids_T.tolist()] for t in self.timelines(batch)]

    def bucket_key(self, time_N: np.ndarray) -> np.ndarray:
        """Return a time after all of each time's moment, int64 [N] microseconds since 1970.

        The moments that begin before it are complete at that time, and nothing is left for a tail.
        """
        return np.minimum(time_N, _LATEST - 1) + 1

    def _leads(self, moments: "_Moments") -> tuple[np.ndarray, np.ndarray]:
        """Return the gap and the age token before the events of each moment, int32, -1 if none."""
        gap_ids, age_ids = np.asarray(self.vocabulary.gap_ids), np.asarray(self.vocabulary.age_ids)
        place_M = np.searchsorted(GAP_EDGES, moments.gap_M, side="right") - 1
        due_M = (place_M >= 0) & (moments.gap_M >= self.gap_floor)
        gap_M = np.where(due_M, gap_ids[place_M], -1).astype(np.int32)
        age_M = moments.age_M
        due_M = age_M >= 0
        due_M[1:] &= moments.first_M[1:] | (age_M[1:] != age_M[:-1])
        return gap_M, np.where(due_M, age_ids[age_M], -1).astype(np.int32)

    def _count_unmapped(self, batch: EventBatch) -> None:
        vocabulary = self.vocabulary
        for code in batch.codes:
            if code not in self._ruled:
                self._ruled[code] = vocabulary.sections(code, vocabulary.parents.get(code))[1]
        self.unmapped.add(batch, np.array([self._ruled[c] for c in batch.codes], bool))


def code_preamble(vocabulary: CodeVocabulary) -> Preamble:
    """Return what every window of codes begins with."""
    age_ids = tuple(np.array([i], np.int32) for i in vocabulary.age_ids[: MOST_YEARS + 1])
    return Preamble(vocabulary.begin, age_ids)


@dataclass(frozen=True)
class _Moments:
    """The moments of a batch, in the order of its rows."""

    row_M: np.ndarray  # int64: the first event of each
    of_N: np.ndarray  # int64: the moment of each event
    time_M: np.ndarray  # int64 microseconds since 1970, STATIC for static events
    first_M: np.ndarray  # bool: the first of its subject that is not of static events
    gap_M: np.ndarray  # int64 microseconds since the one before, -1 where there is none
    age_M: np.ndarray  # int64 whole years, at most MOST_YEARS, -1 where it is not known

    @classmethod
    def of(cls, batch: EventBatch, birth_S: np.ndarray) -> "_Moments":
        time_N, offset_S1 = batch.time_N, batch.offset_S1
        new_N = np.ones(len(time_N), bool)
        new_N[1:] = time_N[1:] != time_N[:-1]
        begin_S = offset_S1[:-1]
        new_N[begin_S[begin_S < len(time_N)]] = True
        row_M = np.flatnonzero(new_N)
        time_M = time_N[row_M]
        subject_M = np.searchsorted(offset_S1, row_M, side="right") - 1
        timed_M = time_M != STATIC
        first_M = timed_M.copy()
        first_M[1:] &= (subject_M[1:] != subject_M[:-1]) | ~timed_M[:-1]
        gap_M = np.full(len(row_M), -1, np.int64)
        after = np.flatnonzero(timed_M & ~first_M)
        gap_M[after] = _since(time_M[after - 1], time_M[after])
        birth_M = birth_S[subject_M]
        known_M = timed_M & (birth_M != UNKNOWN)
        age_M = np.minimum(_since(birth_M, time_M) // YEAR, MOST_YEARS)
        return cls(
            row_M, np.cumsum(new_N) - 1, time_M, first_M, gap_M, np.where(known_M, age_M, -1)
        )


def _since(before_M: np.ndarray, time_M: np.ndarray) -> np.ndarray:
    """Return the microseconds from one time to a later one, int64, at most the largest of int64.

    Their difference fits unsigned integers, whatever the two are.
    """
    since_M = time_M.view(np.uint64) - before_M.view(np.uint64)
    return np.minimum(since_M, np.uint64(_LATEST)).astype(np.int64)


def _order(batch: EventBatch, moments: _Moments, section_N: np.ndarray) -> np.ndarray:
    """Return the rows in the order of moment, section, code, value and text, int64 [N].

    Moments are in order already. Events without a value come after those with one, and without a
    text before those with one.
    """
    num_codes = len(batch.codes)
    rank_C = np.empty(num_codes, np.int64)
    rank_C[sorted(range(num_codes), key=batch.codes.__getitem__)] = np.arange(num_codes)
    key_N = (moments.of_N * len(SECTIONS) + section_N) * num_codes + rank_C[batch.code_N]
    order_N = np.argsort(key_N, kind="stable")
    sorted_N = key_N[order_N]
    same_N = sorted_N[1:] == sorted_N[:-1]
    tied_N = np.zeros(len(order_N), bool)
    tied_N[1:] = same_N
    tied_N[:-1] |= same_N
    tied_K = order_N[tied_N]
    if len(tied_K):  # their texts alone are compared: notes may be long, and ties are few
        used, text_K = np.unique(batch.text_N[tied_K], return_inverse=True)
        names = ["" if t < 0 else batch.texts[t] for t in used.tolist()]
        rank = np.empty(len(used), np.int64)
        # -1 is the first of `used`, and a sort is stable: no text stands before an empty one
        rank[sorted(range(len(used)), key=names.__getitem__)] = np.arange(len(used))
        by_K = np.lexsort((rank[text_K], batch.value_N[tied_K], key_N[tied_K]))
        order_N[tied_N] = tied_K[by_K]
    return order_N


def _cut(
    batch: EventBatch,
    about_S4: np.ndarray,
    moments: _Moments,
    lead: tuple[np.ndarray, np.ndarray],
    token_N: np.ndarray,
    section_N: np.ndarray,
) -> list[Timeline]:
    """Put tokens in their places and cut them into subjects.

    Args:
        about_S4: subject, birth, time of the last event and of the first terminal one, int64.
        lead: the gap and the age token of each moment, -1 if it has none.
        token_N, section_N: of the events in the order of the tokens.
    """
    gap_M, age_M = lead
    offset_S1, row_M = batch.offset_S1, moments.row_M
    num_tokens_N = np.ones(len(token_N), np.int64)
    num_tokens_N[row_M] += (gap_M >= 0).astype(np.int64) + (age_M >= 0)
    end_N1 = np.concatenate([[0], np.cumsum(num_tokens_N)])
    ids_T = np.empty(int(end_N1[-1]), np.int32)
    ids_T[end_N1[1:] - 1] = token_N
    with_gap, with_age = np.flatnonzero(gap_M >= 0), np.flatnonzero(age_M >= 0)
    ids_T[end_N1[row_M[with_gap]]] = gap_M[with_gap]
    ids_T[end_N1[row_M[with_age] + 1] - 2] = age_M[with_age]

    begin_S, end_S = end_N1[offset_S1[:-1]], end_N1[offset_S1[1:]]
    begin_N = np.repeat(begin_S, np.diff(offset_S1))
    line_end_N = (end_N1[1:] - begin_N).astype(np.int32)
    line_start_N = line_end_N - np.int32(1)
    last_M = np.append(row_M[1:], len(token_N))[: len(row_M)] - 1
    static_N1 = np.concatenate([[0], np.cumsum(batch.time_N == STATIC)])
    row_S = offset_S1[:-1] + np.diff(static_N1[offset_S1])  # the first event that has a time
    first_S, stop_S = np.searchsorted(row_M, row_S), np.searchsorted(row_M, offset_S1[1:])
    # the age at the first moment is part of the header
    aged_S = (first_S < stop_S) & (about_S4[:, 1] != UNKNOWN)
    header_S = end_N1[row_S] - begin_S + aged_S
    end_M, head_M = line_end_N[last_M], np.zeros(len(row_M), np.uint16)
    table = (*about_S4.T, header_S, begin_S, end_S, first_S, stop_S, row_S, offset_S1[1:])
    return [
        Timeline(
            subject=subject,
            ids_T=ids_T[begin:end],
            header=header,
            bucket_end_B=end_M[first:stop],
            bucket_time_B=moments.time_M[first:stop],
            bucket_head_B=head_M[first:stop],
            line_start_L=line_start_N[a:b],
            line_end_L=line_end_N[a:b],
            line_time_L=batch.time_N[a:b],
            line_section_L=section_N[a:b],
            line_code_L=token_N[a:b],
            birth=birth,
            last=last,
            terminal=terminal,
        )
        for subject, birth, last, terminal, header, begin, end, first, stop, a, b in zip(
            *(column.tolist() for column in table), strict=True
        )
    ]
