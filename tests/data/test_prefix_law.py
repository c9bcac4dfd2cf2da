"""The prefix law: what a decision node sees is its subject's record as it stood at that moment.

tokens(events up to t) == complete buckets of the trunk + tail, before and after windowing, and as
the prefix and branch that are embedded, on every label of the demo datasets and on generated
tables, in text and in codes. In codes every moment is complete: there is no tail and no branch.
K decision nodes.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data import nodes as own
from smbfast.data.codes import CodeStatistics, CodeVocabulary
from smbfast.data.codes.serializer import CodeSerializer
from smbfast.data.labels import read_labels
from smbfast.data.meds import BIRTH, EventBatch, MedsDataset
from smbfast.data.nodes import Nodes, NodeText, distinct_nodes, node_texts, shared_windows
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import Serializer
from smbfast.data.timelines import Preamble, node_window
from smbfast.data.tokens import train_tokenizer
from tests.data.code_tables import FLOOR, code_serializer
from tests.data.event_tables import (
    DATA,
    DATASETS,
    DAY,
    MINUTE,
    Event,
    assert_same_timeline,
    batch_of,
    births,
    event,
    family_tokenizer,
    nodes_of,
    our_bpe,
    serializer_of,
    subjects,
    timed_events,
    us,
)

WINDOW = 512
FORMATS = ("text-paper", "text")
OURS = our_bpe()
CHUNK = 200_000  # events of truncated records serialized at once
AnySerializer = Serializer | CodeSerializer
Composed = dict[tuple[int, int], tuple[Timeline, NodeText]]


class InMemory:
    """As much of a dataset as `node_texts` reads."""

    splits = ("train",)

    def __init__(self, batch: EventBatch) -> None:
        self.batch = batch

    def batches(self, split: str, subjects: np.ndarray, *, text_chars: int) -> Iterator[EventBatch]:
        yield self.batch


def composed(
    dataset: MedsDataset | InMemory, serializer: AnySerializer, nodes: Nodes, window: int = WINDOW
) -> Composed:
    """Each node's record before windowing and its text, as `node_texts` makes them."""
    records: list[Timeline] = []

    def spy(
        record: Timeline, window: int, preamble: Preamble, spans: list, complete: int
    ) -> tuple[Timeline, int]:
        records.append(record)
        return node_window(record, window, preamble, spans, complete)

    counts: dict[str, int] = {}
    preamble = serializer.preamble
    with patch.object(own, "node_window", spy):
        texts = list(node_texts(dataset, serializer, nodes, window, counts))
    assert counts["embedded"] == len(texts) == len(records)
    skipped = counts["before_first_event"] + counts["unknown_subjects"]
    assert counts["embedded"] + skipped == counts["nodes"] == len(nodes.time_K)
    found = {(t.subject, t.time): (r, t) for r, t in zip(records, texts, strict=True)}
    begins = {}  # of the last bucket of each node's window
    for key, (record, _) in found.items():
        cut, _ = node_window(record, window, preamble)
        begins[key] = cut.bucket_start(len(cut.bucket_end_B) - 1)
    for tokens in (1, 2 * window, 1 << 40):
        check_shared(found, tokens, begins, tails=isinstance(serializer, Serializer))
    return found


def check_shared(
    found: Composed, tokens: int, begins: dict[tuple[int, int], int], *, tails: bool
) -> None:
    """Trunk prefix and branch of every node are its window; no complete bucket is in a branch."""
    seen = []
    for shared in shared_windows((text for _, text in found.values()), tokens):
        assert len(shared) <= tokens or len(shared.nodes) == 1
        assert tails or not shared.branches
        spans = zip(shared.nodes, shared.prefix_K, shared.branch_K, strict=True)
        for node, prefix, branch in spans:
            seen.append((node.subject, node.time))
            seen_of_trunk, own_T = shared.branches[branch] if branch >= 0 else (prefix, [])
            assert seen_of_trunk == prefix > 0
            ids_T = np.concatenate([shared.trunk_T[:prefix], own_T])
            assert np.array_equal(ids_T, node.ids_T)
            assert prefix >= begins[seen[-1]]
    assert seen == list(found)


