"""Cuts timelines into windows of the context length, and into the records at decision nodes.

A window starts at a bucket, and its start depends only on the buckets before it. It is the first
bucket with which at most half a window is repeated. If the bucket that did not fit into the
previous window would still not fit, the window starts at that bucket instead. A decision node takes
the earliest window that holds all of its last bucket. So it sees between half a window and a whole
one, and nothing after its prediction time influences which.

Legend: B buckets, L lines, T tokens.
"""

from dataclasses import replace

import numpy as np

from smbfast.batch import Timeline


def window_spans(timeline: Timeline, window: int, begin: bool) -> list[tuple[int, int]]:
    """Return the buckets `[first, last)` of each window of a timeline, in order.

    Args:
        window: context length in tokens, including the header (begin token and demographics).
        begin: whether each window starts with a begin token.
    """
    room = window - header_length(timeline, window, begin)
    start_B, end_B = _bucket_bounds(timeline)
    spans: list[tuple[int, int]] = []
    first, num_buckets = 0, len(end_B)
    while first < num_buckets:
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
    timeline: Timeline, first: int, last: int, window: int, begin: int | None
) -> tuple[Timeline, int]:
    """Return the window of buckets `[first, last)`, and how many of its tokens were lost.

    The window starts with the begin token and the demographics. Tokens are lost in two cases: a
    single bucket that is longer than the window loses its oldest lines, and a header that is longer
    than a quarter of the window loses its end.
    """
    header = header_length(timeline, window, begin is not None)
    prefix = [np.array([begin], np.int32)] if begin is not None else []
    prefix.append(timeline.ids_T[: header - len(prefix)])
    start, end = timeline.bucket_start(first), int(timeline.bucket_end_B[last - 1])
    a, b = np.searchsorted(timeline.line_start_L, [start, end])
    shift = header - start
    cut = Timeline(
        subject=timeline.subject,
        ids_T=np.concatenate([*prefix, timeline.ids_T[start:end]]),
        header=header,
        bucket_end_B=timeline.bucket_end_B[first:last] + shift,
        bucket_time_B=timeline.bucket_time_B[first:last],
        line_start_L=timeline.line_start_L[a:b] + shift,
        line_end_L=timeline.line_end_L[a:b] + shift,
        line_time_L=timeline.line_time_L[a:b],
        line_section_L=timeline.line_section_L[a:b],
        first_bucket=timeline.first_bucket + first,
    )
    lost = timeline.header + (begin is not None) - header
    if len(cut) > window:
        whole, cut = len(cut), _without_oldest_lines(cut, window)
        lost += whole - len(cut)
    return cut, lost


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
        line_start_L=timeline.line_start_L[:lines],
        line_end_L=timeline.line_end_L[:lines],
        line_time_L=timeline.line_time_L[:lines],
        line_section_L=timeline.line_section_L[:lines],
    )
    if tail is None or not len(tail):
        return record
    return replace(
        record,
        ids_T=np.concatenate([record.ids_T, tail.ids_T]),
        bucket_end_B=np.append(record.bucket_end_B, end + tail.bucket_end_B),
        bucket_time_B=np.append(record.bucket_time_B, tail.bucket_time_B),
        line_start_L=np.append(record.line_start_L, end + tail.line_start_L),
        line_end_L=np.append(record.line_end_L, end + tail.line_end_L),
        line_time_L=np.append(record.line_time_L, tail.line_time_L),
        line_section_L=np.append(record.line_section_L, tail.line_section_L),
    )


def node_window(record: Timeline, window: int, begin: int | None) -> tuple[Timeline, int]:
    """Return the earliest window with all of a record's last bucket, and how many tokens were lost.

    Raises:
        ValueError: if the record has no bucket, because the node is before the first event.
    """
    if not len(record.bucket_end_B):
        raise ValueError("a decision node must have an event before it; this record has none")
    spans = window_spans(record, window, begin is not None)
    first = next(first for first, last in spans if last == len(record.bucket_end_B))
    return window_of(record, first, len(record.bucket_end_B), window, begin)


def header_length(timeline: Timeline, window: int, begin: bool) -> int:
    """Return the number of begin and demographics tokens, at most a quarter of a window."""
    return min(timeline.header + begin, max(window // 4, 1))


def _bucket_bounds(timeline: Timeline) -> tuple[np.ndarray, np.ndarray]:
    end_B = timeline.bucket_end_B.astype(np.int64)
    return np.concatenate([[timeline.header], end_B[:-1]])[: len(end_B)], end_B


def _fits_until(start_B: np.ndarray, end_B: np.ndarray, first: int, room: int) -> int:
    """Return the bucket after the last one that fits from `first` on; one bucket always fits."""
    return max(int(np.searchsorted(end_B, start_B[first] + room, side="right")), first + 1)


def _without_oldest_lines(timeline: Timeline, window: int) -> Timeline:
    length_L = timeline.line_end_L - timeline.line_start_L
    oldest = np.lexsort((timeline.line_start_L, timeline.line_time_L))
    gone = int(np.searchsorted(np.cumsum(length_L[oldest]), len(timeline) - window)) + 1
    keep_L = np.ones(len(length_L), bool)
    keep_L[oldest[:gone]] = False
    keep_T = np.ones(len(timeline), bool)
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
