"""Nothing of others is touched, no folder has two writers, and no helper stops a run."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.base import helpers, locks, ours, replace, runtime
from smbfast.base.entry import entry
from smbfast.base.files import (
    committed_file,
    committed_folder,
    remove_folder,
    standing,
    verify_folder,
    write_text,
)
from smbfast.probing.embedding_file import embedding_file
from smbfast.run.board import Board
from smbfast.run.folder import write_end
from tests.kills import killed_in_a_write


@pytest.fixture(params=["exchanged at once", "by two renames"])
def _exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without a system that exchanges two names at once."""
    if request.param == "by two renames":
        monkeypatch.setattr(replace, "exchange", lambda one, other: False)


def write(path: Path, **files: str) -> None:
    with committed_folder(path, replace=True) as folder:
        for name, text in files.items():
            (folder / f"{name}.md" if name == "README" else folder / name).write_text(text)


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with its content."""
    return {
        str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_text()
        for p in folder.rglob("*")
        if p.is_symlink() or p.is_file()
    }


@pytest.mark.usefixtures("_exchange")
def test_what_others_put_into_a_folder_outlives_it(tmp_path: Path):
    final = tmp_path / "final"
    write(final, model="1", README="card", older="1")
    (final / "slides").mkdir()
    (final / "slides" / "talk.pdf").write_text("mine")
    (final / "notes.txt").write_text("mine")
    (final / "link").symlink_to("/nowhere")
    (final / "README.md").write_text("edited")
    for number in ("2", "3"):
        write(final, model=number, README="card of " + number)
        held = tree(final)
        del held["manifest.json"]
        assert held == {
            "model": number,
            "README.md": "edited",
            "slides/talk.pdf": "mine",
            "notes.txt": "mine",
            "link": "/nowhere",
        }
        verify_folder(final)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


@pytest.mark.usefixtures("_exchange")
def test_a_card_that_nobody_edited_is_written_anew(tmp_path: Path):
    for text in ("1", "2"):
        write(tmp_path / "final", README=text)
    assert (tmp_path / "final" / "README.md").read_text() == "2"


@pytest.mark.usefixtures("_exchange")
@pytest.mark.parametrize("case", ["same name", "no manifest", "a file"])
def test_what_cannot_be_carried_is_set_aside_whole(case: str, tmp_path: Path, capsys):
    final = tmp_path / "final"
    if case == "a file":
        final.write_text("mine")
    else:
        write(final, model="1")
        (final / "target").write_text("mine")
        if case == "no manifest":
            (final / "manifest.json").unlink()
    before = final.read_text() if case == "a file" else tree(final)
    write(final, model="2", target="2")
    aside = tmp_path / "final.set-aside-1"
    assert (aside.read_text() if case == "a file" else tree(aside)) == before
    assert (final / "target").read_text() == "2"
    assert str(aside) in capsys.readouterr().err


def test_names_that_only_look_like_ours_are_left(tmp_path: Path):
    looks = ["final.tmp", "final.old", "final.trash", "final.0123456789abcdef.tmp"]
    for name in looks:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("mine")
    before = tree(tmp_path)
    for _ in range(2):
        write(tmp_path / "final", model="1")
    write_text(tmp_path / "final.json", "1")
    after = tree(tmp_path)
    assert {n: after.get(n) for n in before} == before
    assert {p.name for p in tmp_path.iterdir()} == {*looks, "final", "final.json"}


@pytest.mark.parametrize("where", ["inside", "between", "exchanged"])
def test_after_a_kill_there_is_the_old_or_the_new_and_the_next_write_clears(where, tmp_path: Path):
    final = tmp_path / "final"
    write(final, model="1")
    (final / "mine.bin").write_text("mine")
    killed_in_a_write(final, where)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert final.exists() == (where != "between")
    stands = standing(final)
    verify_folder(stands)
    assert (stands / ("new" if where == "exchanged" else "model")).is_file()
    assert (stands / "mine.bin").read_text() == "mine"
    write_text(tmp_path / "other", "")
    assert {p.name for p in tmp_path.iterdir()} == {"final", "other"}
    verify_folder(final)
    assert (final / "mine.bin").read_text() == "mine"


@pytest.mark.parametrize("left", ["no marker", "an empty marker"])
def test_what_a_kill_left_around_its_marker_is_cleared_a_minute_later(left: str, tmp_path: Path):
    folder = tmp_path / "final.0123456789abcdef.tmp"
    folder.mkdir()
    if left == "an empty marker":
        (folder / ".smbfast-writes-here").touch()
        (folder / "final").mkdir()
    write_text(tmp_path / "other", "")
    assert folder.is_dir()  # it may be the one of a process that is about to write
    os.utime(folder, (1, 1))
    write_text(tmp_path / "other", "")
    assert {p.name for p in tmp_path.iterdir()} == {"other"}


def test_a_disk_that_takes_nothing_any_more_is_no_obstacle_later(tmp_path: Path, monkeypatch):
    def refuses(*args: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("write", "unlink", "rmdir"):
            patch.setattr(os, name, refuses)
        with pytest.raises(OSError, match="Read-only"):
            write_text(tmp_path / "other", "")
    for folder in tmp_path.iterdir():
        os.utime(folder, (1, 1))
    write_text(tmp_path / "other", "")  # of the same process
    assert {p.name for p in tmp_path.iterdir()} == {"other"}


def test_a_manifest_that_cannot_be_read_now_costs_nobody_a_file(tmp_path: Path, monkeypatch):
    write(tmp_path / "step", model="1")
    (tmp_path / "step" / "mine").write_text("mine")
    read, failed = Path.read_text, []

    def fails_once(self: Path, *args: Any, **more: Any) -> str:
        if self.parent.name == replace.GONE and not failed:
            failed.append(self)
            raise OSError(5, "Input/output error", str(self))
        return read(self, *args, **more)

    monkeypatch.setattr(Path, "read_text", fails_once)
    remove_folder(tmp_path / "step")
    assert failed and tree(tmp_path) == {"step.left-1/mine": "mine"}


def test_a_folder_that_cannot_be_removed_ends_nothing(tmp_path: Path, monkeypatch):
    """Nor is the one that was to be replaced lost where the new one cannot take its place."""
    write(tmp_path / "step", model="1")
    rename, renamed = os.rename, []

    def fails(one: Path, other: Path) -> None:
        renamed.append(other)
        if len(renamed) in (1, 3):
            raise OSError(5, "Input/output error", str(one))
        rename(one, other)

    monkeypatch.setattr(os, "rename", fails)
    remove_folder(tmp_path / "step")
    assert tree(tmp_path / "step")["model"] == "1"
    monkeypatch.setattr(replace, "exchange", lambda one, other: False)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "step", model="2")
    assert tree(tmp_path / "step").get("model") == "1" and len(renamed) > 3


def test_a_manifest_of_brackets_is_refused(tmp_path: Path):
    write(tmp_path / "step", model="1")
    (tmp_path / "step" / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"must hold a readable manifest\.json"):
        verify_folder(tmp_path / "step")


def test_a_removal_that_failed_half_way_leaves_one_folder(tmp_path: Path):
    write(tmp_path / "step", model="1")
    (tmp_path / "step" / "mine").write_text("mine")
    (tmp_path / "step.left-1").mkdir()
    remove_folder(tmp_path / "step")
    assert tree(tmp_path) == {"step.left-1/mine": "mine"}


def test_names_and_copies_are_on_the_disk_before_a_write_ends(tmp_path: Path, monkeypatch):
    synced: list[Path] = []
    monkeypatch.setattr(replace, "fsync", synced.append)
    monkeypatch.setattr(locks, "fsync", synced.append)
    write_text(tmp_path / "a" / "b" / "c", "")
    with locks.locked(tmp_path / "d" / "e", "smbfast.train"):
        pass
    assert {tmp_path, tmp_path / "a", tmp_path / "d"} <= set(synced)
    final = tmp_path / "final"
    write(final, model="1")
    (final / "mine").write_text("mine")

    def refuses(*args: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    write(final, model="2")
    assert any(path.name == "mine" for path in synced)


def test_a_write_under_way_is_not_cleared_by_another(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from smbfast.base.files import write_text;"
        "write_text(Path(sys.argv[1]), 'theirs')"
    )
    with committed_file(tmp_path / "a") as staging:
        staging.write_text("ours")
        subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=True)
        assert staging.read_text() == "ours"
    assert (tmp_path / "a").read_text() == "ours"


def test_a_removed_folder_leaves_what_others_put_there(tmp_path: Path):
    write(tmp_path / "step", model="1")
    (tmp_path / "step" / "mine").write_text("mine")
    remove_folder(tmp_path / "step")
    assert tree(tmp_path) == {"step.left-1/mine": "mine"}
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "mine").write_text("no manifest")
    remove_folder(tmp_path / "step")
    assert (tmp_path / "step" / "mine").read_text() == "no manifest"


def test_a_link_stays_and_what_it_points_to_is_written(tmp_path: Path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "b")
    write_text(tmp_path / "a", "1")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "disk" / "b").read_text() == "1"


def test_files_are_for_their_writer_alone(tmp_path: Path):
    with entry("smbfast.name"):
        write(tmp_path / "final", model="1")
    assert (tmp_path / "final").stat().st_mode & 0o077 == 0
    assert all(p.stat().st_mode & 0o077 == 0 for p in (tmp_path / "final").iterdir())


def test_a_folder_that_was_gone_while_it_was_filled_is_not_taken_for_whole(tmp_path: Path):
    write(tmp_path / "run" / "final", model="1")
    with (
        pytest.raises(FileNotFoundError, match="final"),
        committed_folder(tmp_path / "run" / "final", replace=True) as folder,
    ):
        (folder / "config").write_text("2")
        (tmp_path / "run").rename(tmp_path / "away")
        folder.mkdir(parents=True)  # as PEFT does before it writes
        (folder / "model").write_text("2")
    assert not (tmp_path / "run" / "final").exists()
    assert (tmp_path / "away" / "final" / "model").read_text() == "1"


def test_names_that_can_be_guessed_are_no_way_in(tmp_path: Path):
    victim, out = tmp_path / "victim", tmp_path / "e.parquet"
    victim.write_text("mine")
    for name in ("e.parquet.tmp", "e.parquet.old"):
        (tmp_path / name).symlink_to(victim)
    before = os.umask(0)
    try:
        with committed_file(out, private=True) as staging:
            assert staging.stat().st_mode & 0o777 == 0o600
            assert staging.parent.stat().st_mode & 0o777 == 0o700
            staging.write_text("ours")
    finally:
        os.umask(before)
    assert victim.read_text() == "mine" and not out.is_symlink()
    assert out.read_text() == "ours" and out.stat().st_mode & 0o777 == 0o600


class SafetensorError(Exception):
    """As that of safetensors: neither an OSError nor a ValueError."""


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("No space left on device (os error 28)"),  # as of tokenizers
        OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_in_the_words_of_any_library(error, tmp_path: Path):
    out = tmp_path / "final"
    write(out, model="1")
    before = tree(tmp_path)
    with (
        pytest.raises(SystemExit) as stop,
        entry("smbfast.name"),
        committed_folder(out, replace=True),
    ):
        raise error
    assert stop.value.code == f"smbfast.name: No space left on device: {out}"
    assert tree(tmp_path) == before
    with pytest.raises(SystemExit, match=r"smbfast\.name: No space left on device"):
        with entry("smbfast.name"):
            raise error


def test_a_full_disk_of_files_has_their_final_name(tmp_path: Path):
    with (
        pytest.raises(OSError, match="quota") as caught,
        committed_folder(tmp_path / "a") as folder,
    ):
        raise OSError(122, "Disk quota exceeded", str(folder / "model.safetensors"))
    assert caught.value.filename == str(tmp_path / "a" / "model.safetensors")
    with pytest.raises(KeyError), committed_folder(tmp_path / "a"):
        raise KeyError("a mistake of ours stays one")


def test_the_status_is_written_where_nothing_else_can_be(tmp_path: Path, monkeypatch):
    status = tmp_path / "status.json"
    status.write_text(json.dumps({"state": "running", "step": 3, "command": "x"}, indent=1))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smbfast.run.folder.write_text", full)
    write_end(SimpleNamespace(folder=tmp_path), "preempted")
    written = {"state": "preempted", "step": 3, "command": "x"}
    assert json.loads(status.read_text()).items() >= written.items()


def foreign_run(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "final/keep.txt",
        "thesis.docx",
        "best/a/b",
        "checkpoints/step-000001/state.safetensors",
        "prepared/keep.txt",
        "prepared/train/keep.txt",
        "tensorboard/keep.txt",
        "metrics.jsonl",
        "cohort-60-0/keep.txt",
        "final.0123456789abcdef.tmp/x",
        "status.json",
    ],
)
def test_a_folder_of_others_is_no_run_folder(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=name) as refusal:
        ours.require_run_folder(foreign_run(tmp_path, name))
    assert "--run.dir" in str(refusal.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [tmp_path / name]


def test_what_a_run_leaves_that_ended_early_is_ours(tmp_path: Path):
    ours.require_run_folder(tmp_path / "none")
    write(tmp_path / "cohort-60-0", events="1")
    write(tmp_path / "cohort-60-0-99", events="1")
    write(tmp_path / "prepared" / "tokenizer", model="1")
    (tmp_path / "prepared" / "plan.json").write_text("{}")
    killed_in_a_write(tmp_path / "prepared")
    Board(tmp_path / "tensorboard", 1).close()
    for name in ("metrics.jsonl", locks.LOCK, ".DS_Store"):
        (tmp_path / name).touch()
    ours.require_run_folder(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "status.json"])
def test_a_run_that_lost_its_settings_is_no_folder_of_others(name: str, tmp_path: Path):
    """Whether it can go on is asked later, and answered in other words."""
    known = {"run": "a", "format": 1} | {"state": "running", "step": 1, "command": "x"}
    (tmp_path / name).write_text(json.dumps(known))
    ours.require_run_folder(foreign_run(tmp_path, "checkpoints/step-000001/record.json"))


def test_notes_beside_a_run_that_has_begun_are_let_be(tmp_path: Path):
    for name in ("config.toml", "notes.md", "final/keep.txt"):
        foreign_run(tmp_path, name)
    ours.require_run_folder(tmp_path)
    foreign_run(tmp_path, "report.html")
    with pytest.raises(ValueError, match=r"report\.html exists and was not written by smbfast"):
        ours.require_run_folder(tmp_path)


@pytest.mark.parametrize("name", ["x", "train/0.parquet", "data/train/0.parquet", "plan.json.bak"])
def test_a_folder_of_others_is_no_folder_of_shards(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=name):
        ours.require_prepared_folder(foreign_run(tmp_path, name))


def test_a_file_of_others_is_not_replaced(tmp_path: Path):
    nodes = SimpleNamespace(subject_K=[1])
    theirs, mine = tmp_path / "theirs.parquet", tmp_path / "mine.parquet"
    pq.write_table(pa.table({"subject_id": [1]}), theirs)
    columns = {"subject_id": [1], "prediction_time": [1], "embedding": [[1.0]]}
    pq.write_table(pa.table(columns), mine)
    with pytest.raises(ValueError, match="was not written by smbfast"):
        with embedding_file(theirs, nodes):
            pass
    with embedding_file(mine, nodes):
        pass
    for name, own in (("probe.json", '{"tasks": [], "protocol": ""}'), ("report.html", None)):
        (tmp_path / name).write_text('{"mine": 1}')
        with pytest.raises(ValueError, match="was not written by smbfast"):
            ours.require_replaceable(tmp_path / name)
        (tmp_path / name).write_text(own or "<title>a · smbfast report</title>")
        ours.require_replaceable(tmp_path / name)


HOLDS = """
import os, sys, time
from pathlib import Path
from smbfast.base import locks
from smbfast.base.locks import locked
os.environ["PARENT"] = str(os.getpid())
with locked(Path(sys.argv[1]), "smbfast.train"):
    if sys.argv[2] == "forks" and os.fork() == 0:
        time.sleep(600)
    if sys.argv[2] == "forks late":  # a fork that lets go only after its parent has ended
        handle = os.dup(next(iter(locks._HELD)))
        if os.fork() == 0:
            while os.getppid() == int(os.environ["PARENT"]):
                time.sleep(0.01)
            time.sleep(0.3)
            os.close(handle)
            time.sleep(600)
        os.close(handle)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["alone", "forks", "forks late"])
