"""Commands: quick help, one line for what a user can mend, a traceback for a mistake of ours."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest

from smbfast import commands
from smbfast.base.entry import SIGNALS, RunFailed, entry
from smbfast.base.progress import AHEAD, Progress, time_left
from tests.test_floors import FLOORS

COMMANDS = ["prepare", "simulate", "embed", "probe", "report", "tasks", "compare", "push"]
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


LISTED = """
import runpy, sys
sys.argv = ["smbfast", *sys.argv[1:]]
runpy.run_module("smbfast", run_name="__main__")
assert not {"pydantic", "numpy", "torch"} & set(sys.modules)
"""


@pytest.mark.parametrize("word", ["", "--help", "--version"])
def test_the_list_of_commands_waits_for_nothing(word):
    """Not even for pydantic: a first look takes a tenth of a second."""
    words = [word] if word else []
    done = subprocess.run([sys.executable, "-c", LISTED, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if word == "--version":
        assert re.fullmatch(r"smbfast \S+ \(Python 3\.\S+, torch \S+, .*\)\n", done.stdout)
    else:
        assert all(f"\n  {name} " in done.stdout for name in commands.COMMANDS)


def test_every_command_is_in_the_list_with_a_sentence():
    assert {*commands.COMMANDS, "commands"} == FLOORS[-1]
    for name, about in commands.COMMANDS.items():
        assert re.fullmatch(r"[A-Z].{30,90}\.", about), name
    assert set(commands.OTHER_NAMES.values()) <= set(commands.COMMANDS)
    assert not set(commands.OTHER_NAMES) & set(commands.COMMANDS)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_is_that_of_what_was_typed(name, capsys, monkeypatch):
    with contextlib.suppress(SystemExit):
        commands.main([name, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: smbfast {name} ") and "python -m smbfast." not in text
    monkeypatch.setattr(sys, "argv", ["/x/smbfast/__main__.py"])
    with contextlib.suppress(SystemExit):
        commands.main(["help", name])
    assert capsys.readouterr().out.startswith(f"usage: python -m smbfast {name} ")


def test_errors_begin_with_what_was_typed(capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["embed", "--model=m", "--data=/no", "--out=a.parquet", "--at=last"])
    assert stop.value.code.startswith("smbfast embed: /no must be the folder of a MEDS dataset")
    with pytest.raises(SystemExit) as stop:
        commands.main(["embed", "--modle=m"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("smbfast embed: unknown key `modle`")
    with pytest.raises(SystemExit) as stop, entry("smbfast.embed"):
        raise ValueError("as before")
    assert stop.value.code == "smbfast.embed: as before"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "did you mean `train`?"),
        (["Embed"], "did you mean `embed`?"),
        (["finetune"], "did you mean `train`?"),
        (["evaluate"], "did you mean `probe`?"),
        (["lora", "--model.path=x"], "smbfast train lora"),
        (["--data.path=x"], "a command must stand before `--data.path=x`"),
        (["serve"], "must be one of simulate, tasks, check,"),
    ],
)
def test_an_unknown_command_names_the_nearest(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(words)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
    assert ("did you mean" in said) == ("did you mean" in err)


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


@pytest.mark.parametrize(
    ("spec", "program", "ours"),
    [
        ("smbfast.name", "python", True),
        ("smbfast.__main__", "python", True),
        (None, "/usr/bin/smbfast", True),
        ("pytest.__main__", "python", False),
        (None, "/usr/bin/pytest", False),
    ],
)
@pytest.mark.parametrize("fails", [True, False])
def test_signals_stay_ignored_only_in_a_process_of_the_command(
    spec, program, ours, fails, monkeypatch
):
    """Until it has ended, its words and status stay what they are; other programs go on."""
    main = SimpleNamespace(__spec__=spec and SimpleNamespace(name=spec))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", [program])
    before = {n: signal.getsignal(n) for n in (*SIGNALS, signal.SIGALRM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    try:
        with contextlib.suppress(SystemExit), entry("smbfast.name"):
            if fails:
                raise ValueError("wrong")
        assert (signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]) == ours
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# what is collected when modules go, behind the moment at which Python stops to handle signals
AT_THE_END = """
import os, runpy, sys
class Late:
    def __del__(self, own=os.getpid(), kill=os.kill, write=os.write):
        write(2, b"late")
        for number in NUMBERS:
            kill(own, number)
late = Late()
sys.argv[1:] = ["--print"]
runpy.run_module("smbfast.train", run_name="__main__", alter_sys=True)
"""


def test_a_signal_while_python_ends_does_not_change_how_a_command_has_ended():
    numbers = (*SIGNALS, signal.SIGALRM)
    run = AT_THE_END.replace("NUMBERS", repr(tuple(map(int, numbers))))
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "late")


def test_a_signal_behind_the_last_line_of_a_command_is_not_heard(monkeypatch):
    main = SimpleNamespace(__spec__=SimpleNamespace(name="smbfast.name"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    before = {n: signal.getsignal(n) for n in (*SIGNALS, signal.SIGALRM)}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    timer = signal.setitimer

    def set_and_asked(*words):
        timer(*words)
        signal.raise_signal(signal.SIGTERM)

    try:
        with entry("smbfast.name"):
            monkeypatch.setattr(signal, "setitimer", set_and_asked)
    finally:
        monkeypatch.setattr(signal, "setitimer", timer)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_bug_keeps_its_traceback_and_an_exit_its_status():
    states: list[str] = []
    with pytest.raises(KeyError), entry("smbfast.name", on_end=states.append):
        raise KeyError("x")
    assert states == ["failed"]
    with pytest.raises(SystemExit) as stop, entry("smbfast.name", on_end=states.append):
        raise SystemExit(75)
    assert stop.value.code == 75 and states == ["failed"]


def test_a_command_that_fails_leaves_no_time_ahead_to_the_next():
    with pytest.raises(SystemExit), entry("smbfast.name"):
        AHEAD.expect({"probes": 9.0}, before="the first step")
        raise ValueError("so it is")
    assert time_left(3.0) == "3 s left"


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
