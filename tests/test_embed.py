"""Embeddings at decision nodes: what they may see, and what they are."""

import json
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from smbkernels.attention import Segments
from torch import Tensor

import smbfast.train as entry
from smbfast import embed
from smbfast.base.config import read_toml
from smbfast.batch import Timeline
from smbfast.data.labels import Labels, read_labels
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import (
    SPLIT_NAMES,
    Nodes,
    NodeText,
    SharedWindow,
    distinct_nodes,
    node_texts,
    shared_windows,
)
from smbfast.data.prepared import Prepared
from smbfast.model import decoder
from smbfast.model.backbone import PatientEncoder, lora_config
from smbfast.model.target import TargetEncoder
from smbfast.probing import embedding, embedding_file, pooling
from smbfast.probing.embedding import Model
from smbfast.probing.embedding_file import EmbeddingFile, EmbeddingTable
from smbfast.probing.embedding_parts import embed_nodes
from smbfast.probing.pooling import Packed, Row
from smbfast.run import probes
from smbfast.run.checkpoint import restore_final, verified_final
from smbfast.run.open_run import OpenRun
from smbfast.settings import POOLS, LoraSettings, Pool, TrainSettings
from smbfast.simulation.dataset import simulate
from tests.listed import Listed
from tests.ops.tolerance import rounding
from tests.test_shared_step import batch_of
from tests.tiny import DELIMITERS, random_window, tiny_lm
from tests.two_paths import FP32, FP64, make_encoder, move, moved_target, twin
from tests.two_paths import run as train_once

CPU = torch.device("cpu")
MANY = 1 << 20


def text_of(window: Timeline, ids: np.ndarray, time: int, index: int = 0) -> NodeText:
    return NodeText(index, window.subject, time, window.start, ids.astype(np.int32))


def listed(texts: list[NodeText]) -> tuple[Nodes, list[NodeText]]:
    """The nodes of texts in order, and the texts with their places in it."""
    keys = sorted((t.subject, t.time) for t in texts)
    subject_K, time_K = np.array(keys, np.int64).reshape(-1, 2).T
    places = {key: k for k, key in enumerate(keys)}
    texts = [replace(t, index=places[t.subject, t.time]) for t in texts]
    return Nodes(subject_K, time_K, np.ones(len(keys), np.int8)), texts


def table_of(folder: Path, packed: Packed, texts: list[NodeText], **more) -> pa.Table:
    """What `embed_nodes` writes for a packed forward."""
    more = {"tokens": MANY, "pool": "last", "key": "a key", **more}
    embed_nodes(folder / "a.parquet", Model(packed), Listed(*listed(texts)), CPU, **more)
    return pq.read_table(folder / "a.parquet")


def pooled(packed: Packed, windows: list[SharedWindow], pool: Pool) -> np.ndarray:
    return pooling.pooled(packed, Row.of(windows), pool, CPU)


def nodes_of(window: Timeline, places: list[tuple[int, int]]) -> list[NodeText]:
    """Nodes after so many complete buckets, each with so many tokens of a tail of its own."""
    texts = []
    for time, (complete, tail) in enumerate(sorted(places)):
        own_T = np.random.default_rng(time).integers(3, 50, tail)
        ids = np.concatenate([window.ids_T[: window.bucket_start(complete)], own_T])
        texts.append(text_of(window, ids, time))
    return texts


def one_each(hidden, texts: list[NodeText]) -> dict[Pool, np.ndarray]:
    """The reference: one forward for each node, of its window and nothing else."""
    rows: dict[Pool, list] = {pool: [] for pool in POOLS}
    for text in texts:
        layers: list[Tensor] = []
        ids_1T = torch.from_numpy(text.ids_T.astype(np.int64))[None]
        states_TD = hidden(ids_1T, each=layers.append)[0].double()
        assert len(layers) == 3 and torch.equal(layers[-1][0].double(), states_TD)
        last_D, mean_D = states_TD[-1], states_TD.mean(0)
        most_D, deviation_D = states_TD.max(0).values, states_TD.std(0, correction=0)
        rows["last"].append(last_D)
        rows["mean"].append(mean_D)
        rows["layers"].append(torch.cat([layer[0].double().mean(0) for layer in layers]))
        rows["spread"].append(torch.cat([last_D, mean_D, most_D, deviation_D]))
    return {pool: torch.stack(own).numpy() for pool, own in rows.items()}


places = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=6)


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [FP64, FP32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("kind", "lora", "which"),
    [("qwen3", True, "online"), ("llama", False, "online"), ("qwen3", True, "target")],
)
def test_nodes_of_one_forward_are_those_of_one_forward_each(kind, lora, which, dtype):
    # two layers of seven linears, each a sum of at most 24 terms
    tol = rounding(2 * 7 * 24) if dtype == FP32 else 1e-12
    encoder = make_encoder(kind, lora=lora, dtype=dtype)
    chosen = encoder if which == "online" else moved_target(encoder)

    @settings(max_examples=8, deadline=None)
    @given(
        chosen_places=st.lists(places, min_size=1, max_size=3),
        tokens=st.integers(40, 400),
        alone=st.sampled_from(POOLS),
    )
    @torch.no_grad()
    def equal(chosen_places, tokens, alone):
        windows = [random_window(seed, buckets=6) for seed in range(len(chosen_places))]
        found = [nodes_of(w, p) for w, p in zip(windows, chosen_places, strict=True)]
        texts = [text for own in found for text in own]
        shared = list(shared_windows(iter(texts), tokens))
        assert [node for window in shared for node in window.nodes] == texts
        expected = one_each(chosen.hidden, texts)
        plain = embedding.one_by_one(chosen.hidden)
        assert set(expected) == set(POOLS)
        for packed in (chosen.packed, plain):
            got = pooling.pooled_by(packed, Row.of(shared), POOLS, CPU)
            for pool, own in expected.items():
                assert np.abs(got[pool] - own).max() <= tol * np.abs(own).max(), pool
            # whichever others are asked for
            np.testing.assert_array_equal(got[alone], pooled(packed, shared, alone))

    equal()


def test_a_window_is_read_once(tmp_path):
    """Five nodes of one window: the trunk and four tails, of which one needs no token."""
    window = random_window(1, buckets=6)
    texts = nodes_of(window, [(2, 3), (2, 0), (4, 2), (4, 5), (6, 3)])
    read = []

    def packed(ids_T: Tensor, *more, **rows) -> Tensor:
        read.append(len(ids_T))
        return states(ids_T, *more, **rows)

    table = table_of(tmp_path, packed, texts)
    assert read == [len(texts[-1].ids_T) + 3 + 2 + 5]
    assert [row[0] for row in table["embedding"].to_pylist()] == [len(t.ids_T) - 1 for t in texts]


@torch.no_grad()
def test_the_last_layer_computes_only_the_rows_that_are_wanted():
    encoder = make_encoder()
    row = Row.of(list(shared_windows(iter(nodes_of(random_window(1), [(2, 3), (4, 2)])), MANY)))
    lengths = []
    real = decoder._mlp

    def counted(mlp, x_TD):
        lengths.append(len(x_TD))
        return real(mlp, x_TD)

    with patch.object(decoder, "_mlp", counted):
        for pools in (["last"], ["mean"], ["last", "layers"]):
            pooling.pooled_by(encoder.packed, row, pools, CPU)
    T = len(row.batch.ids_T)
    assert lengths == [T, 2, T, T, T, T, 2]


def test_an_encoder_that_has_embedded_can_be_trained(tmp_path):
    """What it caches while it embeds takes part in a backward later."""
    encoder, batch = make_encoder(), batch_of()
    expected = train_once("shared", twin(encoder), None, [batch], jepa=0.0)
    table_of(tmp_path, encoder.packed, nodes_of(random_window(1), [(2, 3)]))
    losses, gradients = train_once("shared", encoder, None, [batch], jepa=0.0)
    assert losses == expected[0]
    assert all(torch.equal(gradients[n], g) for n, g in expected[1].items())


def test_windows_without_a_common_token_have_trunks_of_their_own():
    """No branch can hang on nothing: a timeline without a header, nodes in its first bucket."""
    window = random_window(1)
    texts = [text_of(window, np.array(ids), i) for i, ids in enumerate(([5, 6], [7], [7, 8]))]
    shared = list(shared_windows(iter(texts), MANY))
    assert [w.trunk_T.tolist() for w in shared] == [[5, 6], [7, 8]]
    assert [w.prefix_K for w in shared] == [[2], [1, 2]] and not any(w.branches for w in shared)


