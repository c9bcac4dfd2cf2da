"""Embeddings in parts: any number of processes, kills at any moment, the same bytes."""

import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from smbkernels.attention import Segments
from torch import Tensor

from smbfast.base.claims import CLAIMS
from smbfast.base.entry import RunFailed
from smbfast.data import node_parts
from smbfast.data.labels import read_labels, with_splits
from smbfast.data.meds import MedsDataset
from smbfast.data.node_parts import NodeSource
from smbfast.data.nodes import (
    HELD_OUT,
    Nodes,
    NodeText,
    distinct_nodes,
    node_texts,
    sorted_nodes,
)
from smbfast.data.source_index import put_arrow
from smbfast.probing import embedding_parts
from smbfast.probing.embedding import Model
from smbfast.probing.embedding_parts import PartFolder, embed_nodes, part_folder, parts_of
from smbfast.probing.features import read_embeddings
from tests.data.event_tables import our_bpe, serializer_of
from tests.factory import write_labels, write_meds
from tests.listed import Listed

CPU = torch.device("cpu")
COUNT, SIZE = 60, 7  # nodes, and those of a part
NODES = Nodes(np.arange(COUNT), np.arange(COUNT), np.ones(COUNT, np.int8))
REQUEST = {"key": "a key", "data": "some data"}


def texts() -> list[NodeText]:
    random = np.random.default_rng(0)
    lengths = random.integers(2, 9, COUNT)
    return [
        NodeText(k, k, k, 0, random.integers(3, 99, n).astype(np.int32))
        for k, n in enumerate(lengths)
        if k % 11  # a node before the first event has no text
    ]


def states(ids_T: Tensor, position_T: Tensor, segments: Segments, *, rows: Tensor) -> Tensor:
    return torch.stack([ids_T[rows], position_T[rows], torch.full_like(rows, len(ids_T))], 1) / 7


def never(*inputs, **rows) -> Tensor:
    raise AssertionError("nothing is left to embed")


def embed(out: Path, packed=states, **more) -> dict[str, int] | None:
    source = Listed(NODES, texts(), SIZE, more.pop("state", "the data"))
    more = {"tokens": 16, "pool": "last", "key": "a key", **more}
    return embed_nodes(out, Model(packed), source, CPU, **more)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("expected") / "e.parquet"
    counts = embed(out)
    assert counts == {"nodes": COUNT, "embedded": len(texts())}
    assert [p.name for p in out.parent.iterdir()] == ["e.parquet"]
    table = read_embeddings(out)
    assert table.subject_M.tolist() == [t.index for t in texts()]
    assert (table.embedding_MD[:, 0] * 7).round().tolist() == [t.ids_T[-1] for t in texts()]
    return out.read_bytes()


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_write_the_same_bytes(tmp_path, expected, workers):
    """Each claims by a lock of its own, as processes do; all begin before the first part ends."""
    out, begun, embedded = tmp_path / "e.parquet", threading.Barrier(workers), {}

    def work() -> None:
        me = threading.get_ident()
        embedded[me] = 0

        def counted(ids_T, *more, rows) -> Tensor:
            if not embedded[me]:
                begun.wait(60)
            embedded[me] += 1
            return states(ids_T, *more, rows=rows)

        results.append(embed(out, counted))

    results: list[dict[str, int] | None] = []
    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == workers
    assert [r for r in results if r] == [{"nodes": COUNT, "embedded": len(texts())}]
    assert all(embedded.values()) and out.read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["e.parquet"]


def killed(out: Path, moment: int) -> int:
    """Embed in a process that is killed when it writes for the time `moment`; its parts then."""
    child = os.fork()
    if child == 0:
        left = iter(range(moment))

        def kill(*inputs) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        real = os.rename
        os.rename = lambda one, other: (kill(), real(one, other))
        embed(out)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return len(list(parts_of(out).glob("*.arrow")))


