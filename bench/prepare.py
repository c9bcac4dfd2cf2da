"""python -m bench.prepare: events a second of `smbfast.prepare` on one core, and its peak memory.

On simulated patients (default), or on a MEDS folder repeated with other subject ids and jittered
values (`--data=FOLDER`), so that lines repeat no more than they do in real data. Whole processes
are measured, start-up included, on a small input and on one that is `copies` times as large: the
difference of the two has no start-up in it. With `--peer`, meds-torch-data's preprocessing reads
the same folders in the same rounds.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.data.splits import SPLITS
from smbfast.simulation.dataset import simulate

PROG = "python -m bench.prepare"
OURS, PEER = "smbfast", "meds-torch-data"
PEER_COMMAND = "MTD_preprocess"  # beside the interpreter of its environment
# events a second of one core, the release bar of the format
BARS = {"codes": 250_000}
NOTE_BAR = 50_000  # events a second of one core where every event is a note
NOTE_FLAT = 1.1  # of the peaks there: both inputs fill every buffer
NOTE_BYTES, NOTES_A_SUBJECT, NOTES_A_FILE = 4096, 50, 100_000
# of the peaks on the large and on the small input: buffers that a small input does not fill may
# make a difference, an input that is held whole would show as nearly `copies` (our choice)
FLAT = 1.25
ONE_CORE = {
    **dict.fromkeys(("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
}
# Runs a command on one core and prints what it and all its children took. It is a small process of
# its own because Linux counts the memory of whoever starts a process as a peak of that process.
LAUNCHER = """
import json, os, sys, time
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
status, usage = os.wait4(child, 0)[1:]
print(json.dumps({
    "code": os.waitstatus_to_exitcode(status),
    "wall_s": time.perf_counter() - start,
    "cpu_s": usage.ru_utime + usage.ru_stime,
    "peak_mib": usage.ru_maxrss / 1024,
}))
"""


class PrepareBench(Settings):
    """Measure how many events a second of one core `smbfast.prepare` turns into token shards.

    Every process is held to one core and measured whole, with its children: CPU seconds, wall
    seconds, and the resident peak of its largest process. The rate without start-up is that of the
    events by which the large input exceeds the small one. Memory is flat if the peak hardly differs
    between the two. A rate below the bar of its format, or memory that is not flat, ends with
    status 1.
    """

    epilog: ClassVar[str] = """Examples

  Simulated patients, for which nothing needs to be downloaded:
    python -m bench.prepare --patients=20000

  Both formats, beside a peer in an environment of its own:
    python -m venv peer && peer/bin/pip install meds-torch-data==0.9.0
    python -m bench.prepare --format=text,codes --peer=peer/bin/python --save

  Notes of 4 kB, 200,000 of them and ten times as many:
    python -m bench.prepare --notes=distinct --copies=10 --patients=40000 --format=text,codes

  A dataset of your own, and the same six times over:
    python -m bench.prepare --data=MEDS_FOLDER --copies=6"""

    data: str | None = Field(
        None,
        description="Folder of a MEDS dataset, whose training split is measured. `none` simulates "
        "patients instead.",
    )
    copies: int = Field(
        6,
        ge=2,
        description="How many times the large input is as large as the small one. With `data`, "
        "each copy of its training split has other subject ids and slightly other values.",
    )
    notes: Literal["distinct", "repeated"] | None = Field(
        None,
        description="Measure notes of 4 kB, all distinct or fifty texts that repeat; each of the "
        f"`patients` has {NOTES_A_SUBJECT}. `none` measures simulated patients or `data`.",
    )
    patients: int = Field(
        250_000,
        ge=1000,
        description="Number of simulated patients of the large input, who have about 35 events "
        "each. With `data` it has no effect.",
    )
    format: list[str] = Field(
        [],
        description="Formats to measure, as `python -m smbfast.prepare` takes them. If the list is "
        "empty, its default is measured.",
    )
    peer: Path | None = Field(
        None,
        description="Python interpreter of an environment in which meds-torch-data is installed; "
        "its command MTD_preprocess is measured as well. `none` measures no peer.",
    )
    rounds: int = Field(
        1,
        ge=1,
        description="Rounds of measuring, each with all commands on both inputs in a shuffled "
        "order. Medians are printed.",
    )
    limit: int = Field(
        3600,
        ge=1,
        description="Seconds after which a process is ended. A peer that is ended or fails is "
        "marked, and nothing is lost by it.",
    )
    save: bool = Field(False, description="Append the results to bench/results/prepare.jsonl.")


@dataclass(frozen=True)
class Cost:
    """What a process and its children took."""

    cpu_s: float
    wall_s: float
    peak_mib: float  # resident, of the largest of them


@dataclass
class Tool:
    """A command that prepares a folder, and its costs on the small and on the large input."""

    name: str
    format: str
    command: Callable[[Path, Path], list[str]]  # of the input and of the output
    check: Callable[[Path, Path], None]  # raises a ValueError unless all of the input was prepared
    environment: dict[str, str]
    costs: dict[str, list[Cost]] = field(default_factory=lambda: {"part": [], "whole": []})
    reason: str = ""  # why it was not measured
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name} {self.format}".strip()

    def of(self, size: str, what: str) -> float:
        """The median over rounds."""
        return median(getattr(cost, what) for cost in self.costs[size])


def repeat(source: Path, out: Path, copies: int) -> None:
    """A dataset of `copies` of the training split of `source`, each jittered."""
    files = sorted((source / "data" / "train").glob("*.parquet"))
    random = np.random.default_rng(0)
    (out / "data" / "train").mkdir(parents=True)
    (out / "metadata").mkdir()
    for name in ("codes.parquet", "dataset.json"):
        (out / "metadata" / name).write_bytes((source / "metadata" / name).read_bytes())
    for copy in range(copies):
        for file in files:
            table = pq.read_table(file)
            ids = table["subject_id"].to_numpy() + copy * 10**12
            values = table["numeric_value"].to_numpy(zero_copy_only=False).astype(np.float32)
            if copy:
                values = values * (1 + 0.03 * random.standard_normal(len(values)))
            column = pa.array(values.astype(np.float32), from_pandas=True)
            table = table.set_column(0, table.schema.field(0), pa.array(ids))
            index = table.schema.get_field_index("numeric_value")
            table = table.set_column(index, "numeric_value", column)
            pq.write_table(table, out / "data" / "train" / f"{copy}-{file.name}")


def write_notes(out: Path, subjects: int, kind: str) -> None:
    """A dataset of notes of 4 kB, all distinct or fifty that repeat, on two codes.

    A file holds whole subjects, about `NOTES_A_FILE` of their notes in one row group.
    """
    (out / "data" / "train").mkdir(parents=True)
    (out / "metadata").mkdir()
    names = {"code": ["NOTE//a", "NOTE//b"], "description": ["Progress note", "Letter"]}
    pq.write_table(pa.table(names), out / "metadata" / "codes.parquet")
    (out / "metadata" / "dataset.json").write_text('{"meds_version": "0.4"}')
    body = ("seen today, better than before. " * (NOTE_BYTES // 32))[: NOTE_BYTES - 12]
    step = NOTES_A_FILE // NOTES_A_SUBJECT
    for first in range(0, subjects, step):
        num = min(step, subjects - first) * NOTES_A_SUBJECT
        row = np.arange(num) + first * NOTES_A_SUBJECT
        head = pa.array(row if kind == "distinct" else row % 50).cast(pa.string())
        columns = {
            "subject_id": row // NOTES_A_SUBJECT,
            "time": pa.array((row % NOTES_A_SUBJECT) * 3_600_000_000).cast(pa.timestamp("us")),
            "code": pa.array(["NOTE//a", "NOTE//b"] * (num // 2)),
            "numeric_value": pa.nulls(num, pa.float32()),
            "text_value": pc.binary_join_element_wise(head, body, " "),
        }
        pq.write_table(pa.table(columns), out / "data" / "train" / f"{first // step}.parquet")


def files_of(folder: Path) -> list[Path]:
    """The event files of a MEDS folder."""
    return sorted((folder / "data").glob("*/*.parquet"))


def num_events(folder: Path) -> int:
    """Rows of all event files."""
    return sum(pq.read_metadata(file).num_rows for file in files_of(folder))


def run(command: list[str], environment: dict[str, str], limit: float) -> Cost:
    """Run a command on one core.

    Raises:
        ValueError: it failed, or did not end within `limit` seconds.
    """
    with tempfile.TemporaryFile("w+") as said:
        launched = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", LAUNCHER, *command],
            env=os.environ | ONE_CORE | environment,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,  # so that what it has started can be ended with it
        )
        try:
            out = launched.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(launched.pid, 9)
            launched.communicate()
            raise ValueError(f"{Path(command[0]).name} did not end in {limit:g} s") from None
        said.seek(0)
        cost = json.loads(out.splitlines()[-1])
        if cost.pop("code"):
            lines = said.read().strip().splitlines() or ["no message"]
            raise ValueError(f"{' '.join(command[:3])} failed: {lines[-1][:200]}")
    return Cost(**cost)


def ours(form: str) -> Tool:
    """`smbfast.prepare` in a format; in its default one if the name is empty."""

    def command(data: Path, out: Path) -> list[str]:
        splits = ",".join(s for s in SPLITS if (data / "data" / s).is_dir())
        words = [f"--path={data}", f"--out={out}", f"--splits={splits}", "--workers=1"]
        words += [f"--format={form}"] if form else []
        return [sys.executable, "-m", "smbfast.prepare", *words]

    def check(data: Path, out: Path) -> None:
        counts = json.loads((out / "prepare.json").read_text())["counts"].values()
        seen, given = sum(c["events"] for c in counts), num_events(data)
        late = sum(c.get("late_births", 0) for c in counts)  # left out, and said
        if not given - late <= seen <= given:
            raise ValueError(f"smbfast.prepare must count all {given:,} events, got {seen:,}")
        tool.extra["tokens"] = sum(c["tokens"] for c in counts)  # of the latest, the large one

    tool = Tool(OURS, form, command, check, {})
    return tool


def peer(python: Path) -> Tool:
    """meds-torch-data's preprocessing, as its documentation runs it.

    Raises:
        ValueError: there is no such command beside the interpreter.
    """
    program = python.parent / PEER_COMMAND
    if not program.is_file():
        raise ValueError(f"`peer` must have {PEER_COMMAND} beside it; {python} has not")
    code = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
    names = ("meds-torch-data", "MEDS-transforms", "polars")
    asked = subprocess.run([python, "-c", code % (names,)], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(f"`peer` must be a Python with {names[0]}; {python} is not")

    def command(data: Path, out: Path) -> list[str]:
        return [str(program), f"MEDS_dataset_dir={data}", f"output_dir={out}"]

    def check(data: Path, out: Path) -> None:
        made, given = len(list((out / "data").glob("*/*.nrt"))), len(files_of(data))
        if made != given:
            raise ValueError(f"{PEER_COMMAND} must make a tensor file of all {given}, made {made}")

    # it finds the programs of its stages on the path, and must not find our packages
    path = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {"PATH": path, "PYTHONPATH": ""}
    extra = {"peer_versions": json.loads(asked.stdout)}
    return Tool(PEER, "", command, check, environment, extra=extra)


def measure(tools: list[Tool], inputs: dict[str, Path], rounds: int, limit: float) -> None:
    """All tools on both inputs in turn; what a peer cannot do is its reason.

    Args:
        inputs: the folders `part` and `whole`.

    Raises:
        ValueError: ours failed.
    """
    random = Random(0)
    for _ in range(rounds):
        for size, data in inputs.items():  # the small one first, where a mistake shows early
            for tool in random.sample(tools, len(tools)):
                if tool.reason:
                    continue
                out = data.parent / "out"
                try:
                    cost = run(tool.command(data, out), tool.environment, limit)
                    tool.check(data, out)
                except ValueError as error:
                    if tool.name == OURS:
                        raise
                    tool.reason = f"{error} on the {size} input"
                else:
                    tool.costs[size].append(cost)
                    print(f"{tool.label}, {size}: {cost.cpu_s:.1f} CPU s", file=sys.stderr)
                shutil.rmtree(out, ignore_errors=True)


def result(tool: Tool, events: dict[str, int], first: Tool) -> dict[str, Any]:
    """What a record says of a tool.

    Args:
        events: of the inputs `part` and `whole`.
        first: with which it is compared.
    """
    about: dict[str, Any] = {
        "tool": tool.name,
        "format": tool.format or None,
        "events": events["whole"],
        "events_part": events["part"],
        **tool.extra,
    }
    measured = {
        f"{what}{end}": tool.of(size, what)
        for size, end in (("whole", ""), ("part", "_part"))
        for what in ("cpu_s", "wall_s", "peak_mib")
        if tool.costs[size]
    }
    if tool.reason:
        return about | measured | {"not_measured": tool.reason}
    more = tool.of("whole", "cpu_s") - tool.of("part", "cpu_s")
    rate = (events["whole"] - events["part"]) / more if more > 0 else None
    return {
        **about,
        **measured,
        "rounds": len(tool.costs["whole"]),
        "cpu_s_rounds": {size: [c.cpu_s for c in costs] for size, costs in tool.costs.items()},
        "events_per_cpu_s": events["whole"] / tool.of("whole", "cpu_s"),
        "marginal_events_per_cpu_s": rate,
        "start_up_cpu_s": rate and tool.of("part", "cpu_s") - events["part"] / rate,
        "peak_growth": tool.of("whole", "peak_mib") / tool.of("part", "peak_mib"),
        "cpu_over_first": tool.of("whole", "cpu_s") / first.of("whole", "cpu_s"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """For people; of all figures those that are compared."""
    cells = [
        ["", "CPU s 1x", "CPU s", "wall s", "events/CPU s", "marginal", "MiB 1x", "MiB", "CPU"]
    ]
    for r in rows:
        label = f"{r['tool']} {r['format'] or ''}".strip()
        if "not_measured" in r:
            cells.append([label, f"not measured: {r['not_measured']}"])
            continue
        figures = [f"{r[key]:.1f}" for key in ("cpu_s_part", "cpu_s", "wall_s")]
        for key in ("events_per_cpu_s", "marginal_events_per_cpu_s"):
            figures.append("below noise" if r[key] is None else f"{r[key]:,.0f}")
        figures += [f"{r['peak_mib_part']:.0f}", f"{r['peak_mib']:.0f}"]
        cells.append([label, *figures, f"{r['cpu_over_first']:.2f} x"])
    return records.columns(cells, "  ")


def judged(row: dict[str, Any], notes: str | None = None) -> list[tuple[str, bool]]:
    """Each bar of ours with what was reached, and whether it is met."""
    form, rate, growth = row["format"], row["marginal_events_per_cpu_s"], row["peak_growth"]
    flat = NOTE_FLAT if notes else FLAT
    bar = NOTE_BAR if notes else BARS.get(form)
    line = f"{form or 'prepare'}: peak memory {growth:.2f} x, at most {flat} x"
    lines = [(line, growth <= flat)]
    if bar:
        reached = "below noise" if rate is None else f"{rate:,.0f} events/s"
        line = f"{form}: {reached} a core without start-up, at least {bar:,}"
        lines.append((line, rate is not None and rate >= bar))
    return lines


def _inputs(settings: PrepareBench, work: Path) -> dict[str, Path]:
    inputs = {"part": work / "part", "whole": work / "whole"}
    for size, share in (("part", settings.copies), ("whole", 1)):
        if settings.notes:
            write_notes(inputs[size], settings.patients // share, settings.notes)
        elif settings.data:
            repeat(Path(settings.data), inputs[size], settings.copies // share)
        else:
            simulate(inputs[size], settings.patients // share, 0)
    return inputs


def main(argv: list[str] | None = None) -> None:
    settings = command_line(PrepareBench, argv, prog=PROG)
    stamp = records.stamp("prepare", "cpu") | {"threads": 1}  # of the processes that are measured
    stamp["data"] = Path(settings.data).name if settings.data else "simulated"
    if settings.notes:
        stamp["data"] = f"{settings.notes} notes of 4 kB"
    with tempfile.TemporaryDirectory() as folder:
        try:
            tools = [ours(form) for form in settings.format or [""]]
            tools += [peer(settings.peer)] if settings.peer else []
            inputs = _inputs(settings, Path(folder))
            events = {size: num_events(data) for size, data in inputs.items()}
            measure(tools, inputs, settings.rounds, settings.limit)
        except ValueError as error:
            raise SystemExit(f"{PROG}: {error}") from None
    rows = [result(tool, events, tools[0]) for tool in tools]
    print(f"{stamp['data']}: {events['part']:,} events (1x) and {events['whole']:,}, one core")
    print(table(rows))
    verdicts = [v for row in rows if row["tool"] == OURS for v in judged(row, settings.notes)]
    print("\n".join(f"{line}: {'met' if met else 'NOT MET'}" for line, met in verdicts))
    if settings.save:
        records.append("prepare", [stamp | row for row in rows])
    if not all(met for _, met in verdicts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
