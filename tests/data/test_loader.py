"""Windows to steps to batches: draws by identity, exact masks and cuts, labels.

Legend: W windows, T tokens.
"""

import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smbfast.batch import PackedBatch, Timeline
from smbfast.data.loader import (
    Step,
    in_turn,
    make_batch,
    make_step,
    prefetched,
    step_windows,
    stratified,
)
from smbfast.data.masking import cut_points, future_end, masked_tokens
from smbfast.data.sections import SECTIONS
from smbfast.data.shards import Shard, ShardWriter
from smbfast.data.timelines import Preamble
from smbfast.data.windows import WindowSet
from smbfast.settings import ObjectiveSettings
from tests.refusal import refused
from tests.tiny import step_of

BEGIN = 7
DEMOGRAPHICS = SECTIONS.index("demographics")
UNITS = ("token", "event", "span")


def timeline(subject: int, seed: int, buckets: int = 12, header: int = 4) -> Timeline:
    """Random lines: a bucket is a tag, lines (some of them demographics), a tag; ids from 10 up."""
    random = np.random.default_rng([seed, subject])
    starts, ends, bucket_ends, at = [], [], [], header
    for _ in range(buckets):
        at += 1
        for _ in range(random.integers(1, 5)):
            starts.append(at)
            at += int(random.integers(1, 9))
            ends.append(at)
        at += 1
        bucket_ends.append(at)
    return Timeline(
        subject=subject,
        ids_T=random.integers(10, 1000, at).astype(np.int32),
        header=header,
        bucket_end_B=np.array(bucket_ends, np.int32),
        bucket_time_B=np.arange(buckets, dtype=np.int64),
        bucket_head_B=np.ones(buckets, np.uint16),
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(ends, np.int32),
        line_time_L=np.arange(len(starts), dtype=np.int64),
        line_section_L=random.integers(0, len(SECTIONS), len(starts)).astype(np.uint8),
    )


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> WindowSet:
    folder: Path = tmp_path_factory.mktemp("shards")
    for name, subjects in (("a", range(1, 8)), ("b", range(8, 13))):
        with ShardWriter(folder / name) as writer:
            for subject in subjects:
                writer.add(timeline(subject, 0, buckets=3 * subject))
    shards = [Shard(folder / "a"), Shard(folder / "b")]
    return WindowSet.of(shards, 128, Preamble(BEGIN), objective())


def objective(**changes: object) -> ObjectiveSettings:
    return ObjectiveSettings(**{"min_future": 8, **changes})


def trunks_of(batch: PackedBatch) -> dict[bytes, dict[int, tuple[list[int], list[int]]]]:
    """Per trunk (its ids): per cut, the masked positions and the branch's ids."""
    found: dict[bytes, dict[int, tuple[list[int], list[int]]]] = {}
    ids_T, masked = batch.ids_T.numpy(), batch.masked_M.numpy()
    trunk_at: dict[int, bytes] = {}
    for a, length, trunk_start, prefix in batch.segment_tuples:
        b = a + length
        if prefix == 0:
            trunk_at[a] = ids_T[a:b].tobytes()
            found[trunk_at[a]] = {}
        else:
            rows = masked[(masked >= a) & (masked < b)] - a + prefix
            key = trunk_at[trunk_start]
            found[key][prefix] = (rows.tolist(), ids_T[a:b].tolist())
    return found


def labels_of(batch: PackedBatch) -> list[int]:
    """The next token of every row, -100 where none is predicted."""
    labels = np.full(len(batch.ids_T), -100)
    labels[batch.labelled_N] = batch.label_N
    return labels.tolist()


def eligible_of(window: Timeline, cut: int, end: int) -> list[int]:
    return [
        p
        for a, b, section in zip(
            window.line_start_L, window.line_end_L, window.line_section_L, strict=True
        )
        if a >= cut and section != DEMOGRAPHICS
        for p in range(a, min(b, end))
    ]


