"""python -m bench.prepare: events a second of `smbfast.prepare`, and whether its memory is flat.

On simulated patients (default), or on a MEDS folder repeated with other subject ids and jittered
values (`--data=FOLDER --copies=N`), so that lines repeat no more than they do in real data.
Tokenization and writing are counted; BPE training is not; starting worker processes is.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.base.runtime import git_state, versions
from smbfast.simulation.dataset import simulate

# in a process of its own, so that the peak memory is that of preparing alone
CHILD = """
import json, resource, sys, time
import smbfast.data.preparing as preparing
from smbfast.prepare import main

make_shards, spent = preparing._make_shards, []

def timed(*arguments):
    start = time.perf_counter()
    made = make_shards(*arguments)
    spent.append(time.perf_counter() - start)
    return made

preparing._make_shards = timed
main(sys.argv[1:])
own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"seconds": spent[0], "peak_mib": max(own, workers) / 1024}))
"""


class PrepareBench(Settings):
    """Measure how many events a second `smbfast.prepare` turns into token shards.

    It also prints the peak memory of preparing all of the data and of preparing a part of it, which
    should be about the same.
    """

    epilog: ClassVar[str] = """Examples

  Simulated patients, for which nothing needs to be downloaded:
    python -m bench.prepare --patients=20000

  A dataset of your own, repeated six times:
    python -m bench.prepare --data=MEDS_FOLDER --copies=6"""

    data: str | None = Field(
        None,
        description="Folder of a MEDS dataset, whose training split is measured. `none` simulates "
        "patients instead.",
    )
    copies: int = Field(
        4,
        ge=1,
        description="How often the training split of `data` is repeated. Each copy has other "
        "subject ids and slightly other values. Without `data` it has no effect.",
    )
    patients: int = Field(
        250_000,
        ge=1000,
        description="Number of simulated patients, who have about 35 events each. With `data` it "
        "has no effect.",
    )
    save: bool = Field(False, description="Append the result to bench/results/prepare.jsonl.")


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


def measure(data: Path, work: Path) -> dict:
    """Prepare `data` once: events, seconds of the shards, peak memory of one process."""
    arguments = [f"--path={data}", f"--out={work}", "--splits=train"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
    )
    cost = json.loads(done.stdout.strip().splitlines()[-1])
    counts = json.loads((work / "prepare.json").read_text())["counts"]["train"]
    rate = round(counts["events"] / cost["seconds"])
    return {"events": counts["events"], "tokens": counts["tokens"], "events_per_s": rate, **cost}


def main(argv: list[str] | None = None) -> None:
    settings = command_line(PrepareBench, argv, prog="python -m bench.prepare")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        results = {}
        for name, share in (("part", 10), ("whole", 1)):
            if settings.data:
                copies = max(settings.copies // share, 1)
                repeat(Path(settings.data), work / name, copies)
            else:
                simulate(work / name, settings.patients // share, 0)
            results[name] = measure(work / name, work / f"{name}-shards")
    record = {
        "bench": "prepare",
        "data": Path(settings.data).name if settings.data else "simulated",
        **results["whole"],
        "share": f"{results['part']['events'] / results['whole']['events']:.0%}",
        "peak_mib_part": results["part"]["peak_mib"],
        "versions": versions(),
        "git": git_state(),
        "at": time.strftime("%Y-%m-%d"),
    }
    print(
        f"{record['data']}: {record['events']:,} events, {record['tokens']:,} tokens in "
        f"{record['seconds']:.1f} s: {record['events_per_s']:,} events/s; peak memory of a process "
        f"{record['peak_mib']:.0f} MiB ({record['peak_mib_part']:.0f} on {record['share']} of it)"
    )
    if settings.save:
        records.append("prepare", [record])


if __name__ == "__main__":
    main()
