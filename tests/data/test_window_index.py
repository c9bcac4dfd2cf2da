"""The table of windows on disk is the one in memory, is made once, and never stands in the way."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from smbfast import prepare
from smbfast.base.claims import claimed
from smbfast.batch import Timeline
from smbfast.data import window_index
from smbfast.data.prepared import Prepared
from smbfast.data.shards import Shard, ShardWriter
from smbfast.data.timelines import Preamble
from smbfast.data.window_index import stored_windows
from smbfast.data.windows import COLUMNS, ORDERS, WindowSet
from smbfast.run import data_losses
from smbfast.settings import ObjectiveSettings
from tests.data.test_windows import plain
from tests.factory import write_meds

NAME = "windows/0/train.windows"
OBJECTIVE = ObjectiveSettings(min_future=4)
ARRAYS = (*COLUMNS, *ORDERS)


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    cohort = [plain(subject) for subject in (8, 0, 3, 1, 5, 6, 2, 7, 4)]
    return [written(tmp_path / "shards" / f"{i}", cohort[4 * i : 4 * i + 4]) for i in range(4)]


def written(path: Path, timelines: list[Timeline]) -> Shard:
    with ShardWriter(path) as writer:
        for timeline in timelines:
            writer.add(timeline)
    return Shard(path)


def stored(folders: list[Path], shards: list[Shard], stride: int | None = None) -> WindowSet:
    return stored_windows(folders, NAME, shards, 40, Preamble(7), OBJECTIVE, stride)


def assert_same_windows(got: WindowSet, expected: WindowSet) -> None:
    for name in ARRAYS:
        assert getattr(got, name).dtype == getattr(expected, name).dtype
        assert np.array_equal(getattr(got, name), getattr(expected, name)), name
    assert got.sums == expected.sums


@pytest.fixture
def expected(shards: list[Shard]) -> WindowSet:
    table = WindowSet.of(shards, 40, Preamble(7), OBJECTIVE)
    assert 0 < table.num_with_cut < len(table) > 9
    return table


@pytest.mark.parametrize("stride", [None, 20])
def test_the_table_on_disk_is_the_one_in_memory(
    shards: list[Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int | None
) -> None:
    expected = WindowSet.of(shards, 40, Preamble(7), OBJECTIVE, stride)
    monkeypatch.setattr(window_index, "_SORTED", 5)
    monkeypatch.setattr("smbfast.data.shards.BLOCK", 2)
    assert_same_windows(stored([tmp_path / "a"], shards, stride), expected)
    assert not list((tmp_path / "a").rglob("*.tmp"))


def test_it_is_made_once_and_opens_no_shard(
    shards: list[Shard], expected: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored([tmp_path / "a"], shards)
    monkeypatch.setattr(Shard, "_file", None)
    again = stored([tmp_path / "spare", tmp_path / "a"], shards)
    assert_same_windows(again, expected)
    assert not again.place_W5.flags.owndata  # a map
    assert not (tmp_path / "spare").exists()


def test_nothing_of_a_stopped_writer_is_used(
    shards: list[Shard], expected: WindowSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = window_index.window_columns

    def stopped(*args: object) -> Iterator[dict]:
        yield from list(honest(*args))[:1]
        raise KeyboardInterrupt

    monkeypatch.setattr(window_index, "window_columns", stopped)
    with pytest.raises(KeyboardInterrupt):
        stored([tmp_path / "a"], shards)
    assert [f.name for f in (tmp_path / "a").rglob("*") if f.is_file()] == []
    monkeypatch.undo()
    assert_same_windows(stored([tmp_path / "a"], shards), expected)


@pytest.mark.parametrize("damage", ["short", "flipped", "empty"])
def test_a_damaged_table_is_made_again(
    shards: list[Shard], expected: WindowSet, tmp_path: Path, damage: str
) -> None:
    stored([tmp_path], shards)
    raw = bytearray((tmp_path / NAME).read_bytes())
    raw[-70] ^= 1
    content = {"short": raw[:-64], "flipped": raw, "empty": b""}[damage]
    (tmp_path / NAME).write_bytes(content)
    assert_same_windows(stored([tmp_path], shards), expected)
    assert (tmp_path / NAME).read_bytes() != content


def test_where_a_folder_cannot_be_written_another_is(
    shards: list[Shard], expected: WindowSet, tmp_path: Path
) -> None:
    closed = [tmp_path / "a", tmp_path / "b"]
    for folder in closed:
        folder.write_text("a file, in which no folder can be made")
    assert_same_windows(stored([*closed, tmp_path / "c"], shards), expected)
    assert (tmp_path / "c" / NAME).is_file()
    assert_same_windows(stored(closed, shards), expected)  # in memory


def test_of_two_processes_at_once_one_makes_the_table(
    shards: list[Shard], expected: WindowSet, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A lock is of an open file, so one that this process holds elsewhere is as another's."""
    folder = tmp_path / "a"
    with ThreadPoolExecutor() as pool:
        with claimed(folder, NAME):
            waiting = pool.submit(stored, [folder], shards)
            while (
                "waiting for another process" not in capsys.readouterr().err and not waiting.done()
            ):
                time.sleep(0.01)
            assert not waiting.done()
            window_index._write(folder / NAME, shards, 40, Preamble(7), OBJECTIVE, None, None)
            made = (folder / NAME).stat().st_ino
        assert_same_windows(waiting.result(120), expected)
    assert (folder / NAME).stat().st_ino == made


def test_no_windows(tmp_path: Path) -> None:
    table = stored([tmp_path / "a"], [written(tmp_path / "0", [])])
    assert len(table) == table.num_with_cut == table.num_tokens == 0
    assert (tmp_path / "a" / NAME).is_file()


def test_a_window_holds_no_map(shards: list[Shard], tmp_path: Path) -> None:
    """Else windows of many shards, made for one step, would keep the files of all of them open."""
    table = stored([tmp_path / "a"], shards)
    for array in vars(table[0]).values():
        if isinstance(array, np.ndarray):
            assert array.base is None


def test_a_sample_of_many_shards_holds_no_map(shards: list[Shard]) -> None:
    """The data card looks at records of all shards, of which a system may not open that many."""
    sample = data_losses._sample(shards)
    assert [len(timeline) for timeline in sample] == [len(t) for shard in shards for t in shard]
    for array in (a for t in sample for a in vars(t).values() if isinstance(a, np.ndarray)):
        while isinstance(array, np.ndarray):
            array = array.base
        assert array is None


def test_the_command_writes_the_table_of_a_run_with_the_default_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = write_meds(tmp_path / "meds"), tmp_path / "out"
    prepare.main([f"--path={data}", f"--out={out}", "--window=128"])
    prepared = Prepared.open(out)
    in_memory = WindowSet.of(
        prepared.shards("train"), 128, prepared.preamble, ObjectiveSettings(mask_ratio=0.1)
    )
    for other in (ObjectiveSettings(min_future=3), ObjectiveSettings(horizon=9)):
        assert len(prepared.windows("tuning", 128, other)) > 0
    assert len(list(out.rglob("tuning.windows"))) == 3  # each rule of the cuts has its own
    monkeypatch.setattr(window_index, "window_columns", None)
    # what is masked does not decide where a window may be cut
    assert_same_windows(
        prepared.windows("train", 128, ObjectiveSettings(mask_ratio=0.1)), in_memory
    )