@torch.no_grad()
def test_windows_share_forwards_of_bounded_length(tmp_path):
    encoder = make_encoder()
    windows = [random_window(seed, buckets=4 + seed % 5) for seed in range(40)]
    texts = [t for w in windows for t in nodes_of(w, [(1, 2), (3, 0), (4, 4)])]
    read = []

    def packed(ids_T: Tensor, *more, **rows) -> Tensor:
        read.append(len(ids_T))
        return encoder.packed(ids_T, *more, **rows)

    texts = texts[60:] + texts[:60]  # the order of the data is not that of the nodes
    both = [table_of(tmp_path, packed, texts, tokens=tokens, pool="mean") for tokens in (256, 64)]
    assert max(read) <= 256 and max(read) > 64 and min(read) <= 64
    keys = sorted((t.subject, t.time) for t in texts)
    for table in both:
        times = table["prediction_time"].cast("int64").to_pylist()
        assert list(zip(table["subject_id"].to_pylist(), times, strict=True)) == keys
    np.testing.assert_allclose(*(matrix(t) for t in both), atol=1e-5)


def test_held_out_patients_have_forwards_of_their_own(tmp_path):
    """So the others keep their bits whether held-out patients are embedded or not."""
    texts = [t for s in range(40) for t in nodes_of(random_window(s), [(1, 2), (4, 0)])]
    texts = [replace(t, held_out=t.subject >= 25) for t in texts]
    forwards: list[list[tuple[int, ...]]] = []

    def packed(ids_T: Tensor, *more, **rows) -> Tensor:
        forwards[-1].append(tuple(ids_T.tolist()))
        return states(ids_T, *more, **rows)

    for asked in (texts, [t for t in texts if not t.held_out], [t for t in texts if t.held_out]):
        forwards.append([])
        table_of(tmp_path, packed, asked, tokens=256)
    both, others, held_out = forwards
    assert both == others + held_out and len(held_out) > 2


@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_nothing_a_node_does_not_see_changes_a_bit_of_it(pool):
    """Neither the rest of its trunk, nor other branches, nor the patient beside it."""
    encoder, (first, second) = make_encoder(), (random_window(1), random_window(2))
    seen = nodes_of(first, [(3, 2)])[0]
    found = []
    for shift in (0, 1):
        later = replace(first, ids_T=first.ids_T.copy())
        later.ids_T[first.bucket_start(3) + 3 :] += shift
        other = replace(second, ids_T=second.ids_T + shift)
        texts = [*nodes_of(other, [(5, 2)]), seen, *nodes_of(later, [(5, 3), (6, 0)])]
        shared = list(shared_windows(iter(texts), MANY))
        assert [len(window.nodes) for window in shared] == [1, 3]
        found.append(pooled(encoder.packed, shared, pool))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert pooling.width_of(pool, 16, 2) == len(found[0][1])
    assert all((a != b).any() for k, (a, b) in enumerate(zip(*found, strict=True)) if k != 1)


def test_states_that_are_not_finite_and_no_nodes_are_refused(tmp_path):
    texts = nodes_of(random_window(1), [(2, 0)])

    def broken(*inputs, rows: Tensor) -> Tensor:
        return torch.full((len(rows), 4), torch.nan)

    with pytest.raises(ValueError, match="finite"):
        table_of(tmp_path, broken, texts)
    with pytest.raises(ValueError, match="no decision node"):
        table_of(tmp_path, broken, [])
    assert not list(tmp_path.iterdir())


def states(ids_T: Tensor, position_T: Tensor, segments: Segments, *, rows: Tensor) -> Tensor:
    return position_T[rows, None].double()


def test_texts_are_made_once_for_all_models_by_a_thread_ahead_of_them():
    """The last text waits for the first forward, and that one for the last text."""
    texts = [t for s in range(60) for t in nodes_of(random_window(s), [(1, 0), (4, 2)])]
    nodes, texts = listed(texts)
    makers, num_made = set(), 0
    began, all_made = threading.Event(), threading.Event()

    def lazily() -> Iterator[NodeText]:
        nonlocal num_made
        for num_made, text in enumerate(texts, start=1):
            makers.add(threading.get_ident())
            if num_made == len(texts):
                assert began.wait(60)
                all_made.set()
            yield text

    def waiting(*inputs, **rows) -> Tensor:
        began.set()
        assert all_made.wait(60)
        return states(*inputs, **rows)

    one, other = EmbeddingTable(nodes), EmbeddingTable(nodes)
    sinks = [({"last": one}, Model(waiting)), ({"last": other}, Model(states))]
    with patch.object(embedding, "_PLANNED", 12):  # two groups, of 1,536 tokens at most
        embedding.embed_into(sinks, len(texts), lazily(), CPU, tokens=128)
    assert num_made == len(texts) and len(makers) == 1 and threading.get_ident() not in makers
    assert one.table().equals(other.table())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["text", "model", "end"])
