"""The tests that need a GPU, by pytest in eight processes; what is red is a result, not an end."""

import re
import signal
import subprocess
import sys
import tempfile
from functools import partial
from typing import Any

from bench.gpu.child import Bench, Item
from bench.gpu.driver import ROOT
from bench.gpu.journal import FAILED, KILLED, WRONG

PROCESSES = 8
NOTHING = 5  # pytest's status
RESERVE = 6.0  # seconds of the stage for what is not pytest
_STATE = "(?P<state>PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
# `[gw3] [ 12%] PASSED tests/ops/test_varlen.py::test_name[parameters]`, and without workers
# `tests/ops/test_varlen.py::test_name[parameters] PASSED    [ 12%]`
_ENDED = (
    re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_STATE} (?P<name>\S+::.+?)\s*$"),
    re.compile(rf"^(?P<name>\S+::.+?) {_STATE}\b.*\[ *\d+%\]$"),
)
_WHY = re.compile(r"^(FAILED|ERROR) (\S+::.+?)(?: - (.*))?$")


def items(bench: Bench) -> list[Item]:
    """One: pytest shares out the tests itself."""
    seconds = max(bench.seconds - RESERVE, 5.0)
    return [Item("tests", partial(_tests, bench, seconds), seconds + RESERVE)]


def _tests(bench: Bench, seconds: float) -> dict[str, Any]:
    where, *options = bench.sizes.tests
    # this command's `-n` and `--dist` come after those of the project, and win
    command = [sys.executable, "-m", "pytest", where, "-v", "-p", "no:cacheprovider"]
    command += ["-p", "bench.gpu.picked", f"-n{PROCESSES if bench.device == 'cuda' else 0}"]
    # those of statistics ask for scikit-survival, which is not there, and for no GPU
    command += ["--ignore=tests/statistics"]
    command += [f"--maxprocesses={PROCESSES}", "--dist=load", *options]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            end_with_workers(process)
        said.seek(0)
        text = said.read()
    print(text)
    return judged(text, code, seconds)


def end_with_workers(process: subprocess.Popen) -> None:
    """Kill pytest; its workers end when it is gone."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def judged(text: str, code: int | None, seconds: float) -> dict[str, Any]:
    """Counts and the names of what failed, from what pytest printed; code None: it was killed."""
    lines = text.splitlines()
    matches = [m for line in lines for pattern in _ENDED if (m := pattern.match(line))]
    ended = {m["name"]: m["state"].lower() for m in matches}
    reasons = {m[2]: m[3] or "" for line in lines if (m := _WHY.match(line))}
    states = list(ended.values())
    red = [name for name, state in ended.items() if state in ("failed", "error")]
    red += [name for name in reasons if name not in red]
    figures: dict[str, Any] = {
        "counts": {state: states.count(state) for state in dict.fromkeys(states)},
        "red": {name: reasons.get(name, "")[:200] for name in red},
    }
    if code is None:
        return figures | {"state": KILLED, "reason": f"over {seconds:.0f} s, {len(red)} red"}
    if code == NOTHING:
        return figures | {"state": FAILED, "reason": "no test was taken"}
    if code:
        last = (text.strip().splitlines() or ["nothing was printed"])[-1]
        return figures | {"state": WRONG, "reason": f"{len(red)} red: {last[:200]}"}
    return figures
