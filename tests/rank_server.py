"""One process that imports torch and smbfast once, and forks the ranks of a case under a timeout.

    values = ranks_give(2, "tests.test_ranks:summed", folder=str(tmp_path))

runs `summed(folder=...)` of that module in two processes with the environment that torchrun would
give them, and returns what each of them gave, in the order of ranks. Arguments and values are what
JSON holds; tensors go through files. A rank never outlives its case, the server never outlives the
tests: the kernel kills a rank with the server, and the server ends where its input does.
"""

import atexit
import ctypes
import faulthandler
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
GRACE = 30.0  # seconds that ranks may go on once another has failed
SHOWN = 2000  # characters of what a rank printed
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """What became of a rank: its value, or why there is none."""

    value: Any = None
    error: str | None = None  # a traceback, "killed by signal 9", "no answer within 20 s"
    printed: str = ""  # the end of its stdout and stderr; of a rank that hung, where it did


def run_ranks(
    world: int, function: str, *, timeout: float = 60.0, **arguments: Any
) -> list[Outcome]:
    """Run `function` in `world` processes; what became of each, by rank.

    Args:
        world: number of ranks; 0 is one process that no torchrun has started.
        function: "module:name", imported by the server before it forks.
        timeout: seconds after which a rank without an answer is killed.
        arguments: of the function.
    """
    case = {"world": world, "function": function, "timeout": timeout, "arguments": arguments}
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(case).encode() + b"\n")
    server.stdin.flush()
    line = server.stdout.readline()
    if not line:
        _server.cache_clear()
        raise RuntimeError(f"the server of ranks ended with exit code {server.wait()}")
    return [Outcome(**outcome) for outcome in json.loads(line)]


def ranks_give(world: int, function: str, *, timeout: float = 60.0, **arguments: Any) -> list[Any]:
    """Return the values of `run_ranks`; an AssertionError that shows every rank without one."""
    outcomes = run_ranks(world, function, timeout=timeout, **arguments)
    failed = [f"rank {r}: {o.error}\n{o.printed}" for r, o in enumerate(outcomes) if o.error]
    assert not failed, "\n".join(failed)
    return [outcome.value for outcome in outcomes]


