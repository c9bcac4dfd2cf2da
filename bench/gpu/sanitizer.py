"""Stage `ops` under compute-sanitizer: every access to memory that no allocation covers."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu import journal
from bench.gpu.child import Bench, Item
from bench.gpu.driver import ROOT
from bench.gpu.journal import ABSENT, FAILED, KILLED, WRONG

TOOL = "compute-sanitizer"
RESERVE = 8.0  # seconds of the stage for what is not the tool
_COUNT = re.compile(r"ERROR SUMMARY: (\d+) error")
_LINE = re.compile(r"Invalid|Error|at .*\+0x|leaked", re.IGNORECASE)


def items(bench: Bench) -> list[Item]:
    """One run of the tool."""
    seconds = max(bench.seconds - RESERVE, 10.0)
    return [Item("memcheck", partial(_memcheck, bench, seconds), seconds + RESERVE)]


def _memcheck(bench: Bench, seconds: float) -> dict[str, Any]:
    if not shutil.which(TOOL):
        return {"state": ABSENT, "reason": f"{TOOL} is not there"}
    with tempfile.TemporaryDirectory() as folder:
        out, job = Path(folder) / "ops.jsonl", Path(folder) / "job.json"
        content = {"stage": "ops", "module": "bench.gpu.ops", "fresh": False, "end": bench.end}
        content |= {"rehearsal": bench.rehearsal, "git": bench.git, "refused": {}, "done": []}
        job.write_text(json.dumps(content | {"out": str(out), "at": f"{folder}/at.json"}))
        command = [TOOL, "--tool", "memcheck", "--target-processes", "all"]
        command += [sys.executable, "-m", "bench.gpu.child", str(job)]
        # each tensor an allocation of its own, or neighbours in a cached block would hide an access
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=said, stderr=subprocess.STDOUT
            )
            try:
                code: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
                process.kill()
                process.wait()
            said.seek(0)
            text = said.read()
        covered = {k: r["state"] for k, r in journal.read([out], bench.rehearsal).items()}
    print(text[-20_000:])
    return judged(text, code, covered)


def judged(text: str, code: int | None, covered: dict[str, str]) -> dict[str, Any]:
    """What the tool counted, its first lines, and the items that ran under it."""
    counts = [int(n) for n in _COUNT.findall(text)]
    lines = [x for x in text.splitlines() if x.startswith("====") and _LINE.search(x)]
    figures: dict[str, Any] = {"errors": sum(counts) if counts else None, "lines": lines[:40]}
    figures["covered"] = covered
    if code is None:
        return figures | {"state": KILLED, "reason": f"{len(covered)} items before its time was up"}
    if not counts:
        return figures | {"state": FAILED, "reason": f"no summary, status {code}"}
    if sum(counts):
        return figures | {"state": WRONG, "reason": f"{sum(counts)} errors"}
    return figures
