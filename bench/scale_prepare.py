"""python -m bench.scale_prepare: prepare by several processes at once, killed, and beside a peer.

`kills` starts two processes on one folder again and again, kills one or both at a random moment,
lets the other or the next one finish, and compares every byte with what one process makes alone.
`cluster` does so with the workers of a Dask or Ray cluster, and kills the command once. `pairs`
measures whole commands, start-up included: one process against two on a cohort that is repeated
with other subject ids and jittered values. `cohort` measures two processes on simulated patients,
and meds-torch-data on the same folder in the same rounds where there is one. Each process of ours
works on one file at a time (`--workers=1`); what is compared has both cores.
"""

import contextlib
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import Field

from bench import prepare as alone
from bench import records
from smbfast import prepare as command
from smbfast.base.config import Settings, command_line
from smbfast.base.staging import MARKER
from smbfast.data import fitting
from smbfast.simulation.dataset import simulate

PROG = "python -m bench.scale_prepare"
RATIO = 1.7  # of the wall seconds of one process and of two
BUSY = 0.85  # of the seconds of both cores are CPU seconds
MEMORY = 2048  # MiB of a process
_CHANGING = ("verified.json",)  # holds times of files


class ScalePrepareBench(Settings):
    """Measure prepare by several processes that share a folder.

    A difference in a byte, or a figure below its bar, ends with status 1.
    """

    epilog: ClassVar[str] = """Examples

  Fifty kills at random moments:
    python -m bench.scale_prepare --parts=kills --save

  One process against two, and a peer in an environment of its own:
    python -m venv peer && peer/bin/pip install meds-torch-data==0.9.0
    python -m bench.scale_prepare --parts=pairs,cohort --peer=peer/bin/python --save

  A Dask cluster of two workers on this machine:
    python -m bench.scale_prepare --parts=cluster --on=dask://local?workers=2"""

    parts: list[Literal["kills", "pairs", "cohort", "cluster"]] = Field(
        ["kills", "pairs", "cohort"], min_length=1, description="What is measured."
    )
    data: Path | None = Field(
        None,
        description="Folder of a simulated cohort (`python -m smbfast.simulate`) for the parts "
        "`pairs` and `cohort`. `none` simulates `patients` first, which takes minutes.",
    )
    patients: int = Field(
        200_000, ge=1000, description="Number of patients to simulate where `data` is not given."
    )
    copies: int = Field(
        6, ge=1, description="How many times the train split is repeated for the part `pairs`."
    )
    rounds: int = Field(3, ge=1, description="Rounds of measuring; the best of each is judged.")
    formats: list[Literal["codes", "text"]] = Field(
        ["codes", "text"], min_length=1, description="Formats of the parts kills and cluster."
    )
    kills: int = Field(50, ge=1, description="Number of processes to kill.")
    seed: int = Field(0, ge=0, description="Random seed of the moments.")
    on: str | None = Field(
        None,
        description="Address of a running cluster for the part `cluster`, as prepare takes it; its "
        "workers need smbfast, and the folder of temporary files.",
    )
    peer: Path | None = Field(
        None,
        description="Python interpreter of an environment in which meds-torch-data is installed. "
        "`none` measures no peer.",
    )
    save: bool = Field(False, description="Append to bench/results/scale_prepare.jsonl.")


@dataclass(frozen=True)
class Cost:
    """What processes that were started together took."""

    wall_s: float
    cpu_s: float  # all of them
    peak_mib: list[float]  # resident, of each
    waited_s: float  # for a core that other work had, all of them

    @property
    def wanted(self) -> float:
        """Share of the seconds of two cores in which they ran or would have run."""
        return (self.cpu_s + self.waited_s) / (2 * self.wall_s)

    @property
    def busy(self) -> float:
        """Share of the seconds of two cores."""
        return self.cpu_s / (2 * self.wall_s)


def together(words: list[str], num: int, environment: dict[str, str] | None = None) -> Cost:
    """Run a command `num` times at once.

    Raises:
        ValueError: one of them failed.
    """
    start = time.perf_counter()
    env = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    with tempfile.NamedTemporaryFile("r") as said:
        to = [(os.POSIX_SPAWN_OPEN, n, said.name, os.O_WRONLY | os.O_APPEND, 0) for n in (1, 2)]
        pids = [os.posix_spawn(words[0], words, env, file_actions=to) for _ in range(num)]
        waited = 0.0
        for pid in pids:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            waited += int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
        wall = time.perf_counter() - start
        ended = [os.wait4(pid, 0) for pid in pids]
        if any(status for _, status, _ in ended):
            raise ValueError(f"{' '.join(words[:3])} failed: {said.read()[-300:]}")
    usage = [own for _, _, own in ended]
    cpu = sum(own.ru_utime + own.ru_stime for own in usage)
    return Cost(wall, cpu, [own.ru_maxrss / 1024 for own in usage], waited)


