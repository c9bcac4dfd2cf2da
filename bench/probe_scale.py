"""python -m bench.probe_scale: wall seconds, CPU seconds and memory of a probe of a million nodes.

A dataset is made for the purpose: patients with four decision nodes each and a few events, a binary
task and one of time to event, and a file of embeddings that hold a part of what the outcomes come
from, with the falling spectrum that embeddings have. `python -m smbfast.probe` then runs as a
process of its own, with all baselines and intervals, on `threads` threads. Above 30 minutes or 8
GiB at 1,000,000 nodes it ends with status 1.

Shape suffixes: P patients of a part, N their nodes, V their events, D embedding width, L latent
dimensions.
"""

import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.base.files import committed_folder

PROG = "python -m bench.probe_scale"
BAR_MINUTES, BAR_GIB, BAR_NODES = 30.0, 8.0, 1_000_000
NODES, PART, LATENT = 4, 25_000, 8  # nodes of a patient, patients at once, latent dimensions
SHARES = {"train": 0.7, "tuning": 0.15, "held_out": 0.15}
VALUES, CODES = 40, 160  # codes with values, and without
DAY = 86_400_000_000  # microseconds
BIRTH = -10 * 365 * DAY
ROOT = Path(__file__).parent.parent
MEMORY = re.compile(r"^(VmRSS|RssAnon):\s+(\d+) kB$", re.M)
STAGE = re.compile(r"^probe +([0-9.]+) s  (.*)$")


class ProbeScaleBench(Settings):
    """Probe a million simulated nodes, and measure what it takes.

    The dataset and the embeddings lie in `work` and are made once for each size.
    """

    epilog: ClassVar[str] = """Examples

  A million nodes of width 256, with a record:
    python -m bench.probe_scale --work=WORK --save

  A tenth of it, to see where time goes:
    python -m bench.probe_scale --work=WORK --nodes=100000"""

    work: Path = Field(description="Folder for the dataset, the embeddings and what probe writes.")
    nodes: int = Field(BAR_NODES, ge=1000, description="Number of decision nodes, of all splits.")
    width: int = Field(256, ge=LATENT, description="Width of an embedding.")
    events: int = Field(12, ge=1, description="Mean number of events of a patient.")
    threads: int = Field(2, ge=1, description="Threads of the probe.")
    save: bool = Field(False, description="Append the results to bench/results/probe_scale.jsonl.")


def make(bench: ProbeScaleBench, out: Path) -> None:
    """Write events, labels and embeddings, split by split in parts of 25,000 patients."""
    random = np.random.default_rng(0)
    mixing_LD = random.standard_normal((LATENT, bench.width))
    spectrum_D = np.arange(1, bench.width + 1) ** -0.5
    turn_DD, _ = np.linalg.qr(random.standard_normal((bench.width, bench.width)))
    (out / "metadata").mkdir(parents=True)
    names = [f"LAB//{i}" for i in range(VALUES)] + [f"DX//{i}" for i in range(CODES)]
    pq.write_table(pa.table({"code": names, "description": names}), out / "metadata/codes.parquet")
    (out / "metadata" / "dataset.json").write_text('{"meds_version": "0.4"}')
    vector = pa.list_(pa.float32(), bench.width)
    keys = {"subject_id": pa.int64(), "prediction_time": pa.timestamp("us")}
    schema = pa.schema({**keys, "split": pa.string(), "embedding": vector})
    first = 1
    with pq.ParquetWriter(out / "embeddings.parquet", schema) as writer:
        for split, share in SHARES.items():
            left, number, labels = round(bench.nodes * share / NODES), 0, []
            (out / "data" / split).mkdir(parents=True)
            while left:
                size = min(left, PART)
                latent_PL = random.standard_normal((size, LATENT))
                subject_P = np.arange(first, first + size)
                table = events(bench, random, subject_P, latent_PL, np.array(names))
                pq.write_table(table, out / "data" / split / f"{number}.parquet")
                labels.append(outcomes(random, subject_P, latent_PL))
                noise_ND = random.standard_normal((size * NODES, bench.width)) * spectrum_D
                signal_ND = np.repeat(latent_PL @ mixing_LD, NODES, 0)
                value_ND = (0.2 * signal_ND + noise_ND @ turn_DD).astype(np.float32)
                flat = pa.array(value_ND.ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, bench.width)
                columns = [*labels[-1][:2], pa.array([split] * len(value_ND)), vectors]
                writer.write_table(pa.table(columns, schema=schema))
                first, left, number = first + size, left - size, number + 1
            write_labels(out, split, labels)


