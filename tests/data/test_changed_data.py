"""Data that change between two looks at them: never shards of one state with the digest of another.

Times of change are set back wherever they can be, as archives and copies do.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from smbfast.base import workers
from smbfast.base.ours import prepared_entries
from smbfast.data import fitting, preparing, window_index
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.data.shards import ShardWriter
from smbfast.data.source_index import FOLDER
from smbfast.run.folder import data_of, read_tasks
from smbfast.settings import DataSettings, ObjectiveSettings, load
from tests.factory import at, split_rows, write_labels, write_meds, write_table
from tests.refusal import refused


def made(data: Path, out: Path, **options: Any) -> Prepared:
    settings = DataSettings(path=str(data), format="codes", **{"workers": 1, **options})
    return prepare(settings, out, None, ("train", "tuning"))


def exchange(file: Path) -> None:
    """Change every number of a file, at the same size and date."""
    table, before = pq.read_table(file), file.stat()
    place = table.schema.get_field_index("numeric_value")
    number = pc.add(table["numeric_value"], pa.scalar(1, pa.float32()))
    pq.write_table(table.set_column(place, table.schema.field(place), number), file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def then(call: Callable, act: Callable[[], None]) -> Callable:
    """A function that acts after it was called, once."""
    todo = [act]

    def wrapped(*args: Any, **more: Any) -> Any:
        result = call(*args, **more)
        while todo:
            todo.pop()()
        return result

    return wrapped


@pytest.mark.parametrize("when", ["fitted", "reading", "by workers"])
def test_a_file_that_is_replaced_while_shards_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Workers open the dataset by themselves, so they would index what is there by then."""
    data, out = write_meds(tmp_path / "meds"), tmp_path / "out"
    file = data / "data" / "tuning" / "0.parquet"
    place, name = {
        "fitted": (preparing, "fit_encoding"),
        "reading": (MedsDataset, "file_batches"),
        "by workers": (workers, "worker_pool"),
    }[when]
    if when == "by workers":
        monkeypatch.setattr(fitting, "PARALLEL_ROWS", 0)
        monkeypatch.setattr(workers, "worker_pool", ThreadPoolExecutor)
    monkeypatch.setattr(place, name, then(getattr(place, name), lambda: exchange(file)))
    refused(lambda: made(data, out, workers=2), file, "must not change while it is read")
    assert not out.exists()


def test_nothing_is_removed_while_a_worker_may_still_make_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that appears behind the removal would be taken for one of the mended data."""
    rows = split_rows("tuning")
    bad = [*rows, (rows[-1][0], at(1, 0), "LAB", None, None)]
    data = write_meds(tmp_path / "meds", {"tuning": bad})
    order: list[str] = []

    class Pool(ThreadPoolExecutor):
        def __exit__(self, *error: Any) -> bool | None:
            order.append("workers end")
            return super().__exit__(*error)

    def remove(*_: Any) -> None:
        order.append("removed")

    monkeypatch.setattr(fitting, "PARALLEL_ROWS", 0)
    monkeypatch.setattr(workers, "worker_pool", Pool)
    monkeypatch.setattr(preparing, "_remove_prepared", remove)
    refused(lambda: made(data, tmp_path / "out", workers=2), "lies before the row above it")
    assert order == ["workers end", "removed"]


def test_a_file_that_is_replaced_while_a_vocabulary_is_fitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_meds(tmp_path / "meds")
    write_table(data / "data" / "train" / "1.parquet", [(500, at(1, 1), "A", 1.0, None)])
    file = data / "data" / "train" / "0.parquet"
    monkeypatch.setattr(fitting, "PARALLEL_ROWS", 0)
    pool = then(ThreadPoolExecutor, lambda: exchange(file))
    monkeypatch.setattr(workers, "worker_pool", pool)
    refused(lambda: made(data, tmp_path / "out", workers=2), file, "must not change")


def test_data_that_are_mended_are_prepared_where_labels_were_read_before(tmp_path: Path) -> None:
    """Reading labels writes the index of the data beside the shards that are still to be made."""
    rows = split_rows("tuning")
    bad = [*rows, (rows[-1][0], at(1, 0), "LAB", None, None)]
    data, out = write_meds(tmp_path / "meds", {"tuning": bad}), tmp_path / "out"
    MedsDataset.open(data, index=out / FOLDER)
    refused(lambda: made(data, out), "lies before the row above it")
    assert [entry.name for entry in prepared_entries(out)] == [FOLDER]
    write_table(data / "data" / "tuning" / "0.parquet", rows)
    assert made(data, out).counts["subjects"]


def test_a_copy_of_a_shard_with_the_date_of_another_is_refused(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "meds")
    one = made(data, tmp_path / "one")
    shard, before = one.shards("train")[0], (one.folder / "train" / "0.shard").stat()
    with ShardWriter(tmp_path / "other.shard") as writer:
        writer.index |= shard.index | {"timelines": 0}
        for timeline in shard:
            writer.add(replace(timeline, ids_T=timeline.ids_T + 1))
        writer.add_codes(shard.codes())
        writer.add_subjects(shard.subjects_of_codes())
    os.replace(tmp_path / "other.shard", shard.path)
    os.utime(shard.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shard.path.stat().st_size == before.st_size
    opened = Prepared.open(one.folder)  # size and date are those that were verified
    with pytest.raises(ValueError, match="it is another file"):
        opened.shards("train")[0][0]


def test_a_table_of_windows_that_another_has_just_written_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To replace it would end the other's start, which has read its header but not mapped it."""
    prepared = made(write_meds(tmp_path / "meds"), tmp_path / "out")
    objective = ObjectiveSettings(min_future=4)
    in_turn, files = window_index.in_turn, []

    def after_another(folder: Path, *named: str) -> Any:
        monkeypatch.setattr(window_index, "in_turn", in_turn)
        prepared.windows("train", 256, objective)
        files.extend((table, table.stat().st_ino) for table in folder.rglob("*.windows"))
        return in_turn(folder, *named)

    monkeypatch.setattr(window_index, "in_turn", after_another)
    prepared.windows("train", 256, objective)
    ((table, number),) = files
    assert table.stat().st_ino == number


def test_reading_labels_leaves_a_folder_of_others_as_it_is(tmp_path: Path) -> None:
    data, mine = write_meds(tmp_path / "meds"), tmp_path / "mine"
    write_labels(data)
    mine.mkdir()
    (mine / "notes.txt").write_text("not ours")
    paths = {"data.path": data, "data.prepared": mine, "run.dir": tmp_path / "run"}
    words = [f"--{key}={path}" for key, path in paths.items()]
    settings = load("tiny", [*words, "--probe.labels=task"])
    refused(lambda: read_tasks(settings, data_of(settings, settings.folder)), "notes.txt")
    assert [entry.name for entry in mine.iterdir()] == ["notes.txt"]