def test_an_error_or_interrupt_leaves_the_older_file_and_nothing_else(tmp_path, error, where):
    texts = [t for s in range(8) for t in nodes_of(random_window(s), [(1, 0)])]
    before = table_of(tmp_path, states, texts)
    nodes, texts = listed(texts)

    def broken(*inputs, **rows) -> Tensor:
        raise error("in the model")

    def cut() -> Iterator[NodeText]:
        yield texts[0]
        raise error("in a text")

    def failing(file: EmbeddingFile) -> Iterator:
        raise error("while writing")

    def twice(*inputs, **rows) -> Tensor:
        return 2 * states(*inputs, **rows)

    source = Listed(nodes, cut() if where == "text" else texts, state="the data")
    model = Model(broken if where == "model" else twice)
    parts = failing if where == "end" else EmbeddingFile._parts
    out, more = tmp_path / "a.parquet", {"tokens": 64, "pool": "last", "key": "another"}
    with patch.object(EmbeddingFile, "_parts", parts), pytest.raises(error):
        embed_nodes(out, model, source, CPU, **more)
    # what was committed before the end is for the next command, if that is an interrupt
    went_on = where == "end" and error is KeyboardInterrupt
    assert {p.name for p in tmp_path.iterdir()} == {"a.parquet"} | (
        {"a.parquet.parts"} if went_on else set()
    )
    assert pq.read_table(out).equals(before)
    again = Listed(nodes, texts, state="the data")
    embed_nodes(out, Model(broken if went_on else twice), again, CPU, **more)
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]
    np.testing.assert_array_equal(matrix(pq.read_table(out)), 2 * matrix(before))


def test_memory_does_not_grow_with_the_number_of_nodes(tmp_path):
    """Four times the nodes hold 12 MiB more embeddings and take less than 2 MiB more memory."""
    width, ids = 4096, np.arange(3, 19, dtype=np.int32)

    def wide(*inputs, rows: Tensor) -> Tensor:
        return torch.ones(1, width).expand(len(rows), -1)

    def peak(count: int) -> int:
        nodes = Nodes(np.arange(count), np.zeros(count, np.int64), np.ones(count, np.int8))
        texts = (NodeText(k, k, 0, 0, ids) for k in range(count))
        source, more = Listed(nodes, texts, size=64), {"pool": "last", "key": str(count)}
        tracemalloc.start()
        embed_nodes(tmp_path / "a", Model(wide), source, CPU, tokens=64, **more)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pq.read_metadata(tmp_path / "a").num_rows == count
        return held

    with patch.object(embedding_file, "_PART", 1 << 20):
        peak(256)  # what is made once in a process
        fewer, more = peak(256), peak(1024)
    assert fewer > 1 << 20 and more < fewer + (2 << 20)


def test_distinct_nodes_are_sorted_and_each_once_with_a_split_that_is_known():
    random = np.random.default_rng(0)
    subject_N, time_N = random.integers(-3, 3, (2, 400))
    split_N = np.where(random.random(400) < 0.5, "", np.array(["train", "held_out"])[subject_N % 2])
    task = Labels("a", "times", subject_N, time_N, split_N)
    nodes = distinct_nodes([task.take(np.arange(150)), task.take(np.arange(150, 400))])
    pairs = sorted({*zip(subject_N.tolist(), time_N.tolist(), strict=True)})
    assert list(zip(nodes.subject_K.tolist(), nodes.time_K.tolist(), strict=True)) == pairs
    names = [SPLIT_NAMES[i] for i in nodes.split_K]
    for (subject, time), name in zip(pairs, names, strict=True):
        known = {*split_N[(subject_N == subject) & (time_N == time)]} - {""}
        assert {name} == (known or {""})
    assert nodes.split_K.nbytes == len(pairs) and not len(distinct_nodes([]).time_K)


