"""What a step may cost: `kernels/step_budgets.json`, and everything that is wrong with a step.

A row is a part of the step of one workload:

    kernels_of_layer   kernels of one layer on one micro-batch, or of one layer for an update
    kernels_beside     kernels beside those of layers, in the whole step
    bytes_of_token     bytes read and written, over the trunk tokens of the step, of `LAYERS` layers
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.aot import SHARED_LIMIT
from bench.fakegpu.ledger import Row
from bench.fakegpu.trace import FEW, LOG, UPDATES, Traced
from bench.step.workloads import Workload

TABLE = Path(__file__).resolve().parents[2] / "kernels" / "step_budgets.json"
WORKLOAD = "W1"  # the one that the table and its test are about
LAYERS = 36
PEAK = 0.05  # how far the prediction of memory may be from what was counted
ARCH = 90
Table = dict[str, dict[str, float]]  # "W1 backward": figures


@dataclass(frozen=True)
class Report:
    """A step that was traced with few layers and with more, and judged."""

    rows: Table
    waits: list[list[Any]]  # part, what, file:line, times; log lines are left out
    copies: list[list[Any]]  # blocking ones, likewise
    peak: float  # bytes, with more layers
    predicted: float
    builds: list[dict[str, Any]]


def report_of(workload: Workload, few: Traced, more: Traced) -> Report:
    """What a test reads."""
    return Report(
        rows_of(workload, few, more),
        [[*what, n] for what, n in more.waits.items() if what[0] != LOG],
        [[*what, n] for what, n in more.copies.items() if what[1] == "blocking"],
        more.peak,
        more.predicted,
        list(few.builds.kernels.values()),
    )


def rows_of(workload: Workload, few: Traced, more: Traced) -> Table:
    """The figures of each part."""
    num_micro = -(-len(workload.lengths) // workload.micro)
    whole, low, high = (_parts(t) for t in (few.extended(more, LAYERS), few, more))
    rows = {}
    for part, row in whole.items():
        slope = (high[part].kernels - low[part].kernels) / (FEW[1] - FEW[0])
        rows[f"{workload.name} {part}"] = {
            "kernels_of_layer": round(slope / (1 if part in UPDATES else num_micro), 2),
            "kernels_beside": round(low[part].kernels - FEW[0] * slope, 2),
            "bytes_of_token": round(row.nbytes / workload.num_tokens),
        }
    return rows


def read_table() -> Table:
    """The budgets."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def as_text(table: Table) -> str:
    """JSON with a line for each row."""
    lines = [f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items())]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def over_budget(rows: Table, table: Table) -> list[str]:
    """What is above its row, has no row, or is a row without a part."""
    problems = [f"{name}: a row without a part" for name in sorted(table.keys() - rows.keys())]
    for name, row in rows.items():
        if name not in table:
            problems.append(f"{name}: no row; `python -m bench.fakegpu --write` makes it")
            continue
        problems += [
            f"{name}: {key} {value} is above {table[name][key]}"
            for key, value in row.items()
            if value > table[name][key]
        ]
    return problems


def bad_builds(builds: list[dict[str, Any]]) -> list[str]:
    """Kernels that spill, or need more shared memory than a block may have."""
    return [
        f"{b['kernel']}: {b['spill_bytes']} bytes spilled, {b['shared']} bytes of shared memory"
        for b in builds
        if b["spill_bytes"] or b["shared"] > SHARED_LIMIT[ARCH]
    ]


def _parts(step: Traced) -> dict[str, Row]:
    by_part: dict[str, Row] = defaultdict(Row)
    for key, row in step.rows.items():
        by_part[key.part] = by_part[key.part].plus(row)
    return by_part