def ours(data: Path, out: Path, *more: str) -> list[str]:
    """The command that is measured."""
    words = [f"--path={data}", f"--out={out}", "--workers=1", *more]
    return [sys.executable, "-m", "smbfast.prepare", *words]


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file that must not depend on who made it."""
    files = (
        p
        for p in sorted(folder.rglob("*"))
        # a write that was killed before it had a name leaves a file of no bytes
        if p.is_file() and p.name not in _CHANGING and p.name != MARKER
    )
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def forked(words: list[str]) -> int:
    """Run prepare in a forked process, which needs no seconds to import, and return its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            command.main(words)
        status = 0
    except BaseException as error:
        print(f"a process failed: {error!r}", file=sys.stderr)
    finally:
        os._exit(status)


def killed_processes(settings: ScalePrepareBench, work: Path) -> Iterator[dict[str, Any]]:
    """Kill processes of two that work together, and compare what comes of it with one alone."""
    draw = Random(settings.seed)
    data = work / "small"
    simulate(data, 4096, 3, patients_per_file=256)
    fitting.PARALLEL_ROWS, fitting.PART_ROWS = 0, 10_000  # as if it were large
    for form in settings.formats:
        words = [f"--path={data}", "--workers=1", f"--format={form}", "--window=256"]
        one = work / f"{form}-one"
        assert not _status(forked([*words, f"--out={one}"]))
        expected, out = content(one), work / f"{form}-killed"
        start = time.monotonic()
        pair = [forked([*words, f"--out={out}"]) for _ in range(2)]
        assert not any([_status(pid) for pid in pair])
        seconds = time.monotonic() - start
        kills = differing = failed = trials = markers = 0
        while kills < settings.kills / len(settings.formats):
            shutil.rmtree(out)
            pair, trials = [forked([*words, f"--out={out}"]) for _ in range(2)], trials + 1
            time.sleep(draw.random() * seconds)
            doomed = draw.sample(pair, draw.choice([1, 1, 2]))
            for pid in doomed:
                os.kill(pid, signal.SIGKILL)
            ends = {pid: _status(pid) for pid in pair}
            kills += sum(ends[pid] == -signal.SIGKILL for pid in doomed)
            failed += sum(bool(ends[pid]) for pid in pair if pid not in doomed)
            failed += bool(_status(forked([*words, f"--out={out}"])))  # finds all, or goes on
            got = content(out)
            differing += got != expected
            markers += len(list(out.rglob(MARKER)))
            if got != expected:
                print("differs:", sorted(dict(got.items() ^ expected.items())), file=sys.stderr)
        yield {
            "part": "kills",
            "format": form,
            "shards": sum(name.endswith(".shard") for name in expected),
            "kills": kills,
            "trials": trials,
            "seconds_of_two": seconds,
            "survivors_that_failed": failed,
            "folders_that_differ": differing,
            "empty_markers_left": markers,
            "met": not failed and not differing,
        }


def on_cluster(settings: ScalePrepareBench, work: Path) -> Iterator[dict[str, Any]]:
    """The bytes of a cluster against those of one process.

    Raises:
        ValueError: no cluster is named.
    """
    if settings.on is None:
        raise ValueError("the part `cluster` needs --on=dask://HOST:PORT or ray://HOST:PORT")
    data = work / "cluster"
    simulate(data, 4096, 3, patients_per_file=256)
    for form in settings.formats:
        more, one, out = (f"--format={form}",), work / f"{form}-1", work / f"{form}-cluster"
        cost = together(ours(data, one, *more), 1)
        words = ours(data, out, *more, f"--on={settings.on}")
        there = together(words, 1)
        whole = content(out) == content(one)
        shutil.rmtree(out)
        pid = os.posix_spawn(words[0], words, os.environ)
        while not list(out.glob("train/*.shard")) and not os.waitpid(pid, os.WNOHANG)[0]:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        left = len(list(out.glob("*/*.shard")))
        together(words, 1)
        yield {
            "part": "cluster",
            "engine": settings.on.partition(":")[0],
            "engine_versions": {n: version(n) for n in ("distributed", "ray") if find_spec(n)},
            "format": form,
            "shards": len(list(out.glob("*/*.shard"))),
            "shards_when_killed": left,
            "wall_s": there.wall_s,
            "wall_s_of_one": cost.wall_s,
            "same_bytes": whole,
            "same_bytes_after_a_kill": content(out) == content(one),
            "met": whole and content(out) == content(one),
        }


