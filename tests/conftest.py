"""Settings that hold for every test."""

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never waits for a network
# before torch is imported, which reads them then. Two workers share two cores, and most shapes are
# far too small to share: one thread each. Where the environment asks for more, as for the tests
# marked `numeric`, a thread that waits leaves its core to others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from tests import left_behind

if not torch.cuda.is_available():
    # before any kernel is decorated: Triton's interpreter proves their logic on a CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

NUM_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """No test depends on what another has left behind."""
    before = left_behind.state()
    yield
    left = left_behind.left_since(before)
    assert not left, f"the test has left {left}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A test that sets the number of threads, or runs an entry that does, sets it for itself."""
    yield
    torch.set_num_threads(NUM_THREADS)


@pytest.fixture(scope="module", autouse=True)
def _what_was_there_stays() -> None:
    """What a file finds, imports above all, is not looked through at each collection in it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def no_report() -> Iterator[None]:
    """Runs draw no report, which would take half of the time of a tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smbfast.run.loop.write_report", lambda *_run, **_more: None)
        yield


@pytest.fixture(scope="module")
def few_trees() -> Iterator[None]:
    """Boosting ends after a tenth of the trees that it may grow: half the time of a tiny probe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smbfast.probing.boosting._TREES", 100)
        yield


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where one mark is asked for (`-m numeric`), files that do not name it are not imported."""
    mark = config.option.markexpr
    if collection_path.suffix != ".py" or not re.fullmatch(r"\w+", mark):
        return None
    return None if f"mark.{mark}" in collection_path.read_text(encoding="utf-8") else True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that hold slow tests come first, so that no worker is left alone with one at the end.

    The order within a file stays.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Modules and items stay to the end: no collection of garbage looks through them again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What is left is freed as in any process, or extensions say at the exit that it leaked."""
    gc.unfreeze()
