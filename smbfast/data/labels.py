"""Reads the labels of one task from parquet, and checks them before anything uses them.

There are two kinds of task, recognised by their columns and never by their name:

    binary          subject_id, prediction_time, boolean_value           (MEDS `LabelSchema`)
    time to event   subject_id, prediction_time, duration_days, event    (our choice; MEDS has none)
                    and, if there are competing events, competing

Other columns are ignored. `patient_id` (MEDS before 0.3.3) stands for a missing `subject_id`.
Shape suffixes: N label rows, S subjects. Row numbers in errors count from 0, within the file named.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smbfast.base.counts import few, of_whole
from smbfast.data.columns import is_utc, subject_column
from smbfast.data.meds import MedsDataset
from smbfast.data.parquet import column_names, open_parquet
from smbfast.data.splits import SPLITS


@dataclass(frozen=True)
class Labels:
    """The label rows of one task, in the order of its files.

    subject_N int64; time_N int64, microseconds since 1970; split_N str, one of `SPLITS` or "" where
    the files do not say (see `with_splits`). Binary: value_N bool. Time to event: duration_N
    float64 days from the prediction time to the event or to censoring, event_N bool (False =
    censored). The arrays of the other kind are None, and all are where only times were read.
    competing_N bool, where the files say it (column `competing`), else None: rows whose duration
    ends with an event after which the one that is predicted cannot happen; never with event_N.
    """

    task: str
    kind: Literal["binary", "time_to_event", "times"]
    subject_N: np.ndarray
    time_N: np.ndarray
    split_N: np.ndarray
    value_N: np.ndarray | None = None
    duration_N: np.ndarray | None = None
    event_N: np.ndarray | None = None
    competing_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.subject_N)

    def counts(self) -> dict[str, int]:
        """Return the number of rows per split."""
        return {split: int(np.sum(self.split_N == split)) for split in SPLITS}

    @property
    def binary_N(self) -> np.ndarray:
        """The values of binary labels, bool [N]."""
        assert self.value_N is not None
        return self.value_N

    @property
    def survival_N(self) -> tuple[np.ndarray, np.ndarray]:
        """Durations (float64 [N], days) and events (bool [N]) of time-to-event labels."""
        assert self.duration_N is not None and self.event_N is not None
        return self.duration_N, self.event_N

    def positives(self) -> dict[str, int]:
        """Return the number of true labels or observed events (time to event) per split."""
        true_N = self.binary_N if self.kind == "binary" else self.survival_N[1]
        return {split: int(np.sum(true_N[self.split_N == split])) for split in SPLITS}

    def take(self, rows: np.ndarray) -> "Labels":
        """Return the given rows (indices or a mask) as labels of their own."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_N")}
        return replace(self, **{k: v[rows] for k, v in arrays.items() if v is not None})


def find_tasks(names: list[str], data: Path) -> list[Path]:
    """Return the folders of tasks, which are given by path or by name under `<data>/labels`; of all
    tasks there if none is given.

    Raises:
        ValueError: a task is neither, or none is given and none is there.
    """
    folder = data / "labels"
    known = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not (names or known):
        raise ValueError(f"labels must name task folders; none given and none under {folder}")
    paths = []
    for name in names or known:
        if known and Path(name).resolve() == folder.resolve():
            raise ValueError(
                f"labels {name} must be one task, and it is the folder of all tasks "
                f"({', '.join(known)}); an empty list of labels takes them all"
            )
        options = [Path(name), data / "labels" / name]
        path = next((p for p in options if p.exists()), None)
        if path is None:
            folder = data / "labels"
            known = (
                sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
            )
            raise ValueError(
                f"labels `{name}` must be a folder or a task of {folder} "
                f"({', '.join(known) or 'which has none'})"
            )
        paths.append(path)
    tasks = [_task_of(path) for path in paths]
    if twice := next((task for task in tasks if tasks.count(task) > 1), None):
        raise ValueError(f"labels must name each task once; `{twice}` is there twice")
    return paths


