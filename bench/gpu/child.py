"""The process of one stage: `python -m bench.gpu.child JOB`, started by `bench.gpu.driver`.

A stage's module has `items(bench)`: what it measures, in order. Each becomes a record, also where
it fails. After an error that the GPU does not recover from a new process goes on with the next.
"""

import contextlib
import gc
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from smbkernels.registry import OPS, use

from bench import records
from bench.gpu import journal
from bench.gpu.driver import MORE, SPOILED
from bench.gpu.journal import DONE, FAILED
from bench.gpu.sizes import Sizes

# of errors after which every later call of the process fails too
STICKY = ("CUDA error", "illegal memory access", "device-side assert", "unspecified launch failure")


@dataclass(frozen=True)
class Item:
    """One thing to be measured.

    Attributes:
        name: its key behind that of the stage.
        measure: returns the figures; `state` and `reason` among them say what is not right.
        limit: seconds after which the process is killed.
    """

    name: str
    measure: Callable[[], dict[str, Any]]
    limit: float = 60.0


@dataclass(frozen=True)
class Bench:
    """What a stage's module is given."""

    stage: str
    device: str
    rehearsal: str
    refused: dict[str, list[str]]  # backends, by operation, that stage `ops` did not find right
    end: float  # of the stage, by time.time()
    git: str

    @property
    def seconds(self) -> float:
        """What the stage still has."""
        return self.end - time.time()

    @property
    def sizes(self) -> Sizes:
        """Full on a GPU; on a pretended one of few layers; tiny where a CPU rehearses."""
        sizes = Sizes.of(self.device)
        return replace(sizes, layers=(1, 2)) if self.rehearsal == "fake" else sizes

    def wait(self) -> None:
        """For what the GPU still does."""
        if self.device == "cuda" and self.rehearsal != "fake":
            torch.cuda.synchronize()


def choices(refused: dict[str, list[str]], device: str) -> dict[str, str]:
    """The backend to use of each operation whose own choice would be a refused one."""
    taken = {}
    for name, backends in refused.items():
        status = OPS[name].status(device)
        ready = [
            b.name for b in OPS[name].backends if device in b.devices and status[b.name] == "ok"
        ]
        if set(ready) & set(backends):
            taken[name] = next((b for b in ready if b not in backends), "torch")
    return taken


@contextlib.contextmanager
def chosen_backends(bench: Bench) -> Iterator[dict[str, str]]:
    """No refused backend is chosen in the block; stage `ops` itself asks for each by name."""
    taken = choices(bench.refused, bench.device)
    with use(**taken):
        yield taken


def main(argv: list[str]) -> int:
    job = json.loads(Path(argv[0]).read_text())
    device = "cpu" if job["rehearsal"] == "cpu" else "cuda"
    bench = Bench(
        *(job["stage"], device, job["rehearsal"]),
        refused={name: b for name, b in job["refused"].items() if name in OPS},
        end=job["end"],
        git=job["git"],
    )
    stamp = records.stamp("gpu", "cpu" if job["rehearsal"] else device)
    stamp |= {"rehearsal": job["rehearsal"], "git": job["git"] or stamp["git"]}
    module = importlib.import_module(job["module"])
    with chosen_backends(bench) as taken:
        stamp["use"] = taken
        done = set(job["done"])
        waiting = [i for i in module.items(bench) if f"{bench.stage}/{i.name}" not in done]
        for place, item in enumerate(waiting):
            spoiled = _measured(item, f"{bench.stage}/{item.name}", stamp, job)
            if spoiled:
                return SPOILED
            if job["fresh"] and place + 1 < len(waiting):
                return MORE
    return 0


def _measured(item: Item, key: str, stamp: dict, job: dict) -> bool:
    """Measure an item and append its record; whether the process is of no use any more."""
    at = Path(job["at"])
    new = at.with_suffix(".new")
    new.write_text(json.dumps({"key": key, "limit": item.limit}))
    os.replace(new, at)
    print(f"-- {key}", flush=True)
    torch.manual_seed(0)
    began, spoiled = time.perf_counter(), False
    try:
        figures = item.measure()
    except Exception as error:  # what one item cannot do must not end the stage
        traceback.print_exc()
        figures = {"state": FAILED, "reason": reason_of(error)}
        spoiled = any(word in str(error) for word in STICKY)
    if job["rehearsal"] == "fake":  # nothing was computed: that it ran is all there is to say
        figures = {name: figures[name] for name in ("state", "reason") if name in figures}
    figures = {
        "key": key,
        "state": DONE,
        "seconds": round(time.perf_counter() - began, 2),
    } | figures
    journal.append(Path(job["out"]), stamp | figures)
    gc.collect()
    if torch.cuda.is_initialized() and not spoiled:
        torch.cuda.empty_cache()
    return spoiled


def reason_of(error: BaseException) -> str:
    """An error in a line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "not enough memory"
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
