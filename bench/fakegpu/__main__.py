"""python -m bench.fakegpu: what a training step gives a GPU to do, counted without one."""

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from typing import ClassVar

from pydantic import Field, field_validator

from bench import records
from bench.fakegpu import shim
from bench.fakegpu.budgets import TABLE, WORKLOAD, as_text, report_of
from bench.fakegpu.device import Memory
from bench.fakegpu.ledger import Key, Row
from bench.fakegpu.rehearse import rehearse
from bench.fakegpu.trace import Traced, pair, traced
from bench.step.workloads import Workload, on_cuda
from smbfast.base.config import Settings, command_line

PROG = "python -m bench.fakegpu"


class FakeGpu(Settings):
    """Count what a training step gives a GPU to do: kernels, bytes, products, memory, waits.

    The step runs on a pretended H200, where tensors have shapes and no memory: micro-batches,
    clipping, fused AdamW, the target's average and a truncation of it, at the true size of the
    model. Workloads of bench.step (W1 to W6, K8) may be given as plain arguments. It needs a C++
    compiler and no GPU, and measures no time.
    """

    epilog: ClassVar[str] = """Examples

  W1 at its own 36 layers, extended from 2 and 4:
    python -m bench.fakegpu W1

  The same, every operation of every part:
    python -m bench.fakegpu W1 --ops

  One layer, with every Triton kernel that is launched compiled for sm_90:
    python -m bench.fakegpu W1 --layers=1 --compile

  Rehearse a module as it would run on a GPU, with models of one layer; all that follows --run is
  its name and its arguments (see bench/fakegpu/rehearse.py):
    python -m bench.fakegpu --layers=1 --run bench.step --only=W1 --rivals=B4 --rounds=1"""

    workloads: list[str] = Field(
        ["W1"], description="Workloads to count, the same as plain arguments."
    )
    layers: int = Field(
        0,
        ge=0,
        description="Layers to trace. 0 traces 2 and 4 layers and extends every count, which is a "
        "line in their number, to the model's own.",
    )
    ops: bool = Field(False, description="Print every operation of every part.")
    compile: bool = Field(
        False,
        description="Compile every specialisation of a Triton kernel that is launched, for sm_90, "
        "and print registers, spills and shared memory.",
    )
    write: bool = Field(
        False,
        description=f"Trace {WORKLOAD} alone and make its counts the budgets of "
        "kernels/step_budgets.json.",
    )
    check: bool = Field(
        False,
        description=f"Trace {WORKLOAD} alone and print what tests/test_fake_gpu.py reads, as one "
        "JSON object.",
    )

    @field_validator("workloads")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in known():
                raise ValueError(f"must be among {', '.join(known())}; `{name}` is not")
        return value


def known() -> dict[str, Workload]:
    """Training steps at full size, by name."""
    return {w.name: w for w in on_cuda() if not w.nodes}


def printed(step: Traced, *, ops: bool) -> str:
    """Tables of parts, of operations if asked for, of waits and copies."""
    by_part: dict[str, Row] = defaultdict(Row)
    for key, row in step.rows.items():
        by_part[key.part] = by_part[key.part].plus(row)
    by_part["all"] = sum_of(step.rows)
    rows = [["part", "kernels", "GB", "TFLOP of products"]]
    rows += [[part, *_cells(row)] for part, row in by_part.items()]
    blocks = [records.columns(rows)]
    if ops:
        detail = [["part", "kernels", "GB", "TFLOP", "dtype", "inside", "operation", "sizes"]]
        for key, row in sorted(step.rows.items()):
            sizes = "x".join(map(str, key.sizes)) or "-"
            names = [key.dtype or "-", key.inside or "-", key.op, sizes]
            detail.append([key.part, *_cells(row), *names])
        blocks.append(records.columns(detail))
    peak = f"peak {step.peak / 1e9:.2f} GB allocated"
    blocks.append(f"{peak}, {step.predicted / 1e9:.2f} GB predicted by smbfast.model.memory")
    for title, counts in (("the host waits", step.waits), ("copies to the GPU", step.copies)):
        lines = [[str(n), *what] for what, n in counts.items()]
        blocks.append(f"{title}:\n" + records.columns(lines, "  ") if lines else f"{title}: never")
    builds = list(step.builds.kernels.values())
    if builds:
        header = list(builds[0])
        lines = [header, *([str(b[k]) for k in header] for b in builds)]
        blocks.append(records.columns(lines))
    return "\n\n".join(blocks)


def sum_of(rows: dict[Key, Row]) -> Row:
    """Of all rows."""
    total = Row()
    for row in rows.values():
        total = total.plus(row)
    return total


def _cells(row: Row) -> list[str]:
    return [f"{row.kernels:,.1f}", f"{row.nbytes / 1e9:,.3f}", f"{row.flops / 1e12:,.3f}"]


def run(options: list[str], rest: list[str]) -> None:
    """Rehearse a module: `rest` is its name and its arguments."""
    settings = command_line(FakeGpu, options, prog=PROG)
    if not rest:
        sys.exit(f"{PROG}: --run must be followed by a module and its arguments")
    if not shim.is_started():
        shim.restart(["bench.fakegpu", *options, "--run", *rest])
    ledger = rehearse(rest[0], rest[1:], layers=settings.layers)
    row = sum_of(ledger.rows)
    print(
        f"rehearsed {rest[0]}: {row.kernels:,.0f} kernels, {row.nbytes / 1e9:,.1f} GB read and "
        f"written, at most {Memory.highest / 1e9:.1f} GB allocated; no GPU, no times, no values",
        file=sys.stderr,
    )


def judge(*, write: bool) -> None:
    """Trace the workload of the budgets; write them, or print what a test reads."""
    workload = known()[WORKLOAD]
    report = report_of(workload, *pair(workload, compiled=not write, predicts=not write))
    if write:
        TABLE.write_text(as_text(report.rows), encoding="utf-8")
        print(f"wrote {len(report.rows)} rows to {TABLE}")
    else:
        print(json.dumps(asdict(report)))


def main(argv: list[str] | None = None) -> None:
    """Trace and print."""
    argv = sys.argv[1:] if argv is None else argv
    if "--run" in argv:
        run(argv[: argv.index("--run")], argv[argv.index("--run") + 1 :])
        return
    plain = [a for a in argv if not a.startswith("-") and "=" not in a]
    options = [a for a in argv if a not in plain]
    options += [f"--workloads={','.join(plain)}"] if plain else []
    settings = command_line(FakeGpu, options, prog=PROG)
    if not shim.is_started():
        shim.restart(["bench.fakegpu", *argv])
    if settings.write or settings.check:
        judge(write=settings.write)
        return
    for name in settings.workloads:
        workload = known()[name]
        step = traced(
            workload, layers=settings.layers or None, compiled=settings.compile, predicts=True
        )
        print(f"\n{name}: {workload.description}, {step.layers} layers traced or extended to\n")
        print(printed(step, ops=settings.ops), flush=True)


if __name__ == "__main__":
    main()