def test_a_folder_has_one_writer_who_is_named_and_a_kill_frees_it(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(locks, "_PATIENCE", 60.0)  # a fork may be late on a busy machine
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path), how],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    try:
        with pytest.raises(ValueError, match=r"in use by smbfast\.train since") as refusal:
            with locks.locked(tmp_path, "smbfast.check"):
                pass
        assert f"process {pid} on " in str(refusal.value)
        process.kill()
        process.wait()
        assert (tmp_path / locks.LOCK).is_file()
        with locks.locked(tmp_path, "smbfast.train"):  # although the forked process lives
            pass
        assert not list(tmp_path.iterdir())
    finally:
        os.killpg(process.pid, signal.SIGKILL) if "forks" in how else process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_that_a_lock_has_made_goes_with_it(tmp_path: Path):
    with locks.locked(tmp_path / "a", "smbfast.train"):
        with pytest.raises(ValueError, match="in use"), locks.locked(tmp_path / "a", "x"):
            pass
    assert not (tmp_path / "a").exists()
    with locks.locked(tmp_path / "a", "smbfast.train"):
        (tmp_path / "a" / "b").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_without_locks_it_is_said_and_the_work_goes_on(tmp_path: Path, monkeypatch, capsys):
    def none(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with locks.locked(tmp_path, "smbfast.train"):
        write(tmp_path / "final", model="1")
    assert capsys.readouterr().err.count("without locks") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], object]] = {
    "open": lambda m: m.setattr("smbfast.run.board.EventsWriter", failing),
    "write": lambda m: m.setattr("tensorboardX.record_writer.RecordWriter.write", failing),
    "flush": lambda m: m.setattr("tensorboardX.record_writer.RecordWriter.flush", failing),
    "close": lambda m: m.setattr("tensorboardX.record_writer.RecordWriter.close", failing),
}


