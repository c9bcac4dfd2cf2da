"""python -m bench.scale_embed: a million decision nodes, by one process and by killed ones.

A dataset is made for the purpose: patients with 50 coded events and a decision node at each, in
files of 500 patients. A tiny model is trained on a few of them for two steps. The nodes are
then embedded by one process of `python -m smbfast.embed`, and again by several at once, of which
one is killed and started again at random moments. Both files must have the same bytes, nothing else
may be left, and no process may hold 2 GiB; else the command ends with status 1.

Shape suffixes: P patients of a file, V their events, K nodes.
"""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast import train
from smbfast.base.config import Settings, command_line
from smbfast.base.files import committed_folder
from smbfast.base.replace import sha256
from smbfast.data.node_parts import NODES as OF_A_PART

PROG = "python -m bench.scale_embed"
BAR_GIB = 2.0
NODES, EVENTS, PATIENTS = 50, 50, 500  # nodes and events of a patient, patients of a file
CODES = 20
DAY = 86_400_000_000  # microseconds
ROOT = Path(__file__).parent.parent
MEMORY = re.compile(r"^VmHWM:\s+(\d+) kB$", re.M)


class ScaleEmbedBench(Settings):
    """Embed a million nodes with a tiny model, alone and by processes that are killed.

    The dataset and the model lie in `work` and are made once for each number of nodes.
    """

    epilog: ClassVar[str] = """Examples

  A million nodes, with a record:
    python -m bench.scale_embed --work=WORK --save

  A hundredth of it, to see that it runs:
    python -m bench.scale_embed --work=WORK --nodes=10000 --kills=2"""

    work: Path = Field(description="Folder for the dataset, the model and the embeddings.")
    nodes: int = Field(1_000_000, ge=800, description="Number of decision nodes.")
    processes: int = Field(2, ge=1, description="Processes that embed together and are killed.")
    kills: int = Field(4, ge=1, description="How often one of them is killed and started again.")
    save: bool = Field(False, description="Append the results to bench/results/scale_embed.jsonl.")


def make(patients: int, out: Path) -> None:
    """Write events of so many patients, and the times of their nodes."""
    random = np.random.default_rng(0)
    (out / "data" / "train").mkdir(parents=True)
    (out / "data" / "tuning").mkdir(parents=True)
    nodes = []
    for number, first in enumerate(range(0, patients, PATIENTS)):
        subject_P = np.arange(first, min(first + PATIENTS, patients)) + 1
        time_V = np.sort(random.integers(0, 3650 * DAY, (len(subject_P), EVENTS)), axis=1)
        names = np.array([f"DX//{code}" for code in range(CODES)])
        columns = {
            "subject_id": pa.array(np.repeat(subject_P, EVENTS)),
            "time": pa.array(time_V.ravel()).cast(pa.timestamp("us")),
            "code": names[random.integers(0, CODES, time_V.size)],
            "numeric_value": pa.nulls(time_V.size, pa.float32()),
        }
        split = "tuning" if number == 0 and patients < PATIENTS else "train"
        for own in {split, "train"}:
            pq.write_table(pa.table(columns), out / "data" / own / f"{number}.parquet")
            columns["subject_id"] = pa.array(np.repeat(subject_P + patients, EVENTS))
        # at an event each, some time before its end
        nodes.append((np.repeat(subject_P, NODES), time_V[:, -NODES:].ravel()))
    subject_K, time_K = (np.concatenate(column) for column in zip(*nodes, strict=True))
    times = pa.array(time_K).cast(pa.timestamp("us"))
    pq.write_table(
        pa.table({"subject_id": subject_K, "prediction_time": times}), out / "nodes.parquet"
    )


def command(work: Path, data: Path, out: Path) -> list[str]:
    """The command that embeds all nodes of a dataset."""
    own = [f"--model={work / 'run' / 'final'}", f"--data={data}", f"--at={data / 'nodes.parquet'}"]
    return [sys.executable, "-m", "smbfast.embed", *own, f"--out={out}", "--device=cpu"]