def truncated(
    batch: EventBatch, serializer: AnySerializer, nodes: Nodes
) -> Iterator[tuple[tuple[int, int], Timeline]]:
    """Each node's record, serialized anew from nothing but the events up to it."""
    keys: list[tuple[int, int]] = []
    rows: list[np.ndarray] = []

    def flush() -> Iterator[tuple[tuple[int, int], Timeline]]:
        offset_S1 = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
        if keys:
            yield from zip(
                keys, serializer.timelines(batch.rows(np.concatenate(rows), offset_S1)), strict=True
            )
        keys.clear()
        rows.clear()

    for a, b in zip(batch.offset_S1[:-1], batch.offset_S1[1:], strict=True):
        subject = int(batch.subject_N[a])
        for time in nodes.time_K[nodes.subject_K == subject].tolist():
            seen = a + int(np.sum(batch.time_N[a:b] <= time))
            if seen == a:
                continue
            keys.append((subject, time))
            rows.append(np.arange(a, seen))
        if sum(map(len, rows)) > CHUNK:
            yield from flush()
    yield from flush()


def check_law(
    batches: Iterator[EventBatch],
    serializer: AnySerializer,
    nodes: Nodes,
    found: Composed,
    window: int = WINDOW,
) -> int:
    """The number of nodes whose record and window obey the law; asserts that all do."""
    checked = 0
    for batch in batches:
        for key, alone in truncated(batch, serializer, nodes):
            if not len(alone.bucket_end_B):
                assert key not in found
                continue
            record, text = found[key]
            # when a record ends, and the codes of its lines, are for training alone
            assert (record.last, record.terminal, len(record.line_code_L)) == (UNKNOWN, UNKNOWN, 0)
            assert alone.last != UNKNOWN and len(alone.line_code_L)
            alone = replace(alone, last=UNKNOWN, line_code_L=record.line_code_L)
            assert_same_timeline(record, alone)
            expected, _ = node_window(alone, window, serializer.preamble)
            assert np.array_equal(text.ids_T, expected.ids_T)
            checked += 1
    return checked


def at(subject: int, times: list[int]) -> Nodes:
    times = sorted(set(times))
    return Nodes(
        np.full(len(times), subject, np.int64),
        np.array(times, np.int64),
        np.ones(len(times), np.int8),
    )


@cache
def dataset_of(name: str) -> tuple[MedsDataset, Nodes, PreTrainedTokenizerBase]:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not here")
    dataset = MedsDataset.open(DATA / name)
    tasks = sorted(p for p in (DATA / name / "labels").iterdir() if p.is_dir())
    nodes = distinct_nodes([read_labels(p) for p in tasks])
    composer = serializer_of(our_bpe(), descriptions=dataset.descriptions)
    first = next(dataset.batches("train", dataset.subjects("train")[:20]))
    lines = (x for t in composer.texts(first) for x in t.splitlines(keepends=True))
    return dataset, nodes, train_tokenizer(lines, 3000)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "bucket", "every"),
    [("text", "day", 1), ("text", "hour", 12), ("text", "moment", 25), ("text-paper", "day", 12)],
)
@pytest.mark.parametrize("name", DATASETS)
def test_every_label(name: str, form: str, bucket: str, every: int) -> None:
    dataset, nodes, tokenizer = dataset_of(name)
    some = np.isin(nodes.subject_K, np.unique(nodes.subject_K)[::every])
    nodes = Nodes(nodes.subject_K[some], nodes.time_K[some], nodes.split_K[some])
    options = {"bucket": bucket, "format": form, "values_per_line": 3}
    serializer = serializer_of(tokenizer, descriptions=dataset.descriptions, **options)
    found = composed(dataset, serializer, nodes)
    asked = np.unique(nodes.subject_K)
    batches = (b for split in dataset.splits for b in dataset.batches(split, asked))
    assert check_law(batches, serializer, nodes, found) == len(found)
    assert len(found) > 0.9 * len(nodes.time_K)


@pytest.mark.slow
@pytest.mark.parametrize("name", DATASETS)
def test_every_label_in_codes(name: str) -> None:
    dataset, nodes, _ = dataset_of(name)
    statistics = CodeStatistics()
    for batch in dataset.batches("train"):
        statistics.add(batch)
    vocabulary = CodeVocabulary.fit(
        statistics, SectionMap.read(), dataset.descriptions, dataset.parents
    )
    serializer = CodeSerializer(vocabulary, gap_floor=FLOOR)
    found = composed(dataset, serializer, nodes)
    asked = np.unique(nodes.subject_K)
    batches = (b for split in dataset.splits for b in dataset.batches(split, asked))
    assert check_law(batches, serializer, nodes, found) == len(found)
    assert len(found) > 0.9 * len(nodes.time_K)


