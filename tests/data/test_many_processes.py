"""Processes that prepare one folder at once: the bytes of one alone, whatever ends one of them."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from smbfast.base import ours
from smbfast.base.claims import CLAIMS
from smbfast.base.ours import require_prepared_folder
from smbfast.data import fitting, preparing
from smbfast.data.prepared import Prepared
from smbfast.data.preparing import prepare
from smbfast.settings import DataSettings
from tests.data.test_shards import content
from tests.factory import SPLITS, at, split_rows, subject_rows, write_meds, write_table

NUM_FILES = 4  # of the train split
# where a process is killed: in a format whose vocabulary is counted first, and in one of text
KILLS = [
    *[("codes", place) for place in ("count_part", "fit_encoding", "_make_shard", "_finish")],
    ("codes", "end"),
    ("text", "_make_shard"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_meds(tmp_path_factory.mktemp("many") / "meds")
    for number in range(NUM_FILES):
        own = SPLITS["train"][number::NUM_FILES]
        rows = [row for subject in own for row in subject_rows(subject)]
        write_table(folder / "data" / "train" / f"{number}.parquet", rows)
    return folder


@pytest.fixture(autouse=True)
def _as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of codes are made in parts, of a file each."""
    monkeypatch.setattr(fitting, "PARALLEL_ROWS", 0)
    monkeypatch.setattr(fitting, "PART_ROWS", 1)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What one process makes in each format."""
    folder = tmp_path_factory.mktemp("alone")
    return {form: content(made(data, folder / form, form)) for form in ("codes", "text")}


def made(data: Path, out: Path, form: str, on: str | None = None) -> Path:
    settings = DataSettings(path=str(data), format=form, workers=1, vocab_size=500, bucket="day")
    return prepare(settings, out, None, ("train", "tuning"), on=on).folder


def forked(act: Callable[[], object]) -> int:
    """Do it in a forked process, whose exit status is 0, or 1 after a ValueError."""
    pid = os.fork()
    if pid:
        return pid
    status = 2
    try:
        act()
        status = 0
    except ValueError:
        status = 1
    finally:
        os._exit(status)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def logged(function: Callable, log: Path, monkeypatch: pytest.MonkeyPatch, place: object) -> None:
    """Have each call of a function leave a line, whichever process it is in."""

    def wrapped(*args: object, **more: object) -> object:
        with open(log, "a") as file:
            file.write(f"{function.__name__}\n")
        return function(*args, **more)

    monkeypatch.setattr(place, function.__name__, wrapped)


def clean(out: Path) -> None:
    left = [p.name for p in out.rglob("*") if p.suffix in (".tmp", ".lock", ".counts")]
    assert not left and not (out / CLAIMS).exists(), left


@pytest.mark.parametrize(("form", "num"), [("codes", 4), ("text", 2)])
def test_they_make_what_one_makes_and_nothing_twice(
    data: Path, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, num: int
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    for function, place in ((preparing._make_shard, preparing), (preparing._finish, preparing)):
        logged(function, log, monkeypatch, place)
    logged(fitting._add_file, log, monkeypatch, fitting)
    pids = [forked(lambda: made(data, out, form)) for _ in range(num)]
    assert [status(pid) for pid in pids] == [0] * num
    assert content(out) == alone[form]
    clean(out)
    lines = log.read_text().split()
    assert lines.count("_make_shard") == NUM_FILES + 1 and lines.count("_finish") == 1
    assert lines.count("_add_file") == (NUM_FILES if form == "codes" else 0)


@pytest.mark.parametrize(("form", "place"), KILLS)
def test_a_process_that_is_killed_leaves_its_work_to_others(
    data: Path, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, place: str
) -> None:
    out = tmp_path / "out"
    ready, go = os.pipe(), os.pipe()
    where = fitting if place == "count_part" else preparing
    name = "shutil" if place == "end" else place  # when all is written, before it is cleared

    def doomed() -> None:
        def stops(*_: object, **__: object) -> None:
            os.write(ready[1], b"y")
            os.read(go[0], 1)
            os.kill(os.getpid(), signal.SIGKILL)

        stops.rmtree = stops  # type: ignore[attr-defined]
        monkeypatch.setattr(where, name, stops)
        made(data, out, form)

    first = forked(doomed)
    assert os.read(ready[0], 1) == b"y"
    second = forked(lambda: made(data, out, form))  # waits at the latest where the other is
    time.sleep(0.05)
    os.write(go[1], b"y")
    assert (status(first), status(second)) == (-signal.SIGKILL, 0)
    assert content(made(data, out, form)) == alone[form]
    clean(out)
    require_prepared_folder(out)


def test_the_error_of_one_removes_nothing_of_another(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has other settings; the folder is one that the other has just begun."""
    out, honest = tmp_path / "out", preparing._make_shard
    ready, go = os.pipe(), os.pipe()

    def slow(*args: object) -> None:
        os.write(ready[1], b"y")
        os.read(go[0], 1)
        honest(*args)

    def first() -> None:
        monkeypatch.setattr(preparing, "_make_shard", slow)
        made(data, out, "codes")

    pid = forked(first)
    assert os.read(ready[0], 1) == b"y"
    there = content(out)
    with pytest.raises(ValueError, match="was prepared from other settings"):
        made(data, out, "text")
    assert {n: c for n, c in content(out).items() if "lock" not in n} == {
        n: c for n, c in there.items() if "lock" not in n
    }
    os.write(go[1], b"y" * 100)
    assert status(pid) == 0
    assert Prepared.open(out).counts["subjects"]