class Process:
    """A process that embeds, and the most memory that it was seen to hold."""

    def __init__(self, words: list[str]) -> None:
        path = f"{ROOT}:{ROOT / 'kernels'}"
        self._process = subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.DEVNULL,
        )
        self.peak = 0

    def runs(self) -> bool:
        """Whether it runs; its memory is looked at."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            status = ""
        if seen := MEMORY.search(status):
            self.peak = max(self.peak, int(seen[1]) * 1024)
        return self._process.poll() is None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def require_success(self) -> None:
        """Raise a ValueError if it has ended with an error."""
        if self._process.wait():
            raise ValueError(f"a process has ended with status {self._process.returncode}")


def alone(words: list[str]) -> dict[str, Any]:
    """Embed by one process."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = Process(words)
    while process.runs():
        time.sleep(0.1)
    process.require_success()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": time.monotonic() - start, "cpu_s": cpu, "peak_gib": process.peak / 2**30}


def killed(words: list[str], bench: ScaleEmbedBench, parts: Path) -> dict[str, Any]:
    """Embed by several processes, one of which is killed now and then and started again.

    A kill comes at a random moment after so many parts are there; of all kills, these divide the
    work into equal shares.
    """
    random, start = np.random.default_rng(1), time.monotonic()
    processes = [Process(words) for _ in range(bench.processes)]
    peak, kills, at_kill = 0, 0, []
    total = -(-bench.nodes // OF_A_PART)
    while any([process.runs() for process in processes]):
        num = len(list(parts.glob("*.arrow")))
        if kills < bench.kills and num > total * (kills + 1) / (bench.kills + 1):
            time.sleep(random.uniform(0, 1))
            victim = int(random.integers(len(processes)))
            processes[victim].kill()
            peak = max(peak, processes[victim].peak)
            processes[victim] = Process(words)
            kills += 1
            at_kill.append(num)
        time.sleep(0.1)
    for process in processes:
        process.require_success()
        peak = max(peak, process.peak)
    wall = time.monotonic() - start
    return {"wall_s": wall, "peak_gib": peak / 2**30, "kills": kills, "parts_at_kill": at_kill}


def main(argv: list[str] | None = None) -> None:
    """Make, embed twice, compare."""
    bench = command_line(ScaleEmbedBench, argv, prog=PROG)
    work, patients = bench.work, bench.nodes // NODES
    data = work / f"nodes-{bench.nodes}"
    stamp = records.stamp("scale_embed", "cpu")
    for folder, num in ((work / "few", 400), (data, patients)):
        if not folder.exists():
            with committed_folder(folder) as staging:
                make(num, staging)
    if not (work / "run" / "final").exists():
        short = [
            "--phases.0.steps=1",
            "--phases.1.steps=1",
            "--objective.self_check=false",
            "--objective.min_future=2",
        ]
        words = [f"--data.path={work / 'few'}", f"--run.dir={work / 'run'}", "--data.format=codes"]
        train.main(["tiny", *words, *short, "--run.threads=1"])
    out = work / "embeddings"
    for file in out.glob("*.parquet"):
        file.unlink()
    one, other = out / "alone.parquet", out / "killed.parquet"
    by_one = alone(command(work, data, one))
    print(f"alone: {by_one}", flush=True)
    parts = other.with_name(f"{other.name}.parts")
    by_killed = killed(command(work, data, other), bench, parts)
    print(f"killed: {by_killed}", flush=True)
    same = sha256(one) == sha256(other)
    left = sorted(p.name for p in out.iterdir() if p not in (one, other))
    about = {"nodes": pq.read_metadata(one).num_rows, "bytes": one.stat().st_size}
    both = {"alone": by_one, "killed": by_killed, "processes": bench.processes}
    record = stamp | about | both | {"same_bytes": same, "left": left}
    print(f"{about['nodes']:,} nodes: the same bytes: {same}; left besides: {left or 'nothing'}")
    if bench.save:
        print(f"a record appended to {records.append('scale_embed', [record])}")
    peak = max(by_one["peak_gib"], by_killed["peak_gib"])
    if not same or left or peak > BAR_GIB:
        raise SystemExit(f"{PROG}: not the same bytes, or something is left, or {peak:.2f} GiB")


if __name__ == "__main__":
    main()