def read_labels(path: Path, *, values: bool = True) -> Labels:
    """Read a task: a folder with `{train,tuning,held_out}.parquet`, or with such folders, or any
    parquet files whose splits the dataset knows (`with_splits`); or one parquet file.

    Raises ValueError, naming file and row but no value, for: nothing there, an unreadable file, a
    missing or mistyped column, a null, a negative or non-finite duration, a subject and time given
    twice, a subject in two splits, files of two kinds.

    Args:
        values: whether to read outcomes. Without them a file needs none, and a row may repeat.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"labels must be a task folder or a parquet file; {path} does not exist")
    files = [path] if path.is_file() else _parquet_files(path)
    if not files:
        raise ValueError(f"label folder {path} must hold parquet files (train.parquet, ...); none")
    tables = [_read_label_file(file, values) for file in files]
    kinds = [_kind_of(*table) for table in tables]
    if len(set(kinds)) > 1:
        other = kinds.index(next(kind for kind in kinds if kind != kinds[0]))
        raise ValueError(
            f"the files of a task must have the same columns: {files[0]} is {kinds[0]}, "
            f"{files[other]} is {kinds[other]}"
        )
    arrays = {
        name: np.concatenate([columns[name] for _, columns in tables]) for name in tables[0][1]
    }
    file_split = [_split_of(path, file) for file in files]
    sizes = [len(columns["subject_N"]) for _, columns in tables]
    labels = Labels(
        task=_task_of(path),
        kind=tables[0][0],
        split_N=np.repeat(np.array(file_split, dtype="<U16"), sizes),
        **arrays,
    )
    if values:
        _refuse_repeats(labels, files, sizes)
    _refuse_two_splits(labels, path)
    return labels


def with_splits(labels: Labels, dataset: MedsDataset) -> Labels:
    """Fill the splits that the label files leave open from those of the dataset.

    Rows of subjects the dataset does not know keep what they have. Raises ValueError where label
    files and dataset disagree: splits are by subject and never made anew.
    """
    dataset_N = np.full(len(labels), "", dtype="<U16")
    for split in (name for name in SPLITS if name in dataset.splits):
        dataset_N[np.isin(labels.subject_N, dataset.subjects(split))] = split
    wrong_N = (dataset_N != "") & (labels.split_N != "") & (labels.split_N != dataset_N)
    if wrong_N.any():
        raise ValueError(
            f"labels of {labels.task} must follow the splits of {dataset.path}; "
            f"{of_whole(int(wrong_N.sum()), len(labels))} rows stand in a file of another split"
        )
    return replace(labels, split_N=np.where(labels.split_N == "", dataset_N, labels.split_N))


def with_competing(labels: Labels, other: Labels) -> Labels:
    """Return time-to-event labels in which the event of another task, at the same nodes, competes.

    A row ends with the competing event if that comes no later than its censoring. Raises
    ValueError where the other task lacks rows, or has its event before that of a row: then it does
    not compete.
    """
    for one in (labels, other):
        if one.kind != "time_to_event":
            raise ValueError(f"{one.task} must be of time to event to compete, is {one.kind}")
    at_N = _places(labels, other)
    if (at_N < 0).any():
        raise ValueError(
            f"labels of {other.task} must have every row of {labels.task}, with whose event they "
            f"compete; {of_whole(int((at_N < 0).sum()), len(labels))} are missing"
        )
    duration_N, event_N = labels.survival_N
    other_duration, other_event = other.survival_N
    ends_N, happens_N = other_duration[at_N], other_event[at_N]
    before_N = event_N & happens_N & (ends_N < duration_N)
    if before_N.any():
        raise ValueError(
            f"an event of {other.task} must end the rows of {labels.task} to compete; "
            f"{of_whole(int(before_N.sum()), len(labels))} rows have their own event after it"
        )
    competing_N = happens_N & ~event_N & (ends_N <= duration_N)
    duration_N = np.where(competing_N, ends_N, duration_N)
    return replace(labels, duration_N=duration_N, competing_N=competing_N)


def _places(labels: Labels, other: Labels) -> np.ndarray:
    """Return the row of `other` at the node of each label row, int64 [N]; -1 where there is none.
    Both name a node once."""
    subject_M = np.concatenate([other.subject_N, labels.subject_N])
    time_M = np.concatenate([other.time_N, labels.time_N])
    # a stable sort puts the row of `other` right before that of the labels
    order_M = np.lexsort((time_M, subject_M))
    subject_M, time_M = subject_M[order_M], time_M[order_M]
    same_M = (subject_M[1:] == subject_M[:-1]) & (time_M[1:] == time_M[:-1])
    at_N = np.full(len(labels), -1, np.int64)
    at_N[order_M[1:][same_M] - len(other)] = order_M[:-1][same_M]
    return at_N


def splits_read(final: bool) -> tuple[str, ...]:
    """Return the splits that probes read: held_out only where they are judged on it."""
    return SPLITS if final else tuple(split for split in SPLITS if split != "held_out")


def require_splits(labels: Labels, final: bool) -> None:
    """Raise a ValueError unless train and tuning have a row each; held_out too if it is judged."""
    wanted = splits_read(final)
    empty = [split for split in wanted if not labels.counts()[split]]
    if empty:
        raise ValueError(
            f"labels of {labels.task} must have rows in {' and '.join(wanted)}; "
            f"no row in {', '.join(empty)}"
        )


def without_held_out(labels: Labels) -> Labels:
    """Return all rows but those of held_out, as if there were none."""
    return labels.take(labels.split_N != "held_out")


def read_nodes(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return subjects (int64 [N]) and prediction times (int64 [N], microseconds since 1970) of a
    parquet file, whatever else it holds. Raises as `read_labels` does."""
    table = key_table(file, [])
    subject_N = integer_column(table, "subject_id", file)
    return subject_N, time_column(table, "prediction_time", file)


