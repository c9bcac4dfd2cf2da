"""Cuts timelines into windows of the context length, and into the records at decision nodes.

Windows for training follow each other (`training_spans`): each token of a timeline is new in
exactly one of them, and a bucket that is longer than a window goes on in the next one.

Windows of decision nodes overlap (`node_spans`). Such a window starts at a bucket, and its start
depends only on the buckets before it. It is the first bucket with which at most half a window is
repeated. If the bucket that did not fit into the previous window would still not fit, the window
starts at that bucket instead. A decision node takes the earliest window that holds all of its last
bucket. So it sees between half a window and a whole one, and nothing after its prediction time
influences which.

Legend: B buckets, L lines, S timelines, T tokens, W windows, Y years of age.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from smbfast.batch import UNKNOWN, Timeline

YEAR = 365_242_500 * 86_400  # microseconds: the mean length of a calendar's year
_LATEST = int(np.iinfo(np.int64).max)
MOST_YEARS = 120  # an age above it is written as this one


@dataclass(frozen=True)
class Preamble:
    """What a window begins with: [begin token | demographics | age at its start].

    A window that goes on in a bucket repeats the bucket's date and the tag of its section as well.
    The text formats have a date and tags; an age is in the formats that write one.
    """

    begin: int | None = None  # id of the begin token, if there is one
    age_ids: tuple[np.ndarray, ...] = ()  # ids of the age of 0, 1, ... MOST_YEARS years, or none
    section_ids: tuple[np.ndarray, ...] = ()  # ids of the opening tag of each section, or none

    def age(self, birth: int, time: int) -> np.ndarray:
        """Return the ids of the age at `time` in whole years; none before a birth or without it."""
        if not self.age_ids or birth == UNKNOWN or time < birth:
            return np.empty(0, np.int32)
        return self.age_ids[min((time - birth) // YEAR, MOST_YEARS)]

    def header(self, timeline: Timeline, time: int, window: int) -> np.ndarray:
        """Return the header of a window whose first bucket begins at `time`: int32 ids.

        It is at most a quarter of the window, or as long as begin token and age; what does not fit
        are the last tokens of the demographics.
        """
        begin = [] if self.begin is None else [self.begin]
        first = int(timeline.bucket_time_B[0]) if len(timeline.bucket_time_B) else time
        num_demographics = timeline.header - len(self.age(timeline.birth, first))
        age = self.age(timeline.birth, time)
        room = max(window // 4, 1) - len(begin) - len(age)
        demographics = timeline.ids_T[: max(0, min(num_demographics, room))]
        return np.concatenate([np.array(begin, np.int32), demographics, age])

    def header_length(self, timeline: Timeline, time: int, window: int) -> int:
        """Return the number of tokens of `header`, without making them."""
        first = int(timeline.bucket_time_B[0]) if len(timeline.bucket_time_B) else time
        num_demographics, own = timeline.header, int(self.begin is not None)
        if self.age_ids:
            num_demographics -= len(self.age(timeline.birth, first))
            own += len(self.age(timeline.birth, time))
        return own + max(0, min(num_demographics, max(window // 4, 1) - own))

    def first_header_lengths(
        self, header_S: np.ndarray, birth_S: np.ndarray, time_S: np.ndarray, window: int
    ) -> np.ndarray:
        """Return `header_length` of the first window of each timeline, int64 [S].

        Args:
            header_S: the timelines' own headers, in tokens.
            birth_S, time_S: birth and begin of the first bucket, microseconds since 1970.
        """
        age_S = np.zeros(len(header_S), np.int64)
        if self.age_ids:
            length_Y = np.array([len(ids) for ids in self.age_ids])
            known_S = (birth_S != UNKNOWN) & (time_S >= birth_S)
            years = (time_S[known_S] - birth_S[known_S]) // YEAR
            age_S[known_S] = length_Y[np.minimum(years, MOST_YEARS)]
        own_S = int(self.begin is not None) + age_S
        most_S = max(window // 4, 1) - own_S
        return own_S + np.maximum(0, np.minimum(header_S - age_S, most_S))

    def lead(self, timeline: Timeline, start: int, window: int) -> np.ndarray:
        """Return all that stands before token `start` in the window that begins there.

        Within a bucket that is the header, the bucket's date, and the tag of the section if a line
        begins or goes on at `start`.
        """
        bucket = int(timeline.bucket_end_B.searchsorted(start, side="right"))
        header = self.header(timeline, int(timeline.bucket_time_B[bucket]), window)
        first = timeline.bucket_start(bucket)
        if start == first:
            return header
        date = timeline.ids_T[first : min(first + int(timeline.bucket_head_B[bucket]), start)]
        line = int(np.searchsorted(timeline.line_end_L, start, side="right"))
        inside = line < len(timeline.line_start_L) and timeline.line_start_L[line] <= start
        tagged = inside and bool(self.section_ids)
        tag = self.section_ids[timeline.line_section_L[line]] if tagged else date[:0]
        return np.concatenate([header, date, tag])

    def lead_length(self, timeline: Timeline, start: int, window: int) -> int:
        """Return the number of tokens of `lead`, without making them."""
        bucket = int(timeline.bucket_end_B.searchsorted(start, side="right"))
        length = self.header_length(timeline, int(timeline.bucket_time_B[bucket]), window)
        first = timeline.bucket_start(bucket)
        if start == first:
            return length
        length += min(int(timeline.bucket_head_B[bucket]), start - first)
        line = int(timeline.line_end_L.searchsorted(start, side="right"))
        if not self.section_ids or line == len(timeline.line_start_L):
            return length
        inside = timeline.line_start_L[line] <= start
        return length + inside * len(self.section_ids[timeline.line_section_L[line]])


def training_spans(
    timeline: Timeline, window: int, stride: int, preamble: Preamble
) -> list[tuple[int, int, int]]:
    """Return (start, end, first new token) of each training window, as tokens of the timeline.

    Buckets that fit into a window are kept whole. A longer bucket begins where the one before it
    ended, and goes on in the next window, from line to line if its lines fit.

    Args:
        window: context length in tokens, including what the preamble adds.
        stride: the distance of windows in tokens. With `window` they follow each other. With less,
            a window begins with the last buckets of the one before, about `window - stride` tokens.
    """
    spans: list[tuple[int, int, int]] = []
    start, new, total = timeline.header, timeline.header, len(timeline)
    if new < total <= new + window - preamble.lead_length(timeline, start, window):
        return [(start, total, new)]
    start_B, end_B = _bucket_bounds(timeline)
    while new < total:
        room = max(window - preamble.lead_length(timeline, start, window), 1)
        end = _training_end(timeline, end_B, start, room, window, preamble)
        if end <= new:  # nothing new fits beside what would be repeated
            start = new
            continue
        spans.append((start, end, new))
        new = end
        repeated = room * (window - stride) // window
        place = int(np.searchsorted(start_B, end - repeated)) if repeated else len(start_B)
        at_bucket = place < len(start_B) and start < start_B[place] < end
        start = int(start_B[place]) if at_bucket else end
    return spans


def _training_end(
    timeline: Timeline,
    end_B: np.ndarray,
    start: int,
    room: int,
    window: int,
    preamble: Preamble,
) -> int:
    """Return the end of the training window that begins at token `start` with `room` tokens."""
    limit = start + room
    last = int(np.searchsorted(end_B, limit, side="right"))  # the first bucket that does not fit
    if last == len(end_B):
        return int(end_B[-1])
    first = max(timeline.bucket_start(last), start)
    most = window - preamble.header_length(timeline, int(timeline.bucket_time_B[last]), window)
    if first > start and end_B[last] - first <= most:
        return first  # it fits into the next window
    line = int(np.searchsorted(timeline.line_end_L, limit, side="right")) - 1
    if line >= 0 and timeline.line_end_L[line] > first:
        return int(timeline.line_end_L[line])
    return first if first > start else limit


def node_spans(
    timeline: Timeline,
    window: int,
    preamble: Preamble,
    begin: tuple[int, int] | None = None,
) -> list[tuple[int, int]]:
    """Return the buckets `[first, last)` of each window that decision nodes take, in order.

    Args:
        window: context length in tokens, including what the preamble adds.
        begin: a window of this timeline, all of whose earlier ones are not returned.
    """
    start_B, end_B = _bucket_bounds(timeline)
    spans: list[tuple[int, int]] = []
    first, num_buckets = begin[0] if begin else 0, len(end_B)
    while first < num_buckets:
        time = int(timeline.bucket_time_B[first])
        room = window - preamble.header_length(timeline, time, window)
        last = _fits_until(start_B, end_B, first, room)
        if spans and spans[-1][1] == last:  # nothing new fits, so start at the bucket itself
            first = last
            continue
        spans.append((first, last))
        if last == num_buckets:
            break
        half = int(np.searchsorted(start_B, end_B[last - 1] - room // 2))
        first = min(max(half, first + 1), last)
    return spans


def window_of(
    timeline: Timeline, start: int, end: int, new: int, window: int, preamble: Preamble
) -> tuple[Timeline, int]:
    """Return the window of tokens `[start, end)`, and how many tokens its header lost.

    Its arrays are its own: the file that a timeline is mapped from may be closed while it is used.

    Args:
        start, end: tokens of the timeline, behind its header.
        new: the first of them that no earlier window predicts.
    """
    lead = preamble.lead(timeline, start, window)
    shift = len(lead) - start
    a = int(timeline.bucket_end_B.searchsorted(start, side="right"))
    b = int(timeline.bucket_end_B.searchsorted(end)) + 1
    la = int(timeline.line_end_L.searchsorted(start, side="right"))
    lb = int(timeline.line_start_L.searchsorted(end))
    whole = start == timeline.header and new == start
    cut = Timeline(
        subject=timeline.subject,
        birth=timeline.birth,
        ids_T=np.concatenate([lead, timeline.ids_T[start:end]]),
        header=len(lead),
        bucket_end_B=np.minimum(timeline.bucket_end_B[a:b], end) + shift,
        bucket_time_B=timeline.bucket_time_B[a:b].copy(),
        bucket_head_B=timeline.bucket_head_B[a:b].copy(),
        line_start_L=np.maximum(timeline.line_start_L[la:lb], start) + shift,
        line_end_L=np.minimum(timeline.line_end_L[la:lb], end) + shift,
        line_time_L=timeline.line_time_L[la:lb].copy(),
        line_section_L=timeline.line_section_L[la:lb].copy(),
        start=start,
        # the demographics are new in the first window alone
        labels_from=int(preamble.begin is not None) if whole else new + shift,
        goes_on=b > a and int(timeline.bucket_end_B[b - 1]) > end,
    )
    lost = timeline.header + (preamble.begin is not None) - len(lead) if whole else 0
    return cut, max(lost, 0)


def lines_ahead(timeline: Timeline, start: int, end: int, span: int) -> tuple[slice, np.ndarray]:
    """Return the lines that a window's record has from its first bucket on, past its end.

    Args:
        start, end: tokens of the window, as in `window_of`.
        span: microseconds behind the beginning of its last bucket in which later ones may begin.

    Returns:
        The lines, and when the bucket of each begins, int64 microseconds since 1970.
    """
    end_B, time_B = timeline.bucket_end_B, timeline.bucket_time_B
    a = int(end_B.searchsorted(start, side="right"))
    last = int(time_B[end_B.searchsorted(end)])
    b = int(time_B.searchsorted(min(last + span, _LATEST), side="right"))
    la, lb = timeline.line_start_L.searchsorted((timeline.bucket_start(a), end_B[b - 1])).tolist()
    bucket_L = a + end_B[a:b].searchsorted(timeline.line_start_L[la:lb], side="right")
    return slice(la, lb), time_B[bucket_L]


def node_timeline(timeline: Timeline, complete: int, tail: Timeline | None) -> Timeline:
    """Return the record at a decision node: the first `complete` buckets, then `tail` as the last.

    Args:
        complete: the number of buckets that ended before the prediction time.
        tail: the current bucket's events up to the prediction time, serialized again without
            demographics; None if there are none.
    """
    end = timeline.bucket_start(complete)
    lines = int(np.searchsorted(timeline.line_start_L, end))
    record = replace(
        timeline,
        ids_T=timeline.ids_T[:end],
        bucket_end_B=timeline.bucket_end_B[:complete],
        bucket_time_B=timeline.bucket_time_B[:complete],
        bucket_head_B=timeline.bucket_head_B[:complete],
        line_start_L=timeline.line_start_L[:lines],
        line_end_L=timeline.line_end_L[:lines],
        line_time_L=timeline.line_time_L[:lines],
        line_section_L=timeline.line_section_L[:lines],
        # what a node must not see
        last=UNKNOWN,
        terminal=UNKNOWN,
        line_code_L=timeline.line_code_L[:0],
    )
    if tail is None or not len(tail):
        return record
    return replace(
        record,
        ids_T=np.concatenate([record.ids_T, tail.ids_T]),
        bucket_end_B=np.append(record.bucket_end_B, end + tail.bucket_end_B),
        bucket_time_B=np.append(record.bucket_time_B, tail.bucket_time_B),
        bucket_head_B=np.append(record.bucket_head_B, tail.bucket_head_B),
        line_start_L=np.append(record.line_start_L, end + tail.line_start_L),
        line_end_L=np.append(record.line_end_L, end + tail.line_end_L),
        line_time_L=np.append(record.line_time_L, tail.line_time_L),
        line_section_L=np.append(record.line_section_L, tail.line_section_L),
    )


def node_window(
    record: Timeline,
    window: int,
    preamble: Preamble,
    spans: Sequence[tuple[int, int]] = (),
    complete: int = 0,
) -> tuple[Timeline, int]:
    """Return the earliest window with all of a record's last bucket, and how many tokens were lost.

    Tokens are lost in two cases: a bucket that is longer than the window loses its oldest lines
    (and the beginning of the newest one, if that alone is longer), and a header that is longer than
    a quarter of the window loses its end.

    Args:
        spans: those of the timeline that the record is a part of (`node_spans`), if they are known,
            so that they are made once for all of its records.
        complete: the number of buckets that the record has in common with that timeline.

    Raises:
        ValueError: if the record has no bucket, because the node is before the first event.
    """
    if not len(record.bucket_end_B):
        raise ValueError("a decision node must have an event before it; this record has none")
    # windows that end before a bucket which both have are the same in both
    place = bisect_left(spans, complete, key=itemgetter(1))
    begin = spans[place - 1] if place else None
    own = node_spans(record, window, preamble, begin)
    first = next(first for first, last in own if last == len(record.bucket_end_B))
    start, end = record.bucket_start(first), len(record)
    cut, _ = window_of(record, start, end, start, window, preamble)
    # beside the header that a long window has: the first age may have more tokens than this one
    lost = len(preamble.header(record, int(cut.bucket_time_B[0]), 1 << 40)) - cut.header
    if len(cut) > window:
        whole, cut = len(cut), _without_oldest_lines(cut, window)
        lost += whole - len(cut)
    return cut, lost


def _bucket_bounds(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    end_B = timeline.bucket_end_B.astype(np.int64)
    return np.concatenate([[timeline.header], end_B[:-1]])[: len(end_B)], end_B


def _fits_until(start_B: np.ndarray, end_B: np.ndarray, first: int, room: int) -> int:
    """Return the bucket after the last one that fits from `first` on; one bucket always fits."""
    return max(int(np.searchsorted(end_B, start_B[first] + room, side="right")), first + 1)


def _without_oldest_lines(timeline: Timeline, window: int) -> Timeline:
    length_L = timeline.line_end_L - timeline.line_start_L
    oldest = np.lexsort((timeline.line_start_L, timeline.line_time_L))
    surplus, upto_L = len(timeline) - window, np.cumsum(length_L[oldest], dtype=np.int64)
    gone = int(np.searchsorted(upto_L, surplus)) + 1
    keep_L = np.ones(len(length_L), bool)
    keep_T = np.ones(len(timeline), bool)
    if gone == len(oldest) and surplus < upto_L[-1]:
        # the newest line is too long by itself: its latest values stay
        gone -= 1
        end = int(timeline.line_end_L[oldest[-1]]) - int(upto_L[-1] - surplus)
        keep_T[timeline.line_start_L[oldest[-1]] : end] = False
    keep_L[oldest[:gone]] = False
    for start, end in zip(
        timeline.line_start_L[~keep_L], timeline.line_end_L[~keep_L], strict=True
    ):
        keep_T[start:end] = False
    keep_T &= np.cumsum(keep_T) <= window  # for a bucket whose tags alone are longer
    moved = np.concatenate([[0], np.cumsum(keep_T)]).astype(np.int32)
    return replace(
        timeline,
        ids_T=timeline.ids_T[keep_T],
        bucket_end_B=moved[timeline.bucket_end_B],
        line_start_L=moved[timeline.line_start_L[keep_L]],
        line_end_L=moved[timeline.line_end_L[keep_L]],
        line_time_L=timeline.line_time_L[keep_L],
        line_section_L=timeline.line_section_L[keep_L],
    )