@cache
def _server() -> subprocess.Popen:
    paths = (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", ""))
    more = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.rank_server"],
        cwd=ROOT,
        env={**os.environ, **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    atexit.register(_close, server)
    return server


def _close(server: subprocess.Popen) -> None:
    assert server.stdin is not None
    server.stdin.close()
    server.wait(30)


@dataclass
class _Rank:
    """A forked rank, as the server sees it."""

    pid: int
    answers: int  # file descriptor
    printed: Path
    answer: bytes = b""
    outcome: Outcome | None = None


def _serve() -> None:
    """Answer cases from stdin, a line of JSON each, until it ends."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what an import or a rank prints is no answer
    # of forked ranks too, from their first moment on
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)
    _import()
    asked = b""
    while True:
        more = os.read(0, 1 << 16)
        if not more:
            return
        *cases, asked = (asked + more).split(b"\n")
        for case in cases:
            outcomes = _run_case(**json.loads(case))
            os.write(answers, json.dumps([asdict(o) for o in outcomes]).encode() + b"\n")


def _import() -> None:
    """Load what every rank would load again: half a second of each."""
    importlib.import_module("smbfast.train")
    importlib.import_module("smbfast.run.loop")
    importlib.import_module("smbkernels.registry").load("cpu")
    transformers = importlib.import_module("transformers.conversion_mapping")
    transformers.get_checkpoint_conversion_mapping("qwen3")  # kept by transformers: 900 patterns


def _run_case(world: int, function: str, timeout: float, arguments: dict) -> list[Outcome]:
    module, _, name = function.partition(":")
    run = getattr(importlib.import_module(module), name)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks: list[_Rank] = []
        leave, leaves = os.pipe()  # closed where all ranks have answered
        try:
            for rank in range(max(world, 1)):
                printed = Path(folder) / str(rank)
                answers, answer = os.pipe()
                pid = os.fork()
                if not pid:
                    for end in (answers, leaves, *(r.answers for r in ranks)):
                        os.close(end)
                    _be_rank(rank, world, port, run, arguments, printed, answer, leave)
                os.close(answer)
                ranks.append(_Rank(pid, answers, printed))
            _wait(ranks, timeout)
        finally:
            os.close(leaves)
            for rank_ in ranks:
                _end(rank_)
            os.close(leave)
        return [r.outcome or Outcome(error="ended with the others") for r in ranks]


def _be_rank(
    rank: int,
    world: int,
    port: int,
    run: Any,
    arguments: dict,
    printed: Path,
    answer: int,
    leave: int,
) -> None:
    """Run the function in a forked process, which ends here."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    file = os.open(printed, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in [n for n in os.environ if n in TORCHRUN or n.startswith("TORCHELASTIC")]:
        del os.environ[name]
    if world:
        values = (rank, world, rank, world, "127.0.0.1", port)
        os.environ.update(zip(TORCHRUN, map(str, values), strict=True))
    try:
        text = json.dumps({"value": run(**arguments)})
    except BaseException:  # also of SystemExit the test is to hear
        text = json.dumps({"error": traceback.format_exc()})
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with open(answer, "wb") as end:
        end.write(text.encode())
    # a rank that went before others have heard all that it sent would fail them; one that failed
    # must go, or they would wait for it
    if text.startswith('{"value'):
        os.read(leave, 1)
    os._exit(0)


def _wait(ranks: list[_Rank], timeout: float) -> None:
    """Read answers until all are there, the time is over or the server's input has ended."""
    deadline, end = time.monotonic() + timeout, f"no answer within {timeout:g} s"
    with selectors.DefaultSelector() as selector:
        selector.register(0, selectors.EVENT_READ)
        for rank in ranks:
            selector.register(rank.answers, selectors.EVENT_READ, rank)
        while any(rank.outcome is None for rank in ranks):
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for key, _ in ready:
                if key.data is None:  # no case comes before the answer to this one
                    return
                if more := os.read(key.fd, 1 << 16):
                    key.data.answer += more
                    continue
                selector.unregister(key.fd)
                key.data.outcome = _outcome(key.data)
                if key.data.outcome.error:
                    deadline = min(deadline, time.monotonic() + GRACE)
                    end = "no answer after another rank had failed"
    for rank in ranks:
        if rank.outcome is None:
            _show(rank)
            rank.outcome = Outcome(error=end, printed=_printed(rank))


def _show(rank: _Rank) -> None:
    """Let a rank print where it is, and wait until it has."""
    os.kill(rank.pid, signal.SIGUSR1)
    before, until = "", time.monotonic() + GRACE
    while time.monotonic() < until:
        time.sleep(0.1)
        text = _printed(rank)
        if "most recent call first" in text and text == before:
            return
        before = text


def _outcome(rank: _Rank) -> Outcome:
    """Return the answer of a rank that gave one or has died."""
    if rank.answer:
        return Outcome(**json.loads(rank.answer), printed=_printed(rank))
    _, status = os.waitpid(rank.pid, 0)
    rank.pid = 0
    code = os.waitstatus_to_exitcode(status)
    error = f"killed by signal {-code}" if code < 0 else f"exit code {code} without an answer"
    return Outcome(error=error, printed=_printed(rank))


def _printed(rank: _Rank) -> str:
    text = rank.printed.read_text(errors="replace") if rank.printed.is_file() else ""
    return text[-SHOWN:]


def _end(rank: _Rank) -> None:
    """End a rank, if it still is, and forget it."""
    os.close(rank.answers)
    if not rank.pid:
        return
    if rank.outcome is None or rank.outcome.error:
        os.kill(rank.pid, signal.SIGKILL)
    os.waitpid(rank.pid, 0)


if __name__ == "__main__":
    _serve()