def test_a_full_disk_is_an_error_although_a_part_was_written(tmp_path, monkeypatch):
    nodes, _ = listed(nodes_of(random_window(1), [(2, 0)]))
    monkeypatch.setattr(embedding_file.os, "pwrite", lambda _file, data, _offset: len(data) - 1)
    with pytest.raises(OSError, match="No space left on device"):
        with embedding_file.embedding_file(tmp_path / "e.parquet", nodes) as file:
            file.put([0], np.zeros((1, 3), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file_is_refused_at_once(tmp_path):
    nodes, _ = listed(nodes_of(random_window(1), [(2, 0)]))
    with pytest.raises(IsADirectoryError):
        with embedding_file.embedding_file(tmp_path, nodes):
            pytest.fail("it was opened")


def test_nodes_without_a_text_have_no_row_in_any_part(tmp_path):
    nodes, texts = listed([t for s in range(9) for t in nodes_of(random_window(s), [(1, 0)])])
    with patch.object(embedding_file, "_PART", 8):  # two rows of one number
        source, more = Listed(nodes, texts[5:7], size=3), {"pool": "last", "key": "a key"}
        embed_nodes(tmp_path / "a", Model(states), source, CPU, tokens=64, **more)
    assert pq.read_table(tmp_path / "a")["subject_id"].to_pylist() == [5, 6]


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", ["shared", "reference"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_untrained_encoder_is_that_of_a_second_load(tie, path, dtype, tmp_path):
    """Bit for bit: a new adapter adds zeros, and new rows begin as those of the backbone."""
    windows = [random_window(seed, buckets=6) for seed in range(4)]  # with delimiters
    shared = list(shared_windows(iter([t for w in windows for t in nodes_of(w, [(2, 3)])]), MANY))

    def made(moved: bool) -> PatientEncoder:
        lm = tiny_lm("qwen3", tie=tie).to(dtype)
        lm = get_peft_model(lm, lora_config(lm, LoraSettings(r=4, alpha=8), DELIMITERS))
        encoder = PatientEncoder(lm, 2)
        if moved:
            move(encoder, 0, 0.2)
        return encoder

    def embedded(model: Model) -> np.ndarray:
        with torch.no_grad(), model.scope():
            return pooled(model.packed, shared, "mean")

    trained, again = made(moved=True), made(moved=False)
    before = embedded(Model(embedding.packed_of(trained, None, "online", path)))
    own = embedded(embedding.untrained(trained, path))
    second = embedded(Model(embedding.packed_of(again, None, "online", path)))
    np.testing.assert_array_equal(own, second)
    # and the trained encoder is not changed by it, nor equal to it
    after = embedded(Model(embedding.packed_of(trained, None, "online", path)))
    np.testing.assert_array_equal(before, after)
    assert (np.abs(before - own).max(1) > 1e-2).all()


def test_a_lora_run_loads_no_second_backbone():
    settings = SimpleNamespace(objective=SimpleNamespace(path="shared"))
    with patch.object(probes, "make_encoder", side_effect=AssertionError):
        encoder = make_encoder(lora=True)
        own = probes._untrained(SimpleNamespace(encoder=encoder, settings=settings))
    assert list(own) == ["untrained"] and own["untrained"].packed == encoder.packed


@pytest.fixture(scope="module")
def run(tmp_path_factory, no_report, few_trees):
    """A tiny run on simulated patients, probes included."""
    folder = tmp_path_factory.mktemp("embed")
    simulate(folder / "cohort", 160, 3)
    entry.main(
        [
            "tiny",
            f"--data.path={folder / 'cohort'}",
            f"--run.dir={folder / 'run'}",
            "--probe.labels=death_3y,tte_death",
            "--probe.untrained=2",
            "--probe.bootstraps=100",
            "--phases.0.steps=2",
            "--phases.1.steps=2",
            "--run.threads=1",
        ]
    )
    return folder


def embedded(cohort: Path, run: Path, out: Path, *more: str):
    embed.main(
        [
            f"--model={run / 'final'}",
            f"--data={cohort}",
            "--labels=death_3y,tte_death",
            f"--out={out}",
            *more,
        ]
    )
    return pq.read_table(out)


def matrix(table):
    return np.stack(table["embedding"].to_pylist())


def test_a_node_that_tasks_share_is_embedded_once(run, tmp_path):
    table = embedded(run / "cohort", run / "run", tmp_path / "e.parquet")
    tasks = [read_labels(run / "cohort" / "labels" / t) for t in ("death_3y", "tte_death")]
    pairs = {(int(s), int(t)) for k in tasks for s, t in zip(k.subject_N, k.time_N, strict=True)}
    times = table["prediction_time"].cast("int64").to_pylist()
    found = list(zip(table["subject_id"].to_pylist(), times, strict=True))
    assert len(found) == len(set(found)) and set(found) == pairs
    assert sum(map(len, tasks)) > len(pairs)
    assert (tmp_path / "e.parquet").stat().st_mode & 0o777 == 0o600


def test_the_entry_and_the_training_run_agree_and_batches_do_not_matter(run, tmp_path):
    trained = pq.read_table(run / "run" / "embeddings" / "online.parquet")
    tasks = [shutil.copytree(f, tmp_path / f.name) for f in run.glob("cohort/labels/*_*/")]
    for file in tmp_path.glob("*/held_out.parquet"):  # a run embeds none of them
        file.unlink()
    same = "--labels=" + ",".join(str(f) for f in tasks if f.name in ("death_3y", "tte_death"))
    again = embedded(run / "cohort", run / "run", tmp_path / "e.parquet", same)
    alone = embedded(run / "cohort", run / "run", tmp_path / "one.parquet", same, "--tokens=64")
    plain = embedded(run / "cohort", run / "run", tmp_path / "p.parquet", same, "--path=reference")
    assert again["subject_id"].equals(trained["subject_id"])
    np.testing.assert_array_equal(matrix(again), matrix(trained))
    np.testing.assert_allclose(matrix(alone), matrix(again), atol=2e-5)
    np.testing.assert_allclose(matrix(plain), matrix(again), atol=2e-5)


def test_target_and_pooling_are_others(run, tmp_path):
    last = matrix(embedded(run / "cohort", run / "run", tmp_path / "a.parquet"))
    target = matrix(
        embedded(run / "cohort", run / "run", tmp_path / "b.parquet", "--encoder=target")
    )
    mean = matrix(embedded(run / "cohort", run / "run", tmp_path / "c.parquet", "--pool=mean"))
    # another encoder, but an average of this one: nearer to it than nothing is
    assert 0 < np.abs(target - last).mean() < np.abs(last).mean()
    assert np.abs(mean - last).max() > 1e-2


def test_a_run_chooses_its_pool_and_the_model_says_which(run, tmp_path, monkeypatch, capsys):
    """Also of a finished run. A kill leaves the model of before or of after, and the same command
    ends with the same files."""
    shutil.copytree(run / "run", tmp_path / "run")
    final, words = tmp_path / "run" / "final", read_toml(tmp_path / "run" / "config.toml")
    words["run"]["dir"] = str(tmp_path / "run")
    words["probe"] |= {"pool": "auto", "bootstraps": 100}
    opened = OpenRun.open(TrainSettings(**words))
    before = verified_final(final)
    assert before["pool"] == "last" and "pool_choice" not in before

    def probed(target: TargetEncoder | None) -> dict[str, bytes]:
        opened.save_model(final, target, 4)  # as the loop does
        probes.probe_run(opened, target, final=True)
        files = [*final.iterdir(), tmp_path / "run" / "embeddings" / "online.parquet"]
        return {file.name: file.read_bytes() for file in files}

    target = opened.take_target()
    first = probed(target)
    record = verified_final(final)
    scores = record["pool_choice"]["scores"]
    assert record["pool"] == min(scores, key=scores.get) and set(scores) == set(POOLS)
    assert f"pool {record['pool']}: least tuning log loss" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "run" / "embeddings" / "online.parquet")
    layers = opened.encoder.base.config.num_hidden_layers
    width = pooling.width_of(record["pool"], opened.encoder.width, layers)
    assert table.schema.field("embedding").type.list_size == width
    probe = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert probe["read_out"] == {"pool": record["pool"], "choice": record["pool_choice"]}
    # who loads the model embeds as the run did, to the same bits
    again = embedded(run / "cohort", tmp_path / "run", tmp_path / "e.parquet")
    np.testing.assert_array_equal(matrix(again), matrix(table))
    monkeypatch.setattr(probes, "run_probe", lambda *inputs, **more: probe)
    for broken in ("amend_final", "run_probe"):
        with monkeypatch.context() as patched:
            patched.setattr(probes, broken, raising)
            with pytest.raises(KeyboardInterrupt):
                probed(target)
        assert verified_final(final)["pool"] == (
            "last" if broken == "amend_final" else record["pool"]
        )
        assert probed(target) == first
    # what a finished run has chosen stays chosen; untrained models are kept nowhere, and choose
    calls, choose = [], probes.choose_pool
    monkeypatch.setattr(probes, "choose_pool", lambda *inputs: calls.append(1) or choose(*inputs))
    probes.probe_run(opened, target, final=True)
    assert verified_final(final) == record
    assert len(calls) == opened.settings.probe.untrained


def raising(*inputs, **more):
    raise KeyboardInterrupt


def test_an_embedding_is_the_last_hidden_state_of_the_node(run, tmp_path):
    table = embedded(run / "cohort", run / "run", tmp_path / "e.parquet")
    encoder, _, record = restore_final(run / "run" / "final", CPU)
    dataset = MedsDataset.open(run / "cohort")
    prepared = Prepared.open(run / "run" / "prepared")
    nodes = distinct_nodes([read_labels(run / "cohort" / "labels" / "death_3y")])
    texts = node_texts(dataset, prepared.serializer(dataset), nodes, record["window"], {})
    rows = {
        (s, t): e
        for s, t, e in zip(
            table["subject_id"].to_pylist(),
            table["prediction_time"].cast("int64").to_pylist(),
            table["embedding"].to_pylist(),
            strict=True,
        )
    }
    for node, _ in zip(texts, range(5), strict=False):
        with torch.no_grad():
            hidden = encoder.hidden(torch.from_numpy(node.ids_T.astype("int64"))[None])[0, -1]
        np.testing.assert_allclose(hidden, rows[node.subject, node.time], atol=2e-5)


def test_no_event_after_the_prediction_time_changes_a_bit(run, tmp_path):
    """Rewrite every code and value after each patient's node: the embeddings keep their bits."""
    before = embedded(run / "cohort", run / "run", tmp_path / "a.parquet")
    pairs = zip(
        before["subject_id"].to_pylist(), before["prediction_time"].to_pylist(), strict=True
    )
    node = dict(pairs)
    assert len(node) == len(before)  # one node a subject: all that lies behind it may change
    other = tmp_path / "changed"
    changed = 0
    for file in sorted((run / "cohort").rglob("*.parquet")):
        table = pq.read_table(file)
        out = other / file.relative_to(run / "cohort")
        out.parent.mkdir(parents=True, exist_ok=True)
        if file.relative_to(run / "cohort").parts[0] == "data":
            rows = table.to_pylist()
            for row in rows:
                cut = node.get(row["subject_id"])
                if cut is not None and row["time"] is not None and row["time"] > cut:
                    row["code"], row["numeric_value"] = "DIAGNOSIS//BACK_PAIN", 7.75
                    changed += 1
            rows = [r for i, r in enumerate(rows) if r["numeric_value"] != 7.75 or i % 2]
            table = type(table).from_pylist(rows, schema=table.schema)
        pq.write_table(table, out)
    assert changed > 100
    after = embedded(other, run / "run", tmp_path / "b.parquet")
    np.testing.assert_array_equal(matrix(after), matrix(before))


def test_the_probe_table_holds_baselines_and_oracles(run):
    record = json.loads((run / "run" / "probe.json").read_text())
    for task in record["tasks"]:
        names = [m["name"] for m in task["models"]]
        own = ["smbfast", "smbfast_boosting"] if task["kind"] == "binary" else ["smbfast"]
        trees = ["values_boosting"] if task["kind"] == "binary" else []
        linear = ["age_sex", "counts", "recency", "values"]
        oracles = ["oracle_filter", "oracle_latent"]
        assert names == [*own, "stack", *linear, *trees, "bag", "untrained", *oracles]
        assert not any(model.get("reason") for model in task["models"])
        versions = {model["name"]: model["versions"] for model in task["models"]}
        assert versions.pop("untrained") == 2 and set(versions.values()) == {1}
