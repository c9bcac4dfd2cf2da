"""python -m bench.scale_start: ten million tiny rows through index, plan and first step.

A cohort is generated in many small files, as large ones come. Each stage is a process of its own:
`index` opens the dataset and digests it, `prepare` fits a vocabulary and writes a shard for each
file, `first` opens a run, which makes the table of windows, and takes an optimizer step, `again`
does so with the table there. Seconds count from the end of the imports on.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line

PROG = "python -m bench.scale_start"
EVENTS = 20  # of a subject
CODES = 200
DAY = 86_400_000_000  # microseconds
STAGES = ("index", "prepare", "first", "again")
MEASURE = """
import json, os, resource, sys, threading, time
import smbfast.run.loop, smbfast.train, smbfast.prepare
from bench import scale_start

def sample():
    while not done.is_set():
        most.append(len(os.listdir("/proc/self/fd")))
        done.wait(0.02)

stage, folder = sys.argv[1:]
most, done, start, cpu = [0], threading.Event(), time.perf_counter(), time.process_time()
imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
threading.Thread(target=sample, daemon=True).start()
more = getattr(scale_start, stage)(folder)
done.set()
own = resource.getrusage(resource.RUSAGE_SELF)
children = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({
    "seconds": round(time.perf_counter() - start, 2),
    "cpu_s": round(time.process_time() - cpu + children.ru_utime + children.ru_stime, 2),
    "imports_mib": round(imports / 1024),
    "peak_mib": round(max(own.ru_maxrss, children.ru_maxrss) / 1024),
    "open_files": max(most),
    **(more or {}),
}))
"""


class ScaleStartBench(Settings):
    """Measure the way from MEDS files to the first step of a run on a large generated cohort.

    The cohort holds ids, times, codes and numbers that mean nothing.
    """

    epilog: ClassVar[str] = """Examples

  Ten million rows in 5,000 files, with a record:
    python -m bench.scale_start --folder=FOLDER --save"""

    files: int = Field(5000, ge=1, description="Number of parquet files of the train split.")
    subjects: int = Field(
        100, ge=2, description=f"Number of subjects in each file, of {EVENTS} events each."
    )
    folder: str | None = Field(
        None, description="Folder in which a temporary one is made; `none` is the system's."
    )
    save: bool = Field(False, description="Append the result to bench/results/scale_start.jsonl.")


def generate(folder: Path, num_files: int, num_subjects: int) -> None:
    """Write a MEDS dataset with one file of tuning for a hundred of train."""
    (folder / "metadata").mkdir(parents=True)
    names = [f"LAB//{i}" for i in range(CODES)]
    about = {"code": names, "description": names, "parent_codes": [[] for _ in names]}
    lists = pa.array(about["parent_codes"], pa.list_(pa.string()))
    pq.write_table(pa.table(about | {"parent_codes": lists}), folder / "metadata" / "codes.parquet")
    text = json.dumps({"dataset_name": "generated", "meds_version": "0.4.1"})
    (folder / "metadata" / "dataset.json").write_text(text)
    of_split = {"train": num_files, "tuning": max(1, num_files // 100)}
    first = 0
    for split, num in of_split.items():
        (folder / "data" / split).mkdir(parents=True)
        for file in range(num):
            table = _table(np.random.default_rng(first), first, num_subjects, names)
            pq.write_table(table, folder / "data" / split / f"{file}.parquet")
            first += num_subjects


def _table(random: np.random.Generator, first: int, num: int, names: list[str]) -> pa.Table:
    rows = num * EVENTS
    times = random.integers(1, 60 * DAY, (num, EVENTS)).cumsum(1).ravel()
    codes = pa.DictionaryArray.from_arrays(random.integers(0, CODES, rows).astype(np.int32), names)
    columns = {
        "subject_id": np.repeat(np.arange(first, first + num), EVENTS),
        "time": pa.array(times, pa.timestamp("us")),
        "code": codes.cast(pa.string()),
        "numeric_value": random.normal(size=rows).astype(np.float32),
    }
    return pa.table(columns)


def index(folder: str) -> dict[str, Any]:
    """Open the dataset without an index, which is written, and digest it."""
    from smbfast.data.meds import MedsDataset
    from smbfast.data.source_index import FOLDER

    dataset = MedsDataset.open(Path(folder) / "meds", index=Path(folder) / "prepared" / FOLDER)
    dataset.digest(("train", "tuning"))
    return {}


def prepare(folder: str) -> dict[str, Any]:
    """Prepare the data by one process."""
    from smbfast.prepare import main

    root = Path(folder)
    main(
        [
            f"--path={root / 'meds'}",
            f"--out={root / 'prepared'}",
            "--window=128",
            "--splits=train,tuning",
            "--workers=1",
        ]
    )
    size = sum(f.stat().st_size for f in (root / "prepared" / "train").iterdir())
    return {"gigabytes": round(size / 1e9, 3)}


def first(folder: str) -> dict[str, Any]:
    """Open a run and take its first step."""
    from smbfast.run.open_run import OpenRun
    from smbfast.run.startup import losses_of
    from smbfast.run.step import LossScales, Updater, forward_backward
    from smbfast.settings import load

    root = Path(folder)
    paths = {"data.path": "meds", "data.prepared": "prepared", "run.dir": "run"}
    words = [f"{key}={root / path}" for key, path in paths.items()]
    settings = load("tiny", [*words, "run.device=cpu", "probe.labels=[]", "optim.batch=64"])
    run = OpenRun.open(settings)
    step = run.make_step(0)
    scales = LossScales.of(1.0, 0.0, step.num_labels, step.num_masked)
    forward_backward(losses_of(settings), run.encoder, None, step.micro_batches, scales)
    Updater(run.optimizer, settings.optim.clip).step(lr=1e-4)
    return {"windows": len(run.windows), "tokens": run.windows.num_tokens}


again = first


def measured(stage: str, folder: Path) -> dict[str, Any]:
    """Run a stage in a process of its own."""
    command = [sys.executable, "-c", MEASURE, stage, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{PROG}: {stage} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """The command: generate, measure each stage, save."""
    settings = command_line(ScaleStartBench, argv, prog=PROG)
    rows = []
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        generate(folder / "meds", settings.files, settings.subjects)
        for stage in STAGES:
            stamp = records.stamp("scale_start", "cpu")
            about = {"files": settings.files, "rows": settings.files * settings.subjects * EVENTS}
            rows.append(stamp | about | {"stage": stage} | measured(stage, folder))
            print({k: v for k, v in rows[-1].items() if k not in stamp}, flush=True)
    if settings.save:
        records.append("scale_start", rows)


if __name__ == "__main__":
    main()