LAYOUTS = [
    *((form, bucket) for form in FORMATS for bucket in ("day", "hour", "moment")),
    ("codes", ""),
]


def any_serializer(layout: tuple[str, str], **options: int) -> AnySerializer:
    form, bucket = layout
    if form == "codes":
        return code_serializer()
    return serializer_of(OURS, bucket=bucket, format=form, **options)


@settings(max_examples=160, deadline=None)
@given(
    events=subjects(),
    layout=st.sampled_from(LAYOUTS),
    window=st.integers(64, 160),
)
def test_generated_tables(events: list[Event], layout: tuple[str, str], window: int) -> None:
    serializer = any_serializer(layout, values_per_line=2)
    batch, nodes = batch_of(events), at(1, list(nodes_of(events)))
    found = composed(InMemory(batch), serializer, nodes, window)
    assert check_law(iter([batch]), serializer, nodes, found, window) == len(found)
    assert all(len(text.ids_T) <= window for _, text in found.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("family", ["qwen", "sentencepiece", "sentencepiece-prefixed"])
def test_other_tokenizers(family: str, form: str, tmp_path: Path) -> None:
    tokenizer, _ = family_tokenizer(family, tmp_path, "text")
    serializer = serializer_of(tokenizer, "text", format=form, values_per_line=2)

    @settings(max_examples=25, deadline=None)
    @given(events=subjects())
    def law(events: list[Event]) -> None:
        batch, nodes = batch_of(events), at(1, list(nodes_of(events)))
        found = composed(InMemory(batch), serializer, nodes)
        assert check_law(iter([batch]), serializer, nodes, found) == len(found)

    law()


@settings(max_examples=100, deadline=None)
@given(
    events=subjects(),
    others=st.lists(st.one_of(timed_events, births), max_size=6),
    picked=st.integers(0, 1 << 30),
    layout=st.sampled_from(LAYOUTS),
)
def test_nothing_after_a_node_changes_it(
    events: list[Event], others: list[Event], picked: int, layout: tuple[str, str]
) -> None:
    times = list(nodes_of(events))
    time = times[picked % len(times)]
    # the later events are changed, deleted and added: none of the old ones stays
    later = [e for e in others if us(e[0]) > time]
    altered = [e for e in events if us(e[0]) <= time] + later
    serializer = any_serializer(layout)
    before, after = (
        composed(InMemory(batch_of(e or later)), serializer, at(1, [time]))
        for e in (events, altered or [event("2160-01-01", "LAB//a")])
    )
    assert before.keys() == after.keys()
    for key, (record, text) in before.items():
        assert_same_timeline(after[key][0], record)
        assert after[key][1].ids_T.tolist() == text.ids_T.tolist()


def test_a_node_sees_its_own_moment_and_nothing_later() -> None:
    events = [event("2150-01-31 10:00", "LAB//a", 1), event("2150-01-31 10:01", "LAB//a", 2)]
    noon, next_day = us("2150-01-31 10:01"), us("2150-02-03")
    times = [us("2150-01-31 10:00") - 1, us("2150-01-31 10:00"), noon - 1, noon, next_day]
    serializer = serializer_of(OURS)
    found = composed(InMemory(batch_of(events)), serializer, at(1, times))
    texts = {t: serializer.encoder.tokenizer.decode(f[1].ids_T[1:]) for (_, t), f in found.items()}
    one, two = (f"[2150-01-31]\n<measurements>LAB//a: {v}\n</measurements>" for v in ("1", "1, 2"))
    assert texts == {times[1]: one, times[2]: one, noon: two, next_day: two}


def test_no_event_is_serialized_again_for_a_tail_in_codes() -> None:
    events = [event(f"2150-01-31 {h:02}:00", "LAB//GLU", h) for h in range(10)]
    batch, nodes = batch_of(events), at(1, list(nodes_of(events)))
    serializer = code_serializer()
    with patch.object(serializer, "timelines", wraps=serializer.timelines) as called:
        texts = list(node_texts(InMemory(batch), serializer, nodes, WINDOW, {}))
    assert len(texts) == 3 * 10 - 1 and called.call_count == 1


@pytest.mark.parametrize("form", FORMATS)
def test_a_tail_reads_the_codes_of_its_own_events_and_has_the_same_bits(form: str) -> None:
    names = ["DIAGNOSIS//b", "LAB//a", "LAB//z", "MEDICATION//c"]
    events = [event("2150-01-30 10:00", name, 1) for name in names]
    events += [event(f"2150-01-31 1{h}:00", names[h % 3], h) for h in range(4)]
    batch, nodes = batch_of(events), at(1, [us("2150-01-31 11:00"), us("2150-01-31 12:00")])

    def read(serializer: Serializer) -> tuple[list[list[str]], list[list[int]]]:
        with patch.object(serializer, "code_table", wraps=serializer.code_table) as table:
            texts = node_texts(InMemory(batch), serializer, nodes, WINDOW, {})
            ids = [text.ids_T.tolist() for text in texts]
        return [call.args[0] for call in table.call_args_list], ids

    tables, ids = read(serializer_of(OURS, format=form))
    assert [sorted(table) for table in tables] == [names, names[:3]]
    with patch.object(EventBatch, "with_codes_of_its_events", lambda self: self):
        tables, wanted = read(serializer_of(OURS, format=form))
    assert [sorted(table) for table in tables] == [names, names] and ids == wanted


def test_the_law_is_broken_by_a_code_serializer_that_counts_the_next_moment() -> None:
    events = [event("2150-01-31 10:00", "LAB//GLU"), event("2150-01-31 12:00", "LAB//GLU", 1)]
    batch, nodes = batch_of(events), at(1, [us("2150-01-31 11:00")])
    serializer = code_serializer()
    with patch.object(serializer, "bucket_key", lambda time_K: time_K + 120 * MINUTE):
        found = composed(InMemory(batch), serializer, nodes)
        with pytest.raises(AssertionError):
            check_law(iter([batch]), serializer, nodes, found)


def test_a_tail_tells_the_time_since_the_bucket_before_it() -> None:
    events = [event("2140-01-31", BIRTH), event("2150-01-28 10:00", "LAB//a", 1)]
    events += [event(f"2150-01-31 1{h}:00", "LAB//a", h) for h in range(4)]
    serializer = serializer_of(OURS, format="text", bucket="hour")
    found = composed(InMemory(batch_of(events)), serializer, at(1, [us("2150-01-31 10:30")]))
    ((record, text),) = found.values()
    assert np.array_equal(text.ids_T[1:], record.ids_T)
    expected = "Age 9\n@10\n<measurements>LAB//a 1\n+3 10\n<measurements>LAB//a 0\n"
    assert serializer.encoder.tokenizer.decode(record.ids_T) == expected


@pytest.mark.parametrize("form", FORMATS)
def test_a_tail_that_forgets_the_bucket_before_it_breaks_lean_text_alone(form: str) -> None:
    events = [event("2150-01-30 10:00", "LAB//a"), event("2150-01-31 10:00", "LAB//a")]
    batch, serializer = batch_of(events), serializer_of(OURS, format=form)
    nodes = at(1, [us("2150-01-31 11:00")])
    honest = serializer.timelines
    with patch.object(serializer, "timelines", lambda batch, before_S=None: honest(batch)):
        found = composed(InMemory(batch), serializer, nodes)
    if form == "text":
        with pytest.raises(AssertionError):
            check_law(iter([batch]), serializer, nodes, found)
    else:
        assert check_law(iter([batch]), serializer, nodes, found) == 1


def test_the_law_is_broken_by_a_tail_that_sees_its_whole_bucket() -> None:
    events = [event("2150-01-30 10:00", "LAB//a"), event("2150-01-31 10:00", "LAB//a")]
    events.append(event("2150-01-31 12:00", "DIAGNOSIS//b"))
    batch, serializer = batch_of(events), serializer_of(OURS)
    nodes = at(1, [us("2150-01-31 11:00")])
    honest = own._tails

    def leaking(
        batch: EventBatch, rows: slice, timed_N: np.ndarray, used: Serializer, time_K: np.ndarray
    ) -> list:
        return honest(batch, rows, timed_N, used, used.bucket_key(time_K) + DAY - 1)

    with patch.object(own, "_tails", leaking):
        found = composed(InMemory(batch), serializer, nodes)
        with pytest.raises(AssertionError):
            check_law(iter([batch]), serializer, nodes, found)
