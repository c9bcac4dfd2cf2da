"""python -m bench.start_windows: how long a run with millions of windows takes to its first step.

Short synthetic timelines, one window each, stand in for a large cohort. Three processes are
measured from the end of their imports on: one that makes the table of windows, one that opens a run
and takes its first step after the page cache was emptied of the shards, and a training that may
open 256 files at a time. Pages of token ids that the second one brought into memory are counted
(mincore) and compared with those that its windows lie in.
"""

import ctypes
import json
import mmap
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.batch import UNKNOWN
from smbfast.data.array_file import ArrayFile
from smbfast.data.prepared import Prepared, ShardRecord
from smbfast.data.preparing import prepare
from smbfast.data.shards import ABOUT, TABLE, Shard, ShardWriter
from smbfast.settings import DataSettings
from smbfast.simulation.dataset import simulate

PROG = "python -m bench.start_windows"
SECONDS, MEMORY, OPEN_FILES = 30.0, 1024, 256  # to the first step; MiB; what a training may open
HEADER = 3  # tokens of a timeline before its first moment, which has two: a gap and an event
MEASURE = """
import json, os, resource, sys, time
import smbfast.run.loop, smbfast.train
from bench import start_windows
start = time.perf_counter()
found = start_windows.{stage}(*sys.argv[1:])
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps(dict(found or {{}}, seconds=round(seconds, 2), peak_mib=round(peak))))
"""


class StartBench(Settings):
    """Measure the start of a run on millions of windows, and the making of their table.

    A first step later than 30 seconds after the imports, more than 1 GiB of memory, a page of token
    ids that was read in vain, or a training that fails under `ulimit -n 256` ends with status 1.
    """

    epilog: ClassVar[str] = """Examples

  Ten million windows in a thousand shards, which take 6 GB of disk:
    python -m bench.start_windows --folder=FOLDER --save"""

    windows: int = Field(10_000_000, ge=1000, description="Number of windows, all shards together.")
    shards: int = Field(1000, ge=1, description="Number of shards of the train split.")
    folder: str | None = Field(
        None, description="Folder in which a temporary one is made; `none` is the system's."
    )
    save: bool = Field(False, description="Append the result to bench/results/start_windows.jsonl.")