def test_bad_data_end_all_of_them_and_leave_nothing(data: Path, tmp_path: Path) -> None:
    rows = split_rows("tuning")
    bad = {"tuning": [*rows, (rows[-1][0], at(1, 0), "LAB", None, None)]}
    folder, out = write_meds(tmp_path / "meds", bad), tmp_path / "out"
    pids = [forked(lambda: made(folder, out, "codes")) for _ in range(3)]
    assert [status(pid) for pid in pids] == [1] * 3
    assert not out.exists()


def test_a_dask_cluster_makes_what_one_process_makes(
    data: Path, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers are threads here, which must not share a serializer."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which a worker adds its folder
    distributed = pytest.importorskip("distributed", reason="the extra dask is not installed")
    threads = {"n_workers": 2, "threads_per_worker": 2, "processes": False}
    with distributed.LocalCluster(**threads, protocol="tcp", dashboard_address=None) as cluster:
        on = cluster.scheduler_address.replace("tcp", "dask")
        assert content(made(data, tmp_path / "out", "codes", on)) == alone["codes"]
    clean(tmp_path / "out")


@pytest.mark.parametrize("what", ["begins", "ends a write", "was killed"])
def test_a_folder_in_which_another_process_works_is_no_one_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It begins, or ends a write, between two looks; or it was killed before its first mark."""
    staging, honest = tmp_path / "plan.json.0123456789abcdef.tmp", ours._entries

    def entries(folder: Path) -> list[Path]:
        if what == "begins":
            (folder / "tokenizer").mkdir()
            (folder / "plan.json").write_text("{}")
        return [*honest(folder), *([staging] if what == "ends a write" else [])]

    if what == "was killed":
        staging.mkdir()
    monkeypatch.setattr(ours, "_entries", entries)
    require_prepared_folder(tmp_path)


def test_a_folder_with_the_name_of_a_write_that_holds_a_file_is_refused(tmp_path: Path) -> None:
    staging = tmp_path / "plan.json.0123456789abcdef.tmp"
    staging.mkdir()
    (staging / "mine").touch()
    with pytest.raises(ValueError, match="mine"):
        require_prepared_folder(tmp_path)