def failing(*args: object, **more: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault", FAULTS)
def test_tensorboard_that_cannot_write_says_so_once(
    fault: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr("smbfast.run.board._FLUSH", -1.0)
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        board = Board(tmp_path / "tensorboard", 1)
        for step in range(100):
            board.add("x", 1.0, step)
        board.close()
    err = capsys.readouterr().err
    assert err.count("TensorBoard failed (No space left on device") == 1 == err.count("\n")


def test_tensorboard_whose_disk_is_full_one_day_says_so_once(tmp_path: Path, monkeypatch, capsys):
    board = Board(tmp_path / "tensorboard", 1)
    board.add("x", 1.0, 1)
    FAULTS["write"](monkeypatch)
    for step in range(100):
        board.add("x", 1.0, step)
    board.close()
    err = capsys.readouterr().err
    assert err.count("TensorBoard failed (No space left on device") == 1 == err.count("\n")


def test_tensorboard_reads_what_is_written(tmp_path: Path):
    board = Board(tmp_path, 1)
    board.add("eval/sft", 0.5, 3)
    board.close()
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("events.out.tfevents.") and b"eval/sft" in file.read_bytes()


@pytest.mark.parametrize(
    "error", [KeyError("Zebrafinch"), ValueError("Zebrafinch"), OSError(5, "x")]
)
def test_a_helper_that_fails_is_said_without_a_value(error: Exception, capsys):
    with helpers.helper("the report"):
        raise error
    err = capsys.readouterr().err
    assert err.startswith("warning: the report failed (") and "Zebrafinch" not in err
    with pytest.raises(KeyboardInterrupt), helpers.helper("the report"):
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["is missing", "hangs"])
def test_git_that_does_not_answer_is_not_waited_for(how: str, tmp_path: Path, monkeypatch, capsys):
    if how == "hangs":
        (tmp_path / "git").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
        (tmp_path / "git").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(runtime, "_GIT_PATIENCE", 0.1)
    monkeypatch.setattr(Path, "exists", lambda self: True)
    assert runtime.git_state.__wrapped__() == ""
    assert "warning: git failed" in capsys.readouterr().err


@pytest.fixture
def _handlers() -> Iterator[None]:
    before = {n: signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)}
    yield
    assert {n: signal.getsignal(n) for n in before} == before


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_every_signal_of_a_scheduler_stops_a_command(number: signal.Signals, capsys):
    states: list[str] = []

    def on_end(state: str) -> None:
        states.append(state)
        if state == "preempted":
            os.kill(os.getpid(), number)  # a second one, on the way out

    with pytest.raises(SystemExit) as stop, entry("smbfast.name", status=75, on_end=on_end):
        assert callable(signal.getsignal(number))  # else it would end the tests
        os.kill(os.getpid(), number)
        signal.pause()
    assert stop.value.code == 75 and states == ["preempted"]
    assert "smbfast.name: stopped" in capsys.readouterr().err


