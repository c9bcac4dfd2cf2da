"""Prediction files: what one model says of every judged row of a task.

`predictions/<task>/<model>.parquet`, or `<model>-<s>.parquet` of each of several versions. Of
binary tasks they have meds-evaluation's schema; of time-to-event tasks columns of our choice. The
parquet metadata `smbfast` say what they are of, as JSON. Shape suffixes: J judged rows, S versions,
H horizons.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.files import committed_file
from smbfast.base.ours import require_replaceable
from smbfast.data.labels import Labels
from smbfast.judging.measures import competing_of
from smbfast.judging.scored import Scored

METADATA = b"smbfast"
FOLDER = "predictions"
_KEYS = [("subject_id", pa.int64()), ("prediction_time", pa.timestamp("us"))]
PREDICTIONS = pa.schema(
    [
        *_KEYS,
        ("boolean_value", pa.bool_()),
        ("predicted_boolean_value", pa.bool_()),
        ("predicted_boolean_probability", pa.float64()),
    ]
)
SURVIVAL = pa.schema(
    [
        *_KEYS,
        ("duration_days", pa.float64()),
        ("event", pa.bool_()),
        ("competing", pa.bool_()),
        ("log_hazard", pa.float64()),
    ]
)


def write_predictions(
    folder: Path,
    judged: Labels,
    scored: list[Scored],
    judged_on: str,
    horizons_H: tuple[float, ...] = (),
) -> None:
    """Write the files of one task below `folder`/predictions, and remove those of models that an
    earlier probe wrote there and this one has not.

    Args:
        judged, scored: of the judged rows.
        horizons_H: days, of the columns `event_probability_<h>`.
    """
    own = Path(folder) / FOLDER / judged.task
    written = set()
    for model in scored:
        for version, name in _names(model):
            about = {
                "task": judged.task,
                "kind": judged.kind,
                "model": model.name,
                "label": model.label,
                "role": model.role,
                "version": version,
                "judged_on": judged_on,
                "horizons_days": list(horizons_H) if judged.kind == "time_to_event" else None,
            }
            table = _table(judged, model, version)
            table = table.replace_schema_metadata({METADATA: json.dumps(about).encode()})
            with committed_file(own / name, private=True) as staging:
                pq.write_table(table, staging)
            written.add(name)
    for file in sorted(own.glob("*.parquet")):
        if file.name not in written and about_predictions(file):
            file.unlink()


def require_predictions(folder: Path, tasks: list[str]) -> None:
    """Raise a ValueError if a prediction file would replace one of others."""
    for task in tasks:
        for file in sorted((Path(folder) / FOLDER / task).glob("*.parquet")):
            require_replaceable(file)


def about_predictions(file: Path) -> dict[str, Any]:
    """Return what the metadata of a prediction file say, empty if it is not of ours."""
    try:
        metadata = pq.read_schema(file).metadata or {}
        about = json.loads(metadata.get(METADATA, b"{}"))
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        return {}
    return about if isinstance(about, dict) else {}


def _names(model: Scored) -> Iterator[tuple[int, str]]:
    versions = len(model.score_SN)
    for version in range(versions):
        yield version, f"{model.name}{f'-{version}' if versions > 1 else ''}.parquet"


def _table(judged: Labels, model: Scored, version: int) -> pa.Table:
    score_J = model.score_SN[version]
    keys = [pa.array(judged.subject_N), pa.array(judged.time_N).cast(pa.timestamp("us"))]
    if judged.kind == "binary":
        columns = [pa.array(judged.binary_N), pa.array(score_J >= 0.5), pa.array(score_J)]
        return pa.table([*keys, *columns], schema=PREDICTIONS)
    duration_J, event_J = judged.survival_N
    rivals_J = competing_of(judged)
    competing_J = np.zeros(len(judged), bool) if rivals_J is None else rivals_J
    columns = [pa.array(duration_J), pa.array(event_J), pa.array(competing_J), pa.array(score_J)]
    table = pa.table([*keys, *columns], schema=SURVIVAL)
    if model.chance_SNH is not None:
        for place, chance_J in enumerate(model.chance_SNH[version].T):
            table = table.append_column(f"event_probability_{place}", pa.array(chance_J))
    return table
