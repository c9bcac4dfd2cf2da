"""Writes a simulated cohort as a MEDS 0.4 dataset, with labels and oracles.

    data/{train,tuning,held_out}/<n>.parquet      events; sorted, a patient in one file
    metadata/{codes.parquet, dataset.json, subject_splits.parquet}
    labels/<task>/{train,tuning,held_out}.parquet MEDS labels; labels/tasks.json counts them
    labels/tte_death/...                          subject_id, prediction_time, duration_days, event
    oracles/<task>/...                            the rows of the labels, with `bayes_filter` and
                                                  `latent` (`smbfast.simulation.oracles`)

The disease is fiction (`smbfast.simulation.cohort`) and stands for no real population. The memory
used is that of one file of patients, whatever their number. The same settings give the same bytes.
"""

import json
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.files import committed_folder
from smbfast.base.progress import Progress
from smbfast.data.splits import SPLITS
from smbfast.simulation import cohort, oracles

_EVENTS = meds.DataSchema.schema()
_KEY = [
    pa.field("subject_id", pa.int64(), nullable=False),
    pa.field("prediction_time", pa.timestamp("us"), nullable=False),
]
_BINARY = pa.schema([*_KEY, pa.field("boolean_value", pa.bool_(), nullable=False)])
_DURATION = pa.schema(
    [
        *_KEY,
        pa.field("duration_days", pa.float64(), nullable=False),
        pa.field("event", pa.bool_(), nullable=False),
    ]
)
_ORACLE = pa.schema(
    [
        *_KEY,
        pa.field("bayes_filter", pa.float64(), nullable=False),
        pa.field("latent", pa.float64(), nullable=False),
    ]
)


