"""MEDS as tools write it: times in UTC, other types and names, hidden files, no splits at all.

Legend: S subjects, N events.
"""

from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.data.labels import read_labels, with_splits
from smbfast.data.meds import MOST_TIME, STATIC, MedsDataset
from smbfast.data.preparing import prepare
from smbfast.data.splits import SPLITS as NAMES
from smbfast.data.splits import divided
from smbfast.settings import DataSettings
from tests.factory import (
    CODES,
    SPLITS,
    at,
    split_rows,
    subject_rows,
    table_of,
    write_codes,
    write_flat,
    write_labels,
    write_meds,
    write_table,
)
from tests.refusal import CANARY, CANARY_SUBJECT, refused

TENTHS = (0.8, 0.1, 0.1)


def read(dataset: MedsDataset, split: str = "train") -> list[tuple]:
    """All events of a split as (subject, time, code, value, text)."""
    return [
        (int(s), int(t), b.codes[c], str(v), b.texts[x] if x >= 0 else None)
        for b in dataset.batches(split)
        for s, t, c, v, x in zip(b.subject_N, b.time_N, b.code_N, b.value_N, b.text_N, strict=True)
    ]


def recast(table: pa.Table, column: str, kind: pa.DataType) -> pa.Table:
    place = table.schema.get_field_index(column)
    return table.set_column(place, column, table[column].cast(kind, safe=False))


def rounded(table: pa.Table) -> pa.Table:
    place = table.schema.get_field_index("numeric_value")
    whole = pa.array(
        [None if v is None else float(round(v)) for v in table["numeric_value"].to_pylist()]
    )
    return table.set_column(place, "numeric_value", whole.cast(pa.float32()))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: recast(t, "time", pa.timestamp("us", tz="UTC")),
        lambda t: recast(t, "time", pa.timestamp("ms", tz="Etc/UTC")),
        lambda t: recast(t, "numeric_value", pa.int64()),
        lambda t: recast(t, "numeric_value", pa.int16()),
        lambda t: recast(t, "numeric_value", pa.decimal128(20, 3)),
        lambda t: recast(t, "numeric_value", pa.float64()),
        lambda t: t.rename_columns(["patient_id", *t.column_names[1:]]),
        lambda t: recast(t, "subject_id", pa.int32()),
    ],
)
def test_types_and_names_that_say_the_same(
    tmp_path: Path, change: Callable[[pa.Table], pa.Table]
) -> None:
    table = rounded(table_of(split_rows("train")))
    plain, other = (
        MedsDataset.open(write_meds(tmp_path / name, {"train": rows}))
        for name, rows in (("plain", table), ("other", change(table)))
    )
    assert read(plain) == read(other)
    assert plain.subjects("train").tolist() == other.subjects("train").tolist()


def test_decimals_are_the_numbers_that_they_write(tmp_path: Path) -> None:
    table = table_of(subject_rows(1)[:3])
    numbers = pa.array([None, Decimal("4.418"), Decimal("-0.001")], pa.decimal128(9, 3))
    data = write_meds(tmp_path, {"train": table.set_column(3, "numeric_value", numbers)})
    [batch] = MedsDataset.open(data).batches("train")
    assert np.array_equal(batch.value_N, np.float32([np.nan, 4.418, -0.001]), equal_nan=True)


def test_hidden_files_are_no_data(tmp_path: Path) -> None:
    data = write_meds(tmp_path)
    before = MedsDataset.open(data)
    train = data / "data" / "train"
    (train / "._0.parquet").write_bytes(b"resource fork")
    (train / ".ipynb_checkpoints").mkdir()
    (train / ".ipynb_checkpoints" / "0.parquet").write_bytes(b"a copy")
    assert MedsDataset.open(data).splits == before.splits


@pytest.mark.parametrize("tuning", ["val", "valid", "validation", "dev"])
def test_other_names_of_splits(tmp_path: Path, tuning: str) -> None:
    data = write_meds(tmp_path / "folders")
    (data / "data" / "tuning").rename(data / "data" / tuning)
    (data / "data" / "held_out").rename(data / "data" / "test")
    flat = write_flat(tmp_path / "flat")
    table = flat / "metadata" / "subject_splits.parquet"
    names = {"train": "train", "tuning": tuning, "held_out": "test"}
    rows = pq.read_table(table)
    renamed = pa.array([names[s] for s in rows["split"].to_pylist()])
    write_table(table, rows.set_column(1, "split", renamed))
    for folder in (data, flat):
        dataset = MedsDataset.open(folder)
        for split, subjects in SPLITS.items():
            assert dataset.subjects(split).tolist() == list(subjects)


