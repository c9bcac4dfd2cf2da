"""MEDS folders that break a rule: refused with file, row and column, or read and counted."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from smbfast import prepare as entry
from smbfast.data.meds import STATIC, MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.settings import DataSettings
from tests.factory import (
    CODES,
    at,
    split_rows,
    subject_rows,
    table_of,
    write_flat,
    write_meds,
    write_table,
)
from tests.refusal import CANARY, CANARY_SUBJECT, CANARY_VALUE, nothing_half_written, refused

SECRET = (CANARY_SUBJECT, at(3), f"LAB//{CANARY}", CANARY_VALUE, CANARY)
OTHER = (CANARY_SUBJECT + 1, at(3), f"LAB//{CANARY}", CANARY_VALUE, CANARY)
SECRET_CODES = {**CODES, f"LAB//{CANARY}": CANARY}


def prepared(data: Path, out: Path, **settings: object) -> Prepared:
    options = DataSettings(path=str(data), vocab_size=500, workers=1, **settings)
    return prepare(options, out, None, ("train", "tuning"))


def prepare_refuses(data: Path, *words: object) -> str:
    """Through the library and through the command."""
    out = data.parent / "out"
    argv = [f"--path={data}", f"--out={out}", "--vocab_size=500"]
    refused(lambda: entry.main(argv), *words)
    nothing_half_written(data.parent)
    message = refused(lambda: prepared(data, out), *words)
    nothing_half_written(data.parent)
    assert not out.exists(), "a folder that can never be finished was left behind"
    return message


def events(data: Path, split: str = "train") -> list[tuple]:
    """All events of a split as (subject, time, code, value, text)."""
    return [
        (int(s), int(t), b.codes[c], float(v), b.texts[x] if x >= 0 else None)
        for b in MedsDataset.open(data).batches(split)
        for s, t, c, v, x in zip(b.subject_N, b.time_N, b.code_N, b.value_N, b.text_N, strict=True)
    ]


def secret_meds(folder: Path, **rows: object) -> Path:
    return write_meds(folder, rows, SECRET_CODES)


def test_a_missing_folder(tmp_path: Path) -> None:
    prepare_refuses(tmp_path / "nowhere", tmp_path / "nowhere", "no such folder")


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    prepare_refuses(tmp_path / "file", tmp_path / "file", "folder")


def test_a_folder_that_is_not_meds(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    prepare_refuses(tmp_path / "other", "data/train/*.parquet")
    (tmp_path / "other" / "data").mkdir()
    prepare_refuses(tmp_path / "other", tmp_path / "other" / "data", "no parquet")


@pytest.mark.parametrize("column", ["subject_id", "time", "code"])
def test_a_missing_column(tmp_path: Path, column: str) -> None:
    table = table_of([*split_rows("train"), SECRET]).drop_columns([column])
    data = secret_meds(tmp_path / "data", train=table)
    prepare_refuses(data, data / "data" / "train" / "0.parquet", f"`{column}`", "`numeric_value`")


def canaries(rows: int, kind: pa.DataType) -> pa.Array:
    if kind == pa.string():
        return pa.array([CANARY] * rows, kind)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return pa.array([CANARY_SUBJECT] * rows, kind)
    return pa.nulls(rows, kind)


@pytest.mark.parametrize(
    ("column", "kind", "expected"),
    [
        ("subject_id", pa.string(), "int64"),
        ("subject_id", pa.float64(), "int64"),
        ("subject_id", pa.uint64(), "int64"),
        ("time", pa.string(), "timestamp[us]"),
        ("time", pa.int64(), "timestamp[us]"),
        ("time", pa.date32(), "timestamp[us]"),
        ("time", pa.timestamp("us", tz="America/New_York"), "time zone"),
        ("code", pa.int64(), "string"),
        ("code", pa.list_(pa.string()), "string"),
        ("numeric_value", pa.string(), "float32"),
        ("text_value", pa.float64(), "string"),
    ],
)
def test_a_mistyped_column(tmp_path: Path, column: str, kind: pa.DataType, expected: str) -> None:
    table = table_of(split_rows("train"))
    index = table.schema.get_field_index(column)
    table = table.set_column(index, column, canaries(len(table), kind))
    data = secret_meds(tmp_path / "data", train=table)
    prepare_refuses(data, data / "data" / "train" / "0.parquet", f"`{column}`", expected)


def test_a_column_that_is_there_twice(tmp_path: Path) -> None:
    table = table_of([*split_rows("train"), SECRET])
    data = secret_meds(tmp_path / "data", train=table.append_column("code", table["code"]))
    prepare_refuses(data, data / "data" / "train" / "0.parquet", "`code`")


def test_rows_of_a_subject_out_of_order(tmp_path: Path) -> None:
    rows = split_rows("train")
    late = (CANARY_SUBJECT, at(4), *SECRET[2:])
    data = secret_meds(tmp_path / "data", train=[*rows, late, SECRET])
    prepare_refuses(data, data / "data" / "train" / "0.parquet", f"row {len(rows) + 1}", "sort")


def test_interleaved_subjects(tmp_path: Path) -> None:
    rows = [*split_rows("train"), SECRET, OTHER, SECRET]
    data = secret_meds(tmp_path / "data", train=rows)
    message = prepare_refuses(data, data / "data" / "train" / "0.parquet", "stand together")
    assert f"row {len(rows) - 1}" in message


def test_a_subject_that_goes_on_in_another_row_group_is_one_subject(tmp_path: Path) -> None:
    many, one = (write_meds(tmp_path / n, row_group_size=g) for n, g in (("a", 7), ("b", 4096)))
    assert str(events(many)) == str(events(one))
    assert MedsDataset.open(many).subjects("train").tolist() == list(range(1, 13))


@pytest.mark.parametrize("column", [0, 2])
def test_null_code_and_null_subject(tmp_path: Path, column: int) -> None:
    rows = split_rows("train")
    bad = tuple(None if i == column else v for i, v in enumerate(SECRET))
    data = secret_meds(tmp_path / "data", train=[*rows, bad])
    name = ("subject_id", "", "code")[column]
    file = data / "data" / "train" / "0.parquet"
    prepare_refuses(data, file, f"row {len(rows)}", f"`{name}`", "null")


def test_null_code_in_a_later_row_group_names_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smbfast.data.long_texts.ROWS", 16)
    rows = split_rows("train")
    rows[101] = (*rows[101][:2], None, CANARY_VALUE, CANARY)
    prepare_refuses(secret_meds(tmp_path / "data", train=rows), "row 101 ", "`code`")


def test_a_subject_in_two_splits(tmp_path: Path) -> None:
    train, tuning = [*split_rows("train"), SECRET], [*split_rows("tuning"), SECRET]
    data = secret_meds(tmp_path / "data", train=train, tuning=tuning)
    first, second = (data / "data" / s / "0.parquet" for s in ("train", "tuning"))
    prepare_refuses(data, first, second, f"row {len(tuning) - 1}", "one split")


def test_a_subject_in_two_files(tmp_path: Path) -> None:
    data = secret_meds(tmp_path / "data", train=[*split_rows("train"), SECRET])
    second = write_table(data / "data" / "train" / "1.parquet", [SECRET])
    prepare_refuses(data, data / "data" / "train" / "0.parquet", second, "row 0", "one file")


def test_no_training_subject(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "data", {"train": []})
    prepare_refuses(data, data, "`train`", "none")
    (data / "data" / "train" / "0.parquet").unlink()
    prepare_refuses(data, data, "`train`", "none")


def test_a_file_without_rows_is_no_error(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "data")
    write_table(data / "data" / "train" / "00.parquet", [])
    found = prepared(data, tmp_path / "out")
    assert sorted(len(s) for s in found.shards("train")) == [0, 12]


def test_the_flat_layout(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data")
    dataset = MedsDataset.open(data)
    assert dataset.subjects("tuning").tolist() == [13, 14, 15, 16]
    assert {e[0] for e in events(data)} == set(range(1, 13))
    assert prepared(data, tmp_path / "out").counts["subjects"] == 16


def splits_table(subjects: list, splits: list) -> pa.Table:
    return pa.table({"subject_id": pa.array(subjects, pa.int64()), "split": pa.array(splits)})


@pytest.mark.parametrize(
    ("subjects", "splits", "words"),
    [
        ([1, CANARY_SUBJECT, CANARY_SUBJECT], ["train"] * 3, ("row 2", "once")),
        ([1, None], ["train", "train"], ("row 1", "`subject_id`", "null")),
        ([1, 2], ["train", None], ("row 1", "`split`")),
    ],
)
def test_a_bad_table_of_splits(
    tmp_path: Path, subjects: list, splits: list, words: tuple[str, ...]
) -> None:
    data = write_flat(tmp_path / "data")
    file = data / "metadata" / "subject_splits.parquet"
    write_table(file, splits_table(subjects, splits))
    prepare_refuses(data, file, *words)


def test_subjects_outside_the_splits_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_flat(tmp_path / "data")
    splits = ["train"] * 4 + ["tuning"] * 3 + ["other"]
    file = data / "metadata" / "subject_splits.parquet"
    write_table(file, splits_table(list(range(1, 9)), splits))
    assert MedsDataset.open(data).without_split() == 13
    assert prepared(data, tmp_path / "out").counts["subjects"] == 7
    assert "13 subjects are in none of the splits" in capsys.readouterr().err


def test_the_flat_layout_without_its_table(tmp_path: Path) -> None:
    data = write_flat(tmp_path / "data")
    (data / "metadata" / "subject_splits.parquet").unlink()
    prepare_refuses(data, data / "metadata" / "subject_splits.parquet")


def test_nan_and_infinite_values_are_counted_and_no_value(tmp_path: Path) -> None:
    rows = [*split_rows("train")]
    rows += [(50, at(1), "LAB//glucose", v, None) for v in (np.nan, np.inf, -np.inf, None, 7.0)]
    data = write_meds(tmp_path / "data", {"train": rows})
    assert np.isnan([e[3] for e in events(data)[-5:]]).tolist() == [True] * 4 + [False]
    found = prepared(data, tmp_path / "out", format="text-paper")
    assert found.counts["nonfinite_values"] == 3
    assert "nan" not in found.encoding.tokenizer.decode(found.shards("train")[0][12].ids_T).lower()


def test_meds_0_3(tmp_path: Path) -> None:
    """No text_value, double values, further columns, subject_id as int32."""
    old = pa.schema(
        [
            ("code", pa.large_string()),
            ("subject_id", pa.int32()),
            ("time", pa.timestamp("ns")),
            ("numeric_value", pa.float64()),
        ]
    )
    rows = {}
    for split in ("train", "tuning", "held_out"):
        table = table_of(split_rows(split), old)
        rows[split] = table.append_column("hadm_id", pa.nulls(len(table), pa.int64()))
    data = write_meds(tmp_path / "data", rows, version="0.3.3")
    new = events(write_meds(tmp_path / "new"))
    assert str(events(data)) == str([(*e[:4], None) for e in new])
    assert prepared(data, tmp_path / "out").record["meds_version"] == "0.3.3"


def test_columns_without_any_value(tmp_path: Path) -> None:
    table = table_of(split_rows("train"))
    for name in ("numeric_value", "text_value"):
        at_column = table.schema.get_field_index(name)
        table = table.set_column(at_column, name, pa.nulls(len(table)))
    rows = events(write_meds(tmp_path / "data", {"train": table}))
    assert np.isnan([e[3] for e in rows]).all() and {e[4] for e in rows} == {None}


def test_null_times_after_timed_rows_come_first(tmp_path: Path) -> None:
    rows = split_rows("train")
    moved = [*subject_rows(50)[2:], *subject_rows(50)[:1], (51, at(1), "LAB//glucose", 1.0, None)]
    found = events(write_meds(tmp_path / "data", {"train": [*rows, *moved]}))[len(rows) :]
    assert found[0][:3] == (50, STATIC, "GENDER//F")
    assert [e[0] for e in found] == [r[0] for r in moved]
    assert [e[1] for e in found[1:]] == [int(r[1].astype(int)) for r in moved if r[1] is not None]


def test_years_1_and_9999_and_a_birth_without_time(tmp_path: Path) -> None:
    first, last = np.datetime64("0001-01-01", "us"), np.datetime64("9999-12-31T23:59:59", "us")
    rows = [(50, t, "LAB//glucose", 1.0, None) for t in (first, at(0), last)]
    rows.insert(0, (50, None, "MEDS_BIRTH", None, None))
    data = write_meds(tmp_path / "data", {"train": [*split_rows("train"), *rows]})
    found = prepared(data, tmp_path / "out", format="text-paper")
    text = found.encoding.tokenizer.decode(found.shards("train")[0][12].ids_T)
    assert "[0001-01-01]" in text and "[9999-12-31]" in text and "Birth" in text
    assert "290308" not in text, "the stand-in for no time was printed as a date"


def test_a_time_that_no_microsecond_holds(tmp_path: Path) -> None:
    times = pa.array([2**60] * 2, pa.timestamp("ms"))
    table = table_of([SECRET, SECRET]).set_column(1, "time", times)
    prepare_refuses(secret_meds(tmp_path / "data", train=table), "`time`", "row 0")


@pytest.mark.parametrize("code", ["", "//", "LAB//", "//x", "A//B//C//", " ", "\n", "/" * 300])
def test_odd_codes_are_lines_of_their_own(tmp_path: Path, code: str) -> None:
    rows = [*split_rows("train"), (50, at(1), code, 1.0, None), (50, at(2), "LAB//x", 2.0, None)]
    found = prepared(write_meds(tmp_path / "data", {"train": rows}, {}), tmp_path / "out")
    timeline = found.shards("train")[0][12]
    assert len(timeline.line_start_L) == 2 and len(timeline.bucket_end_B) == 2


def test_a_subject_without_timed_events_is_counted(tmp_path: Path) -> None:
    rows = [*split_rows("train"), (50, None, "GENDER//F", None, None)]
    found = prepared(write_meds(tmp_path / "data", {"train": rows}), tmp_path / "out")
    assert found.counts["subjects_without_events"] == 1 and found.counts["subjects"] == 16