def test_a_kill_at_any_write_leaves_nothing_half_written(tmp_path, expected):
    """Also while the file is made of all parts; what is there is not embedded again."""
    out, num = tmp_path / "e.parquet", -(-COUNT // SIZE)
    # writing the key, the first part, and then the fourth
    assert [killed(out, moment) for moment in (0, 1, 3)] == [0, 0, 3] and not out.exists()
    assert killed(out, num - 3) == num and not out.exists()
    assert embed(out, never) and out.read_bytes() == expected
    assert [p.name for p in tmp_path.iterdir()] == ["e.parquet"]


def test_the_same_request_again_is_done_at_once_and_another_is_not(tmp_path, expected, capsys):
    out = tmp_path / "e.parquet"
    embed(out)
    assert embed(out, never) is None and out.read_bytes() == expected
    for other in ({"key": "another"}, {"state": "other data"}):
        assert embed(out, **other) and [p.name for p in tmp_path.iterdir()] == ["e.parquet"]
        assert out.read_bytes() != expected


def test_parts_of_another_request_are_refused_while_somebody_is_at_work(tmp_path, capsys):
    with part_folder(tmp_path / "p", REQUEST, 3) as folder:
        folder.write(0, {}, {"embedded": 0})
        for other, words in [
            ({"key": "another"}, "something else to the same file"),
            ({"data": "changed"}, "data that have changed"),
        ]:
            with pytest.raises(ValueError, match=words):
                with part_folder(tmp_path / "p", REQUEST | other, 3):
                    pytest.fail("it was opened")
        with part_folder(tmp_path / "p", REQUEST, 3) as joined:
            assert joined.done() == {0}
    assert PartFolder(tmp_path / "p", 3).done() == {0}  # for the next command
    with part_folder(tmp_path / "p", REQUEST | {"data": "changed"}, 3) as folder:
        assert folder.done() == set()
    assert "the data have changed since" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_part_is_said_and_made_again(tmp_path, expected, monkeypatch):
    out = tmp_path / "e.parquet"

    def stop(*inputs, **more) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PartFolder, "fill", stop)
        embed(out)
    part = sorted(parts_of(out).glob("*.arrow"))[2]
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"{part.name} must hold embeddings; it was damaged"):
        embed(out)
    assert not part.exists()
    other = pa.table({"node": ["x"]}, metadata={"of": "it", "counts": "{}"})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(PartFolder, "fill", stop)
        embed(out)
    put_arrow(part, other)  # whole by its checksum, and of other columns
    with pytest.raises(ValueError, match=rf"{part.name} must hold embeddings; it was damaged"):
        embed(out)
    assert embed(out) and out.read_bytes() == expected


def test_a_part_of_another_request_is_never_put_into_the_file(tmp_path, expected):
    """Where there are no locks, a process that was begun before may write one."""
    out = tmp_path / "e.parquet"
    with part_folder(parts_of(out), {"key": "another", "data": "the data"}, 9) as other:
        begun = False

        def meddled(*inputs, **rows) -> Tensor:
            nonlocal begun
            if not begun:
                begun = True
                other.write(8, {}, {"embedded": 0})
            return states(*inputs, **rows)

        folder = parts_of(out)
        (folder / "key.json").unlink()
        shutil.rmtree(folder / CLAIMS)
        with pytest.raises(ValueError, match="is of another model or other nodes and is removed"):
            embed(out, meddled)
    assert not out.exists()
    assert embed(out) and out.read_bytes() == expected


def test_a_file_that_nobody_wrote_is_not_said_to_be_there(tmp_path):
    out = tmp_path / "e.parquet"

    def removed(*inputs, **rows) -> Tensor:
        shutil.rmtree(parts_of(out), ignore_errors=True)
        return states(*inputs, **rows)

    with pytest.raises(RunFailed, match=r"was removed before .* was written"):
        embed(out, removed)
    assert not out.exists() and embed(out)


def test_parts_are_private_and_nothing_of_others_is_removed(tmp_path):
    with part_folder(tmp_path / "p", REQUEST, 3) as folder:
        folder.write(0, {}, {"embedded": 0})
        part = next((tmp_path / "p").glob("*.arrow"))
        assert part.stat().st_mode & 0o777 == 0o600
        assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700
        (tmp_path / "p" / "notes.txt").write_text("mine")
        folder.remove()
    assert [f.name for f in (tmp_path / "p").iterdir()] == ["notes.txt"]


def test_a_process_goes_on_in_the_data_and_leaves_room_for_others():
    free = {3, 4, 5, 9, 10, 11, 12, 13}
    assert embedding_parts._next(free, 3, shared=True) == 4
    assert embedding_parts._next(free, 6, shared=False) == 9
    assert embedding_parts._next(free, 6, shared=True) == 11
    assert embedding_parts._next({0}, -1, shared=True) == 0


