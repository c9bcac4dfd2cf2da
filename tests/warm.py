"""Processes that begin where the imports are done: each is a fork of a server that has made them.

`python -m MODULE` spends five seconds of a processor on its imports. A test of many such processes
lets one be real, and begins the others here.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import warnings
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")


def start_server(modules: list[str]) -> None:
    """Begin the server, with the environment of this moment, unless it runs."""
    FORKS.set_forkserver_preload(modules)
    forkserver.ensure_running()


class Warm:
    """Stands in for `subprocess.Popen` of `[sys.executable, "-m", MODULE, ...]`."""

    def __init__(
        self, command: list[str], *, cwd: Path, env: dict[str, str], stdout: Any, **_more: Any
    ) -> None:
        assert command[:2] == [sys.executable, "-m"], command
        given = (command[2], command[3:], str(cwd), env, stdout.name)
        self._process = FORKS.Process(target=_run, args=given)
        self._process.start()
        self.args, self.pid = command, self._process.pid

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative where a signal ended it."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self._process.exitcode


def _run(module: str, argv: list[str], cwd: str, env: dict[str, str], said: str) -> None:
    os.setpgid(0, 0)  # so that it is killed with all that it starts
    with open(said, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [module, *argv]
    warnings.simplefilter("ignore")  # of a module that the server has imported and is run again
    runpy.run_module(module, run_name="__main__", alter_sys=True)