def key_table(file: Path, columns: list[str]) -> pa.Table:
    """Read `subject_id`, `prediction_time` and further `columns` of a parquet file, in this order.

    Raises ValueError for an unreadable file and for a column that is missing or there twice.
    """
    parquet = open_parquet(file)
    names = parquet.schema_arrow.names
    wanted = [subject_column(parquet.schema_arrow), "prediction_time", *columns]
    for name in wanted:
        if names.count(name) != 1:
            problem = "have a column" if name not in names else "have only one column"
            shown = column_names(parquet.schema_arrow)
            raise ValueError(f"{file} must {problem} `{name}`; it has {shown}")
    try:
        table = parquet.read(columns=wanted)
    except (pa.ArrowException, OSError):
        raise ValueError(f"{file} is damaged: its pages cannot be read") from None
    # parquet gives columns in file order, whatever was asked
    return table.select(wanted).rename_columns(["subject_id", *wanted[1:]])


def integer_column(table: pa.Table, name: str, file: Path) -> np.ndarray:
    """Return an integer column without nulls as int64 [N]."""
    column = _without_null(table, name, file)
    if not pa.types.is_integer(column.type):
        raise ValueError(f"column `{name}` of {file} must be int64, is {column.type}")
    return _cast(column, pa.int64(), name, file).to_numpy()


def time_column(table: pa.Table, name: str, file: Path) -> np.ndarray:
    """Return a timestamp column without nulls as int64 [N], microseconds since 1970.

    Other units are converted where nothing is lost. UTC is taken as it stands; another time zone is
    refused, since MEDS times have none and the shift cannot be known.
    """
    column = _without_null(table, name, file)
    if not pa.types.is_timestamp(column.type):
        raise ValueError(f"column `{name}` of {file} must be timestamp[us], is {column.type}")
    if not is_utc(column.type):
        raise ValueError(
            f"column `{name}` of {file} must be timestamp[us] without time zone, is {column.type}"
        )
    column = _cast(column, pa.timestamp("us"), name, file)
    return column.cast(pa.int64()).to_numpy()


def _read_label_file(
    file: Path, values: bool
) -> tuple[Literal["binary", "time_to_event", "times"], dict[str, np.ndarray]]:
    if not values:
        return "times", dict(zip(("subject_N", "time_N"), read_nodes(file), strict=True))
    names = open_parquet(file).schema_arrow.names
    survival = "duration_days" in names or ("event" in names and "boolean_value" not in names)
    columns = ["duration_days", "event"] if survival else ["boolean_value"]
    if survival and "competing" in names:
        columns.append("competing")
    table = key_table(file, columns)
    arrays = {
        "subject_N": integer_column(table, "subject_id", file),
        "time_N": time_column(table, "prediction_time", file),
    }
    if not survival:
        return "binary", arrays | {"value_N": _bool_column(table, "boolean_value", file)}
    duration = _without_null(table, "duration_days", file)
    if not (pa.types.is_floating(duration.type) or pa.types.is_integer(duration.type)):
        raise ValueError(f"column `duration_days` of {file} must be double, is {duration.type}")
    duration_N = _cast(duration, pa.float64(), "duration_days", file).to_numpy()
    bad_N = ~np.isfinite(duration_N) | (duration_N < 0)
    if bad_N.any():
        raise ValueError(
            f"column `duration_days` of {file} must be finite and not negative; "
            f"row {int(np.argmax(bad_N))} is not ({few(int(bad_N.sum()))} rows in all)"
        )
    arrays |= {"duration_N": duration_N, "event_N": _bool_column(table, "event", file)}
    if "competing" in names:
        arrays["competing_N"] = _competing(table, arrays["event_N"], file)
    return "time_to_event", arrays