@pytest.mark.usefixtures("_handlers")
def test_an_interrupt_that_is_lost_can_be_repeated(monkeypatch: pytest.MonkeyPatch):
    ended: list[int] = []
    clock = [100.0]
    monkeypatch.setattr("smbfast.base.entry.os._exit", ended.append)
    monkeypatch.setattr("smbfast.base.entry.monotonic", lambda: clock[0])
    with pytest.raises(SystemExit), entry("smbfast.name", status=75):
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGUSR1)
                signal.pause()
            for number in (signal.SIGTERM, signal.SIGUSR1):  # handed on by others: no more is asked
                os.kill(os.getpid(), number)
            clock[0] += 5
        assert ended == [75]
        raise KeyboardInterrupt


@pytest.mark.usefixtures("_handlers")
def test_an_interrupt_that_python_drops_is_repeated(capsys):
    """In the callback of a weak reference nobody can catch it."""

    class Thing:
        pass

    def callback(_reference: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.sigtimedwait([], 0.01)

    thing = Thing()
    reference = weakref.ref(thing, callback)
    with pytest.raises(SystemExit) as stop, entry("smbfast.name"):
        del thing
        signal.sigtimedwait([], 60)
    assert stop.value.code == 75 and reference() is None
    err = capsys.readouterr().err
    assert "smbfast.name: stopped" in err and "ignored" not in err


@pytest.mark.usefixtures("_handlers")
def test_an_interrupt_that_a_library_swallows_is_repeated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smbfast.base.entry._AGAIN", 0.05)
    with pytest.raises(SystemExit) as stop, entry("smbfast.name"):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        signal.sigtimedwait([], 60)
    assert stop.value.code == 75
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


THROUGH_TEXT = """
from smbfast.base.entry import entry

def interrupted():
    raise KeyboardInterrupt

if __name__ == "__main__":
    with entry("smbfast.name"):
        exec("interrupted()")
"""


def test_an_interrupt_through_source_text_ends_with_75_too(tmp_path: Path):
    """As in the import of a library: Python remembers it, and would end itself by SIGINT."""
    (tmp_path / "program.py").write_text(THROUGH_TEXT)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    run = [sys.executable, "-m", "program"]
    done = subprocess.run(run, env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    assert done.returncode == 75, done.stderr


BEGINS = """
import os, signal, sys
sys.argv[0], number = sys.argv[1], getattr(signal, sys.argv[-1])
before = signal.getsignal(number)
import smbfast
if signal.getsignal(number) == before:
    raise SystemExit(3)
os.kill(os.getpid(), number)
signal.sigtimedwait([], 60)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_command_that_has_not_begun_is_stopped_with_a_line(name: str):
    run = [sys.executable, "-c", BEGINS]
    done = subprocess.run([*run, "-m", "smbfast.train", name], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (75, "\nsmbfast: stopped before it began\n")
    for words in (["notebook"], ["-m", "others"]):  # whose package imports smbfast
        other = subprocess.run([*run, *words, name], capture_output=True)
        assert other.returncode == 3  # what answered before still does
