"""Windows: where they start, what they hold, and that both follow from the past alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data import timelines
from smbfast.data.timelines import (
    Preamble,
    node_spans,
    node_timeline,
    node_window,
    training_spans,
    window_of,
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
        bucket_head_B=np.ones(len(lengths), np.uint16),
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
PLAIN = Preamble()


def preamble_of(begin: bool) -> Preamble:
    return Preamble(BEGIN if begin else None)


def room_of(timeline: Timeline, window: int, begin: bool) -> int:
    """Tokens of buckets that a window may hold."""
    return window - min(timeline.header + begin, max(window // 4, 1))


def buckets_of(timeline: Timeline, first: int, last: int, window: int, begin: int | None):
    start, end = timeline.bucket_start(first), int(timeline.bucket_end_B[last - 1])
    return window_of(timeline, start, end, start, window, Preamble(begin))


def test_windows_of_nodes_by_hand() -> None:
    # room for 100 - 5 = 95 tokens of buckets; the next starts where at most 47 remain
    timeline = flat([20, 20, 20, 20, 20, 20, 20])
    assert node_spans(timeline, 100, PLAIN) == [(0, 4), (2, 6), (4, 7)]


def test_a_bucket_that_fits_beside_no_half_begins_a_window() -> None:
    assert node_spans(flat([40, 40, 80, 10]), 100, PLAIN) == [(0, 2), (2, 4)]
    assert node_spans(flat([60, 60, 10]), 100, PLAIN) == [(0, 1), (1, 3)]
    assert node_spans(flat([300, 300]), 100, PLAIN) == [(0, 1), (1, 2)]
    assert node_spans(flat([30]), 100, preamble_of(True)) == [(0, 1)]


def test_training_windows_by_hand() -> None:
    """Room for 95 tokens: short buckets stay whole, a long one goes on behind its repeated date."""
    timeline = flat([40, 40, 40])
    assert training_spans(timeline, 100, 100, PLAIN) == [(5, 85, 5), (85, 125, 85)]
    # half a window is repeated: what fits of it in whole buckets
    assert training_spans(timeline, 100, 50, PLAIN) == [(5, 85, 5), (45, 125, 85)]
    # the lines of 30 end at 40, 70, 100 and 130; the first window ends with the third
    long = timeline_of([[2], [30, 30, 30, 30], [3]])
    spans = training_spans(long, 100, 100, PLAIN)
    ends = long.line_end_L.tolist()
    assert spans == [(5, ends[3], 5), (ends[3], len(long), ends[3])]
    cut, lost = window_of(long, *spans[1], 100, PLAIN)
    date = long.ids_T[9:10].tolist()
    assert cut.ids_T.tolist() == [*long.ids_T[:5], *date, *long.ids_T[ends[3] :]] and lost == 0
    assert cut.header == cut.labels_from == 6 and cut.start == ends[3]
    assert lines(cut)[0] == (6 + 0, 6 + 30)


def test_a_window_that_goes_on_in_a_section_repeats_its_tag() -> None:
    tags = tuple(np.array([900 + i], np.int32) for i in range(8))
    long = replace(timeline_of([[40, 40, 40]]), line_section_L=np.array([3, 3, 4], np.uint8))
    preamble = Preamble(BEGIN, section_ids=tags)
    spans = training_spans(long, 100, 100, preamble)
    for span, tag in zip(spans[1:], (904,), strict=True):
        cut, _ = window_of(long, *span, 100, preamble)
        assert cut.ids_T[: cut.header].tolist() == [BEGIN, *range(100, 106), tag]


def test_every_window_tells_the_age_at_its_start() -> None:
    ages = tuple(np.array([500 + y], np.int32) for y in range(timelines.MOST_YEARS + 1))
    preamble = Preamble(BEGIN, age_ids=ages)
    # the last of the five header tokens is the age at the first bucket
    timeline = replace(
        flat([40, 40, 40, 40]), bucket_time_B=timelines.YEAR * np.arange(4), birth=-63
    )
    spans = training_spans(timeline, 100, 100, preamble)
    heads = [window_of(timeline, *s, 100, preamble)[0] for s in spans]
    assert [w.ids_T[: w.header].tolist() for w in heads] == [
        [BEGIN, 100, 101, 102, 103, 500 + years] for years in (0, 2)
    ]
    assert preamble.age(0, timelines.YEAR - 1)[0] == 500
    assert preamble.age(0, 500 * timelines.YEAR)[0] == 500 + timelines.MOST_YEARS
    assert not len(preamble.age(5, 4)) and not len(Preamble().age(0, 5))
    assert not len(preamble.age(UNKNOWN, 5))


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=9), min_size=1, max_size=20),
    window=windows,
    header=headers,
    begin=st.booleans(),
    stride=st.sampled_from([1.0, 0.5, 0.25]),
)
def test_each_token_is_new_in_one_training_window(
    lengths: list[list[int]], window: int, header: int, begin: bool, stride: float
) -> None:
    timeline, preamble = timeline_of(lengths, header), preamble_of(begin)
    spans = training_spans(timeline, window, int(stride * window), preamble)
    assert spans[0][0] == header and spans[-1][1] == len(timeline)
    new = [range(fresh, end) for _, end, fresh in spans]
    assert [t for tokens in new for t in tokens] == list(range(header, len(timeline)))
    if stride == 1:
        assert all(start == fresh for start, _, fresh in spans)
    labelled: list[int] = []
    for span in spans:
        cut, lost = window_of(timeline, *span, window, preamble)
        assert len(cut) <= window and cut.bucket_end_B[-1] == len(cut)
        assert cut.line_start_L.min(initial=cut.header) >= cut.header
        labelled += cut.ids_T[max(cut.labels_from, 1) :].tolist()
        first = span[0] == header and span[2] == header
        assert lost == (max(header + begin - max(window // 4, 1), 0) if first else 0)
        room = room_of(timeline, window, begin)
        ends = timeline.bucket_end_B
        inside = ends[(ends > span[0]) & (ends < span[1])]
        assert np.isin(inside + cut.header - span[0], cut.bucket_end_B).all()
        if span[1] not in ends:  # only a bucket that no window holds is divided
            divided = int(np.searchsorted(ends, span[1]))
            assert ends[divided] - timeline.bucket_start(divided) > room
    # identity: every token of the timeline is its own place, so this is "a label exactly once"
    shown = timeline.ids_T.tolist()
    lost = header + begin - max(window // 4, 1)
    del shown[max(header - max(lost, 0), 0) : header]
    # where nothing stands before a window, nothing predicts its first token
    cuts = [window_of(timeline, *span, window, preamble)[0] for span in spans]
    bare = {cut.start for cut in cuts if not cut.header and not cut.labels_from}
    unseen = bare or ({0} if not begin else set())
    assert labelled == [t for t in shown if t - 100 not in unseen]


@settings(max_examples=200, deadline=None)
@given(lengths=buckets, window=windows, header=headers, begin=st.booleans())
def test_windows_of_nodes_cover_every_bucket_and_fit(
    lengths: list[list[int]], window: int, header: int, begin: bool
) -> None:
    timeline = timeline_of(lengths, header)
    spans = node_spans(timeline, window, preamble_of(begin))
    assert spans[0][0] == 0 and spans[-1][1] == len(lengths)
    for (first, last), (next_first, next_last) in pairwise(spans):
        assert first < next_first <= last < next_last, "in order, no gap, none inside another"
    for first, last in spans:
        record = node_timeline(timeline, last, None)
        cut, lost = node_window(record, window, preamble_of(begin))
        assert len(cut) <= window and cut.start == timeline.bucket_start(first)
        whole = timeline.bucket_end_B[last - 1] - timeline.bucket_start(first)
        assert len(cut) + lost == begin + timeline.header + whole
        assert last == first + 1 or lost == max(begin + header - window // 4, 0)


@settings(max_examples=100, deadline=None)
@given(lengths=buckets, window=windows, header=headers, begin=st.booleans())
def test_starts_follow_from_the_buckets_before(
    lengths: list[list[int]], window: int, header: int, begin: bool
) -> None:
    preamble = preamble_of(begin)
    spans = node_spans(timeline_of(lengths, header), window, preamble)
    for n in range(1, len(lengths) + 1):
        short = node_spans(timeline_of(lengths[:n], header), window, preamble)
        needed = 1 + sum(last < n for _, last in spans)
        assert short == [(first, min(last, n)) for first, last in spans[:needed]]
        # a part of the last bucket changes no window before it
        part = [*lengths[: n - 1], lengths[n - 1][:1]]
        earlier = node_spans(timeline_of(part, header), window, preamble)[:-1]
        assert earlier == spans[: len(earlier)]


@settings(max_examples=200, deadline=None)
@given(lengths=buckets, window=windows, header=headers, begin=st.booleans())
def test_a_node_sees_at_least_half_a_window_but_one_bucket(
    lengths: list[list[int]], window: int, header: int, begin: bool
) -> None:
    timeline = timeline_of(lengths, header)
    room = room_of(timeline, window, begin)
    sizes = np.diff([timeline.header, *timeline.bucket_end_B])
    starts = [timeline.bucket_start(b) for b in range(len(lengths))]
    for n in range(1, len(lengths) + 1):
        record = node_timeline(timeline, n, None)
        cut, _ = node_window(record, window, preamble_of(begin))
        seen, there = len(cut) - cut.header, int(sizes[:n].sum())
        first = starts.index(cut.start)
        if first == 0:
            assert seen == there or n == 1
        elif first == n - 1 and sizes[n - 1] > room // 2:
            assert seen > room // 2 - max(lengths[n - 1])
        else:
            assert seen > room // 2 - sizes[first - 1]


@settings(max_examples=100, deadline=None)
@given(lengths=buckets, window=windows, header=headers)
def test_a_node_takes_the_earliest_window_that_holds_it(
    lengths: list[list[int]], window: int, header: int
) -> None:
    timeline, preamble = timeline_of(lengths, header), preamble_of(True)
    spans = node_spans(timeline, window, preamble)
    for n in range(1, len(lengths) + 1):
        cut, _ = node_window(node_timeline(timeline, n, None), window, preamble)
        first = next(first for first, last in spans if last >= n)
        assert cut.start == timeline.bucket_start(first)


def test_a_window_holds_begin_token_header_and_buckets() -> None:
    timeline = flat([20, 20, 20, 20, 20, 20, 20])
    cut, lost = buckets_of(timeline, 2, 4, 100, BEGIN)
    a, b = timeline.bucket_start(2), timeline.bucket_end_B[3]
    assert cut.ids_T.tolist() == [BEGIN, *timeline.ids_T[:5], *timeline.ids_T[a:b]]
    assert (cut.header, cut.start, lost) == (6, a, 0)
    assert cut.bucket_end_B.tolist() == [26, 46]
    assert cut.bucket_time_B.tolist() == [2000, 3000]
    assert [(cut.ids_T[s], cut.ids_T[e - 1]) for s, e in lines(cut)] == [
        (timeline.ids_T[s], timeline.ids_T[e - 1]) for s, e in lines(timeline)[2:4]
    ]
    without, _ = buckets_of(timeline, 2, 4, 100, None)
    assert without.ids_T.tolist() == cut.ids_T[1:].tolist() and without.header == 5


def lines(timeline: Timeline) -> list[tuple[int, int]]:
    return list(zip(timeline.line_start_L, timeline.line_end_L, strict=True))


@pytest.mark.parametrize("begin", [BEGIN, None])
def test_a_long_header_takes_a_quarter_and_what_is_lost_is_counted(begin: int | None) -> None:
    timeline = flat([20, 20], header=40)
    cut, lost = buckets_of(timeline, 0, 2, 100, begin)
    assert cut.header == 25 and lost == 15 + (begin is not None)
    kept = 25 - (begin is not None)
    assert cut.ids_T[:25].tolist() == [BEGIN] * (begin is not None) + list(range(100, 100 + kept))


def test_a_long_bucket_loses_its_oldest_lines() -> None:
    # 5 + 2 + 4 x 30 tokens into 90: two lines must go
    timeline = timeline_of([[30, 30, 30, 30]])
    cut, lost = node_window(timeline, 90, PLAIN)
    # the first line's last event is the latest of all: it stays, the two after it go
    keep = [*range(0, 36), *range(96, 127)]
    assert cut.ids_T.tolist() == [100 + i for i in keep] and lost == 60
    assert lines(cut) == [(6, 36), (36, 66)]
    assert cut.line_time_L.tolist() == [500, 3] and cut.bucket_end_B.tolist() == [67]
    assert cut.bucket_time_B.tolist() == [0]


@pytest.mark.parametrize("sizes", [[200], [200, 30, 7]])
def test_of_a_line_longer_than_a_window_the_latest_values_stay(sizes: list[int]) -> None:
    timeline = timeline_of([sizes])  # the first line is the newest, from token 6 on
    cut, lost = node_window(timeline, 90, PLAIN)
    tags = len(timeline) - sum(sizes) - 6
    held = 90 - 6 - tags
    keep = [*range(6), *range(206 - held, 206), *range(len(timeline) - tags, len(timeline))]
    assert cut.ids_T.tolist() == [100 + i for i in keep] and lost == len(timeline) - 90
    assert lines(cut) == [(6, 6 + held)] and cut.line_time_L.tolist() == [500]
    assert cut.bucket_end_B.tolist() == [90]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=20),
    window=windows,
    header=st.integers(0, 10),
)
def test_no_more_lines_go_than_must(sizes: list[int], window: int, header: int) -> None:
    timeline = timeline_of([sizes], header)
    cut, lost = node_window(timeline, window, PLAIN)
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
    cut, lost = node_window(tags, 64, PLAIN)
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
        node_window(node_timeline(flat([20]), 0, None), 100, PLAIN)


def test_starts_that_see_the_future_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # windows counted from the end of the record: what the law forbids
    def from_the_end(timeline: Timeline, window: int, preamble: Preamble) -> list[tuple[int, int]]:
        n = len(timeline.bucket_end_B)
        return [(max(i - 3, 0), i) for i in range(n, 0, -3)][::-1]

    honest = test_starts_follow_from_the_buckets_before.hypothesis.inner_test
    honest([[20]] * 8, 100, 5, False)
    monkeypatch.setitem(honest.__globals__, "node_spans", from_the_end)
    with pytest.raises(AssertionError):
        honest([[20]] * 8, 100, 5, False)
    assert timelines.node_spans is not from_the_end