def _kind_of(kind: str, columns: dict[str, np.ndarray]) -> str:
    return f"{kind} with competing events" if "competing_N" in columns else kind


def _competing(table: pa.Table, event_N: np.ndarray, file: Path) -> np.ndarray:
    competing_N = _bool_column(table, "competing", file)
    both_N = competing_N & event_N
    if both_N.any():
        raise ValueError(
            f"column `competing` of {file} must be false where `event` is true; row "
            f"{int(np.argmax(both_N))} has both ({few(int(both_N.sum()))} rows in all)"
        )
    return competing_N


def _bool_column(table: pa.Table, name: str, file: Path) -> np.ndarray:
    column = _without_null(table, name, file)
    if not pa.types.is_boolean(column.type):
        raise ValueError(f"column `{name}` of {file} must be bool, is {column.type}")
    return column.to_numpy().astype(bool)


def _without_null(table: pa.Table, name: str, file: Path) -> pa.ChunkedArray:
    column = table.column(name)
    if column.null_count:
        row = pc.index(pc.is_null(column), True).as_py()
        raise ValueError(
            f"column `{name}` of {file} must have no nulls; row {row} is null "
            f"({few(column.null_count)} in all)"
        )
    return column


def _cast(column: pa.ChunkedArray, to: pa.DataType, name: str, file: Path) -> pa.ChunkedArray:
    try:
        return column.cast(to)
    except pa.ArrowException:
        raise ValueError(
            f"column `{name}` of {file} must fit {to}; {column.type} does not without loss"
        ) from None


def _parquet_files(folder: Path) -> list[Path]:
    paths = [p for p in folder.rglob("*.parquet") if p.is_file() and p.name[0] not in "._"]
    place = {split: at for at, split in enumerate(SPLITS)}
    return sorted(paths, key=lambda p: (place.get(_split_of(folder, p), len(SPLITS)), str(p)))


def _task_of(path: Path) -> str:
    path = path.resolve()
    inside = path.is_file() and path.stem in SPLITS
    return path.parent.name if inside else path.stem if path.is_file() else path.name


def _split_of(root: Path, file: Path) -> str:
    parts = [file.stem] if root == file else [*file.relative_to(root).parts[:-1], file.stem]
    return next((part for part in parts if part in SPLITS), "")


def _refuse_repeats(labels: Labels, files: list[Path], sizes: list[int]) -> None:
    # a stable sort keeps equal keys in file order, so the later of two rows is the one named
    order_N = np.lexsort((labels.time_N, labels.subject_N))
    subject_N, time_N = labels.subject_N[order_N], labels.time_N[order_N]
    again_N = (subject_N[1:] == subject_N[:-1]) & (time_N[1:] == time_N[:-1])
    if not again_N.any():
        return
    row = int(order_N[1:][again_N].min())
    starts = np.concatenate([[0], np.cumsum(sizes)])
    at = int(np.searchsorted(starts, row, side="right")) - 1
    raise ValueError(
        f"a subject and prediction time must be labelled once; row {row - int(starts[at])} of "
        f"{files[at]} repeats an earlier one ({few(int(again_N.sum()))} rows in all)"
    )


def _refuse_two_splits(labels: Labels, path: Path) -> None:
    in_split = [np.unique(labels.subject_N[labels.split_N == split]) for split in SPLITS]
    _, num_splits = np.unique(np.concatenate(in_split), return_counts=True)
    doubled = int((num_splits > 1).sum())
    if doubled:
        raise ValueError(
            f"a subject must be in one split; in {path}, {few(doubled)} subjects are in several"
        )