def dataset(files: dict[str, list[list[int]]]) -> SimpleNamespace:
    """Subjects of the files of each split."""
    splits = {s: [Path(f"{s}/{n}") for n in range(len(own))] for s, own in files.items()}
    known = {
        (split, path): np.array(ids)
        for split, own in files.items()
        for path, ids in zip(splits[split], own, strict=True)
    }
    return SimpleNamespace(splits=splits, subjects=lambda split, own: known[split, own[0]])


def test_parts_depend_on_the_data_and_the_nodes_alone():
    """Each node of a known subject is in one; those of held_out are in parts of their own."""
    random = np.random.default_rng(0)
    subjects = random.permutation(400)
    cuts = np.split(subjects, [3, 90, 100, 101, 250])
    data = dataset({"train": [c.tolist() for c in cuts[:4]], "": [c.tolist() for c in cuts[4:]]})
    subject_K = np.sort(random.choice(420, 900))  # 20 subjects are not in the data
    split_K = np.where(subject_K % 5 == 0, HELD_OUT, 1).astype(np.int8)
    nodes = Nodes(subject_K, np.arange(900), split_K)
    parts = node_parts.node_parts(data, nodes, size=20)
    index = np.concatenate([part.index_M for part in parts])
    assert sorted(index) == np.flatnonzero(subject_K < 400).tolist()
    assert all((np.diff(part.index_M) > 0).all() for part in parts)
    held = [set(split_K[part.index_M] == HELD_OUT) for part in parts]
    assert held == sorted(held, key=lambda own: True in own) and all(len(own) == 1 for own in held)
    most = np.bincount(subject_K).max()
    sizes = [len(part.index_M) for part in parts]
    assert max(sizes) < 20 + most and sum(size < 10 for size in sizes) <= 2  # the last ones
    order = [s for part in parts for piece in part.pieces for s in piece.subject_S]
    there = [s for s in subjects if s in set(subject_K)]
    assert order == [s for s in there if s % 5] + [s for s in there if s % 5 == 0]
    fewer = nodes[np.flatnonzero(split_K != HELD_OUT)]
    others = node_parts.node_parts(data, fewer, size=20)
    for one, other in zip(others, parts[: len(others)], strict=True):
        np.testing.assert_array_equal(fewer.time_K[one.index_M], nodes.time_K[other.index_M])


def test_parts_are_read_in_any_order_and_in_order_by_one_pass_over_a_file(tmp_path, monkeypatch):
    write_meds(tmp_path)
    data, serializer = MedsDataset.open(tmp_path), serializer_of(our_bpe())
    nodes = distinct_nodes([with_splits(read_labels(write_labels(tmp_path)), data)])
    day = 86_400_000_000
    nodes = sorted_nodes(  # half of them four days earlier: two of these before the first event
        np.repeat(nodes.subject_K, 2),
        np.stack([nodes.time_K, nodes.time_K - 4 * day], 1).ravel(),
        np.repeat(nodes.split_K, 2),
    )
    lost: dict[str, int] = {}
    ids = {t.index: t.ids_T.tolist() for t in node_texts(data, serializer, nodes, 60, lost)}
    assert lost["before_first_event"] and lost["tokens_lost"]
    passes, real = [], MedsDataset.file_batches

    def counted(dataset: MedsDataset, file: Path, *inputs, **more):
        passes.append(file)
        return real(dataset, file, *inputs, **more)

    monkeypatch.setattr(MedsDataset, "file_batches", counted)
    source = NodeSource(data, serializer, nodes, 60, size=5)
    assert len(source.parts) > 6
    for order in (source.parts, source.parts[::-1], source.parts[::2] + source.parts[1::2]):
        passes.clear()
        counts: list[dict[str, int]] = [{} for _ in order]
        own = [list(source.texts(p, c)) for p, c in zip(order, counts, strict=True)]
        assert {t.index: t.ids_T.tolist() for texts in own for t in texts} == ids
        assert source.counted(counts) == lost
        if order is source.parts:
            assert sorted(passes) == sorted(f for own in data.splits.values() for f in own)
    os.utime(data.splits["train"][0], ns=(1, 1))
    with pytest.raises(ValueError, match="must not change while it is read"):
        list(source.texts(source.parts[0], {}))
    again = NodeSource(MedsDataset.open(tmp_path), serializer, nodes, 60)
    assert again.state() != source.state()
