"""python -m bench.aot: what every shipped Triton kernel needs on sm_80, sm_90 and sm_100.

Compiled without a GPU and held to `kernels/budgets.json`, which has rows per Triton version. For a
version without rows, and against any row that does not say why it is excused, these rules hold: no
spills, shared memory within the chip's limit of a block, 16-byte loads where the build expects
them, and its matrix instructions where it expects those.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from bench.records import columns
from smbfast.base.config import Settings, command_line

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "kernels" / "budgets.json"
KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}  # of a block, by opting in
TENSOR_MEMORY_LIMIT = 512  # columns, of an sm_100 multiprocessor
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# no more than the row says, and no less
AT_MOST = ("registers", "spill_bytes", "spill_moves", "shared", "tensor_memory")
AT_LEAST = ("wide_loads", "wide_stores")

Table = dict[str, dict[str, dict[str, Any]]]  # Triton version, "build sm_90", figures


class AotBench(Settings):
    """Compile every shipped Triton kernel for sm_80, sm_90 and sm_100, and check the budgets.

    No GPU is needed. The figures (registers, spills, shared memory, wide loads, matrix
    instructions) are compared with kernels/budgets.json; if one is exceeded, the command exits with
    status 1.
    """

    epilog: ClassVar[str] = """Examples

  The table, and what exceeds its budget:
    python -m bench.aot

  Make these figures the budgets of the installed Triton:
    python -m bench.aot --write

  The same for another version, from a wheel that was unpacked into FOLDER:
    python -m bench.aot --write --triton=FOLDER

  The kernels of one operation:
    python -m bench.aot --only=ema_update"""

    write: bool = Field(
        False,
        description="Write the figures into kernels/budgets.json, as the budgets of this version "
        "of Triton.",
    )
    triton: str | None = Field(
        None,
        description="Folder that holds another version of Triton, unpacked from its wheel. `none` "
        "takes the installed one.",
    )
    only: str | None = Field(
        None,
        description="Text in the names of the builds to compile. `none` compiles all. With "
        "`write`, the budgets of other builds stay.",
    )
    processes: int = Field(2, ge=1, description="Number of processes that compile at a time.")


@dataclass(frozen=True)
class Compiled:
    """What `bench.cubin` found."""

    triton: str
    problems: list[str]  # of the lists of builds
    reports: list[dict[str, Any]]
    unchanged: list[str] = field(default_factory=list)  # rows whose builds were left out


def compile_all(
    modules: list[str] | None = None,
    *,
    triton: str | None = None,
    only: str = "",
    processes: int = 2,
    changed: bool = False,
) -> Compiled:
    """Compile and read, in processes that do not interpret and keep nothing.

    Args:
        modules: with a function `builds`; None: those that `smbkernels` ships.
        triton: a folder that holds another version of the package.
        changed: leave out builds whose row was made from the same source and settings by the same
            version: the compiler would give the same figures.

    Raises:
        RuntimeError: the process failed, with the end of what it said.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    paths = [p for p in ([str(Path(triton).resolve())] if triton else []) + paths if p]
    with tempfile.TemporaryDirectory() as cache:
        # not interpreted, and by the tools of the wheel as they come
        env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        env |= {"PYTHONPATH": os.pathsep.join(paths), "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "bench.cubin", f"--processes={processes}"]
        command += [f"--only={only}", *([f"--rows={TABLE}"] if changed else []), *(modules or [])]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compilation ahead of time failed: {done.stderr.strip()[-1500:]}")
    return Compiled(**json.loads(done.stdout.splitlines()[-1]))


def read_table() -> Table:
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def row_name(report: dict[str, Any]) -> str:
    return f"{report['build']} sm_{report['arch']}"


def _build_of(row: str) -> str:
    return row.rpartition(" ")[0]


def row_of(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report that become its row."""
    figures = {key: report[key] for key in (*AT_MOST, *AT_LEAST)}
    return figures | {"matrix": sorted(report["matrix"]), "source": report["source"]}


def broken_rules(report: dict[str, Any]) -> list[str]:
    """The rules that hold for any version of Triton and that a report breaks."""
    if "error" in report:
        return [f"does not compile: {report['error']}"]
    arch, broken = report["arch"], []
    if report["spill_bytes"] or report["spill_moves"]:
        broken.append(f"spills {report['spill_bytes']} bytes in {report['spill_moves']} moves")
    if report["shared"] > SHARED_LIMIT[arch]:
        broken.append(f"shared memory {report['shared']} is above {SHARED_LIMIT[arch]}")
    if report["tensor_memory"] > TENSOR_MEMORY_LIMIT:
        broken.append(f"tensor memory {report['tensor_memory']} is above {TENSOR_MEMORY_LIMIT}")
    if report["expects_wide_loads"] and not report["wide_loads"]:
        broken.append(f"no 16-byte load, {report['narrow_loads']} narrower ones")
    if report["expects_tensor_cores"] and MATRIX[arch] not in report["matrix"]:
        broken.append(f"no {MATRIX[arch]}, found {list(report['matrix']) or 'none'}")
    return broken


def exceeded(report: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """Where a report is worse than its row, and the rules it breaks without an excuse."""
    if "error" in report:
        return broken_rules(report)
    worse = [f"{k} {report[k]} is above {row[k]}" for k in AT_MOST if report[k] > row[k]]
    worse += [f"{k} {report[k]} is below {row[k]}" for k in AT_LEAST if report[k] < row[k]]
    if sorted(report["matrix"]) != row["matrix"]:
        worse.append(f"matrix instructions are {sorted(report['matrix'])}, not {row['matrix']}")
    return worse + ([] if row.get("excused") else broken_rules(report))


def failures(compiled: Compiled, table: Table) -> list[str]:
    """Everything wrong: lists of builds, rows without builds and the reverse, budgets, rules."""
    problems = list(compiled.problems)
    rows = table.get(compiled.triton)
    if rows is None:
        return problems + [
            f"{row_name(r)}: {broken}" for r in compiled.reports for broken in broken_rules(r)
        ]
    names = {row_name(report) for report in compiled.reports} | set(compiled.unchanged)
    problems += [f"{name}: a row without a build" for name in sorted(rows.keys() - names)]
    for report in compiled.reports:
        name = row_name(report)
        if name in rows:
            problems += [f"{name}: {worse}" for worse in exceeded(report, rows[name])]
        else:
            problems += [f"{name}: {broken}" for broken in broken_rules(report)]
            problems.append(
                f"{name}: a build without a row; `python -m bench.aot --write` makes it"
            )
    return problems


def updated(compiled: Compiled, table: Table, only: str = "") -> Table:
    """The table with the rows of this version; a reason to be excused stays while it is needed.

    Args:
        only: what was compiled; rows of other builds stay, rows without a build go.
    """
    before = table.get(compiled.triton, {})
    rows = {name: row for name, row in before.items() if only not in _build_of(name)}
    for report in compiled.reports:
        if "error" in report:
            continue
        row = row_of(report)
        excused = before.get(row_name(report), {}).get("excused")
        rows[row_name(report)] = row | (
            {"excused": excused} if excused and broken_rules(report) else {}
        )
    return {**table, compiled.triton: dict(sorted(rows.items()))}


def as_text(table: Table) -> str:
    """JSON with a line for each row, so that a change of one is one line of a diff."""
    parts = []
    for version in sorted(table):
        rows = [f"    {json.dumps(n)}: {json.dumps(r)}" for n, r in table[version].items()]
        parts.append(f"  {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def printed(compiled: Compiled) -> str:
    """The reports as a table for people."""
    header = ["build", "arch", "regs", "spill B", "shared KiB", "loads 16B/less", "stores"]
    rows = [[*header, "matrix"]]
    for r in compiled.reports:
        if "error" in r:
            rows.append([r["build"], f"sm_{r['arch']}", "does not compile"])
            continue
        matrix = " ".join(f"{name}×{times}" for name, times in r["matrix"].items())
        rows.append(
            [
                r["build"],
                f"sm_{r['arch']}",
                str(r["registers"]),
                str(r["spill_bytes"]),
                f"{r['shared'] / KIB:.1f}",
                f"{r['wide_loads']}/{r['narrow_loads']}",
                f"{r['wide_stores']}/{r['narrow_stores']}",
                matrix or "-",
            ]
        )
    return columns(rows)


def main(argv: list[str] | None = None) -> None:
    settings = command_line(AotBench, argv, prog="python -m bench.aot")
    began = time.perf_counter()
    only = settings.only or ""
    compiled = compile_all(triton=settings.triton, only=only, processes=settings.processes)
    spent = time.perf_counter() - began
    if not compiled.reports:
        sys.exit(f"python -m bench.aot: `only` must be in the name of a build, got {only!r}")
    print(printed(compiled))
    print(f"\nTriton {compiled.triton}: {len(compiled.reports)} compilations in {spent:.0f} s")
    slowest = sorted(compiled.reports, key=lambda r: -r.get("seconds", 0))[:3]
    print("slowest:", ", ".join(f"{row_name(r)} {r.get('seconds')} s" for r in slowest))
    table = read_table()
    if settings.write:
        table = updated(compiled, table, only)
        TABLE.write_text(as_text(table), encoding="utf-8")
        print(f"wrote {len(table[compiled.triton])} rows to {TABLE.relative_to(ROOT)}")
    if only and compiled.triton in table:
        rows = table[compiled.triton].items()
        table[compiled.triton] = {n: r for n, r in rows if only in _build_of(n)}
    problems = failures(compiled, table)
    print("\n".join(problems) if problems else "all within budget")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
