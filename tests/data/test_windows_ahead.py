"""Windows of objectives that read ahead: pairs, lines and follow-up, against plain Python."""

from pathlib import Path

import numpy as np
import pytest

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data import window_index
from smbfast.data.code_classes import CodeClasses
from smbfast.data.horizon_counts import counted_pairs
from smbfast.data.horizons import Horizons
from smbfast.data.loader import make_step
from smbfast.data.sections import SECTIONS
from smbfast.data.shards import Shard, ShardWriter
from smbfast.data.timelines import Preamble
from smbfast.data.window_index import stored_pairs, stored_windows
from smbfast.data.windows import WindowSet
from smbfast.settings import ObjectiveSettings
from tests.tiny import step_of

HOUR = 3_600_000_000
DEATH = SECTIONS.index("death")
IDS = np.array([3, 0, 7, 4])  # of the classes; lines have 0 to 9
CLASSES = CodeClasses("dabc", IDS)
CASES = [(0, "drop"), (0, "none"), (24 * HOUR, "drop")]


def record(subject: int) -> Timeline:
    """Buckets of events of a token each, a quarter of them on the day after the one before."""
    random = np.random.default_rng(subject)
    num_B = random.integers(1, 24, random.integers(1, 12))
    day_B = np.cumsum(random.choice([1, 2, 9, 40], len(num_B)))
    time_B = day_B * 24 * HOUR
    last = int(time_B[-1]) + int(random.integers(0, 24 * HOUR))
    place = int(random.integers(0, 2 * len(num_B)))  # of the bucket with a terminal event
    terminal = min(int(time_B[place]) + 5, last) if place < len(num_B) else UNKNOWN
    ends_B, num_lines = num_B.cumsum() + 2, int(num_B.sum())
    section_L = np.full(num_lines, 3, np.uint8)
    section_L[random.random(num_lines) < 0.05] = DEATH
    return Timeline(
        subject=subject,
        ids_T=np.arange(num_lines + 2, dtype=np.int32),
        header=2,
        bucket_end_B=ends_B.astype(np.int32),
        bucket_time_B=time_B,
        bucket_head_B=np.zeros(len(num_B), np.uint16),
        line_start_L=np.arange(2, num_lines + 2, dtype=np.int32),
        line_end_L=np.arange(3, num_lines + 3, dtype=np.int32),
        line_time_L=np.repeat(time_B, num_B),
        line_section_L=section_L,
        line_code_L=random.integers(0, 10, num_lines, np.int32),
        last=last,
        terminal=terminal,
    )


def horizons_of(bucket: int, censored: str) -> Horizons:
    return Horizons(("1d", "3d", "45d"), bucket, censored)


def known(t: Timeline, p: int, span: int, horizons: Horizons) -> bool:
    """Whether what follows a bucket within a span is known."""
    at = int(t.bucket_time_B[p]) + max(horizons.bucket - 1, 0)
    if t.terminal != UNKNOWN:
        return at < t.terminal
    return horizons.censored == "none" or at + span <= t.last


def is_pair(t: Timeline, p: int, last: int, horizons: Horizons) -> bool:
    """Whether a bucket from `p + 1` to `last` begins within a known horizon of bucket `p`."""
    time = t.bucket_time_B.tolist()
    return any(
        known(t, p, span, horizons)
        and any(time[p] < time[q] <= time[p] + span for q in range(p + 1, last + 1))
        for span in horizons.spans_H.tolist()
    )


COHORT = [record(s) for s in range(40)]


@pytest.mark.parametrize("bucket, censored", CASES)
@pytest.mark.parametrize("stride", [None, 11])
def test_pairs_and_lines_are_those_of_the_record(
    bucket: int, censored: str, stride: int | None
) -> None:
    horizons, cut = horizons_of(bucket, censored), (16, Preamble(7), ObjectiveSettings(), stride)
    table = WindowSet.of([COHORT[:9], COHORT[9:]], *cut, horizons=horizons, classes=CLASSES)
    plain = WindowSet.of([COHORT[:9], COHORT[9:]], *cut)
    assert plain.num_with_pair == 0 and not plain.has_pair_W.any() and plain[0].ahead is None
    num_past = num_on = 0
    for i in range(len(table)):
        shard, place, start, end, _ = table.place_W5[i].tolist()
        t, window = COHORT[9 * shard + place], table[i]
        end_B, time_B = t.bucket_end_B.tolist(), t.bucket_time_B.tolist()
        first = next(b for b, e in enumerate(end_B) if e > start)
        last = next(b for b, e in enumerate(end_B) if e >= end)
        assert table.has_pair_W[i] == any(is_pair(t, p, last, horizons) for p in range(first, last))
        assert window.goes_on == (end_B[last] > end)
        until = time_B[last] + 45 * 24 * HOUR
        lines = zip(t.line_time_L.tolist(), t.line_code_L.tolist(), strict=True)
        own = [
            (x, IDS.tolist().index(c)) for x, c in lines if time_B[first] <= x <= until and c in IDS
        ]
        ahead = window.ahead
        assert list(zip(ahead.time_L.tolist(), ahead.class_L.tolist(), strict=True)) == own
        assert (ahead.last, ahead.terminal) == (t.last, t.terminal)
        assert (ahead.time_L.dtype, ahead.class_L.dtype) == (np.int64, np.int32)
        num_past += any(x > time_B[last] for x, _ in own)
        num_on += window.goes_on
    assert num_past and num_on and 0 < table.num_with_pair < len(table)
    with_pair = np.flatnonzero(table.has_pair_W).tolist()
    assert table.with_pair_C.tolist() == sorted(with_pair, key=lambda i: (table.length_W[i], i))


