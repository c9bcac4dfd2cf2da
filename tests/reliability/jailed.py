"""Commands in forked children with little memory and time, which are watched.

A child imports nothing anew. It may take 4 GB beside what it has, and 20 seconds; what it opens a
socket to, unpickles or starts is written down by an audit hook.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY = 4 << 30  # bytes beside what the process has
PATIENCE = 20.0  # seconds
WATCHED = (
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "os.system",
    "subprocess.Popen",
)
WATCHED += ("os.exec", "os.posix_spawn")


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    how: str  # "done", "refused", "traceback", "hangs", "killed"
    words: str  # of a refusal or traceback
    events: list[str]  # that were watched
    seconds: float


def jailed(command: Callable[[], object], answer: Path) -> Ended:
    """Run a command in a child and return how it ended."""
    began = time.monotonic()
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        _child(command, answer)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - began > PATIENCE:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Ended("hangs", "", [], time.monotonic() - began)
        time.sleep(0.002)
    seconds = time.monotonic() - began
    if status or not answer.is_file():
        return Ended("killed", f"status {status}", [], seconds)
    how, words, events = json.loads(answer.read_text())
    return Ended(how, words, events, seconds)


def _child(command: Callable[[], object], answer: Path) -> None:
    events: list[str] = []
    how, words = "done", ""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        sys.addaudithook(lambda event, given: _note(events, event, given))
        try:
            command()
        except SystemExit as error:
            how, words = ("refused", str(error)) if error.code not in (None, 0) else ("done", "")
        except BaseException:
            how, words = "traceback", traceback.format_exc()[-700:]
        answer.write_text(json.dumps([how, words, events[:20]]))
    finally:
        os._exit(0 if answer.is_file() else 1)


def _note(events: list[str], event: str, given: tuple) -> None:
    if event in WATCHED:
        # a socket to a process of this machine is a path, and reaches no network
        if event == "socket.connect" and isinstance(given[1], str | bytes):
            return
        events.append(f"{event} {given!r}"[:120])
