"""Reads what a run folder holds: its records by phase.

A run that was killed leaves half a line, one without JEPA leaves nulls, and a resumed one may write
steps twice. All of that is read and counted; only a folder without any record is an error.

Legend: N records of one phase, in order of the step.
"""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One stretch of training under the same settings: optimizer steps `start` < step <= `end`."""

    name: str
    start: int
    end: int
    steps: list[Record]
    evals: list[Record]


@dataclass(frozen=True)
class Run:
    """The readable content of a run folder; what is missing is empty or None."""

    path: Path
    header: Record
    phases: list[Phase]
    end: Record | None
    status: Record
    probe: Record | None
    sample: Record | None
    config: str | None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """A judgement in plain words."""

    level: Literal["good", "warn", "bad", "unknown"]
    text: str


def number(value: object) -> float:
    """Return `value` as a float; nan for null, text and truth values."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def column(records: list[Record], key: str) -> np.ndarray:
    """Return `key` of every record, float64 [N]; nan where it is missing or null."""
    return np.array([number(record.get(key)) for record in records], dtype=np.float64)


def read_run(path: Path) -> Run:
    """Read the run folder `path`.

    Raises:
        ValueError: it is not the folder of a run.
    """
    metrics = path / "metrics.jsonl"
    if not path.is_dir():
        raise ValueError(f"run must be the folder of a training run, got {path}: no such folder")
    if not metrics.is_file():
        raise ValueError(
            f"run must be a folder with metrics.jsonl (written by smbfast.train), "
            f"got {path}: no metrics.jsonl in it"
        )
    notes: list[str] = []
    records = _read_records(metrics, notes)
    if not records:
        raise ValueError(f"{metrics} must hold one JSON object a line, got no readable line")
    headers = [record for record in records if record.get("kind") == "header"]
    ends = [record for record in records if record.get("kind") == "end"]
    config = path / "config.toml"
    return Run(
        path=path,
        header=headers[-1] if headers else {},
        phases=_phases(records),
        end=ends[-1] if ends else None,
        status=_read_json(path / "status.json", notes) or {},
        probe=_read_json(path / "probe.json", notes),
        sample=_read_json(path / "sample.json", notes),
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        notes=notes,
    )


def _read_records(path: Path, notes: list[str]) -> list[Record]:
    records, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            broken += 1
    if broken:
        lines = "1 line" if broken == 1 else f"{broken} lines"
        notes.append(
            f"{lines} of metrics.jsonl could not be read and were left out "
            "(a run that is still writing, or was killed, leaves half a line)."
        )
    return records


def _read_json(path: Path, notes: list[str]) -> Record | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        notes.append(f"{path.name} could not be read as a JSON object and was left out.")
        return None
    return content


def _phases(records: list[Record]) -> list[Phase]:
    # a resumed run writes the steps after its checkpoint again: the later record stands
    latest: dict[tuple[object, str, float], Record] = {}
    for record in records:
        step = number(record.get("step"))
        if record.get("kind") in ("step", "eval") and math.isfinite(step):
            key = (record["kind"], str(record.get("phase")), step)
            latest.pop(key, None)
            latest[key] = record
    # stable: at a border the last measurement of one phase stays before the first of the next
    ordered = sorted(latest.values(), key=lambda record: record["step"])
    phases: list[Phase] = []
    for name, group in itertools.groupby(ordered, key=lambda record: str(record.get("phase"))):
        members = list(group)
        phases.append(
            Phase(
                name=name,
                start=phases[-1].end if phases else 0,
                end=int(members[-1]["step"]),
                steps=[record for record in members if record["kind"] == "step"],
                evals=[record for record in members if record["kind"] == "eval"],
            )
        )
    return phases


def relative(value_N: np.ndarray) -> np.ndarray:
    """Return values over the first finite one (at phase entry): float64 [N], nan without one."""
    finite = np.flatnonzero(np.isfinite(value_N))
    if not len(finite) or value_N[finite[0]] <= 0:
        return np.full(len(value_N), np.nan)
    return value_N / value_N[finite[0]]
