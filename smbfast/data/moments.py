"""The moments at which subjects are embedded: decision nodes that no label file names.

Three forms, of a command's argument or of Python objects: `last`, a date or time, and a table of
subjects and prediction times.

Legend: N rows of a table, K nodes, S subjects.
"""

import csv
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv
from pyarrow import interchange

from smbfast.data.columns import subject_column
from smbfast.data.labels import integer_column, key_table, time_column
from smbfast.data.meds import BIRTH, STATIC, MedsDataset
from smbfast.data.nodes import SPLIT_NAMES, Nodes, sorted_nodes, split_index

LAST = "last"
Keys = tuple[np.ndarray, np.ndarray]
Moments = str | datetime | Keys  # "last", a moment for everyone, or subjects and times: int64 [N]

_NAMES = ("subject_id", "patient_id")
_TABLES = (".parquet", ".csv")


def read_moments(at: Any) -> Moments:
    """Return what `at` says, checked: its files are read, and no data are.

    Args:
        at: "last"; a date or time (`date`, `datetime`, or ISO 8601 text); a parquet or csv file
            with subject_id and prediction_time; or such a table: of pyarrow, a dict of columns, or
            a frame of another library (`as_table`). MEDS times have no time zone, and a date alone
            is its midnight, the beginning of that day.

    Raises:
        ValueError: it is none of these, a column is missing or of a wrong type or holds a null, or
            a time has a time zone other than UTC.
    """
    if isinstance(at, tuple):  # what this function returns
        return at
    if isinstance(at, date) and at != at:  # NaT of pandas, which is a datetime
        return _read_text(str(at))
    if isinstance(at, datetime):
        return _without_zone(at)
    if isinstance(at, date):
        return datetime(at.year, at.month, at.day)
    if isinstance(at, str | Path):
        return _read_text(str(at))
    if isinstance(at, np.datetime64):
        return _read_text(str(at.astype("datetime64[us]")))
    return node_keys(as_table(at, "at"), "at")


def nodes_at(dataset: MedsDataset, moments: Moments) -> Nodes:
    """Return the nodes that `moments` asks for, of subjects of `dataset` or of those that it names.

    With "last" a node is at the last event of each subject that has one with a time, births aside;
    the events are read once for it.
    """
    if isinstance(moments, tuple):
        subject_N, time_N = moments
        return sorted_nodes(subject_N, time_N, _splits(dataset, subject_N))
    if isinstance(moments, datetime):
        subjects = [dataset.subjects(split) for split in dataset.splits]
        subject_K = np.concatenate([np.empty(0, np.int64), *subjects])
        time_K = np.full(len(subject_K), np.datetime64(moments, "us").astype(np.int64))
    else:
        subject_K, time_K = _last_events(dataset)
    return sorted_nodes(subject_K, time_K, _splits(dataset, subject_K))


def as_table(data: Any, name: str) -> pa.Table:
    """Return a table of pyarrow: of a dict of columns, of pandas, or of any frame that has Arrow's
    C stream (`__arrow_c_stream__`), `to_arrow` or the dataframe interchange protocol.

    Args:
        name: what messages call it.

    Raises:
        ValueError: it is none of these or lazy, or its columns cannot be converted.
    """
    try:
        if isinstance(data, pa.Table):
            return data
        if hasattr(data, "to_arrow"):  # before the stream: in that of polars, text is in views
            return pa.table(data.to_arrow())
        if isinstance(data, dict) or hasattr(data, "__arrow_c_stream__"):
            return pa.table(data)
        if type(data).__module__.split(".")[0] == "pandas":
            return pa.Table.from_pandas(data, preserve_index=False)
        if hasattr(data, "__dataframe__"):
            return interchange.from_dataframe(data)
    except (pa.ArrowException, ValueError, TypeError, AttributeError):
        # their messages may hold a cell
        raise ValueError(
            f"`{name}` must have columns that Arrow can hold; this {type(data).__name__} has not"
        ) from None
    for collected in ("collect", "compute"):  # of polars, of Dask
        if hasattr(data, collected):
            raise ValueError(
                f"`{name}` must be a table in memory, got a lazy {type(data).__name__}: give "
                f"what its .{collected}() returns"
            )
    raise ValueError(
        f"`{name}` must be a table of pyarrow, pandas or polars, got {type(data).__name__}"
    )


