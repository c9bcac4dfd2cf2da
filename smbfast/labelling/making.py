"""Makes MEDS label files from task definitions, in one pass over the events.

    <out>/<task>/{train,tuning,held_out}.parquet   subject_id, prediction_time and
        boolean_value                              of a binary task, or
        duration_days, event                       of time to event, with
        competing                                  where its competing events compete
    <out>/<task>/task.toml                         the definition
    <out>/tasks.json                               rows, and how many were left out for which reason

The memory used is that of one batch of events. The same data and definitions give the same rows.

Legend: Q nodes of a batch, K given nodes.
"""

import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.config import to_toml
from smbfast.base.counts import recorded
from smbfast.base.files import committed_folder, write_text
from smbfast.base.progress import Progress
from smbfast.data.labels import find_tasks, read_labels
from smbfast.data.meds import MedsDataset
from smbfast.data.splits import SPLITS
from smbfast.labelling.moments import Record, SetsOfCodes
from smbfast.labelling.outcomes import Answers, Candidates, answers, candidates, exclusions
from smbfast.settings.tasks import (
    DEATH,
    DEFINITION,
    TaskDefinition,
    TaskFile,
    TasksSettings,
    load_tasks,
)

_ROWS = 1 << 16  # of a row group, about
_KEY = [
    pa.field("subject_id", pa.int64(), nullable=False),
    pa.field("prediction_time", pa.timestamp("us"), nullable=False),
]


