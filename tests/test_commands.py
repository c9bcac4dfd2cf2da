"""Commands: quick help, one line for what a user can mend, a traceback for a mistake of ours."""

import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from smbfast.base.entry import RunFailed, entry
from smbfast.base.progress import Progress

COMMANDS = ["prepare", "simulate", "embed", "probe", "report", "tasks", "compare"]
# runs a command in a fresh process, then names what it should not have waited for
CHILD = """
import importlib, sys
try:
    importlib.import_module("smbfast." + sys.argv[1]).main(sys.argv[2:])
except SystemExit as stop:
    status = stop.code
heavy = {"torch", "peft", "transformers", "sklearn", "pyarrow", "matplotlib", "lifelines"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
raise SystemExit(status)
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("argument, status", [("--help", 0), ("--no.such=key", 2)])
def test_help_and_a_refused_setting_import_nothing_heavy(command, argument, status):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, command, argument], capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    shown = done.stdout if status == 0 else done.stderr
    assert f"python -m smbfast.{command}" in shown


@pytest.mark.parametrize(
    "command, arguments, words",
    [
        ("train", ["--data.path=/no/such/folder"], "there is no such folder"),
        ("train", ["--data.window=64"], "data.window must be at least 128"),
        ("check", ["--data.stride=512"], "data.stride must be at most data.window"),
        ("prepare", ["--path=.", "--out=x", "--stride=2048"], "data.stride must be at most"),
        ("embed", ["--model=m", "--data=/no", "--out=a.parquet", "--at=last"], "no such folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_before_heavy_imports(
    command, arguments, words
):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, command, *arguments], capture_output=True, text=True
    )
    assert words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("`x` must be 1, got 2"), "smbfast.name: `x` must be 1, got 2"),
        (RunFailed("step 3 broke"), "smbfast.name: step 3 broke"),
        (OSError(28, "No space left on device", "a.bin"), "smbfast.name: No space left on device"),
        (BrokenProcessPool("terminated abruptly"), "smbfast.name: a worker process was killed"),
        (RuntimeError("can't start new thread"), "smbfast.name: the system starts no more threads"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error, words):
    states: list[str] = []
    with pytest.raises(SystemExit) as stop, entry("smbfast.name", on_end=states.append):
        raise error
    # a SystemExit that holds text prints it and ends with status 1
    assert stop.value.code.startswith(words) and "\n" not in stop.value.code
    assert stop.value.__suppress_context__ and states == ["failed"]


@pytest.mark.parametrize("status", [1, 75])
def test_a_signal_to_stop_is_one_line(status, capsys):
    states: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    more = {"stopped": "go on", "status": status, "on_end": states.append}
    with pytest.raises(SystemExit) as stop, entry("smbfast.name", **more):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert stop.value.code == status and states == ["preempted"]
    assert capsys.readouterr().err == "\nsmbfast.name: stopped; go on\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bug_keeps_its_traceback_and_an_exit_its_status():
    states: list[str] = []
    with pytest.raises(KeyError), entry("smbfast.name", on_end=states.append):
        raise KeyError("x")
    assert states == ["failed"]
    with pytest.raises(SystemExit) as stop, entry("smbfast.name", on_end=states.append):
        raise SystemExit(75)
    assert stop.value.code == 75 and states == ["failed"]


def test_progress_says_how_much_how_fast_and_how_long(monkeypatch, capsys):
    times = iter([0.0, 4.0, 5.0, 9.0, 10.0])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("smbfast.base.progress.time", clock)
    progress = Progress("smbfast.name", 2000, "nodes")
    for _ in range(4):
        progress.add(250)
    assert capsys.readouterr().err == (
        "smbfast.name: 500 of 2,000 nodes, 100 a second, 15 s left\n"
        "smbfast.name: 1,000 of 2,000 nodes, 100 a second, 10 s left\n"
    )
