"""Processes of one folder: what the first notes, who is the last, and pieces that they divide."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from smbfast.base import dividing, workers
from smbfast.base.claims import claimed
from smbfast.base.dividing import Piece, divide
from smbfast.base.locks import LOCK
from smbfast.base.progress import Progress
from smbfast.base.together import together
from smbfast.base.workers import Workers, engine_of, num_cores

PROGRESS = partial(Progress, "test", unit="things")


def fails(folder, note="it"):
    with together(folder, lambda: note) as group:
        return group.noted, group.first, group.all_failed()


def test_the_first_notes_and_the_last_of_those_that_failed_knows(tmp_path):
    folder = tmp_path / "new"
    with together(folder, lambda: "first") as first:
        assert fails(folder, "second") == ("first", False, False)
        assert first.first and first.noted == "first"
        assert first.all_failed()
    assert not folder.exists()
    assert fails(tmp_path, "alone") == ("alone", True, True)
    assert not list(tmp_path.iterdir())


def test_who_did_not_fail_is_never_cleared_away(tmp_path):
    """It was done, was stopped, or was killed."""
    with together(tmp_path, dict) as group:
        with together(tmp_path, dict):
            pass
        assert not group.all_failed()
    with together(tmp_path, dict) as group:
        pid = os.fork()
        if not pid:
            with together(tmp_path, dict):
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not group.all_failed()
    assert not list(tmp_path.iterdir())


def test_what_a_kill_leaves_is_taken_for_nothing(tmp_path):
    pid = os.fork()
    if not pid:
        with together(tmp_path, lambda: "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == [LOCK]
    assert fails(tmp_path, "next") == ("next", True, True)


def make(folder, name, log):
    (folder / name).write_text("made")
    with open(log, "a") as file:
        file.write(f"{name}\n")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_pieces_are_divided(tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(workers, "worker_pool", ThreadPoolExecutor)
    log, folder = tmp_path / "log", tmp_path / "shared"
    folder.mkdir()
    (folder / "0").write_text("there")
    (folder / "other").write_text("so that 1 is not wanted")
    pieces = [Piece((str(i),), 10, (folder, str(i), log)) for i in range(6)]
    pieces[1] = Piece(("1", "other"), 10, (folder, "1", log))
    pieces[2] = Piece(("0",), 10, (folder, "0", log), anyway=True)

    def take_part(_):
        progress = PROGRESS(50)
        with Workers(num_workers) as own:
            divide(folder, pieces, make, own if own.many else None, progress)
        return progress.done

    with ThreadPoolExecutor() as pool:
        counted = list(pool.map(take_part, range(3)))
    made = log.read_text().split()
    assert sorted(set(made)) == ["0", "3", "4", "5"] and len(made) - made.count("0") == 3
    assert max(counted) <= 60


def test_what_another_has_begun_is_waited_for_and_taken_over(tmp_path, capsys):
    log, pieces = tmp_path / "log", [Piece(("0",), 1, (tmp_path, "0", tmp_path / "log"))]
    progress = PROGRESS(1)
    with ThreadPoolExecutor() as pool:
        with claimed(tmp_path, "0"):
            waiting = pool.submit(divide, tmp_path, pieces, make, None, progress)
            while "waiting for 1 piece" not in capsys.readouterr().err and not waiting.done():
                time.sleep(0.01)
            assert not waiting.done() and not log.exists()
        waiting.result(120)
    assert log.read_text() == "0\n" and progress.done == 1


def test_a_piece_that_was_finished_meanwhile_is_not_made_again(tmp_path, monkeypatch):
    looked = []

    def not_at_first(folder: Path, piece: Piece) -> bool:
        looked.append(piece)
        return len(looked) > 2

    monkeypatch.setattr(dividing, "is_done", not_at_first)
    divide(tmp_path, [Piece(("0",), 1, ())], lambda: pytest.fail("made"), None, PROGRESS(1))
    assert len(looked) == 3


def test_cores_are_those_that_a_job_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5})
    assert num_cores() == 3


@pytest.mark.parametrize(
    "on", ["", "dask", "dask://", "dask://host", "spark://host:1", "dask://local?workers=0", "a:1"]
)
def test_an_address_of_another_form_is_refused(on):
    with pytest.raises(ValueError, match="address of a running cluster"):
        engine_of(on)


def test_an_address():
    assert engine_of("dask://10.0.0.1:8786") == engine_of("dask://local?workers=2") == "dask"
    assert engine_of("ray://head:10001") == "ray"


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(workers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"smbfast\[ray\]"), Workers(1, "ray://head:10001"):
        pytest.fail("it was entered")