def events(
    bench: ProbeScaleBench,
    random: np.random.Generator,
    subject_P: np.ndarray,
    latent_PL: np.ndarray,
    names: np.ndarray,
) -> pa.Table:
    """Return a birth, a sex and the events of each patient in the year before the last node."""
    num = 2 + random.poisson(bench.events, len(subject_P))
    at_V = np.repeat(np.arange(len(subject_P)), num)
    starts = np.cumsum(num) - num
    code_V = random.integers(len(names), size=len(at_V))
    time_V = random.integers(0, 365 * DAY, len(at_V))
    # a lab says one of the latent dimensions, with noise as large as itself
    value_V = latent_PL[at_V, code_V % LATENT] + random.standard_normal(len(at_V))
    name_V = names[code_V].astype(object)
    lab_V = code_V < VALUES
    sex = random.integers(2, size=len(subject_P))
    name_V[starts] = np.array(["GENDER//F", "GENDER//M"], dtype=object)[sex]
    name_V[starts + 1] = "MEDS_BIRTH"
    time_V[starts], time_V[starts + 1] = np.iinfo(np.int64).min, BIRTH
    lab_V[starts] = lab_V[starts + 1] = False
    order_V = np.lexsort((time_V, at_V))
    timeless_V = np.zeros(len(at_V), bool)
    timeless_V[starts] = True
    columns = {
        "subject_id": subject_P[at_V],
        "time": pa.array(time_V, mask=timeless_V).cast(pa.timestamp("us")),
        "code": pa.array(name_V, pa.string()),
        "numeric_value": pa.array(value_V.astype(np.float32), mask=~lab_V),
    }
    return pa.table(columns).take(pa.array(order_V))