def _status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def pairs(settings: ScalePrepareBench, data: Path, work: Path) -> dict[str, Any]:
    """One process against two, whole commands."""
    large, out = work / "large", work / "out"
    alone.repeat(data, large, settings.copies)
    costs: dict[int, list[Cost]] = {1: [], 2: []}
    digests = set()
    for _ in range(settings.rounds):
        for num, own in costs.items():
            own.append(together(ours(large, out, "--splits=train"), num))
            digests.add(str(content(out)))
            shutil.rmtree(out)
            print(f"{num} at once: {own[-1].wall_s:.1f} s", file=sys.stderr)
    best = {num: min(own, key=lambda cost: cost.wall_s) for num, own in costs.items()}
    ratio = best[1].wall_s / best[2].wall_s
    return {
        "part": "pairs",
        "events": alone.num_events(large),
        "files": len(alone.files_of(large)),
        "wall_s": {num: [cost.wall_s for cost in own] for num, own in costs.items()},
        "cpu_s": {num: [cost.cpu_s for cost in own] for num, own in costs.items()},
        "peak_mib": best[2].peak_mib,
        "ratio": ratio,
        "busy": best[2].busy,
        "wanted": {num: cost.wanted for num, cost in best.items()},
        "same_bytes": len(digests) == 1,
        "met": ratio >= RATIO and len(digests) == 1,
    }


def cohort(settings: ScalePrepareBench, data: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Two processes on simulated patients, and a peer on the same folder."""
    out = work / "out"
    splits = ",".join(s for s in alone.SPLITS if (data / "data" / s).is_dir())
    words = {"codes": ours(data, out, f"--splits={splits}")}
    words["text"] = [*words["codes"], "--format=text"]
    tool = alone.peer(settings.peer) if settings.peer else None
    costs: dict[str, list[Cost]] = {name: [] for name in (*words, *(["peer"] if tool else []))}
    for _ in range(settings.rounds):
        for name, own in costs.items():
            if tool and name == "peer":
                own.append(together(tool.command(data, out), 1, tool.environment))
                tool.check(data, out)
            else:
                own.append(together(words[name], 2))
            shutil.rmtree(out)
            print(f"{name}: {own[-1]}", file=sys.stderr)
    events = alone.num_events(data)
    for name, own in costs.items():
        best = min(own, key=lambda cost: cost.wall_s)
        about: dict[str, Any] = {
            "part": "cohort",
            "tool": alone.OURS if name != "peer" else alone.PEER,
            "format": name if name != "peer" else None,
            "processes": 2 if name != "peer" else 1,
            "events": events,
            "wall_s": [cost.wall_s for cost in own],
            "cpu_s": [cost.cpu_s for cost in own],
            "peak_mib": best.peak_mib,
            "busy": best.busy,
            "wanted": best.wanted,
            "events_per_s": events / best.wall_s,
        }
        if tool and name == "peer":
            yield about | tool.extra
        else:
            # on a machine with other work, a core is had by turns
            yield about | {"met": max(best.peak_mib) < MEMORY and best.wanted > BUSY}


def main(argv: list[str] | None = None) -> None:
    settings = command_line(ScalePrepareBench, argv, prog=PROG)
    stamp = records.stamp("scale_prepare", "cpu") | {
        "threads": 1,  # of a process
        "cores": len(os.sched_getaffinity(0)),
        "nice": os.nice(0),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        try:
            if "kills" in settings.parts:
                rows += killed_processes(settings, work)
            if "cluster" in settings.parts:
                rows += on_cluster(settings, work)
            if {"pairs", "cohort"} & set(settings.parts):
                data = settings.data or work / "cohort"
                if not settings.data:
                    simulate(data, settings.patients, 0, patients_per_file=4096)
                if "cohort" in settings.parts:
                    rows += cohort(settings, data, work)
                if "pairs" in settings.parts:
                    rows.append(pairs(settings, data, work))
        except ValueError as error:
            raise SystemExit(f"{PROG}: {error}") from None
    for row in rows:
        print(row)
    if settings.save:
        ended = {"load_after": round(os.getloadavg()[0], 2)}
        records.append("scale_prepare", [stamp | ended | row for row in rows])
    if not all(row.get("met", True) for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
