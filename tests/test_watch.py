"""A rank for which nobody is left ends: its launcher is gone, or the next rank is silent."""

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from smbfast.run import watch
from smbfast.run.watch import ELASTIC, Watch


class Store(dict):
    """What ranks leave for each other, in memory."""

    def __init__(self, **content: Any) -> None:
        super().__init__(content)
        self.twenty = threading.Event()  # numbers were left

    def clone(self) -> "Store":
        return self

    def set(self, key: str, value: Any) -> None:
        self[key] = value
        if value == "20":
            self.twenty.set()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class Ends(SimpleNamespace):
    """What a rank does as it ends: its state, the signals it sends, its exit."""

    def __init__(self) -> None:
        super().__init__(states=[], signals=[], status=None, asked=threading.Event())
        self.left, self.gone = threading.Event(), threading.Event()

    def kill(self, pid: int, number: int) -> None:
        self.signals.append((pid, number))
        self.asked.set()

    def exit(self, status: int) -> None:
        self.status = status
        self.left.set()
        self.gone.wait(60)  # nothing comes after it


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    made = Ends()
    monkeypatch.setattr(watch, "TICK", 0.001)
    monkeypatch.setattr(watch, "SILENCE", 5)
    own = {name: getattr(os, name) for name in ("environ", "getpid", "getppid", "write")}
    fake = SimpleNamespace(**own, kill=made.kill, _exit=made.exit)
    monkeypatch.setattr(watch, "os", fake)
    return made


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch, ends: Ends) -> Iterator[Any]:
    """Makes the thread of rank 0 of two, and ends it."""
    made: list[Watch] = []

    def launch(store: Store) -> None:
        monkeypatch.setenv(ELASTIC, "a job")
        made.append(Watch(os.getppid()))
        made[-1].on_end = ends.states.append
        made[-1].listen(store, 0, 2)

    yield launch
    for each in made:
        each._over.set()
        ends.gone.set()
        each._thread.join(60)


def test_a_rank_that_falls_silent_is_not_waited_for(rank: Any, ends: Ends, capfd) -> None:
    store = Store(**{"beat 1": b"1"})
    rank(store)
    assert ends.left.wait(30)
    assert (ends.states, ends.status, ends.signals) == (["failed"], 1, [])
    assert "rank 1 has not been heard of" in capfd.readouterr().err
    assert int(store["beat 0"]) > 0  # it was itself heard of


def test_a_rank_that_has_left_as_it_should_is_not_missed(rank: Any, ends: Ends) -> None:
    store = Store(**{"beat 1": b"left"})
    rank(store)
    assert store.twenty.wait(60)
    assert not ends.left.is_set() and not ends.states


def test_a_rank_whose_launcher_is_gone_saves_and_ends(
    rank: Any, ends: Ends, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank(Store(**{"beat 1": b"left"}))
    monkeypatch.setattr(watch.os, "getppid", lambda: -1)  # the tests may be of process 1
    assert ends.asked.wait(30)
    assert ends.signals == [(os.getpid(), signal.SIGTERM)]
    assert "torchrun has ended" in capfd.readouterr().err
