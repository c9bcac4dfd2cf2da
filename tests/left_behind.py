"""What a test leaves in its process, where the next one would find it.

A thread that prints into the next test's capture, a process that holds a lock, a signal handler or
a variable of the environment that another test then meets: each makes some order of tests fail, and
the failure names a test that did nothing wrong.
"""

import gc
import math
import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds in which threads and processes must end that a test has asked to
SOON = 0.5  # seconds after which garbage is collected: what nobody holds any more may wait for it
# of one process of tests, for all that come: servers that fork, and threads of libraries
KEPT = ("tests.rank_server", "multiprocessing.forkserver", "multiprocessing.resource_tracker")
KEPT += ("Dask-Offload", "compile_worker", "InductorSubproc")
# what our commands answer and read; libraries set others when they are imported, in any test
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
_NAMES = ("SMBFAST", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM", "PYTHON")
_TASKS = Path("/proc/self/task")
# not on macOS, nor in every container
SEES_PROCESSES = hasattr(os, "waitid") and (_TASKS / str(os.getpid()) / "children").is_file()


def state() -> dict[str, Any]:
    """What tests share, by what it is called: what is the same before a test and after it."""
    umask = os.umask(0o077)
    os.umask(umask)
    environment = {k: v for k, v in os.environ.items() if k.startswith(_NAMES)}
    return {
        "threads": {t for t in threading.enumerate() if _is_ours(t)},
        "processes": _processes(),
        "locks": set(vars(sys.modules.get("smbfast.base.locks", stat)).get("_HELD", ())),
        "signal handlers": {number: signal.getsignal(number) for number in _SIGNALS},
        "environment": environment,
        "times ahead": _times_ahead(),
        "umask": umask,
        "working directory": os.getcwd(),
        "arguments": list(sys.argv),
    }


def left_since(before: dict[str, Any], patience: float = PATIENCE) -> str:
    """Return what is otherwise than before, in words; empty where nothing is.

    Args:
        before: of `state`.
        patience: seconds in which threads and processes may end.
    """
    began, after = time.monotonic(), state()
    collected_at = began + SOON
    while (more := _begun(before, after)) and time.monotonic() < began + patience:
        if time.monotonic() > collected_at:
            gc.collect()
            collected_at = math.inf
        time.sleep(0.01)
        after = state()
    begun = [f"{name} {said}" for name, said in more.items()]
    changed = [
        f"{name} {_unlike(before[name], after[name])}"
        for name in before
        if not isinstance(before[name], set) and before[name] != after[name]
    ]
    return "; ".join([*begun, *changed])


def _begun(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """What there is more of than before, of what ends by itself."""
    more = {name: after[name] - was for name, was in before.items() if isinstance(was, set)}
    said = {name: sorted(map(str, new)) for name, new in more.items() if name != "processes"}
    commands = ((pid, _command(pid)) for pid in sorted(more["processes"]))
    said["processes"] = [
        f"{pid} {command[:100]}"
        for pid, command in commands
        if command is not None and not any(kept in command for kept in KEPT)
    ]
    return {name: new for name, new in said.items() if new}


def _unlike(before: Any, after: Any) -> str:
    if not isinstance(before, dict):
        return f"{before} became {after}"
    names = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    return ", ".join(f"{n}: {before.get(n)} became {after.get(n)}" for n in sorted(names))


def _times_ahead() -> tuple[float, str]:
    module = sys.modules.get("smbfast.base.progress")
    return (module.AHEAD.seconds, module.AHEAD.before) if module else (0, "")


def _is_ours(thread: threading.Thread) -> bool:
    """Whether Python has started a thread: those of libraries, as of autograd, stay."""
    is_monitor = type(thread).__module__.startswith("tqdm.")  # older ones give it no name
    is_known = is_monitor or thread.name.startswith(KEPT)
    return not is_known and not isinstance(thread, threading._DummyThread)


def _processes() -> set[int]:
    """Ids of processes that this one has started, also of those not waited for."""
    pids: set[int] = set()
    if not SEES_PROCESSES:
        return pids
    with suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        for task in _TASKS.iterdir():
            with suppress(OSError):  # a thread that has just ended
                pids |= {int(pid) for pid in (task / "children").read_text().split()}
    return pids


def _command(pid: int) -> str | None:
    """The command of a process, empty of one that has ended; None once it was waited for."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    return None
