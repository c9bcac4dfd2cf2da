"""What a test leaves in its process, where the next one would find it.

A thread that prints into the next test's capture, a process that holds a lock, a signal handler or
a variable of the environment that another test then meets: each makes some order of tests fail, and
the failure names a test that did nothing wrong.
"""

import gc
import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

PATIENCE = 20.0  # seconds in which threads and processes must end that a test has asked to
# of one process of tests, for all that come: servers that fork, and threads of libraries
KEPT = ("tests.rank_server", "multiprocessing.forkserver", "multiprocessing.resource_tracker")
KEPT += ("tqdm_monitor", "Dask-Offload", "compile_worker")
# what our commands answer and read; libraries set others when they are imported, in any test
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM)
_NAMES = ("SMBFAST", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "SLURM", "PYTHON")
_CHILDREN = Path("/proc/self/task")


def state() -> dict[str, Any]:
    """What tests share, by what it is called: what is the same before a test and after it."""
    umask = os.umask(0o077)
    os.umask(umask)
    environment = {k: v for k, v in os.environ.items() if k.startswith(_NAMES)}
    return {
        "threads": {t for t in threading.enumerate() if not t.name.startswith(KEPT)},
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
    until, after = time.monotonic() + patience, state()
    while _begun(before, after) and time.monotonic() < until:
        time.sleep(0.01)
        after = state()
    if _begun(before, after):  # what nobody holds any more may wait for a collection of garbage
        gc.collect()
        after = state()
    begun = [f"{name} {sorted(map(str, more))}" for name, more in _begun(before, after).items()]
    changed = [
        f"{name} {_unlike(before[name], after[name])}"
        for name in before
        if not isinstance(before[name], set) and before[name] != after[name]
    ]
    return "; ".join([*begun, *changed])


def _begun(before: dict[str, Any], after: dict[str, Any]) -> dict[str, set]:
    """What there is more of than before, of what ends by itself."""
    more = {name: after[name] - was for name, was in before.items() if isinstance(was, set)}
    return {name: new for name, new in more.items() if new}


def _unlike(before: Any, after: Any) -> str:
    if not isinstance(before, dict):
        return f"{before} became {after}"
    names = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    return ", ".join(f"{n}: {before.get(n)} became {after.get(n)}" for n in sorted(names))


def _times_ahead() -> tuple[float, str]:
    module = sys.modules.get("smbfast.base.progress")
    return (module.AHEAD.seconds, module.AHEAD.before) if module else (0, "")


def _processes() -> set[str]:
    """Ids and commands of processes that this one has started, also of those not waited for."""
    with suppress(ChildProcessError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if _CHILDREN.is_dir():
            return _children()
    return set()


def _children() -> set[str]:
    named = set()
    for task in _CHILDREN.iterdir():
        with suppress(OSError):  # a thread that has just ended
            for pid in (task / "children").read_text().split():
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
                if not any(kept in command for kept in KEPT):
                    named.add(f"{pid} {command[:100]}")
    return named
