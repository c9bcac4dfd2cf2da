"""Reading labels: both kinds, layouts in the wild, and what bad files get."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.data.labels import read_labels, require_splits, with_splits, without_held_out

SPLITS = ("train", "tuning", "held_out")
SECRET = 987_654_321  # a value that no error may show


def columns(subjects: list, **other: object) -> dict[str, object]:
    times = pa.array([1_000_000 * i for i in range(len(subjects))], pa.timestamp("us"))
    base = {"subject_id": pa.array(subjects, pa.int64()), "prediction_time": times}
    return base | other


def binary(subjects: list) -> dict[str, object]:
    return columns(subjects, boolean_value=pa.array([s % 2 == 0 for s in subjects], pa.bool_()))


def write(path: Path, table: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table), path)
    return path


def write_task(folder: Path) -> Path:
    for at, split in enumerate(SPLITS):
        write(folder / f"{split}.parquet", binary([10 * at + i for i in range(3)]))
    return folder


class Dataset:
    path = Path("somewhere")
    splits = SPLITS

    def subjects(self, split: str) -> np.ndarray:
        at = SPLITS.index(split)
        return np.arange(10 * at, 10 * at + 10)


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as caught:
        read_labels(path)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert str(SECRET) not in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_task_folder(tmp_path: Path) -> None:
    labels = read_labels(write_task(tmp_path / "death"))
    assert (labels.task, labels.kind) == ("death", "binary")
    assert labels.counts() == {"train": 3, "tuning": 3, "held_out": 3}
    assert labels.positives() == {"train": 2, "tuning": 2, "held_out": 2}
    assert labels.subject_N.dtype == np.int64 and labels.value_N.dtype == bool
    assert labels.time_N[:3].tolist() == [0, 1_000_000, 2_000_000]
    require_splits(labels, final=True)
    chosen_on = without_held_out(labels)
    assert chosen_on.counts() == {"train": 3, "tuning": 3, "held_out": 0}
    require_splits(chosen_on, final=False)
    with pytest.raises(ValueError, match="no row in held_out"):
        require_splits(chosen_on, final=True)


def test_time_to_event_is_known_by_its_columns(tmp_path: Path) -> None:
    table = columns([1, 2], duration_days=[0.0, 5.5], event=[True, False])
    labels = read_labels(write(tmp_path / "plain_name" / "train.parquet", table).parent)
    assert labels.kind == "time_to_event"
    assert labels.duration_N.tolist() == [0.0, 5.5] and labels.event_N.tolist() == [True, False]
    assert labels.value_N is None and labels.competing_N is None


def test_competing_events_are_read_where_a_file_says_them(tmp_path: Path) -> None:
    table = columns([1, 2], duration_days=[1.0, 5.5], event=[True, False], competing=[False, True])
    file = write(tmp_path / "t" / "train.parquet", table)
    labels = read_labels(file)
    assert labels.competing_N.tolist() == [False, True]
    assert labels.take(np.array([1])).competing_N.tolist() == [True]
    write(file, table | {"competing": [True, True]})
    refused(file, "train.parquet", "`competing`", "row 0")
    write(file, table | {"competing": [False, None]})
    refused(file, "train.parquet", "`competing`", "null")
    write(file, table)
    write(file.with_stem("tuning"), columns([3], duration_days=[1.0], event=[True]))
    refused(file.parent, "train.parquet is time_to_event with competing", "tuning.parquet is time")


def test_other_columns_and_layouts_are_accepted(tmp_path: Path) -> None:
    table = binary([1, 2]) | {"float_value": [0.5, None], "categorical_value": ["a", None]}
    old = {"patient_id" if k == "subject_id" else k: v for k, v in binary([3]).items()}
    write(tmp_path / "task" / "train" / "0.parquet", table)
    write(tmp_path / "task" / "train" / "1.parquet", old)
    write(tmp_path / "task" / "held_out" / "0.parquet", binary([20]))
    labels = read_labels(tmp_path / "task")
    assert labels.counts() == {"train": 3, "tuning": 0, "held_out": 1}
    with pytest.raises(ValueError, match="no row in tuning"):
        require_splits(labels, final=False)


def test_splits_come_from_the_dataset_where_files_have_none(tmp_path: Path) -> None:
    file = write(tmp_path / "icu.parquet", binary([1, 11, 21, 99]))
    labels = with_splits(read_labels(file), Dataset())
    assert labels.task == "icu"
    assert labels.split_N.tolist() == ["train", "tuning", "held_out", ""]


def test_a_split_that_the_dataset_contradicts_is_refused(tmp_path: Path) -> None:
    labels = read_labels(write(tmp_path / "t" / "train.parquet", binary([1, 21])).parent)
    with pytest.raises(ValueError, match="; <=10 rows stand in a file of another split"):
        with_splits(labels, Dataset())
    labels = read_labels(
        write(tmp_path / "u" / "train.parquet", binary([1, *range(10, 22)])).parent
    )
    with pytest.raises(ValueError, match="; all but <=10 rows stand in a file of another split"):
        with_splits(labels, Dataset())


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
def test_lossless_units_are_converted(tmp_path: Path, unit: str) -> None:
    table = binary([1])
    scale = {"s": 1, "ms": 10**3, "ns": 10**9}[unit]
    table["prediction_time"] = pa.array([7 * scale], pa.timestamp(unit, tz="UTC"))
    labels = read_labels(write(tmp_path / "a.parquet", table))
    assert labels.time_N.tolist() == [7_000_000]


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "no", "does not exist")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty", "parquet")


def test_unreadable(tmp_path: Path) -> None:
    file = write_task(tmp_path / "t") / "tuning.parquet"
    file.write_bytes(f"not parquet {SECRET}".encode())
    refused(tmp_path / "t", str(file))
    file.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    refused(tmp_path / "t", str(file))


@pytest.mark.parametrize("name", ["subject_id", "prediction_time", "boolean_value"])
def test_a_missing_column(tmp_path: Path, name: str) -> None:
    table = binary([SECRET])
    del table[name]
    refused(write(tmp_path / "train.parquet", table), "train.parquet", f"`{name}`")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("subject_id", pa.array([str(SECRET)])),
        ("subject_id", pa.array([2**63 + SECRET], pa.uint64())),
        ("subject_id", pa.array([None], pa.int64())),
        ("prediction_time", pa.array([SECRET])),
        ("prediction_time", pa.array([SECRET], pa.timestamp("ns"))),
        ("prediction_time", pa.array([SECRET], pa.timestamp("us", tz="Europe/Berlin"))),
        ("prediction_time", pa.array([None], pa.timestamp("us"))),
        ("boolean_value", pa.array([SECRET])),
        ("boolean_value", pa.array([None], pa.bool_())),
    ],
)
def test_a_mistyped_column_or_null(tmp_path: Path, name: str, column: pa.Array) -> None:
    table = binary([1]) | {name: column}
    reason = "row 0" if column.null_count else str(column.type)
    refused(write(tmp_path / "train.parquet", table), "train.parquet", f"`{name}`", reason)


@pytest.mark.parametrize(
    "duration", [-float(SECRET), float("nan"), float("inf")], ids=["negative", "nan", "inf"]
)
def test_a_bad_duration(tmp_path: Path, duration: float) -> None:
    table = columns([1, 2], duration_days=[1.0, duration], event=[True, False])
    refused(write(tmp_path / "train.parquet", table), "train.parquet", "duration_days", "row 1")


def test_half_a_time_to_event_task(tmp_path: Path) -> None:
    table = columns([1], duration_days=[1.0])
    refused(write(tmp_path / "train.parquet", table), "train.parquet", "`event`")


def test_a_repeated_node_names_file_and_row(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "t")
    table = binary([5, SECRET, SECRET])
    table["prediction_time"] = pa.array([1, 2, 2], pa.timestamp("us"))
    write(folder / "held_out.parquet", table)
    refused(folder, "held_out.parquet", "row 2", "<=10 rows")


def test_a_subject_in_two_splits(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.parquet", binary([1, SECRET]))
    write(tmp_path / "t" / "held_out.parquet", binary([SECRET]))
    refused(tmp_path / "t", "<=10 subjects are in several")


def test_files_of_two_kinds(tmp_path: Path) -> None:
    write(tmp_path / "t" / "train.parquet", binary([1]))
    table = columns([2], duration_days=[1.0], event=[True])
    write(tmp_path / "t" / "held_out.parquet", table)
    refused(tmp_path / "t", "train.parquet is binary", "held_out.parquet is time_to_event")
