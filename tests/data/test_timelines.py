"""Windows: where they start, what they hold, and that both follow from the past alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.batch import Timeline
from smbfast.data import timelines
from smbfast.data.timelines import (
    header_length,
    node_timeline,
    node_window,
    window_of,
    window_spans,
)

BEGIN = 7
TAGS = 2  # tokens of each bucket that belong to no line


def timeline_of(lengths: list[list[int]], header: int = 5) -> Timeline:
    """A timeline whose buckets hold lines of these lengths; every token is its own position.

    A bucket is a tag, its lines, a tag. The last events of lines lie in the order of the text,
    except that in each bucket the first line has the latest one.
    """
    ends, starts, line_ends, times = [], [], [], []
    at = header
    for bucket, lines in enumerate(lengths):
        at += 1
        for i, length in enumerate(lines):
            starts.append(at)
            at += length
            line_ends.append(at)
            times.append(1000 * bucket + (i or 500))
        at += 1
        ends.append(at)
    return Timeline(
        subject=3,
        ids_T=np.arange(100, 100 + at, dtype=np.int32),
        header=header,
        bucket_end_B=np.array(ends, np.int32),
        bucket_time_B=np.arange(len(lengths), dtype=np.int64) * 1000,
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(line_ends, np.int32),
        line_time_L=np.array(times, np.int64),
        line_section_L=np.zeros(len(starts), np.uint8),
    )


def flat(sizes: list[int], header: int = 5) -> Timeline:
    """Buckets of these sizes, one line each."""
    return timeline_of([[s - TAGS] for s in sizes], header)


buckets = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=30)
windows = st.integers(64, 160)
headers = st.integers(0, 60)


def test_windows_by_hand() -> None:
    # room for 100 - 5 = 95 tokens of buckets; the next starts where at most 47 remain
    timeline = flat([20, 20, 20, 20, 20, 20, 20])
    assert window_spans(timeline, 100, begin=False) == [(0, 4), (2, 6), (4, 7)]


def test_a_bucket_that_fits_beside_no_half_begins_a_window() -> None:
    assert window_spans(flat([40, 40, 80, 10]), 100, begin=False) == [(0, 2), (2, 4)]
    assert window_spans(flat([60, 60, 10]), 100, begin=False) == [(0, 1), (1, 3)]
    assert window_spans(flat([300, 300]), 100, begin=False) == [(0, 1), (1, 2)]
    assert window_spans(flat([30]), 100, begin=True) == [(0, 1)]


@settings(max_examples=200, deadline=None)
@given(lengths=buckets, window=windows, header=headers, begin=st.booleans())
def test_windows_cover_every_bucket_and_fit(
    lengths: list[list[int]], window: int, header: int, begin: bool
) -> None:
    timeline = timeline_of(lengths, header)
    spans = window_spans(timeline, window, begin)
    assert spans[0][0] == 0 and spans[-1][1] == len(lengths)
    for (first, last), (next_first, next_last) in pairwise(spans):
        assert first < next_first <= last < next_last, "in order, no gap, none inside another"
    for first, last in spans:
        cut, lost = window_of(timeline, first, last, window, BEGIN if begin else None)
        assert len(cut) <= window and cut.first_bucket == first
        whole = timeline.bucket_end_B[last - 1] - timeline.bucket_start(first)
        assert len(cut) + lost == begin + timeline.header + whole
        assert last == first + 1 or lost == max(begin + header - window // 4, 0)


@settings(max_examples=100, deadline=None)
@given(lengths=buckets, window=windows, header=headers, begin=st.booleans())
def test_starts_follow_from_the_buckets_before(
    lengths: list[list[int]], window: int, header: int, begin: bool
) -> None:
    spans = window_spans(timeline_of(lengths, header), window, begin)
    for n in range(1, len(lengths) + 1):
        short = window_spans(timeline_of(lengths[:n], header), window, begin)
        needed = 1 + sum(last < n for _, last in spans)
        assert short == [(first, min(last, n)) for first, last in spans[:needed]]
        # a part of the last bucket changes no window before it
        part = [*lengths[: n - 1], lengths[n - 1][:1]]
        earlier = window_spans(timeline_of(part, header), window, begin)[:-1]
        assert earlier == spans[: len(earlier)]


@settings(max_examples=200, deadline=None)
@given(lengths=buckets, window=windows, header=headers, begin=st.booleans())
def test_a_node_sees_at_least_half_a_window_but_one_bucket(
    lengths: list[list[int]], window: int, header: int, begin: bool
) -> None:
    timeline = timeline_of(lengths, header)
    room = window - header_length(timeline, window, begin)
    sizes = np.diff([timeline.header, *timeline.bucket_end_B])
    for n in range(1, len(lengths) + 1):
        record = node_timeline(timeline, n, None)
        cut, _ = node_window(record, window, BEGIN if begin else None)
        seen, there = len(cut) - cut.header, int(sizes[:n].sum())
        if cut.first_bucket == 0:
            assert seen == there or n == 1
        elif cut.first_bucket == n - 1 and sizes[n - 1] > room // 2:
            assert seen > room // 2 - max(lengths[n - 1])
        else:
            assert seen > room // 2 - sizes[cut.first_bucket - 1]


@settings(max_examples=100, deadline=None)
@given(lengths=buckets, window=windows, header=headers)
def test_a_node_takes_the_earliest_window_that_holds_it(
    lengths: list[list[int]], window: int, header: int
) -> None:
    timeline = timeline_of(lengths, header)
    spans = window_spans(timeline, window, True)
    for n in range(1, len(lengths) + 1):
        cut, _ = node_window(node_timeline(timeline, n, None), window, BEGIN)
        assert cut.first_bucket == next(first for first, last in spans if last >= n)


def test_a_window_holds_begin_token_header_and_buckets() -> None:
    timeline = flat([20, 20, 20, 20, 20, 20, 20])
    cut, lost = window_of(timeline, 2, 4, 100, BEGIN)
    a, b = timeline.bucket_start(2), timeline.bucket_end_B[3]
    assert cut.ids_T.tolist() == [BEGIN, *timeline.ids_T[:5], *timeline.ids_T[a:b]]
    assert (cut.header, cut.first_bucket, lost) == (6, 2, 0)
    assert cut.bucket_end_B.tolist() == [26, 46]
    assert cut.bucket_time_B.tolist() == [2000, 3000]
    assert [(cut.ids_T[s], cut.ids_T[e - 1]) for s, e in lines(cut)] == [
        (timeline.ids_T[s], timeline.ids_T[e - 1]) for s, e in lines(timeline)[2:4]
    ]
    without, _ = window_of(timeline, 2, 4, 100, None)
    assert without.ids_T.tolist() == cut.ids_T[1:].tolist() and without.header == 5


def lines(timeline: Timeline) -> list[tuple[int, int]]:
    return list(zip(timeline.line_start_L, timeline.line_end_L, strict=True))


@pytest.mark.parametrize("begin", [BEGIN, None])
def test_a_long_header_takes_a_quarter_and_what_is_lost_is_counted(begin: int | None) -> None:
    timeline = flat([20, 20], header=40)
    cut, lost = window_of(timeline, 0, 2, 100, begin)
    assert cut.header == 25 and lost == 15 + (begin is not None)
    kept = 25 - (begin is not None)
    assert cut.ids_T[:25].tolist() == [BEGIN] * (begin is not None) + list(range(100, 100 + kept))


def test_a_long_bucket_loses_its_oldest_lines() -> None:
    # 5 + 2 + 4 x 30 tokens into 90: two lines must go
    timeline = timeline_of([[30, 30, 30, 30]])
    cut, lost = window_of(timeline, 0, 1, 90, None)
    # the first line's last event is the latest of all: it stays, the two after it go
    keep = [*range(0, 36), *range(96, 127)]
    assert cut.ids_T.tolist() == [100 + i for i in keep] and lost == 60
    assert lines(cut) == [(6, 36), (36, 66)]
    assert cut.line_time_L.tolist() == [500, 3] and cut.bucket_end_B.tolist() == [67]
    assert cut.bucket_time_B.tolist() == [0]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=20),
    window=windows,
    header=st.integers(0, 10),
)
def test_no_more_lines_go_than_must(sizes: list[int], window: int, header: int) -> None:
    timeline = timeline_of([sizes], header)
    cut, lost = window_of(timeline, 0, 1, window, None)
    assert len(cut) == len(timeline) - lost <= window
    for start, end in lines(cut):
        held = cut.ids_T[start:end]
        at = int(np.flatnonzero(timeline.ids_T == held[0])[0])
        assert held.tolist() == timeline.ids_T[at : at + len(held)].tolist()
    gone = np.isin(timeline.line_time_L, cut.line_time_L, invert=True)
    if gone.any():
        assert timeline.line_time_L[gone].max() < cut.line_time_L.min(initial=1 << 40)
        youngest_gone = np.argmax(np.where(gone, timeline.line_time_L, -1))
        start, end = lines(timeline)[youngest_gone]
        assert len(cut) + end - start > window


def test_tags_longer_than_a_window_are_cut() -> None:
    timeline = flat([90])
    fields = ("line_start_L", "line_end_L", "line_time_L", "line_section_L")
    tags = replace(timeline, **{n: getattr(timeline, n)[:0] for n in fields})
    cut, lost = window_of(tags, 0, 1, 64, None)
    assert len(cut) == cut.bucket_end_B[-1] == 64 and lost == 95 - 64


def test_node_timeline_joins_buckets_and_tail() -> None:
    timeline, tail = flat([20, 20, 20]), flat([12], header=0)
    tail = replace(tail, bucket_time_B=np.array([2000]), ids_T=tail.ids_T + 1000)
    record = node_timeline(timeline, 2, tail)
    assert record.ids_T.tolist() == [*timeline.ids_T[:45], *tail.ids_T]
    assert record.bucket_end_B.tolist() == [25, 45, 57]
    assert record.bucket_time_B.tolist() == [0, 1000, 2000]
    assert lines(record) == [(6, 24), (26, 44), (46, 56)]
    assert node_timeline(timeline, 2, None).bucket_end_B.tolist() == [25, 45]


def test_a_record_without_buckets_has_no_window() -> None:
    with pytest.raises(ValueError, match="event before it"):
        node_window(node_timeline(flat([20]), 0, None), 100, BEGIN)


def test_starts_that_see_the_future_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # windows counted from the end of the record: what the law forbids
    def from_the_end(timeline: Timeline, window: int, begin: bool) -> list[tuple[int, int]]:
        n = len(timeline.bucket_end_B)
        return [(max(i - 3, 0), i) for i in range(n, 0, -3)][::-1]

    honest = test_starts_follow_from_the_buckets_before.hypothesis.inner_test
    honest([[20]] * 8, 100, 5, False)
    monkeypatch.setitem(honest.__globals__, "window_spans", from_the_end)
    with pytest.raises(AssertionError):
        honest([[20]] * 8, 100, 5, False)
    assert timelines.window_spans is not from_the_end
