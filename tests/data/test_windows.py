"""The table of windows against the windows themselves: lengths, cuts, labels and what is lost."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smbfast.batch import Timeline
from smbfast.data.loader import make_batch
from smbfast.data.masking import allowed_cuts
from smbfast.data.sections import SECTIONS
from smbfast.data.timelines import YEAR, Preamble
from smbfast.data.windows import WindowSet
from smbfast.settings import ObjectiveSettings

AGES = tuple(np.full(1 + years % 2, 700 + years, np.int32) for years in range(121))
TAGS = tuple(np.full(1 + s % 3, 900 + s, np.int32) for s in range(len(SECTIONS)))


@st.composite
def timelines(draw: st.DrawFn, subject: int) -> Timeline:
    """Like text (date, tag, lines, tag) or like codes (gap, events of one token each)."""
    text = draw(st.booleans())
    header = draw(st.integers(0, 30))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))
    ends, starts, stops, sections, at = [], [], [], [], header
    for bucket in range(draw(st.integers(0, 14))):
        at += 2 if text else min(bucket, 1)
        for _ in range(int(random.integers(1, 12))):
            starts.append(at)
            at += int(random.integers(1, 40 if random.random() < 0.1 else 6)) if text else 1
            stops.append(at)
            sections.append(random.choice([0, 3, 5], p=[0.3, 0.4, 0.3]))
        at += text
        ends.append(at)
    times = np.sort(random.integers(0, 80 * YEAR, len(ends)))
    return Timeline(
        subject=subject,
        ids_T=random.integers(10, 600, at).astype(np.int32),
        header=header,
        bucket_end_B=np.array(ends, np.int32),
        bucket_time_B=times,
        bucket_head_B=np.full(len(ends), text, np.uint16),
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(stops, np.int32),
        line_time_L=np.zeros(len(starts), np.int64),
        line_section_L=np.array(sections, np.uint8),
        line_code_L=np.arange(len(starts), dtype=np.int32),
        birth=draw(st.sampled_from([0, 20 * YEAR])),
    )


preambles = st.builds(
    Preamble,
    begin=st.sampled_from([None, 7]),
    age_ids=st.sampled_from([(), AGES]),
    section_ids=st.sampled_from([(), TAGS]),
)
objectives = st.builds(
    ObjectiveSettings,
    context=st.sampled_from([(0.25, 0.9), (0.0, 1.0), (0.5, 0.5), (0.1, 0.3)]),
    min_future=st.sampled_from([1, 8, 30]),
    horizon=st.sampled_from([None, 1, 4, 20]),
)


@settings(max_examples=200, deadline=None)
@given(
    cohort=st.integers(1, 5).flatmap(lambda n: st.tuples(*map(timelines, range(n)))),
    window=st.sampled_from([40, 64, 200]),
    stride=st.sampled_from([None, 20, 39]),
    preamble=preambles,
    objective=objectives,
)
def test_the_table_says_what_the_windows_are(
    cohort: tuple[Timeline, ...],
    window: int,
    stride: int | None,
    preamble: Preamble,
    objective: ObjectiveSettings,
) -> None:
    shards = [list(cohort[:2]), list(cohort[2:]), []]
    table = WindowSet.of(shards, window, preamble, objective, stride)
    made = [table[i] for i in range(len(table))]
    assert table.length_W.tolist() == [len(w) for w in made]
    assert table.has_cut_W.tolist() == [len(allowed_cuts(w, objective)) > 0 for w in made]
    with_cut = [i for i, w in enumerate(made) if len(allowed_cuts(w, objective))]
    # by length, and by place where lengths are the same
    assert table.with_cut_C.tolist() == sorted(with_cut, key=lambda i: (len(made[i]), i))
    assert table.num_with_cut == len(with_cut)
    assert table.num_tokens == sum(map(len, made))
    assert table.num_tokens_with_cut == sum(len(made[i]) for i in with_cut)
    batch = make_batch(made, objective, 0, 0, jepa=False)
    assert table.num_labels == batch.num_labels == table.labels_W.sum()


@settings(max_examples=100, deadline=None)
@given(timeline=timelines(0), window=st.sampled_from([40, 64, 200]), preamble=preambles)
def test_lengths_of_what_stands_before_are_those_of_its_ids(
    timeline: Timeline, window: int, preamble: Preamble
) -> None:
    for time in timeline.bucket_time_B.tolist():
        ids = preamble.header(timeline, time, window)
        assert preamble.header_length(timeline, time, window) == len(ids)
    for start in range(timeline.header, len(timeline)):
        ids = preamble.lead(timeline, start, window)
        assert preamble.lead_length(timeline, start, window) == len(ids)


@settings(max_examples=100, deadline=None)
@given(timeline=timelines(0), begin=st.sampled_from([None, 7]), window=st.integers(130, 300))
def test_labels_of_an_epoch_are_the_tokens_of_the_timelines(
    timeline: Timeline, begin: int | None, window: int
) -> None:
    """Each once, but for the first of a timeline that has no begin token before it."""
    assume(begin is not None or timeline.header)  # else a later window's first token has no context
    table = WindowSet.of([[timeline]], window, Preamble(begin), ObjectiveSettings())
    tokens = len(timeline) if len(timeline.bucket_end_B) else 0
    assert table.num_lost == 0
    assert table.num_labels == max(tokens - (begin is None), 0)


def test_blocks_of_timelines_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = [plain(subject) for subject in range(9)]
    whole = WindowSet.of([cohort], 40, Preamble(7), ObjectiveSettings(min_future=4))
    monkeypatch.setattr("smbfast.data.windows.BLOCK", 2)
    parts = WindowSet.of([cohort], 40, Preamble(7), ObjectiveSettings(min_future=4))
    assert 0 < whole.num_with_cut < len(whole) > 9
    for name in ("place_W5", "length_W", "has_cut_W", "labels_W", "with_cut_C"):
        assert np.array_equal(getattr(parts, name), getattr(whole, name))
        assert getattr(whole, name).dtype == getattr(parts, name).dtype
    assert parts.num_labels == whole.num_labels


def test_a_window_takes_less_than_forty_bytes() -> None:
    table = WindowSet.of([[plain(s) for s in range(9)]], 40, Preamble(), ObjectiveSettings())
    held = (table.place_W5, table.length_W, table.has_cut_W, table.labels_W, table.with_cut_C)
    assert sum(a.nbytes for a in held) < 40 * len(table)
    assert all(type(a) is np.ndarray and a.base is None for a in held)


def plain(subject: int) -> Timeline:
    """Buckets of ten tokens, one line of eight each; as many as the subject's number and one."""
    ends = np.arange(1, subject + 2) * 10 + 4
    return Timeline(
        subject=subject,
        ids_T=np.arange(10, ends[-1] + 10, dtype=np.int32),
        header=4,
        bucket_end_B=ends.astype(np.int32),
        bucket_time_B=ends.astype(np.int64),
        bucket_head_B=np.ones(len(ends), np.uint16),
        line_start_L=(ends - 9).astype(np.int32),
        line_end_L=(ends - 1).astype(np.int32),
        line_time_L=ends.astype(np.int64),
        line_section_L=np.full(len(ends), 3, np.uint8),
        line_code_L=np.arange(len(ends), dtype=np.int32),
    )
