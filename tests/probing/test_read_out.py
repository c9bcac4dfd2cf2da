"""The pool of a run: the one whose embeddings say most about its tasks, on tuning."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from smbfast.data.labels import Labels
from smbfast.data.nodes import Nodes
from smbfast.probing import features
from smbfast.probing.embedding_file import embedding_file
from smbfast.probing.features import Rows
from smbfast.probing.read_out import Choice, candidates, choose_pool

SPLIT_N = np.repeat(["train", "tuning", "held_out"], [80, 40, 40])
TRUE_N = np.random.default_rng(0).random(len(SPLIT_N)) < 0.4


def task(true_N: np.ndarray = TRUE_N, name: str = "a") -> Labels:
    times = np.arange(len(SPLIT_N))
    return Labels(name, "binary", times, times, SPLIT_N, value_N=true_N)


def survival(name: str = "t") -> Labels:
    times = np.arange(len(SPLIT_N))
    days_N = np.where(TRUE_N, 10.0, 400.0) + times
    return Labels(name, "time_to_event", times, times, SPLIT_N, duration_N=days_N, event_N=TRUE_N)


def chosen(folder: Path, tasks: list[Labels], noise: dict[str, float], **more) -> Choice:
    """The choice among pools that give the outcome beside so much noise."""
    count = len(SPLIT_N)
    nodes = Nodes(np.arange(count), np.arange(count), np.ones(count, np.int8))
    with ExitStack() as stack:
        files = {}
        for pool, size in noise.items():
            files[pool] = stack.enter_context(embedding_file(folder / f"{pool}.parquet", nodes))
            noise_N = np.random.default_rng(1).normal(size=count)
            files[pool].put(list(range(count)), (TRUE_N + size * noise_N)[:, None])
        return choose_pool(tasks, files, more.get("left_out", {}))


def test_the_pool_of_the_least_tuning_loss_is_chosen_and_of_equal_ones_the_narrower(tmp_path):
    tasks, noise = [task(), task(name="b")], {"last": 2.0, "mean": 0.6, "layers": 0.6}
    choice = chosen(tmp_path, tasks, noise, left_out={"spread": "too wide"})
    assert choice.pool == "mean" and choice.tasks == ["a", "b"]
    assert choice.scores["mean"] == choice.scores["layers"] < choice.scores["last"]
    assert "mean of a, b: last 0." in choice.text() and "spread left out" in choice.text()
    assert chosen(tmp_path, tasks, noise | {"layers": 0.4}).pool == "layers"
    assert not list(tmp_path.iterdir())  # nothing of any pool stays


def test_embeddings_that_are_too_many_for_memory_are_read_from_the_file(tmp_path, monkeypatch):
    noise, read = {"last": 2.0, "mean": 0.3}, []
    expected = chosen(tmp_path, [task()], noise)
    monkeypatch.setattr(features, "_HELD", 0)
    real = Rows.chunks
    monkeypatch.setattr(Rows, "chunks", lambda rows: [read.append(rows.shape), real(rows)][1])
    streamed = chosen(tmp_path, [task()], noise)
    assert (80, 1) in read and streamed.pool == expected.pool == "mean"
    # both stop where no component of the gradient is above 1e-6
    assert streamed.scores == pytest.approx(expected.scores, abs=1e-3)


def test_held_out_patients_have_no_say(tmp_path):
    turned_N = np.where(SPLIT_N == "held_out", ~TRUE_N, TRUE_N)
    noise = {"last": 1.0, "mean": 0.5}
    assert chosen(tmp_path, [task()], noise) == chosen(tmp_path, [task(turned_N)], noise)


def test_times_to_events_decide_where_no_task_is_binary(tmp_path):
    noise = {"last": 3.0, "mean": 0.1}
    choice = chosen(tmp_path, [survival()], noise)
    assert choice.pool == "mean" and choice.tasks == ["t"] and "1 - C" in choice.by
    assert chosen(tmp_path, [survival(), task()], noise).tasks == ["a"]


def test_a_task_that_cannot_be_measured_has_no_say(tmp_path):
    one_class = task(np.where(SPLIT_N == "train", True, TRUE_N), "b")
    noise = {"last": 3.0, "mean": 0.1}
    assert chosen(tmp_path, [one_class, task()], noise).tasks == ["a"]
    nothing = chosen(tmp_path, [one_class], noise)
    assert (nothing.pool, nothing.by, nothing.scores) == ("last", "no task to choose by", {})


def test_a_pool_that_is_too_wide_takes_no_part():
    assert candidates(96, 3) == (["last", "mean", "layers", "spread"], {})
    pools, left_out = candidates(4096, 36)  # Qwen3-8B
    assert pools == ["last", "mean", "spread"]
    assert left_out == {"layers": "151,552 numbers, above 16,384"}
