"""Reads prediction files: what one model says of the rows of one task, with their outcomes.

Two schemas, recognised by their columns:

    binary          that of meds-evaluation: subject_id, prediction_time, boolean_value,
                    predicted_boolean_probability
    time to event   our own: subject_id, prediction_time, duration_days, event, log_hazard;
                    competing (bool) and event_probability_<h> may be there

Other columns are ignored. What wrote a file of ours is in the parquet metadata under `smbfast`;
files of others have none.

Legend: N rows, H horizons.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smbfast.base.counts import few
from smbfast.data.columns import is_utc
from smbfast.data.parquet import column_names, open_parquet

KEY = b"smbfast"  # of the metadata
_NUMBERS = (pa.types.is_floating, pa.types.is_integer)


@dataclass(frozen=True)
class Predictions:
    """What one model says of N rows, each a patient and a prediction time, in their order.

    subject_N int64; time_N int64, microseconds since 1970. true_N bool: the outcome, or whether the
    event was observed. duration_N: float64 days to the event or to censoring, None for a binary
    task. competing_N: bool, whether a competing event ended the time; None where none is known.
    score_N: float64, probability or log hazard. probability_NH: float64, that of the event by each
    of `horizons_days`; None where the file has none. about: the metadata, empty for files of
    others.
    """

    kind: Literal["binary", "time_to_event"]
    subject_N: np.ndarray
    time_N: np.ndarray
    true_N: np.ndarray
    score_N: np.ndarray
    duration_N: np.ndarray | None = None
    competing_N: np.ndarray | None = None
    probability_NH: np.ndarray | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.subject_N)

    @property
    def horizons(self) -> tuple[float, ...]:
        """The horizons that the metadata name, in days."""
        named = self.about.get("horizons_days")
        named = named if isinstance(named, list) else []
        return tuple(float(days) for days in named if isinstance(days, int | float))

    def take(self, rows: np.ndarray) -> "Predictions":
        """Return the given rows (indices or a mask)."""
        return replace(self, **{name: array[rows] for name, array in self._arrays().items()})

    def _arrays(self) -> dict[str, np.ndarray]:
        return {k: v for k, v in vars(self).items() if isinstance(v, np.ndarray)}


def together(parts: list[Predictions]) -> Predictions:
    """Return the rows of all parts below each other; what one part lacks is left out, and
    probabilities are if they are not by the same horizons."""
    names = set.intersection(*(set(part._arrays()) for part in parts))
    if any(part.horizons != parts[0].horizons for part in parts):
        names -= {"probability_NH"}
    changed: dict[str, Any] = dict.fromkeys(set(parts[0]._arrays()) - names)
    changed |= {name: np.concatenate([getattr(p, name) for p in parts]) for name in names}
    return replace(parts[0], **changed)


def about_file(file: Path) -> dict[str, Any]:
    """Return what the metadata of a prediction file say; {} for files of others.

    Raises:
        ValueError: the file is missing or is not parquet.
    """
    metadata = open_parquet(file).schema_arrow.metadata or {}
    try:
        about = json.loads(metadata.get(KEY, b"{}"))
    except (ValueError, RecursionError):
        about = {}
    return about if isinstance(about, dict) else {}


def read_predictions(file: Path) -> Predictions:
    """Read one prediction file.

    Raises:
        ValueError: it names the file for: unreadable, a column missing or of a wrong type, a null,
            a probability outside 0 to 1, a score or duration that is not finite, a row twice, no
            row.
    """
    opened = open_parquet(file)
    schema = opened.schema_arrow
    kind: Literal["binary", "time_to_event"]
    kind = "time_to_event" if "log_hazard" in schema.names else "binary"
    score = "log_hazard" if kind == "time_to_event" else "predicted_boolean_probability"
    true = "event" if kind == "time_to_event" else "boolean_value"
    wanted = {
        "subject_id": (pa.types.is_integer,),
        "prediction_time": (pa.types.is_timestamp,),
        true: (pa.types.is_boolean,),
        score: _NUMBERS,
    }
    if kind == "time_to_event":
        wanted["duration_days"] = _NUMBERS
    if "competing" in schema.names and kind == "time_to_event":
        wanted["competing"] = (pa.types.is_boolean,)
    chances = _chances(schema) if kind == "time_to_event" else []
    wanted |= dict.fromkeys(chances, _NUMBERS)
    _require_columns(file, schema, wanted)
    try:
        table = opened.read(columns=list(wanted))
    except (pa.ArrowException, OSError):
        raise ValueError(f"{file} is damaged: its pages cannot be read") from None
    columns = {name: _whole(file, name, table[name]) for name in wanted}
    duration_N = columns["duration_days"].astype(np.float64) if kind != "binary" else None
    chance = [columns[name].astype(np.float64) for name in chances]
    predictions = Predictions(
        kind=kind,
        subject_N=columns["subject_id"].astype(np.int64),
        time_N=columns["prediction_time"],
        true_N=columns[true],
        score_N=columns[score].astype(np.float64),
        duration_N=duration_N,
        competing_N=columns.get("competing"),
        probability_NH=np.stack(chance, 1) if chance else None,
        about=about_file(file),
    )
    _require_values(file, predictions, score)
    return predictions


def _chances(schema: pa.Schema) -> list[str]:
    """Return the columns of probabilities by horizon, in the order of the horizons."""
    names = [n for n in schema.names if re.fullmatch(r"event_probability_\d+", n)]
    return sorted(names, key=lambda name: int(name.rpartition("_")[2]))


def _require_columns(file: Path, schema: pa.Schema, wanted: dict[str, tuple]) -> None:
    for name, accepted in wanted.items():
        if schema.names.count(name) != 1:
            raise ValueError(
                f"{file} must have one column `{name}`, as a prediction file has; it has "
                f"{column_names(schema)}"
            )
        actual = schema.field(name).type
        if not any(accepts(actual) for accepts in accepted):
            expected = " or ".join(a.__name__.removeprefix("is_") for a in accepted)
            raise ValueError(f"{file}: column `{name}` must be {expected}, it is {actual}")
        if pa.types.is_timestamp(actual) and not is_utc(actual):
            raise ValueError(f"{file}: column `{name}` must have no time zone, it is {actual}")


def _whole(file: Path, name: str, column: pa.ChunkedArray) -> np.ndarray:
    if column.null_count:
        raise ValueError(
            f"{file}: column `{name}` must have a value in each row; {few(column.null_count)} have "
            "none"
        )
    if pa.types.is_timestamp(column.type):
        # of finer units the rest below a microsecond is cut, on both sides alike
        column = pc.cast(column, pa.timestamp("us"), safe=False).cast(pa.int64())
    return column.combine_chunks().to_numpy(zero_copy_only=False)


def _require_values(file: Path, rows: Predictions, score: str) -> None:
    if not len(rows):
        raise ValueError(f"{file} must have rows; it has none")
    wrong_N = ~np.isfinite(rows.score_N)
    if wrong_N.any():
        raise ValueError(f"{file}: `{score}` must be finite; {few(wrong_N.sum())} rows are not")
    chances = [rows.score_N] if rows.kind == "binary" else []
    chances += [rows.probability_NH] if rows.probability_NH is not None else []
    for chance in chances:
        if not ((chance >= 0) & (chance <= 1)).all():
            raise ValueError(f"{file}: a probability must be from 0 to 1; not all are")
    if rows.duration_N is not None:
        wrong_N = ~(np.isfinite(rows.duration_N) & (rows.duration_N >= 0))
        if wrong_N.any():
            raise ValueError(
                f"{file}: `duration_days` must be finite and not negative; {few(wrong_N.sum())} "
                "rows are not"
            )
    num_repeats = repeats(rows)
    if num_repeats:
        raise ValueError(
            f"{file} must hold each patient and prediction time once; {few(num_repeats)} rows "
            "repeat another"
        )


def repeats(rows: Predictions) -> int:
    """Return how many rows have the patient and time of an earlier one."""
    order_N = np.lexsort((rows.time_N, rows.subject_N))
    subject_N, time_N = rows.subject_N[order_N], rows.time_N[order_N]
    return int(np.sum((subject_N[1:] == subject_N[:-1]) & (time_N[1:] == time_N[:-1])))