def synthetic(folder: Path, num_windows: int, num_shards: int) -> None:
    """Prepare a simulated cohort and put synthetic shards in the place of its own."""
    simulate(folder / "meds", 60, 0)
    data = DataSettings(path=str(folder / "meds"), window=128, workers=1)
    made = prepare(data, folder / "prepared", None, ("train", "tuning"))
    num_ids = len(made.tokenizer)
    each = -(-num_windows // num_shards)
    train = [(f"train/{s}.shard", each) for s in range(num_shards)]
    shards = {"train": train, "tuning": [("tuning/0.shard", 1000)]}
    record: dict[str, Any] = dict(made.record, shards={})
    for split, files in shards.items():
        record["shards"][split] = [
            _shard(made.folder, name, num, seed, num_ids) for seed, (name, num) in enumerate(files)
        ]
    (made.folder / "prepare.json").write_text(json.dumps(record))


def _shard(folder: Path, name: str, num: int, seed: int, num_ids: int) -> ShardRecord:
    random = np.random.default_rng(seed)
    buckets_S = random.integers(10, 15, num)  # moments of one event each
    num_S3 = np.stack([HEADER + 2 * buckets_S, buckets_S, buckets_S], 1)
    total = int(buckets_S.sum())
    turn = np.arange(total) - np.repeat(buckets_S.cumsum() - buckets_S, buckets_S)
    end = (HEADER + 2 * (turn + 1)).astype(np.int32)
    times = (turn * 86_400_000_000).astype(np.int64)
    numbers, zeros, last = np.arange(num), np.zeros(num, int), (buckets_S - 1) * 86_400_000_000
    about_S5 = np.stack(
        [seed * num + numbers, zeros, zeros + HEADER, last, np.where(numbers % 2, last, UNKNOWN)], 1
    )
    columns = {
        "ids_T": random.integers(5, num_ids, int(num_S3[:, 0].sum()), np.int32),
        "bucket_end_B": end,
        "bucket_time_B": times,
        "bucket_head_B": np.ones(total, np.uint16),
        "line_start_L": end - 1,
        "line_end_L": end,
        "line_time_L": times,
        "line_section_L": np.full(total, 3, np.uint8),
        "line_code_L": random.integers(5, num_ids, total, np.int32),
    }
    with ShardWriter(folder / name) as writer:
        writer.add_block(about_S5, num_S3, columns)
        writer.index |= {"split": name.split("/")[0], "counts": {}, "unmapped": {}}
    shard = Shard(folder / name)
    tokens = len(columns["ids_T"])
    return ShardRecord(file=name, sha256=shard.sha256, timelines=num, tokens=tokens)


def build(folder: str) -> dict:
    """Make the tables of windows with the rules of the preset that `first_step` takes."""
    run = _settings(folder, "build")
    prepared = Prepared.open(Path(folder) / "prepared")
    start = time.perf_counter()
    table = prepared.windows("train", run.data.window, run.objective)
    seconds = time.perf_counter() - start
    prepared.windows("tuning", run.data.window, run.objective)
    return {"windows": len(table), "us_a_window": round(seconds / len(table) * 1e6, 2)}


def first_step(folder: str) -> dict:
    """Open a run, make its fixed batches and its first step; return the windows that were made."""
    from smbfast.data.windows import WindowSet
    from smbfast.run.fixed import Fixed
    from smbfast.run.open_run import OpenRun
    from smbfast.run.startup import losses_of
    from smbfast.run.step import LossScales, Updater, forward_backward

    settings = _settings(folder, "first")
    made: list[tuple[str, int, int, int]] = []
    honest = WindowSet.__getitem__

    def noted(table: WindowSet, index: int) -> Any:
        shard, timeline, start, end, _ = table.place_W5[index].tolist()
        made.append((str(table.shards[shard].path), timeline, start, end))  # type: ignore[union-attr]
        return honest(table, index)

    WindowSet.__getitem__ = noted  # type: ignore[method-assign]
    run = OpenRun.open(settings)
    Fixed.of(run)
    step = run.make_step(0)
    scales = LossScales.of(1.0, 0.0, step.num_labels, step.num_masked)
    forward_backward(losses_of(settings), run.encoder, None, step.micro_batches, scales)
    Updater(run.optimizer, settings.optim.clip).step(lr=1e-4)
    return {"made": made}


def train(folder: str) -> dict:
    """Train with few open files; a step of 64 windows is of almost as many shards."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    from smbfast.train import main

    main(["tiny", *_words(folder, "train"), "--optim.batch=64"])
    return {}


def _words(folder: str, name: str) -> list[str]:
    paths = {
        "data.path": "meds",
        "data.prepared": "prepared",
        "run.dir": f"runs/{name}",
    }
    return [f"--{key}={Path(folder) / path}" for key, path in paths.items()] + [
        "--run.device=cpu",
        "--probe.labels=[]",
    ]


def _settings(folder: str, name: str) -> Any:
    from smbfast.settings import load

    return load("tiny", [word.removeprefix("--") for word in _words(folder, name)])


def measured(stage: str, folder: Path) -> dict:
    """Run a stage in a process of its own."""
    command = [sys.executable, "-c", MEASURE.format(stage=stage), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{PROG}: {stage} failed\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def forget(files: list[Path]) -> None:
    """Ask the system to drop the pages of files from its cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pages_of_ids(path: Path) -> set[int]:
    """Return the pages of a shard in memory that hold nothing but token ids."""
    place = ArrayFile.open(path).places["ids_T"]
    size = path.stat().st_size
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    flags = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
    address = ctypes.addressof(ctypes.c_ubyte.from_buffer(whole))
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags):
        raise OSError("mincore failed")
    resident = np.flatnonzero(np.frombuffer(flags, np.uint8) & 1)
    first = -(-place.first // mmap.PAGESIZE)
    return set(resident[resident >= first].tolist())


def needed_pages(made: list[list]) -> dict[str, set[int]]:
    """Return the pages of token ids in which windows lie, with those of their demographics."""
    needed: dict[str, set[int]] = {}
    for path, timeline, start, end in made:
        file = ArrayFile.open(Path(path))
        rows = file.mapped()["timelines"].reshape(-1, len(TABLE))
        own = int(rows[timeline - 1, len(ABOUT)]) if timeline else 0
        for a, b in ((0, HEADER), (start, end)):
            first, last = (file.places["ids_T"].first + 4 * (own + t) for t in (a, b - 1))
            pages = range(first // mmap.PAGESIZE, last // mmap.PAGESIZE + 1)
            needed.setdefault(path, set()).update(pages)
    return needed


def main(argv: list[str] | None = None) -> None:
    """The command: make the folder, run the stages, judge and save."""
    settings = command_line(StartBench, argv, prog=PROG)
    stamp = records.stamp("start_windows", "cpu")
    with tempfile.TemporaryDirectory(dir=settings.folder) as name:
        folder = Path(name)
        synthetic(folder, settings.windows, settings.shards)
        files = [folder / "prepared" / f"train/{s}.shard" for s in range(settings.shards)]
        gigabytes = sum(f.stat().st_size for f in files) / 1e9
        result = {"build": measured("build", folder)}
        forget(files)
        cached = sum(len(pages_of_ids(f)) for f in files)
        result["first_step"] = measured("first_step", folder)
        needed = needed_pages(result["first_step"].pop("made"))
        read = {f: pages_of_ids(f) for f in files}
        vain = sum(len(pages - needed.get(str(f), set())) for f, pages in read.items())
        result["pages_of_ids"] = {
            "before": cached,
            "read": sum(map(len, read.values())),
            "needed": sum(len(v) for f, v in needed.items() if "/train/" in f),
            "in_vain": vain,
        }
        result["train"] = measured("train", folder)
    row = {"shards": settings.shards, "gigabytes": round(gigabytes, 2), **result}
    print(json.dumps(row, indent=1))
    first = result["first_step"]
    met = first["seconds"] <= SECONDS and first["peak_mib"] <= MEMORY and vain == cached == 0
    print(f"first step in {SECONDS:.0f} s and {MEMORY} MiB, no page in vain: {met}")
    if settings.save:
        records.append("start_windows", [stamp | row])
    if not met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
