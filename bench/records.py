"""What every record of `bench/results/*.jsonl` says besides its figures, and tables for people."""

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from smbfast.base.runtime import git_state, versions

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """The model of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def stamp(bench: str, device: str) -> dict[str, Any]:
    """The part that is the same in every record of a run."""
    return {
        "bench": bench,
        "device": device,
        "device_name": device_name(device),
        "driver": _driver() if device == "cuda" else "",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of other processes, before the run
        "versions": versions(),
        "git": git_state(),
        "at": time.strftime("%Y-%m-%d"),
    }


def append(bench: str, records: list[dict[str, Any]]) -> Path:
    """Add a line for each record to the results of a bench."""
    path = RESULTS / f"{bench}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def columns(rows: list[list[str]], indent: str = "") -> str:
    """Rows of cells, aligned; a row with fewer cells ends in free text."""
    full = max(len(row) for row in rows)
    widths = [
        max((len(row[i]) for row in rows if len(row) == full), default=0) for i in range(full)
    ]
    widths[0] = max(len(row[0]) for row in rows)
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.TimeoutExpired, IndexError):
        return ""
