"""Embeddings at decision nodes: what they may see, and what they are."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import smbfast.train as entry
from smbfast import embed
from smbfast.checkpoint import restore_final
from smbfast.data.labels import read_labels
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.simulate import simulate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on simulated patients, probes included."""
    folder = tmp_path_factory.mktemp("embed")
    simulate(folder / "cohort", 160, 3)
    entry.main(
        [
            "tiny",
            f"--data.path={folder / 'cohort'}",
            f"--run.dir={folder / 'run'}",
            "--probe.labels=death_3y,tte_death",
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
    again = embedded(run / "cohort", run / "run", tmp_path / "e.parquet")
    alone = embedded(run / "cohort", run / "run", tmp_path / "one.parquet", "--batch=1")
    assert again["subject_id"].equals(trained["subject_id"])
    np.testing.assert_array_equal(matrix(again), matrix(trained))
    np.testing.assert_allclose(matrix(alone), matrix(again), atol=2e-5)


def test_target_and_pooling_are_others(run, tmp_path):
    last = matrix(embedded(run / "cohort", run / "run", tmp_path / "a.parquet"))
    target = matrix(
        embedded(run / "cohort", run / "run", tmp_path / "b.parquet", "--encoder=target")
    )
    mean = matrix(embedded(run / "cohort", run / "run", tmp_path / "c.parquet", "--pool=mean"))
    assert 0 < np.abs(target - last).max() < 1 and np.abs(mean - last).max() > 1e-2


def test_an_embedding_is_the_last_hidden_state_of_the_node(run, tmp_path):
    table = embedded(run / "cohort", run / "run", tmp_path / "e.parquet")
    encoder, _, record = restore_final(run / "run" / "final", CPU)
    dataset = MedsDataset.open(run / "cohort")
    prepared = Prepared.open(run / "run" / "prepared")
    nodes = embed.distinct_nodes([read_labels(run / "cohort" / "labels" / "death_3y")])
    texts = embed.node_texts(dataset, prepared.serializer(dataset), nodes, record["window"], {})
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
    import json

    record = json.loads((run / "run" / "probe.json").read_text())
    for task in record["tasks"]:
        names = [m["name"] for m in task["models"]]
        assert names == ["smbfast", "untrained", "counts", "oracle_filter", "oracle_latent"]
        assert {d["against"] for d in task["differences"]} == {"untrained", "counts"}
