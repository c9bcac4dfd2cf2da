"""python -m bench.start_files: what it costs to open a dataset of many files, subjects and codes.

Each case is a process of its own: its CPU seconds and resident peak without those of the imports.
`files` opens the dataset without an index, `index` writes one and then opens the dataset from it,
with the digest of the data; `codes` opens and searches a large codes.parquet from its copy in the
index. A figure above its bar ends with status 1.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line

PROG = "python -m bench.start_files"
EVENTS = 4  # of a subject: their number hardly matters, as ids alone are read
# (CPU seconds, MiB) above the imports, for 5,000 files and 1,000,000 codes
BARS = {"files": (90.0, 1024.0), "index": (5.0, 1024.0), "codes": (5.0, 150.0)}
CHILD = """
import json, sys, time
from itertools import islice
from pathlib import Path
from smbfast.data import code_table, meds, source_index

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) / 1024

def opening(file, *more):
    opened.append(file)
    return honest(file, *more)

case, folder, index, opened = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), []
honest, source_index.open_parquet = source_index.open_parquet, opening
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before, start = peak(), time.process_time()
if case == "codes":
    table = code_table.CodeTable.open(folder / "metadata" / "codes.parquet", index)
    codes = islice(table.descriptions, 0, None, 10)  # no list: its strings are not the table's
    assert all(table.descriptions[code] and table.parents[code] for code in codes)
else:
    dataset = meds.MedsDataset.open(folder, index=index if case == "index" else None)
    if case == "index":
        dataset.digest(("train",))
print(json.dumps({
    "cpu_s": time.process_time() - start,
    "peak_mib": peak() - before,
    "files_opened": len(opened),
}))
"""


class StartFilesBench(Settings):
    """Measure what it costs to open a dataset of many files, with and without an index of it.

    The dataset is made for the purpose and holds nothing but ids, times and codes. The index is
    written by a process of its own, whose cost is printed as well.
    """

    epilog: ClassVar[str] = """Examples

  All cases, with a record of each:
    python -m bench.start_files --save"""

    only: list[Literal["files", "index", "codes"]] = Field(
        [], description="Cases to measure. If the list is empty, all are."
    )
    files: int = Field(5000, ge=1, description="Number of parquet files of events.")
    subjects: int = Field(1000, ge=1, description="Number of subjects in each file.")
    codes: int = Field(1_000_000, ge=1, description="Number of codes in codes.parquet.")
    save: bool = Field(False, description="Append the results to bench/results/start_files.jsonl.")


def make_events(folder: Path, num_files: int, num_subjects: int) -> None:
    """Write the files of a train split, each with subjects of its own."""
    (folder / "data" / "train").mkdir(parents=True)
    num = num_subjects * EVENTS
    times = pa.array(np.tile(np.arange(EVENTS) * 10**12, num_subjects), pa.timestamp("us"))
    codes = pa.array(np.tile([f"LAB//{i}" for i in range(EVENTS)], num_subjects))
    values = pa.array(np.ones(num, np.float32))
    for file in range(num_files):
        ids = np.repeat(np.arange(num_subjects) + file * num_subjects, EVENTS)
        columns = {"subject_id": ids, "time": times, "code": codes, "numeric_value": values}
        pq.write_table(pa.table(columns), folder / "data" / "train" / f"{file}.parquet")


def make_codes(folder: Path, num_codes: int) -> None:
    """Write a codes.parquet in random order, with long descriptions and two parents a code."""
    (folder / "metadata").mkdir(parents=True)
    order = np.random.default_rng(0).permutation(num_codes).tolist()
    columns = {
        "code": [f"LAB//VENDOR//{i:08d}//mg/dL" for i in order],
        "description": [f"Measurement number {i} of a long vocabulary" for i in order],
        "parent_codes": [[f"LOINC/{i % 50_000}-{i % 9}", f"SNOMED/{i % 70_000}"] for i in order],
    }
    pq.write_table(pa.table(columns), folder / "metadata" / "codes.parquet")


def opened(case: str, folder: Path, index: Path) -> dict[str, float]:
    """Return what a process that opens the dataset takes above its imports."""
    command = [sys.executable, "-c", CHILD, case, str(folder), str(index)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise SystemExit(f"{PROG}: {case} failed: {lines[-1][:200]}")
    return json.loads(done.stdout)


def measure(case: str, settings: StartFilesBench, folder: Path) -> dict[str, Any]:
    """Return the record of a case, in a new folder."""
    index = folder / "source"
    if case == "codes":
        make_codes(folder, settings.codes)
    else:
        make_events(folder, settings.files, settings.subjects)
    row: dict[str, Any] = {"case": case}
    row |= {"codes": settings.codes} if case == "codes" else {"files": settings.files}
    row |= {} if case == "codes" else {"subjects": settings.files * settings.subjects}
    if case != "files":
        row["write"] = opened(case, folder, index)
        row["index_mib"] = sum(f.stat().st_size for f in index.iterdir()) / 2**20
    return row | opened(case, folder, index)


def judged(row: dict[str, Any]) -> tuple[str, bool]:
    """Return a line about a record, and whether it is within its bars."""
    seconds, size = BARS[row["case"]]
    met = row["cpu_s"] <= seconds and row["peak_mib"] <= size
    met &= row["case"] != "index" or not row["files_opened"]
    text = f"{row['case']}: {row['cpu_s']:.2f} CPU s (at most {seconds:g}), {row['peak_mib']:.0f} "
    text += f"MiB (at most {size:g}), {row['files_opened']:,} files opened"
    if "write" in row:
        first = row["write"]
        text += f"; to write it {first['cpu_s']:.2f} CPU s, {first['peak_mib']:.0f} MiB"
    return text, met


def main(argv: list[str] | None = None) -> None:
    settings = command_line(StartFilesBench, argv, prog=PROG)
    stamp = records.stamp("start_files", "cpu")
    rows = []
    for case in settings.only or list(BARS):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(case, settings, Path(folder)))
        text, met = judged(rows[-1])
        print(f"{text}: {'met' if met else 'NOT MET'}", flush=True)
    if settings.save:
        records.append("start_files", [stamp | row for row in rows])
    if not all(judged(row)[1] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