def simulate(
    out: Path,
    patients: int,
    seed: int,
    *,
    held_out: int = 0,
    nodes: int = 1,
    patients_per_file: int = 16384,
) -> None:
    """Write the cohort described at the top of this file to `out`, whole or not at all.

    Patient i has `subject_id` i + 1 and is the same whatever `patients` and `patients_per_file`;
    its split is a draw of its own (60 / 15 / 25 %). The next `held_out` patients are all held_out,
    whatever their draw says. `nodes` changes labels, never events.

    Raises:
        ValueError: `out` exists already, or a number is out of range.
    """
    for name, value in (
        ("patients", patients),
        ("nodes", nodes),
        ("patients_per_file", patients_per_file),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, value in (("seed", seed), ("held_out", held_out)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    with committed_folder(Path(out)) as folder:
        _write(folder, patients, held_out, seed, nodes, patients_per_file)


def _write(
    folder: Path, patients: int, held_out: int, seed: int, nodes: int, patients_per_file: int
) -> None:
    everyone = patients + held_out
    blocks = -(-everyone // cohort.BLOCK)
    per_file = -(-patients_per_file // cohort.BLOCK)
    counts = {
        task: {split: {"rows": 0, "subjects": 0, "positive": 0} for split in SPLITS}
        for task in oracles.TASKS
    }
    progress = Progress("smbfast.simulate", everyone, "patients")
    with _Tables(folder) as tables:
        _open_all(tables)
        for file, first in enumerate(range(0, blocks, per_file)):
            held: dict[str, list[pa.Table]] = {}
            for number in range(first, min(first + per_file, blocks)):
                block = cohort.draw_block(seed, number)
                split_B = np.where(block.index_B < patients, block.split_B, "held_out")
                split_B[block.index_B >= everyone] = ""
                at_nodes = cohort.draw_nodes(block, seed, nodes)
                _hold_block(held, block, split_B, at_nodes, file, counts)
                progress.add(int((split_B != "").sum()))
            for name in sorted(held):
                tables.write(name, pa.concat_tables(held[name]))
            tables.close_data()
    _write_metadata(folder, patients, held_out, seed)
    about = [
        {
            "task": task,
            "type": "time_to_event" if task == "tte_death" else "binary",
            "about": f"{oracles.ABOUT[task]}; node at noon or 18:00 on the day of a visit",
            "splits": counts[task],
        }
        for task in oracles.TASKS
    ]
    (folder / "labels" / "tasks.json").write_text(json.dumps(about, indent=1) + "\n")


def _open_all(tables: "_Tables") -> None:
    """Open every label file, so that it exists even when no patient of its split has a label."""
    tables.open("metadata/subject_splits.parquet", meds.SubjectSplitSchema.schema())
    for task in oracles.TASKS:
        for split in SPLITS:
            label = _DURATION if task == "tte_death" else _BINARY
            tables.open(f"labels/{task}/{split}.parquet", label)
            tables.open(f"oracles/{task}/{split}.parquet", _ORACLE)


def _hold_block(
    held: dict[str, list[pa.Table]],
    block: cohort.Block,
    split_B: np.ndarray,
    nodes: cohort.Nodes,
    file: int,
    counts: dict[str, dict[str, dict[str, int]]],
) -> None:
    """Put the tables of one block into `held`, by the file they belong to.

    Args:
        split_B: of each patient; "" for one who is not in the cohort.
    """
    subject_B, real_B = block.index_B + 1, split_B != ""
    splits = pa.table(
        {"subject_id": subject_B[real_B], "split": split_B[real_B].astype(object)},
        schema=meds.SubjectSplitSchema.schema(),
    )
    held.setdefault("metadata/subject_splits.parquet", []).append(splits)
    rows, outcomes = cohort.rows(block), oracles.outcomes(block, nodes)
    for split in SPLITS:
        at = np.nonzero(split_B[rows.row_E] == split)[0]
        if len(at):
            held.setdefault(f"data/{split}/{file}.parquet", []).append(
                _event_table(rows, at, subject_B)
            )
        for task, outcome in outcomes.items():
            at = np.nonzero(split_B[nodes.row_N[outcome.node_M]] == split)[0]
            node_M = outcome.node_M[at]
            key = {
                "subject_id": subject_B[nodes.row_N[node_M]],
                "prediction_time": pa.array(nodes.time_N[node_M], pa.timestamp("us")),
            }
            if outcome.days_M is None:
                label = pa.table({**key, "boolean_value": outcome.label_M[at]}, schema=_BINARY)
            else:
                value = {"duration_days": outcome.days_M[at], "event": outcome.label_M[at]}
                label = pa.table({**key, **value}, schema=_DURATION)
            oracle = {"bayes_filter": outcome.bayes_M[at], "latent": outcome.latent_M[at]}
            held.setdefault(f"labels/{task}/{split}.parquet", []).append(label)
            held.setdefault(f"oracles/{task}/{split}.parquet", []).append(
                pa.table({**key, **oracle}, schema=_ORACLE)
            )
            count = counts[task][split]
            count["rows"] += len(at)
            count["subjects"] += len(np.unique(nodes.row_N[node_M]))
            count["positive"] += int(outcome.label_M[at].sum())


def _event_table(rows: cohort.Rows, at: np.ndarray, subject_B: np.ndarray) -> pa.Table:
    time_E, value_E = rows.time_E[at], rows.value_E[at]
    codes = pa.array([code for code, _ in cohort.CODES])
    return pa.table(
        {
            "subject_id": subject_B[rows.row_E[at]],
            "time": pa.array(time_E, pa.timestamp("us"), mask=time_E == np.iinfo(np.int64).min),
            "code": codes.take(pa.array(rows.code_E[at])),
            "numeric_value": pa.array(value_E, pa.float32(), mask=np.isnan(value_E)),
            "text_value": pa.nulls(len(at), pa.large_string()),
        },
        schema=_EVENTS,
    )


def _write_metadata(folder: Path, patients: int, held_out: int, seed: int) -> None:
    codes = pa.table(
        {
            "code": [code for code, _ in cohort.CODES],
            "description": [description for _, description in cohort.CODES],
            "parent_codes": pa.nulls(len(cohort.CODES), pa.list_(pa.string())),
        },
        schema=meds.CodeMetadataSchema.schema(),
    )
    pq.write_table(codes, folder / "metadata" / "codes.parquet")
    further = f" and {held_out} held out" if held_out else ""
    dataset = {
        "dataset_name": "smbfast simulated cohort",
        "dataset_version": f"seed {seed}, {patients} patients{further}",
        "etl_name": "smbfast.simulate",
        "etl_version": "1",
        "meds_version": meds.__version__,
    }
    (folder / "metadata" / "dataset.json").write_text(json.dumps(dataset, indent=1) + "\n")


class _Tables:
    """Parquet files that are being written, by their name inside the dataset."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writers: dict[str, pq.ParquetWriter] = {}

    def __enter__(self) -> "_Tables":
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.writers.values():
            writer.close()

    def open(self, name: str, schema: pa.Schema) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writers[name] = pq.ParquetWriter(path, schema)

    def write(self, name: str, table: pa.Table) -> None:
        if name not in self.writers:
            self.open(name, table.schema)
        self.writers[name].write_table(table)

    def close_data(self) -> None:
        for name in [name for name in self.writers if name.startswith("data/")]:
            self.writers.pop(name).close()