def test_files_named_after_the_splits(tmp_path: Path) -> None:
    for split in SPLITS:
        write_table(tmp_path / "data" / f"{split}.parquet", split_rows(split))
    dataset = MedsDataset.open(tmp_path)
    assert dataset.subjects("held_out").tolist() == list(SPLITS["held_out"])
    # beside a file of another name they are names of files, and nothing says the splits
    write_table(tmp_path / "data" / "more.parquet", subject_rows(99))
    refused(lambda: MedsDataset.open(tmp_path), "data.split=0.8,0.1,0.1")


def test_what_is_in_no_split_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files in `data/` that no folder of a split holds, and subjects that never had an event."""
    rows = [*split_rows("train"), (70, None, "GENDER//F", None, None)]
    data = write_meds(tmp_path / "meds", {"train": rows})
    write_table(data / "data" / "external" / "0.parquet", subject_rows(98))
    write_table(data / "data" / "1.parquet", subject_rows(99))
    settings = DataSettings(path=str(data), format="codes", workers=1)
    made = prepare(settings, tmp_path / "out", None, ("train", "tuning"))
    assert "2 files are in none of the splits" in capsys.readouterr().err
    assert made.left_out().endswith(
        "subjects without an event with a date <=10; files in the folder of no split 2"
    )


def test_two_names_of_one_split(tmp_path: Path) -> None:
    data = write_meds(tmp_path)
    write_table(data / "data" / "dev" / "0.parquet", subject_rows(99))
    refused(lambda: MedsDataset.open(data), "dev and tuning", "one name")


def without_splits(folder: Path, num_subjects: int = 60) -> Path:
    for number, first in enumerate(range(1, num_subjects + 1, 20)):
        rows = [r for s in range(first, first + 20) for r in subject_rows(s, days=2)]
        write_table(folder / "data" / f"{number}.parquet", rows)
    write_codes(folder, CODES)
    return folder


def test_a_dataset_without_splits(tmp_path: Path) -> None:
    data = without_splits(tmp_path / "data")
    refused(lambda: MedsDataset.open(data), data, "subject_splits.parquet", "--data.split=0.8")
    dataset = MedsDataset.open(data, split=(0.5, 0.25, 0.25))
    subjects = {split: dataset.subjects(split).tolist() for split in NAMES}
    everyone = [s for own in subjects.values() for s in own]
    assert sorted(everyone) == list(range(1, 61)) and all(subjects.values())
    assert {event[0] for event in read(dataset, "tuning")} == set(subjects["tuning"])
    # a patient stays where he is when others come
    more = MedsDataset.open(without_splits(tmp_path / "more", 80), split=(0.5, 0.25, 0.25))
    assert set(subjects["tuning"]) == {s for s in more.subjects("tuning").tolist() if s <= 60}
    assert more.digest(("train",)) != dataset.digest(("train",))
    other = MedsDataset.open(data, split=TENTHS)
    assert other.digest(("train",)) != dataset.digest(("train",))


def test_fractions_are_in_the_record_of_shards_and_divide_labels(tmp_path: Path) -> None:
    data = without_splits(tmp_path / "data")
    settings = DataSettings(path=str(data), split=(0.5, 0.25, 0.25), workers=1)
    made = prepare(settings, tmp_path / "out", None, ("train", "tuning"))
    assert made.record["split"] == [0.5, 0.25, 0.25]
    assert "split 0.5,0.25,0.25 by a hash" in made.size_text
    dataset = MedsDataset.open(data, split=settings.split)
    assert made.record["counts"]["tuning"]["subjects"] == len(dataset.subjects("tuning"))
    task = write_labels(data, rows={"train": [(s, at(1), True) for s in (1, 2, 3)]})
    for number, file in enumerate(sorted(task.iterdir())):
        file.rename(task / f"{number}.parquet")  # names that say no split
    split_N = with_splits(read_labels(task), dataset).split_N
    for subject, split in zip((1, 2, 3), split_N, strict=True):
        assert subject in dataset.subjects(str(split))
    again = settings.model_copy(update={"split": TENTHS})
    refused(lambda: prepare(again, tmp_path / "out", None, ("train", "tuning")), "split differ")


def test_a_dataset_with_splits_is_not_divided(tmp_path: Path) -> None:
    for data in (write_meds(tmp_path / "folders"), write_flat(tmp_path / "flat")):
        refused(lambda data=data: MedsDataset.open(data, split=TENTHS), "data.split", "its own")


def test_fractions_of_a_hash() -> None:
    """Binomial: four standard deviations of a count of 100,000 subjects, and ids of any kind."""
    num = 100_000
    for subject_S in (np.arange(num), np.arange(num) * 4096, -np.arange(num) - (1 << 62)):
        share = np.bincount(divided(subject_S, TENTHS), minlength=3) / num
        for got, wanted in zip(share, TENTHS, strict=True):
            assert abs(got - wanted) < 4 * (wanted * (1 - wanted) / num) ** 0.5
    none_held_out = divided(np.arange(num), (0.9, 0.1, 0.0))
    assert set(none_held_out.tolist()) == {0, 1}


def test_folders_that_contradict_the_table(tmp_path: Path) -> None:
    data = write_meds(tmp_path)
    table = data / "metadata" / "subject_splits.parquet"
    pairs = [(s, split) for split, subjects in SPLITS.items() for s in subjects]

    def written(splits: list[str]) -> None:
        write_table(table, pa.table({"subject_id": [s for s, _ in pairs], "split": splits}))

    written([split for _, split in pairs])
    assert len(MedsDataset.open(data).subjects("train")) == 12
    written(["train" for _ in pairs])
    refused(
        lambda: MedsDataset.open(data), table, "up to 10 subjects differ", "of held_out are train"
    )
    written(["held_out" for _ in pairs])
    refused(lambda: MedsDataset.open(data), table, "16 subjects", "12 of train are held_out")
    written(["third" for _ in pairs])
    refused(lambda: MedsDataset.open(data), table, "20 subjects", "of another name")
    # subjects of whom the table says nothing do not contradict it
    write_table(table, pa.table({"subject_id": [1], "split": ["train"]}))
    MedsDataset.open(data)


def test_times_that_would_wrap(tmp_path: Path) -> None:
    rows = split_rows("train")
    subject, code = CANARY_SUBJECT, f"LAB//{CANARY}"

    def with_time(time: int) -> Path:
        table = table_of([*rows, (subject, None, code, None, None)])
        times = pa.array([*table["time"].cast(pa.int64()).to_pylist()[:-1], time], pa.int64())
        write_meds(tmp_path, {"train": table.set_column(1, "time", times.cast(pa.timestamp("us")))})
        return tmp_path

    for time in (STATIC, STATIC + 1, -MOST_TIME - 1, MOST_TIME + 1, (1 << 63) - 1):
        dataset = MedsDataset.open(with_time(time))
        refused(lambda dataset=dataset: read(dataset), f"row {len(rows)} ", "`time`")
    for time in (-MOST_TIME, MOST_TIME):
        assert read(MedsDataset.open(with_time(time)))[-1][1] == time


def test_any_folder_serves(tmp_path: Path) -> None:
    """No train split is needed: only held_out, no splits, files in the folder itself."""
    for folder in ("held_out", "site-3"):
        write_table(tmp_path / "a" / "data" / folder / "0.parquet", subject_rows(len(folder)))
    write_table(tmp_path / "b" / "0.parquet", subject_rows(5))
    write_table(tmp_path / "b" / "labels" / "task.parquet", pa.table({"x": [1]}))
    write_table(tmp_path / "c" / "data" / "deep" / "0.parquet", subject_rows(6))
    opened = {n: MedsDataset.open(tmp_path / n, need_train=False) for n in "abc"}
    subjects = {
        n: {s: d.subjects(s).tolist() for s in d.splits if len(d.subjects(s))}
        for n, d in opened.items()
    }
    assert subjects == {"a": {"held_out": [8], "": [6]}, "b": {"": [5]}, "c": {"": [6]}}
    assert {e[0] for e in read(opened["a"], "")} == {6}
    refused(lambda: MedsDataset.open(tmp_path / "a"), "`train`", "none")
    flat = write_flat(tmp_path / "flat")
    table = flat / "metadata" / "subject_splits.parquet"
    write_table(table, pa.table({"subject_id": [1, 13], "split": ["train", "other"]}))
    dataset = MedsDataset.open(flat, need_train=False)
    assert dataset.subjects("").tolist() == list(range(2, 21))
    assert dataset.without_split() == MedsDataset.open(flat).without_split() == 19


def test_a_table_in_memory_reads_as_its_file(tmp_path: Path) -> None:
    events = table_of(split_rows("train"))
    data = write_meds(tmp_path, {"train": events})
    codes = pq.read_table(data / "metadata" / "codes.parquet")
    dataset, files = MedsDataset.of_table(events, codes), MedsDataset.open(data)
    assert list(dataset.splits) == [""] and read(dataset, "") == read(files)
    assert dict(dataset.descriptions) == dict(files.descriptions)
    assert dict(MedsDataset.of_table(events).descriptions) == {}
    refused(
        lambda: MedsDataset.of_table(events.drop_columns(["time"])), "the table of events", "`time`"
    )
    torn = pa.concat_tables([events, events])
    refused(lambda: MedsDataset.of_table(torn), "the table of events", "stand together")


def test_batches_of_chosen_subjects(tmp_path: Path) -> None:
    data = write_meds(tmp_path)
    write_table(data / "data" / "train" / "1.parquet", subject_rows(77))
    dataset = MedsDataset.open(data)
    for asked, got in (([77, 3, 3, 99], {3, 77}), ([99], set()), ([], set())):
        batches = dataset.batches("train", np.array(asked, np.int64))
        assert {int(s) for batch in batches for s in batch.subject_N} == got