def outcomes(
    random: np.random.Generator, subject_P: np.ndarray, latent_PL: np.ndarray
) -> tuple[pa.Array, pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Return keys of the nodes, a binary outcome of a tenth, and times to an event of a half."""
    risk_N = np.repeat(latent_PL @ np.linspace(1, 0.2, LATENT), NODES)
    time_N = np.tile((1 + np.arange(NODES)) * 90 * DAY, len(subject_P))
    true_N = random.random(len(risk_N)) < 1 / (1 + np.exp(3.0 - risk_N))
    days_N = random.exponential(365, len(risk_N)) * np.exp(-0.7 * risk_N)
    end_N = random.uniform(30, 1095, len(risk_N))
    # whole days, so that times are tied as they are in records
    duration_N = np.ceil(np.minimum(days_N, end_N))
    keys = pa.array(np.repeat(subject_P, NODES)), pa.array(time_N).cast(pa.timestamp("us"))
    return *keys, true_N, duration_N, days_N <= end_N


def write_labels(out: Path, split: str, labels: list[tuple[Any, ...]]) -> None:
    """Write the two tasks of a split."""
    subject, when = (pa.chunked_array([part[place] for part in labels]) for place in (0, 1))
    keys = {"subject_id": subject, "prediction_time": when}
    true_N, duration_N, event_N = (
        np.concatenate([x[place] for x in labels]) for place in (2, 3, 4)
    )
    tasks = {
        "within": {"boolean_value": true_N},
        "until": {"duration_days": duration_N, "event": event_N},
    }
    for task, columns in tasks.items():
        (out / "labels" / task).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(keys | columns), out / "labels" / task / f"{split}.parquet")


class Watch(threading.Thread):
    """Reads twice a second how much memory a process holds, in GiB.

    own: without pages of files that it maps, which the system takes back when it needs them; whole:
    with them.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status, self._end = Path(f"/proc/{pid}/status"), threading.Event()
        self._stat, self._spent = Path(f"/proc/{pid}/stat"), 0.0
        self.own = self.whole = self.recent = 0.0

    def run(self) -> None:
        """Read until `stop`."""
        while not self._end.wait(0.5):
            try:
                text = self._status.read_text()
            except OSError:
                return
            sizes = {key: int(kib) / 2**20 for key, kib in MEMORY.findall(text)}
            own = sizes.get("RssAnon", 0.0)
            self.recent = max(self.recent, own)
            self.own = max(self.own, own)
            self.whole = max(self.whole, sizes.get("VmRSS", 0.0))

    def since(self) -> tuple[float, float]:
        """Return the peak of `own` and the CPU seconds since the last call."""
        recent, self.recent = self.recent, 0.0
        before, self._spent = self._spent, self._cpu()
        return round(recent, 2), round(self._spent - before, 1)

    def _cpu(self) -> float:
        """Return the CPU seconds of the process; those of the last call when it has ended."""
        try:
            fields = self._stat.read_text().rpartition(")")[2].split()
        except OSError:
            return self._spent
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Read no more."""
        self._end.set()


def probe(bench: ProbeScaleBench, data: Path) -> dict[str, Any]:
    """Run the probe, and return what it took, and of each stage when it began, what it was, its
    peak in GiB and its CPU seconds.

    Raises:
        ValueError: the probe failed.
    """
    out = data.parent / f"{data.name}-probe"
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "smbfast.probe", f"--embeddings={data / 'embeddings.parquet'}"]
    words += [f"--data={data}", f"--out={out}", "--labels=within,until"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    own = paths | dict.fromkeys(names, str(bench.threads)) | {"PYTHONUNBUFFERED": "1"}
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        words, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    watch, lines = Watch(process.pid), []
    stages: list[list[Any]] = [[0.0, "labels and embeddings", 0.0, 0.0]]
    watch.start()
    assert process.stdout is not None
    for line in process.stdout:
        if said := STAGE.match(line):
            stages[-1][2:] = watch.since()
            stages.append([float(said[1]), said[2], 0.0, 0.0])
        else:
            lines.append(line)
        print(line, end="", file=sys.stderr, flush=True)
    failed = process.wait()
    watch.stop()
    if failed:
        raise ValueError(f"the probe ended with {failed}: {''.join(lines[-1:]).strip()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # of a process that has ended nothing can be read: what is left is the last stage's
    stages[-1][2:] = watch.since()[0], round(cpu - sum(stage[3] for stage in stages), 1)
    return {
        "wall_s": round(time.monotonic() - begun, 1),
        "cpu_s": round(cpu, 1),
        "peak_gib": round(watch.own, 2),
        "peak_with_files_gib": round(watch.whole, 2),
        "stages": stages,
    }


def main(argv: list[str] | None = None) -> None:
    """Make what is missing, measure, print and, if asked, record."""
    bench = command_line(ProbeScaleBench, argv, prog=PROG)
    data = bench.work / f"nodes-{bench.nodes}-{bench.width}-{bench.events}"
    if not data.is_dir():
        with committed_folder(data) as staging:
            make(bench, staging)
    stamp = records.stamp("probe_scale", "cpu") | {"threads": bench.threads}
    try:
        took = probe(bench, data)
    except ValueError as error:
        raise SystemExit(f"{PROG}: {error}") from None
    record = stamp | {"nodes": bench.nodes, "width": bench.width, "events": bench.events} | took
    for start, (began, what, peak, cpu) in enumerate(took["stages"]):
        rest = [*(s[0] for s in took["stages"][start + 1 :]), took["wall_s"]]
        print(f"{rest[0] - began:8.1f} s  {cpu:7.1f} CPU s  {peak:5.2f} GiB  {what}")
    minutes, gib = took["wall_s"] / 60, took["peak_gib"]
    print(f"{bench.nodes:,} nodes: {minutes:.1f} minutes, {took['cpu_s']:.0f} CPU s, {gib:.2f} GiB")
    if bench.save:
        print(f"written to {records.append('probe_scale', [record])}")
    if bench.nodes >= BAR_NODES and (minutes > BAR_MINUTES or gib > BAR_GIB):
        raise SystemExit(f"{PROG}: the bars are {BAR_MINUTES:g} minutes and {BAR_GIB:g} GiB")


if __name__ == "__main__":
    main()