def test_an_epoch_is_every_window_once() -> None:
    """In phases without JEPA; a batch of more windows than there are has each of them once."""
    n = 23
    for batch in (1, 5, n):
        order = np.concatenate([in_turn(n, batch, 3, s) for s in range(3 * n // batch + 2)])
        for epoch in range(2):
            assert sorted(order[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))
        assert order[:n].tolist() != order[n : 2 * n].tolist()
    assert in_turn(n, 2 * n + 1, 3, 0).tolist() == order[:n].tolist()
    assert in_turn(n, n, 4, 0).tolist() != order[:n].tolist()


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 90), batch=st.integers(1, 12), seed=st.integers(0, 99))
def test_an_epoch_of_a_stratum_is_each_of_its_places_once(num: int, batch: int, seed: int) -> None:
    count, steps = min(batch, num), -(-num // min(batch, num))
    taken = np.array([stratified(num, batch, seed, s) for s in range(2 * steps)])
    assert taken.shape == (2 * steps, count)
    edges = [s * num // count for s in range(count + 1)]
    assert {b - a for a, b in pairwise(edges)} <= {num // count, -(-num // count)}
    for s, (first, end) in enumerate(pairwise(edges)):
        for epoch in range(2):
            own = taken[epoch * (end - first) : (epoch + 1) * (end - first), s]
            assert sorted(own.tolist()) == list(range(first, end))


def test_strata_and_epochs_have_orders_of_their_own() -> None:
    taken = np.array([stratified(80, 4, 0, s) for s in range(40)])
    orders = [
        (taken[20 * e : 20 * e + 20, s] - 20 * s).tolist() for e in range(2) for s in range(4)
    ]
    assert len({tuple(order) for order in orders}) == 8
    other = np.array([stratified(80, 4, 1, s) for s in range(20)])
    assert not any((other[:, s] == taken[:20, s]).all() for s in range(4))


class Counted:
    """Stands for an array of `size` numbers, each its own place; counts those that are read."""

    def __init__(self, size: int) -> None:
        self.size, self.num_read = size, 0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        self.num_read += len(places)
        return places


@pytest.mark.parametrize("jepa", [True, False])
def test_the_plan_of_a_step_costs_the_same_however_many_windows_there_are(jepa: bool) -> None:
    """It reads as many entries of the table as it takes windows, and makes no array of all."""
    none = np.empty(0)
    for num in (1_000, 1_000_000):
        with_cut, all_windows = Counted(num), Counted(num)
        table = WindowSet([], Preamble(), 128, all_windows, *[none] * 4, with_cut, none)
        tracemalloc.start()
        taken = [step_windows(table, objective(), 8, 0, s, jepa=jepa) for s in range(20)]
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(np.unique(taken)) == 160
        assert with_cut.num_read == 160 * jepa and all_windows.num_read == 0
        assert peak < 50_000  # bytes; a list of a million places would take eight million


def test_only_windows_with_a_cut_take_part_where_cuts_are_needed(windows: WindowSet) -> None:
    having = set(np.flatnonzero(windows.has_cut_W).tolist())
    assert 0 < len(having) < len(windows)

    def taken(chosen: ObjectiveSettings, jepa: bool) -> set[int]:
        steps = range(2 * len(windows))
        return {i for s in steps for i in step_windows(windows, chosen, 4, 0, s, jepa=jepa)}

    future = objective(sft_labels="future")
    assert taken(objective(), True) == taken(future, True) == taken(future, False) == having
    assert taken(objective(), False) == set(range(len(windows)))
    for step in range(50):
        lengths = windows.length_W[step_windows(windows, objective(), 4, 0, step, jepa=True)]
        assert lengths.tolist() == sorted(lengths.tolist())
        for jepa in (True, False):
            made = make_step(windows, future, step, batch=4, tokens=99, seed=0, jepa=jepa)
            assert made.num_labels > 0 and (made.num_masked > 0) == jepa


@pytest.mark.parametrize("labels", ["all", "future"])
@pytest.mark.parametrize("jepa", [True, False])
def test_ranks_share_the_batches_of_a_step_and_count_all_of_it(
    windows: WindowSet, labels: str, jepa: bool
) -> None:
    chosen = objective(sft_labels=labels, cuts=2)

    def of_rank(rank: int, ranks: int, tokens: int) -> Step:
        options = {"batch": 8, "tokens": tokens, "seed": 1, "jepa": jepa}
        return make_step(windows, chosen, 5, rank=rank, ranks=ranks, **options)

    whole = of_rank(0, 1, 100_000)
    for ranks, tokens in ((1, 1000), (2, 1000), (3, 1000), (2, 1), (20, 1000)):
        steps = [of_rank(rank, ranks, tokens) for rank in range(ranks)]
        batches = [b for step in steps for b in step.micro_batches]
        trunks = {k: v for b in batches for k, v in trunks_of(b).items()}
        assert trunks == {k: v for b in whole.micro_batches for k, v in trunks_of(b).items()}
        counted = [counts_of(step) for step in (whole, step_of(5, batches), *steps)]
        assert counted == counted[:1] * len(counted)
        assert len({step.digest for step in steps}) == 1
        sizes = [len(step.micro_batches) for step in steps]
        assert max(sizes) - min(sizes) <= 1
    assert of_rank(0, 2, 1000).digest != of_rank(0, 2, 1001).digest  # unlike micro-batches


def counts_of(step: Step) -> tuple:
    """The counts of a step."""
    counts = (step.num_labels, step.num_masked, step.num_tokens, step.num_pairs)
    return *counts, step.num_by_horizon


def test_fewer_windows_with_a_cut_than_the_batch_are_each_taken_once(windows: WindowSet) -> None:
    having = np.flatnonzero(windows.has_cut_W).tolist()
    for step in range(3):
        many = step_windows(windows, objective(), 10 * len(windows), 0, step, jepa=True)
        assert sorted(many.tolist()) == having


def test_no_window_with_a_cut_is_refused_with_the_way_out(windows: WindowSet) -> None:
    none = replace(windows, with_cut_C=windows.with_cut_C[:0])
    for chosen, jepa in ((objective(), True), (objective(sft_labels="future"), False)):
        refused(
            lambda chosen=chosen, jepa=jepa: step_windows(none, chosen, 4, 0, 0, jepa=jepa),
            f"none of {len(windows)}",
            "data.bucket",
            "data.window",
            "objective.min_future",
        )
    assert len(step_windows(none, objective(), 4, 0, 0, jepa=False)) == 4


@pytest.mark.parametrize("unit", UNITS)
def test_micro_batches_order_and_neighbours_change_no_draw(windows: WindowSet, unit: str) -> None:
    chosen = objective(mask_unit=unit, cuts=3)

    def step(tokens: int, index: int = 5) -> dict:
        made = make_step(windows, chosen, index, batch=8, tokens=tokens, seed=1, jepa=True)
        assert made.num_masked == sum(b.num_masked for b in made.micro_batches) > 0
        assert made.num_tokens == sum(b.num_trunk_tokens for b in made.micro_batches)
        assert made.num_labels == sum(b.num_labels for b in made.micro_batches) > 0
        return {k: v for b in made.micro_batches for k, v in trunks_of(b).items()}

    whole = step(100_000)
    assert whole == step(1000) == step(1) == step(100_000)
    own = [windows[i] for i in step_windows(windows, chosen, 8, 1, 5, jepa=True)]
    assert whole == trunks_of(make_batch(own[::-1], chosen, 1, 5, jepa=True))
    alone = trunks_of(make_batch(own[:1], chosen, 1, 5, jepa=True))
    assert alone.items() <= whole.items()
    again = trunks_of(make_batch(own, chosen, 1, 6, jepa=True))
    assert again.keys() == whole.keys() and again != whole  # another step draws anew
    assert trunks_of(make_batch(own, chosen, 2, 5, jepa=True)) != whole  # as does another seed


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1000),
    unit=st.sampled_from(UNITS),
    ratio=st.floats(0.01, 1.0),
    cuts=st.integers(1, 6),
    horizon=st.one_of(st.none(), st.integers(1, 60)),
    header=st.integers(0, 9),
    skeleton=st.sampled_from(["visible", "hidden"]),
)
def test_masks_cuts_and_batches(
    seed: int, unit: str, ratio: float, cuts: int, horizon: int | None, header: int, skeleton: str
) -> None:
    chosen = objective(
        mask_unit=unit, mask_ratio=ratio, cuts=cuts, horizon=horizon, skeleton=skeleton
    )
    own = [timeline(s, seed, 6 + s, header) for s in range(4)]
    batch = make_batch(own, chosen, seed, 0, jepa=True)
    batch.check()
    assert batch.num_trunk_tokens == sum(map(len, own))
    trunks = trunks_of(batch)
    for window in own:
        points = cut_points(window, chosen, seed, 0)
        branches = trunks[window.ids_T.astype(np.int64).tobytes()]
        assert list(branches) == points == sorted(set(points)) and len(points) <= cuts
        ends = window.bucket_end_B[:-1].tolist()
        allowed = [
            c
            for c in ends
            if 0.25 * len(window) <= c <= 0.9 * len(window)
            and len(window) - c >= 8
            and eligible_of(window, c, future_end(window, c, chosen))
        ]
        assert set(points) <= set(allowed) and len(points) == min(cuts, len(allowed))
        for cut, (masked, ids) in branches.items():
            end = min(len(window), cut + (horizon or len(window)))
            assert len(ids) == end - cut
            eligible = eligible_of(window, cut, end)
            assert len(masked) == len(set(masked)) == max(1, round(ratio * len(eligible)))
            assert set(masked) <= set(eligible)
            unread = set(masked)
            if skeleton == "hidden":
                unread |= set(range(cut, end)) - set(eligible)
            read = [0 if p in unread else int(window.ids_T[p]) for p in range(cut, end)]
            assert ids == read  # no id of the vocabulary here is 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), ratio=st.floats(0.05, 1.0))
def test_lines_are_masked_whole_except_the_last(seed: int, ratio: float) -> None:
    window = timeline(1, seed)
    chosen = objective(mask_unit="event", mask_ratio=ratio)
    for cut in cut_points(window, chosen, seed, 0):
        masked = set(masked_tokens(window, cut, chosen, seed, 0, 0).tolist())
        partly = 0
        for a, b in zip(window.line_start_L, window.line_end_L, strict=True):
            held = masked & set(range(a, b))
            partly += 0 < len(held) < b - a
            assert held == set(range(a, a + len(held)))  # a part is the line's beginning
        assert partly <= 1


def test_spans_are_runs_of_about_their_mean_length() -> None:
    window, one = timeline(1, 0, buckets=400), objective(mask_unit="token", mask_ratio=0.2)
    cut = int(window.bucket_end_B[100])

    def runs(chosen: ObjectiveSettings) -> float:
        masked = masked_tokens(window, cut, chosen, 0, 0, 0)
        at = np.searchsorted(eligible_of(window, cut, len(window)), masked)
        return len(at) / (1 + np.sum(np.diff(at) > 1))

    spans = [runs(objective(mask_unit="span", mask_ratio=0.2, span=n)) for n in (1, 8, 10**9)]
    # a fifth of neighbouring spans touch
    assert runs(one) < 1.6 and spans[0] < 1.6 and 7 < spans[1] < 15
    assert spans[2] == len(masked_tokens(window, cut, one, 0, 0, 0))  # one span: one run


def test_cuts_are_uniform_and_masks_differ_between_cuts() -> None:
    window, chosen = timeline(1, 0), objective()
    drawn = [c for s in range(2000) for c in cut_points(window, chosen, 0, s)]
    points, counts = np.unique(drawn, return_counts=True)
    assert len(drawn) == 2000 and len(points) >= 4
    assert counts.min() > 0.75 * 2000 / len(points) and counts.max() < 1.3 * 2000 / len(points)
    cut = int(points[0])
    masks = [masked_tokens(window, cut, chosen, 0, 0, k).tolist() for k in range(2)]
    assert masks[0] != masks[1]
    # a window that comes again, cut where it was, is masked anew
    assert masked_tokens(window, cut, chosen, 0, 1, 0).tolist() != masks[0]
    later = replace(window, start=3)
    assert masked_tokens(later, cut, chosen, 0, 0, 0).tolist() != masks[0]


def test_no_cut_where_too_little_future_remains() -> None:
    window = timeline(1, 0)
    assert cut_points(window, objective(min_future=len(window)), 0, 0) == []
    only = replace(window, line_section_L=np.full_like(window.line_section_L, DEMOGRAPHICS))
    assert cut_points(only, objective(), 0, 0) == []
    batch = make_batch([only], objective(), 0, 0, jepa=True)
    batch.check()
    assert batch.num_masked == 0 and batch.num_labels == len(only) - 1


@pytest.mark.parametrize("header", [0, 1, 5])
def test_labels(header: int) -> None:
    window = timeline(1, 0, header=header)
    ids = window.ids_T.tolist()
    labels = labels_of(make_batch([window], objective(), 0, 0, jepa=False))
    assert labels == [*ids[1:], -100]
    cut = int(window.bucket_end_B[4])
    assert labels[cut - 1] == ids[cut]  # the last context token's is the first future token
    repeated = replace(window, start=2, labels_from=header)
    labels = labels_of(make_batch([repeated], objective(), 0, 0, jepa=False))
    before = max(header - 1, 0)
    assert labels == [-100] * before + [*ids[1 + before :], -100]


@pytest.mark.parametrize("jepa", [True, False])
def test_labels_of_the_future_alone(jepa: bool) -> None:
    window, chosen = timeline(1, 0), objective(sft_labels="future", cuts=3)
    first = cut_points(window, chosen, 0, 0)[0]
    batch = make_batch([window], chosen, 0, 0, jepa=jepa)
    ids = window.ids_T.tolist()
    trunk = labels_of(batch)[: len(window)]
    # the same labels whether or not the phase has JEPA: a phase of SFT alone draws its cut too
    assert trunk == [-100] * (first - 1) + [*ids[first:], -100]
    assert (batch.num_masked > 0) == jepa and set(labels_of(batch)[len(window) :]) <= {-100}


def test_without_jepa_there_are_trunks_alone(windows: WindowSet) -> None:
    made = make_step(windows, objective(), 0, batch=4, tokens=600, seed=0, jepa=False)
    for batch in made.micro_batches:
        batch.check()
        assert batch.num_masked == 0 and not any(prefix for *_, prefix in batch.segment_tuples)
    assert made.num_tokens == sum(len(b.ids_T) for b in made.micro_batches)


def test_check_finds_a_masked_identity_and_a_wrong_target() -> None:
    batch = make_batch([timeline(1, 0), timeline(2, 0)], objective(), 0, 0, jepa=True)
    shown = batch.ids_T.clone()
    shown[batch.masked_M[0]] = 5
    for broken in (
        replace(batch, ids_T=shown),
        replace(batch, replaced_R=batch.replaced_R[1:]),
        replace(batch, replaced_R=batch.labelled_N),
        replace(batch, target_M=batch.target_M + 1),
        replace(batch, labelled_N=batch.masked_M),
        replace(batch, position_T=batch.position_T.roll(1)),
    ):
        with pytest.raises(AssertionError):
            broken.check()


def test_prefetched_keeps_order_and_stays_few_ahead() -> None:
    started: list[int] = []
    gate = threading.Event()

    def make(i: int) -> int:
        started.append(i)
        if i == 3:
            gate.set()
        return i

    results: Iterator = prefetched([lambda i=i: make(i) for i in range(9)])
    assert next(results) == 0 and max(started) <= 3
    assert list(results) == list(range(1, 9)) and started == list(range(9))
    assert gate.is_set() and list(prefetched([])) == []


def test_prefetched_passes_an_error_on() -> None:
    def broken() -> None:
        raise ValueError("window 3 must be whole")

    results = prefetched([lambda: 1, broken, lambda: 3])
    assert next(results) == 1
    with pytest.raises(ValueError, match="window 3"):
        next(results)