def test_without_classes_there_are_no_lines() -> None:
    made = WindowSet.of(
        [COHORT], 16, Preamble(), ObjectiveSettings(), horizons=horizons_of(0, "drop")
    )
    assert not len(made[0].ahead.time_L) and made[0].ahead.last == COHORT[0].last


@pytest.mark.parametrize(("jepa", "codes"), [(True, True), (True, False), (False, True)])
def test_a_step_counts_the_pairs_of_all_ranks(jepa: bool, codes: bool) -> None:
    form, horizons = ObjectiveSettings(jepa="horizon"), horizons_of(0, "drop")
    cut = 16, Preamble(7), form
    table = WindowSet.of([COHORT], *cut, horizons=horizons, classes=CLASSES)
    steps = [
        make_step(
            table,
            form,
            3,
            batch=12,
            tokens=40,
            seed=1,
            jepa=jepa,
            codes=codes,
            rank=rank,
            ranks=3,
        )
        for rank in range(3)
    ]
    whole = step_of(3, [b for step in steps for b in step.micro_batches])
    assert whole.num_pairs > 0 and whole.num_labels > 0 and (whole.num_masked > 0) == jepa
    for step in steps:
        for name in ("num_labels", "num_masked", "num_pairs", "num_tokens", "num_by_horizon"):
            assert getattr(step, name) == getattr(whole, name), name


def test_a_table_without_a_pair_is_refused() -> None:
    short = Horizons(("6h",))
    made = WindowSet.of([COHORT], 16, Preamble(), ObjectiveSettings(), horizons=short)
    with pytest.raises(ValueError, match=r"with the horizons 6h none of .* has one"):
        made.require_pairs()


def shards_of(folder: Path) -> list[Shard]:
    for i in range(4):
        with ShardWriter(folder / f"{i}") as writer:
            writer.add(*COHORT[10 * i : 10 * i + 10])
    return [Shard(folder / f"{i}") for i in range(4)]


@pytest.mark.parametrize("bucket, censored", CASES)
def test_the_counts_are_those_of_plain_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: int, censored: str
) -> None:
    shards, horizons = shards_of(tmp_path / "shards"), horizons_of(bucket, censored)
    whole = counted_pairs(shards, horizons)
    monkeypatch.setattr("smbfast.data.shards.BLOCK", 3)
    monkeypatch.setattr("smbfast.data.horizon_counts._BUCKETS", 5)
    assert counted_pairs(shards, horizons) == whole
    num_positions, sums = 0, np.zeros((3, 3), int)
    for t in COHORT:
        deaths = t.line_time_L[t.line_section_L == DEATH].tolist()
        for p, time in enumerate(t.bucket_time_B.tolist()):
            if t.terminal != UNKNOWN and time + max(bucket - 1, 0) >= t.terminal:
                continue
            num_positions += 1
            for h, span in enumerate(horizons.spans_H.tolist()):
                usable = known(t, p, span, horizons)
                dies = bool(deaths) and time < deaths[0] <= time + span
                sums[:, h] += usable, dies, dies and usable
    assert whole.num_positions == num_positions and sums.min() > 0
    columns = (whole.num_usable, whole.num_deaths, whole.num_deaths_usable)
    assert [list(column) for column in columns] == sums.tolist()


def test_table_and_counts_on_disk_are_made_once_and_map_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, horizons = shards_of(tmp_path / "shards"), horizons_of(0, "drop")
    cut = shards, 16, Preamble(7), ObjectiveSettings(), None
    expected, counts = WindowSet.of(*cut, horizons=horizons), counted_pairs(shards, horizons)
    monkeypatch.setattr(window_index, "_SORTED", 5)
    monkeypatch.setattr("smbfast.data.windows._BUCKETS", 5)
    folders = [tmp_path / "a"]
    for _ in range(2):
        table = stored_windows(folders, "windows/0/train.windows", *cut, horizons, CLASSES)
        assert np.array_equal(table.has_pair_W, expected.has_pair_W)
        assert np.array_equal(table.with_pair_C, expected.with_pair_C)
        assert table.horizons is horizons and table.classes is CLASSES
        assert stored_pairs(folders, "windows/0/pairs.json", shards, horizons) == counts
        # the second time neither reads a shard
        monkeypatch.setattr(Shard, "blocks", None)
    monkeypatch.undo()
    file = tmp_path / "a/windows/0/pairs.json"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(file.read_text().replace(str(counts.num_usable[0]), "0", 1))  # damaged
    assert stored_pairs(folders, "windows/0/pairs.json", shards, horizons) == counts