def make_labels(config: TasksSettings, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Write the label files of every task of a file of definitions, and print a line for each.

    Returns the entries of `tasks.json`, in which counts of 1 to 10 are `<=10`.

    Raises:
        ValueError: a definition or the dataset is of the wrong form, or a folder that would be
            written holds what this command has not made. Nothing is written then.
    """
    assert config.definitions is not None
    file = load_tasks(config.definitions)
    dataset = MedsDataset.open(config.data, split=config.split)
    tasks = file.each()
    for task in tasks:
        _require_ours(config.out / task.name)
    before = _earlier(config.out / "tasks.json")
    with ExitStack() as stack:
        written = [_Task(task, file, config, stack) for task in tasks]
        progress = Progress("smbfast.tasks", sum(_sizes(dataset).values()), "patients")
        sets = SetsOfCodes(file.sets)
        unseen = _Unseen(file)
        for split in (name for name in SPLITS if name in dataset.splits):
            for batch in dataset.batches(split, text_chars=0):
                record = Record.of(batch, sets)
                unseen.add(record)
                for one in written:
                    one.add(split, record)
                progress.add(len(record.subject_S))
        entries = [one.finished() for one in written]
    names = {entry["task"] for entry in entries}
    everything = [entry for entry in before if entry["task"] not in names] + entries
    write_text(config.out / "tasks.json", json.dumps(everything, indent=1) + "\n")
    for entry in entries:
        say(_line(entry))
    for sentence in unseen.sentences():
        say(f"warning: {sentence}")
    return entries


def given_nodes(task: TaskDefinition, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the nodes that a task takes from label files, subjects and times, sorted by both.

    Raises:
        ValueError: there are none, or they cannot be read.
    """
    assert task.nodes is not None
    [folder] = find_tasks([task.nodes], data)
    labels = read_labels(folder, values=False)
    node_K2 = np.unique(np.stack([labels.subject_N, labels.time_N], 1), axis=0)
    return node_K2[:, 0], node_K2[:, 1]


def nodes_in(
    record: Record, subject_K: np.ndarray, time_K: np.ndarray
) -> tuple[Candidates, np.ndarray]:
    """Return those of the given nodes, sorted by subject and time, whose subjects are in a batch,
    and which they are (int64 [Q], ascending).

    Each subject is searched for among the nodes: a pass over all nodes for every batch would be
    quadratic.

    Args:
        subject_K: ids.
    """
    order_S = np.argsort(record.subject_S, kind="stable")
    sorted_S = record.subject_S[order_S]
    first_S, last_S = (np.searchsorted(subject_K, sorted_S, side) for side in ("left", "right"))
    size_S = last_S - first_S
    start_Q = np.repeat(first_S - np.cumsum(size_S) + size_S, size_S)
    row_Q = start_Q + np.arange(len(start_Q))
    time_Q = time_K[row_Q]
    return Candidates(np.repeat(order_S, size_S), time_Q, time_Q), row_Q


class _Unseen:
    """Which sets of the tasks no event is in: a misspelt code makes labels that are all false."""

    def __init__(self, file: TaskFile) -> None:
        self.tasks: dict[str, list[str]] = {}
        self.without_time: set[str] = set()
        self.known: set[str] = set()  # of which an event without a time counts
        for task in file.tasks:
            # that nobody dies is no mistake of a task that is not about death
            asked = {task.outcome, task.index, task.until, task.followed_to}
            silent = {DEATH} - asked
            self.known |= {*task.need, *task.without} - asked
            for name in task.sets_named() - silent:
                self.tasks.setdefault(name, []).append(task.name)

    def add(self, record: Record) -> None:
        """Take the sets that a batch has events of."""
        for name in list(self.tasks):
            static = bool(record.moments[name].static_S.any())
            if len(record.moments[name].time_X) or (static and name in self.known):
                del self.tasks[name]
            elif static:
                self.without_time.add(name)

    def sentences(self) -> list[str]:
        """Return a sentence for each set without an event that has a time."""
        return [
            f"the set {name} of {', '.join(tasks)} has "
            + ("events without a time alone" if name in self.without_time else "no event at all")
            + " in these data."
            for name, tasks in sorted(self.tasks.items())
        ]


class _Task:
    """The files of one task while they are written, and its counts."""

    def __init__(
        self, task: TaskDefinition, file: TaskFile, config: TasksSettings, stack: ExitStack
    ) -> None:
        self.task = task
        self.given = given_nodes(task, config.data) if task.nodes is not None else None
        self.excluded: Counter[str] = Counter()
        self.counts = {split: Counter[str]() for split in SPLITS}
        folder = stack.enter_context(
            committed_folder(config.out / task.name, replace=True, private=True)
        )
        (folder / DEFINITION).write_text(to_toml(file.of(task)), encoding="utf-8")
        schema = _schema(task)
        self.held: dict[str, list[pa.Table]] = {split: [] for split in SPLITS}
        self.writers = {
            split: stack.enter_context(pq.ParquetWriter(folder / f"{split}.parquet", schema))
            for split in SPLITS
        }

    def add(self, split: str, record: Record) -> None:
        """Take the nodes of a batch."""
        given = self.given
        at = candidates(self.task, record) if given is None else nodes_in(record, *given)[0]
        reason_Q = exclusions(self.task, record, at)
        answer = answers(self.task, record, at)
        reason_Q = np.where(reason_Q == "", answer.reason_Q, reason_Q)
        reasons, number = np.unique(reason_Q[reason_Q != ""], return_counts=True)
        self.excluded.update(dict(zip(reasons.tolist(), number.tolist(), strict=True)))
        rows = np.flatnonzero(reason_Q == "")
        if not len(rows):
            return
        count = self.counts[split]
        count["rows"] += len(rows)
        count["subjects"] += len(np.unique(at.subject_Q[rows]))  # a subject is in one batch
        count["positive"] += int(answer.true_Q[rows].sum())
        count["competing"] += int(answer.competing_Q[rows].sum())
        self.held[split].append(_table(self.task, record, at.take(rows), answer, rows))
        if sum(table.num_rows for table in self.held[split]) >= _ROWS:
            self._flush(split)

    def finished(self) -> dict[str, Any]:
        """Write what is left, close the files and return the entry of `tasks.json`."""
        for split in SPLITS:
            self._flush(split)
            self.writers[split].close()
        names = ["rows", "subjects", "positive"]
        names += ["competing"] if _competes(self.task) else []
        return {
            "task": self.task.name,
            "type": self.task.kind,
            "about": self.task.about,
            "splits": {
                # each is a part of the rows, and no part tells a small rest
                split: {name: recorded(count[name], count["rows"]) for name in names}
                for split, count in self.counts.items()
            },
            "excluded": {reason: recorded(n) for reason, n in sorted(self.excluded.items())},
        }

    def _flush(self, split: str) -> None:
        if self.held[split]:
            self.writers[split].write_table(pa.concat_tables(self.held[split]))
            self.held[split] = []


def _competes(task: TaskDefinition) -> bool:
    return task.kind == "time_to_event" and task.on_competing == "competing"


def _schema(task: TaskDefinition) -> pa.Schema:
    if task.kind == "binary":
        return pa.schema([*_KEY, pa.field("boolean_value", pa.bool_(), nullable=False)])
    columns = [("duration_days", pa.float64()), ("event", pa.bool_())]
    columns += [("competing", pa.bool_())] if _competes(task) else []
    return pa.schema([*_KEY, *(pa.field(name, kind, nullable=False) for name, kind in columns)])


def _table(
    task: TaskDefinition, record: Record, at: Candidates, answer: Answers, rows: np.ndarray
) -> pa.Table:
    columns: dict[str, Any] = {
        "subject_id": record.subject_S[at.subject_Q],
        "prediction_time": pa.array(at.time_Q, pa.timestamp("us")),
    }
    if task.kind == "binary":
        columns["boolean_value"] = answer.true_Q[rows]
    else:
        columns |= {"duration_days": answer.days_Q[rows], "event": answer.true_Q[rows]}
    if _competes(task):
        columns["competing"] = answer.competing_Q[rows]
    return pa.table(columns, schema=_schema(task))


def _sizes(dataset: MedsDataset) -> dict[str, int]:
    return {split: len(dataset.subjects(split)) for split in SPLITS if split in dataset.splits}


def _require_ours(folder: Path) -> None:
    """Raise a ValueError if a folder holds label files that were not made from a definition."""
    if folder.exists() and not (folder / DEFINITION).is_file():
        raise ValueError(
            f"{folder} exists and holds no {DEFINITION}, so it was not made from a definition and "
            "is not replaced; move it or name another --out"
        )


def _earlier(file: Path) -> list[dict[str, Any]]:
    """Return the entries of an earlier tasks.json; empty if there is none."""
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        entries = None
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "task" in e for e in entries
    ):
        raise ValueError(f"{file} must be a list of tasks, or not exist; name another --out")
    return entries


def _line(entry: dict[str, Any]) -> str:
    """Return what was made of a task, in a line, and what was left out, in a second one."""
    kind = "true" if entry["type"] == "binary" else "events"
    parts = [
        f"{split} {count['rows']} rows of {count['subjects']} patients, {count['positive']} {kind}"
        for split, count in entry["splits"].items()
    ]
    left_out = ", ".join(f"{reason} {count}" for reason, count in entry["excluded"].items())
    more = f"\n  left out: {left_out}" if left_out else ""
    return f"{entry['task']}: {'; '.join(parts)}{more}"
