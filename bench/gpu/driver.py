"""Runs the stages of a call, each in a process of its own with its own time.

A stage's process (`bench.gpu.child`) appends a record for each of its items, and before an item
writes which one it begins. So a process that hangs, crashes or spoils its GPU costs one item: that
item is marked, and a new process goes on with the next. Nothing here needs more than Python.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu import journal
from bench.gpu.journal import DONE, FAILED, KILLED, Record
from bench.gpu.plan import CALLS, INSTALL, STAGES, Stage
from bench.gpu.wheels import install

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "gpu.jsonl"  # of earlier calls
# exit statuses of a process that leaves the next item to a fresh one: as it should, and because its
# GPU does not recover from an error
MORE, SPOILED = 17, 18
TRIES = 40  # processes of a stage: an end to what would begin again and again
MARGIN = 3.0  # seconds before the deadline at which all is ended
POLL = 0.05  # seconds


@dataclass
class Run:
    """A call: what is to be run, where its records go, and what is known by now."""

    out: Path
    work: Path  # a folder that outlives a call: unpacked wheels and compiled kernels
    deadline: float  # of time.monotonic()
    rehearsal: str = ""  # cpu or fake; empty: on a GPU
    git: str = ""
    log: Path = Path(os.devnull)  # what the processes print
    slack: float = 1.0  # how many times as long everything may take: for a busy machine
    earlier: list[Path] = field(default_factory=lambda: [RESULTS])
    again: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        paths = [*self.earlier, self.out]
        self.latest = journal.without(journal.read(paths, self.rehearsal), self.again)

    @property
    def left(self) -> float:
        """Seconds until all is ended."""
        return self.deadline - MARGIN - time.monotonic()

    def add(self, key: str, state: str, **more: Any) -> Record:
        """Append a record that no process could write itself."""
        record = {"bench": "gpu", "key": key, "state": state, **more}
        record |= {"rehearsal": self.rehearsal, "git": self.git, "at": time.strftime("%Y-%m-%d")}
        journal.append(self.out, record)
        self.latest[key] = record
        return record

    def reload(self, since: int) -> None:
        """Take in what a process has appended behind that byte of `out`."""
        if self.out.exists():
            text = self.out.read_bytes()[since:].decode(errors="replace")
            for line in text.splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    record = json.loads(line)
                    self.latest[record["key"]] = record

    def environment(self) -> dict[str, str]:
        """Of every process: the same compiled kernels, and an allocator that does not fragment."""
        caches = self.work / "caches"
        expandable = "expandable_segments:True"
        paths = [self.work / "site", ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")]
        fixed = {
            "PYTHONPATH": os.pathsep.join(str(p) for p in paths if str(p)),
            "PYTHONUNBUFFERED": "1",
            "PYTORCH_ALLOC_CONF": expandable,
            "PYTORCH_CUDA_ALLOC_CONF": expandable,  # its name before
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "HF_HUB_OFFLINE": "1",
        }
        # what is measured is compiled, never Triton's interpreter
        return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | fixed


def chosen(call: int | None, only: list[str], rehearsal: str = "") -> list[Stage]:
    """The stages of a call, then those of earlier ones; or those that are named."""
    stages = [s for s in STAGES if s.traced or rehearsal != "fake"]
    if only:
        return [s for s in stages if s.name in only]
    own = [s for s in stages if call in (None, s.call)]
    return own + [s for s in stages if call is not None and s.call < call]


def unpack(run: Run, wheels: Path) -> str:
    """Unpack the wheels; the reason why that failed, which is also a record."""
    reason = install(wheels, run.work / "site", min(INSTALL, max(run.left, 1.0)))
    if reason:
        run.add("install", FAILED, reason=reason)
    return reason


def run_stages(run: Run, stages: list[Stage]) -> bool:
    """Run what has no mark of its end yet and still fits; whether all of it ended well."""
    good = True
    for stage in stages:
        mark = run.latest.get(stage.name)
        if mark and mark["state"] == DONE:
            print(f"{stage.name}: done before", flush=True)
            continue
        if run.left < stage.least:
            print(f"{stage.name}: not begun, {max(run.left, 0):.0f} s are left", flush=True)
            good = False
            continue
        mark = run_stage(run, stage)
        print(f"{stage.name}: {_summary(run, stage, mark)}", flush=True)
        good = good and mark["state"] == DONE
    return good


def run_stage(run: Run, stage: Stage) -> Record:
    """Run one stage to its end, in as many processes as it takes, and mark it."""
    began = time.monotonic()
    own = began + run.slack * stage.cap
    end = min(own, run.deadline - MARGIN)
    whose = f"its {run.slack * stage.cap:.3g} s" if end == own else "the time of the call"
    state, reason = FAILED, f"no end after {TRIES} processes"
    for _ in range(TRIES):
        code, key, overdue = _process(run, stage, end)
        if code == 0:
            state, reason = DONE, ""
            break
        if code is None and not overdue:  # the time of the stage, not that of the item
            state, reason = KILLED, f"over {whose}" + (f", during {key}" if key else "")
            break
        if key in run.latest:  # it has its record: what comes after it is left
            continue
        what = f"over its {overdue:.3g} s" if code is None else _last_words(run, code or 0)
        if not key:
            state, reason = FAILED, what
            break
        run.add(key, KILLED if code is None else FAILED, reason=what)
    seconds = round(time.monotonic() - began, 1)
    return run.add(stage.name, state, **({"reason": reason} if reason else {}), seconds=seconds)


def _process(run: Run, stage: Stage, end: float) -> tuple[int | None, str, float]:
    """One process: its exit status (None: killed), the item it was in, and that one's limit.

    The limit is 0 where the item was not what ran over its time.
    """
    place = run.work / stage.name
    place.mkdir(parents=True, exist_ok=True)
    at, job = place / "at.json", place / "job.json"
    at.unlink(missing_ok=True)
    job.write_text(json.dumps(_job(run, stage, at, end)))
    command = [sys.executable, "-m", "bench.gpu.child", str(job)]
    if run.rehearsal == "fake":
        command[2:3] = ["bench.fakegpu", "--layers=1", "--run", "bench.gpu.child"]
    since = run.out.stat().st_size if run.out.exists() else 0
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with open(run.log, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=run.environment(),
            stdout=log,
            stderr=log,
            process_group=0,  # not a session of its own, which would outlive a call that is cut off
        )
        try:
            code, overdue = _watched(process, at, end, run.slack)
        finally:
            _kill(process)
    run.reload(since)
    return code, _at(at).get("key", ""), overdue


def _job(run: Run, stage: Stage, at: Path, end: float) -> dict[str, Any]:
    return {
        "stage": stage.name,
        "module": stage.path,
        "fresh": stage.fresh,
        "rehearsal": run.rehearsal,
        "out": str(run.out),
        "at": str(at),
        "git": run.git,
        "end": time.time() + end - time.monotonic(),  # by a clock that processes share
        "done": [key for key in run.latest if key.startswith(f"{stage.name}/")],
        "refused": journal.refused(run.latest),
    }


def _watched(
    process: subprocess.Popen, at: Path, end: float, slack: float
) -> tuple[int | None, float]:
    """Wait for the end of a process; None where it was killed, and the limit of its item if so."""
    begun, key = time.monotonic(), ""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(POLL), 0.0
        now, item = time.monotonic(), _at(at)
        if item.get("key", "") != key:
            begun, key = now, item["key"]
        if key and now - begun > slack * item["limit"]:
            return None, slack * item["limit"]
        if now > end:
            return None, 0.0


def _kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _at(path: Path) -> Record:
    """The item that a process is in; it is replaced as a whole, so never half written."""
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _last_words(run: Run, code: int) -> str:
    lines = [x for x in run.log.read_text(errors="replace").splitlines() if x.strip()]
    how = f"signal {-code}" if code < 0 else f"status {code}"
    return f"ended with {how}: {lines[-1][:200] if lines else 'nothing was printed'}"


def _summary(run: Run, stage: Stage, mark: Record) -> str:
    """How a stage ended, and each item that is not simply done."""
    items = {k: r for k, r in run.latest.items() if k.startswith(f"{stage.name}/")}
    states = [r["state"] for r in items.values()]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "no item"
    why = f" ({mark['reason']})" if "reason" in mark else ""
    lines = [f"{mark['state']}{why} in {mark['seconds']:.0f} s: {counts}"]
    for key, record in items.items():
        if record["state"] != DONE:
            lines.append(f"  {key}: {record['state']}: {record.get('reason', '')}")
    return "\n".join(lines)


def listed(run: Run, stages: list[Stage]) -> str:
    """The plan, with what is known of each stage."""
    rows = []
    for s in stages:
        state = run.latest.get(s.name, {}).get("state", "")
        rows.append(
            f"{s.call:>4}  {s.name:<12} {s.cap:>5.0f} {s.least:>6.0f}  {state:<8} {s.about}"
        )
    head = f"call  {'stage':<12} {'cap s':>5} {'least':>6}  {'state':<8}"
    calls = ", ".join(f"{n}: {seconds:.0f} s" for n, seconds in CALLS.items())
    return "\n".join(
        [head, *rows, f"calls {calls}; the wheels take at most {INSTALL:.0f} s of each"]
    )


def pack(run: Run, most: int = 15 << 20) -> str:
    """Put compiled kernels beside the records, for a later machine; what became of it."""
    caches = run.work / "caches"
    if not caches.exists():
        return "no compiled kernels"
    path = Path(shutil.make_archive(str(run.out.with_name("caches")), "gztar", caches))
    if path.stat().st_size > most:
        size = path.stat().st_size
        path.unlink()
        return f"compiled kernels are not packed: {size / 1e6:.0f} MB"
    return f"compiled kernels in {path}"


def restore(run: Run, archive: Path) -> None:
    """Unpack what `pack` made on an earlier machine."""
    # Python has filters since 3.11.4, and here the archive is our own
    safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    shutil.unpack_archive(archive, run.work / "caches", **safely)
