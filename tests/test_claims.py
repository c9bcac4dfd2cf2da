"""Claims of work: one process at a time has one, and no end of a process leaves one behind."""

import os
import signal
import threading
import time
from errno import EACCES

import pytest

from smbfast.base import claims, locks
from smbfast.base.claims import CLAIMS, claimed, clear_claims


def held_by_a_child(folder, name):
    """Fork a process that claims the work and sleeps; return its id once it has it."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with claimed(folder, name) as mine:
                os.write(write, b"y" if mine else b"n")
                time.sleep(120)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as opened:
        assert opened.read(1) == b"y"
    return pid


def ended(pid):
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_one_has_a_claim_and_nothing_is_left_of_it(tmp_path):
    folder = tmp_path / "new"
    with claimed(folder, "train/0") as first, claimed(folder, "train/0") as second:
        assert (first, second) == (True, False)
        with claimed(folder, "train%2F0") as other, claimed(folder, "..") as dots:
            assert other and dots, "names of other work"
    with claimed(folder, "train/0") as again:
        assert again
    assert not list(folder.iterdir()) and not list(tmp_path.glob("*.lock"))


def test_a_block_that_fails_lets_go(tmp_path):
    with pytest.raises(KeyError), claimed(tmp_path, "work"):
        raise KeyError
    with claimed(tmp_path, "work") as mine:
        assert mine


def test_a_killed_process_holds_nothing(tmp_path):
    child = held_by_a_child(tmp_path, "work")
    with claimed(tmp_path, "work") as mine:
        assert not mine
    clear_claims(tmp_path)
    assert list((tmp_path / CLAIMS).iterdir()), "it is held"
    ended(child)
    assert list((tmp_path / CLAIMS).iterdir()), "a kill leaves the file"
    with claimed(tmp_path, "work") as mine:
        assert mine
    assert not list(tmp_path.iterdir())


def test_what_kills_left_is_cleared(tmp_path):
    ended(held_by_a_child(tmp_path, "work"))
    clear_claims(tmp_path)
    clear_claims(tmp_path)
    assert not list(tmp_path.iterdir())


def test_waiting_takes_the_claim_over(tmp_path):
    """Three that wait for one: each has the claim once, none beside another."""
    at_work, most, turns = [], [], []

    def take():
        with claimed(tmp_path, "work", wait=True) as mine:
            at_work.append(mine)
            most.append(len(at_work))
            time.sleep(0.01)
            at_work.pop()
            turns.append(mine)

    child = held_by_a_child(tmp_path, "work")
    waiting = [threading.Thread(target=take) for _ in range(3)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    assert not turns, "the child has it"
    ended(child)
    for thread in waiting:
        thread.join(120)
    assert turns == [True] * 3 and most == [1] * 3
    assert not list(tmp_path.iterdir())


def test_a_forked_process_does_not_hold_it_on(tmp_path):
    with claimed(tmp_path, "work"):
        pid = os.fork()
        if not pid:
            time.sleep(120)
            os._exit(0)
    with claimed(tmp_path, "work") as mine:
        assert mine
    ended(pid)


def refuse(*_):
    raise PermissionError(EACCES, "refused")


@pytest.mark.parametrize("places", ["no locks", "read only"])
def test_without_locks_everybody_works(tmp_path, monkeypatch, capsys, places):
    if places == "no locks":
        monkeypatch.setattr(claims, "acquire", lambda handle, wait: None)
    else:
        monkeypatch.setattr(claims.os, "open", refuse)
    for _ in range(2):
        with claimed(tmp_path, "work") as first, claimed(tmp_path, "work") as second:
            assert first and second
    assert places == "read only" or list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert said.count("repeat each other's work") == (places == "no locks")
    assert not locks._HELD


def test_a_folder_that_goes_away_after_it_was_there(tmp_path, monkeypatch):
    """Whoever lets go removes the folder of claims: also between two looks of another process."""
    mkdir, gone = os.mkdir, []

    def removed_at_once(path, *args, **more):
        if not gone and os.fspath(path).endswith(CLAIMS):
            gone.append(path)
            raise FileExistsError(path)
        mkdir(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", removed_at_once)
    with claimed(tmp_path, "work") as mine:
        assert mine and gone


def test_a_file_in_place_of_the_folder_of_claims_is_named(tmp_path):
    (tmp_path / CLAIMS).write_text("of somebody")
    with pytest.raises(OSError, match=CLAIMS), claimed(tmp_path, "work"):
        pass


def test_a_link_to_nothing_in_place_of_the_folder_is_no_endless_loop(tmp_path):
    (tmp_path / "folder").symlink_to(tmp_path / "nothing")
    with pytest.raises(OSError), claimed(tmp_path / "folder", "work"):
        pass
