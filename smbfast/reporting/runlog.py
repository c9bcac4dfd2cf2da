"""Reads what a run folder holds: its records by phase, and whether the JEPA target collapsed.

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

# our choice: what the report (and the goal of the default run) calls healthy
HALF = 0.5
GOOD_RATIO = 0.9


@dataclass(frozen=True)
class Phase:
    """One stretch of training under the same settings: optimizer steps `start` < step <= `end`."""

    name: str
    start: int
    end: int
    steps: list[Record]
    evals: list[Record]

    @property
    def judged(self) -> bool:
        """Return whether the target encoder was measured at all."""
        return bool(np.isfinite(column(self.evals, "target_rank")).any())


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


def trivial_ratio(records: list[Record]) -> np.ndarray:
    """Return the JEPA loss over that of the better trivial predictor, as logged: float64 [N]."""
    ratio_N = column(records, "ratio")
    trivial_N = np.fmin(column(records, "trivial_mean"), column(records, "trivial_copy"))
    with np.errstate(divide="ignore", invalid="ignore"):
        computed_N = column(records, "jepa") / np.where(trivial_N > 0, trivial_N, np.nan)
    return np.where(np.isfinite(ratio_N), ratio_N, computed_N)


def collapse(phases: list[Phase]) -> Finding:
    """Judge whether the target collapsed in any phase with JEPA; return the worst finding.

    Bad: effective rank or mean std fell below half of its value at phase entry. Doubtful: the
    weakest dimensions did, or the last loss is above 0.9 of the best trivial predictor's.
    """
    findings = [_collapse_of(phase) for phase in phases if phase.judged]
    if not findings:
        return Finding("unknown", "No phase of this run measured a target encoder.")
    order = ("good", "unknown", "warn", "bad")
    return max(reversed(findings), key=lambda finding: order.index(finding.level))


def _collapse_of(phase: Phase) -> Finding:
    where = f"in phase “{phase.name}”"
    names = {
        "target_rank": "effective rank",
        "target_std": "mean standard deviation",
        "target_std_p5": "5th percentile of the standard deviations",
    }
    lowest = {}
    for key in names:
        share_N = relative(column(phase.evals, key))
        share_N = share_N[np.isfinite(share_N)]
        if len(share_N) > 1:
            lowest[key] = float(share_N.min())
    if "target_rank" not in lowest and "target_std" not in lowest:
        return Finding(
            "unknown",
            f"Too early to say {where}: collapse shows as change since phase entry, "
            "and there is no second measurement yet.",
        )
    fallen = [key for key, share in lowest.items() if share < HALF]
    ratio_N = trivial_ratio(phase.evals)
    ratio_N = ratio_N[np.isfinite(ratio_N)]
    loss = (
        f"the last tuning loss is {ratio_N[-1]:.2f} of the best trivial predictor's "
        f"(below 1 is needed, {GOOD_RATIO} or less is good)"
        if len(ratio_N)
        else "the loss was not compared with trivial predictors"
    )
    if {"target_rank", "target_std"} & set(fallen):
        drops = " and ".join(f"the {names[key]} to {_percent(lowest[key])}" for key in fallen)
        return Finding(
            "bad",
            f"Signs of collapse {where}: the target fell below half of its value at phase entry "
            f"({drops} of it); {loss}. Its representations no longer spread as they did, so a low "
            "loss means little. Remedies: a larger share of SFT, a lower learning rate, "
            "a target that moves more slowly.",
        )
    spread = " and ".join(
        f"its {names[key]} at or above {_percent(lowest[key])}"
        for key in ("target_rank", "target_std")
        if key in lowest
    )
    spread = f"the target kept {spread} of the value at phase entry"
    if fallen:
        return Finding(
            "warn",
            f"No collapse as a whole {where}, but single dimensions die: {spread}, yet the "
            f"{names['target_std_p5']} fell to {_percent(lowest['target_std_p5'])}; {loss}.",
        )
    if len(ratio_N) and ratio_N[-1] > GOOD_RATIO:
        verdict = "no better than" if ratio_N[-1] >= 1 else "hardly better than"
        return Finding(
            "warn",
            f"No collapse {where}, but the prediction is {verdict} a trivial one: {spread}; "
            f"{loss}.",
        )
    return Finding("good", f"No signs of collapse {where}: {spread}; {loss}.")


def _percent(share: float) -> str:
    # rounded down, so that 49.9 % never reads as the half it missed
    return f"{math.floor(share * 100)} %"