def events_table(data: Any, name: str) -> pa.Table:
    """Return a table of events whose rows are in the order of MEDS, from one in any order.

    Rows that have to move are sorted by subject and time, events without a time first; events at
    one time stay as they lie. A table in order comes back as it is.

    Raises:
        ValueError: see `as_table`. Columns are not checked: one that is missing or of a wrong type
            is for the reader of events to name.
    """
    table = as_table(data, name)
    subject = subject_column(table.schema)
    if any(table.column_names.count(column) != 1 for column in (subject, "time")):
        return table
    subjects, times = table[subject], table["time"]
    if not (pa.types.is_integer(subjects.type) and pa.types.is_timestamp(times.type)):
        return table
    if subjects.null_count:
        return table
    subject_N = subjects.to_numpy()
    time_N = times.cast(pa.int64()).fill_null(STATIC).to_numpy()
    same_N = subject_N[1:] == subject_N[:-1]
    together = int((~same_N).sum()) + 1 == len(np.unique(subject_N))
    if len(table) == 0 or (together and (time_N[1:] >= time_N[:-1])[same_N].all()):
        return table
    return table.take(pa.array(np.lexsort((time_N, subject_N))))


def node_keys(table: pa.Table, name: str) -> Keys:
    """Return subject_id and prediction_time of a table of nodes, in the order of its rows.

    Args:
        name: what messages call it.

    Raises:
        ValueError: a column is missing, of a wrong type or has a null, or times have a time zone.
    """
    subject = next((n for n in _NAMES if n in table.column_names), _NAMES[0])
    for column in (subject, "prediction_time"):
        if table.column_names.count(column) != 1:
            shown = ", ".join(f"`{n}`" for n in table.column_names) or "none"
            raise ValueError(f"`{name}` must have one column `{column}`; it has {shown}")
    at = table.column_names.index("prediction_time")
    if pa.types.is_date(table.schema.types[at]):
        days = table["prediction_time"].cast(pa.timestamp("us"))
        table = table.set_column(at, "prediction_time", days)
    subject_N = integer_column(table, subject, Path(name))
    return subject_N, time_column(table, "prediction_time", Path(name))


def _read_text(at: str) -> Moments:
    if at == LAST:
        return LAST
    path = Path(at)
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _read_csv(path)
    if suffix in _TABLES or path.is_file():
        return node_keys(key_table(path, []), str(path))
    try:
        return _without_zone(datetime.fromisoformat(at))
    except ValueError:
        raise ValueError(
            f"`at` must be `last`, a date such as 2024-01-31 or 2024-01-31T12:00, without a time "
            f"zone, or a parquet or csv file with subject_id and prediction_time; got `{at}`"
        ) from None


def _without_zone(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment
    if moment.utcoffset():
        raise ValueError("`at` must have no time zone, as MEDS times have none; this one has")
    return moment.astimezone(UTC).replace(tzinfo=None)


def _read_csv(path: Path) -> Keys:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        name = next((n for n in _NAMES if n in header), _NAMES[0])
        if missing := [n for n in (name, "prediction_time") if header.count(n) != 1]:
            raise ValueError(
                f"{path} must have one column `{missing[0]}` in its first line; it has "
                f"{len(header)} columns, {header.count(missing[0]) or 'none'} of that name"
            )
        types = {name: pa.int64(), "prediction_time": pa.timestamp("us")}
        options = arrow_csv.ConvertOptions(column_types=types, include_columns=list(types))
        table = arrow_csv.read_csv(path, convert_options=options)
    except OSError as error:
        raise ValueError(f"{path} must be a csv file that can be read: {error.strerror}") from None
    except (pa.ArrowException, UnicodeDecodeError, csv.Error):
        raise ValueError(
            f"{path} must be csv with an integer `{_NAMES[0]}` and a `prediction_time` such as "
            "2024-01-31 12:00:00, without a time zone; it has something else"
        ) from None
    return node_keys(table, str(path))


def _splits(dataset: MedsDataset, subject_N: np.ndarray) -> np.ndarray:
    split_N = np.zeros(len(subject_N), np.int8)
    for split in (s for s in dataset.splits if s in SPLIT_NAMES[1:]):
        mine_N = np.isin(subject_N, dataset.subjects(split))
        split_N[mine_N] = split_index(np.array([split]))[0]
    return split_N


def _last_events(dataset: MedsDataset) -> Keys:
    """Return each subject with an event that has a time, and the time of its last one."""
    subjects, times = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for split in dataset.splits:
        for batch in dataset.batches(split, text_chars=1):  # no text is read here
            birth_N = np.array([code == BIRTH for code in batch.codes])[batch.code_N]
            # STATIC is the least time there is, so events that do not count never are the last
            time_N = np.where(birth_N, STATIC, batch.time_N)
            last_S = np.maximum.reduceat(time_N, batch.offset_S1[:-1])
            subjects.append(batch.subject_N[batch.offset_S1[:-1]][last_S != STATIC])
            times.append(last_S[last_S != STATIC])
    return np.concatenate(subjects), np.concatenate(times)
