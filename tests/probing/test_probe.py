"""The entry: a small dataset with known answers, its files, and what bad input gets."""

import json
import shutil
import stat
import tracemalloc
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.data.labels import read_labels
from smbfast.data.nodes import distinct_nodes
from smbfast.judging.predictions import PREDICTIONS
from smbfast.probe import main
from smbfast.probing import features, logistic, ridge
from smbfast.probing.features import join, read_embeddings
from smbfast.probing.run_probe import run_probe
from smbfast.probing.table import table
from smbfast.settings import ProbeCommandSettings

DAY = 86_400_000_000
SIZES = {"train": 60, "tuning": 30, "held_out": 40}
SECRET = 987_654_321.5
KEYS = ("subject_id", "prediction_time", "split", "embedding")
NAMES = (
    *("smbfast", "stack", "untrained", "age_sex", "counts", "recency", "values"),
    *("oracle_filter", "oracle_latent"),
)
BINARY = ("auroc", "auprc", "brier", "brier_skill", "slope", "intercept")
TIMES = ("auc", "c_harrell", "c_uno", "ibs", *(f"{n}_{h}" for n in ("auc", "brier") for h in "012"))


def stamps(days: list) -> pa.Array:
    return pa.array([int(day * DAY) for day in days], pa.timestamp("us"))


def write(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def vectors(embedding_ND: np.ndarray) -> pa.Array:
    flat = pa.array(embedding_ND.astype(np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, embedding_ND.shape[1])


def write_embeddings(path: Path, nodes: dict, signal: float, **other: object) -> Path:
    rng = np.random.default_rng(5)
    embedding_ND = rng.normal(size=(len(nodes["subject"]), 6))
    embedding_ND[:, 0] += signal * nodes["latent"]
    columns = {
        "subject_id": pa.array(nodes["subject"], pa.int64()),
        "prediction_time": stamps(nodes["day"]),
        "split": nodes["split"],
        "embedding": vectors(embedding_ND),
    }
    return write(path, columns | other)


@pytest.fixture
def world(tmp_path: Path, few_trees: None) -> dict:
    """A MEDS folder with a binary and a survival task, two nodes a patient, oracles, embeddings."""
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    nodes: dict[str, list] = {"subject": [], "day": [], "split": [], "latent": []}
    start = 1
    for split, size in SIZES.items():
        subjects = np.arange(start, start + size)
        start += size
        latent_S = rng.normal(size=size)
        rows = [
            row
            for s, z in zip(subjects.tolist(), latent_S, strict=True)
            for row in [(s, -8000, "MEDS_BIRTH"), *[(s, 1, "SICK" if z > 0 else "WELL")]]
        ]
        write(
            data / "data" / split / "0.parquet",
            {
                "subject_id": pa.array([r[0] for r in rows], pa.int64()),
                "time": stamps([r[1] for r in rows]),
                "code": [r[2] for r in rows],
                "numeric_value": pa.nulls(len(rows), pa.float32()),
            },
        )
        subject_N, latent_N = np.repeat(subjects, 2), np.repeat(latent_S, 2)
        day_N = np.tile([2, 3], size)
        keys = {"subject_id": pa.array(subject_N), "prediction_time": stamps(day_N)}
        true_N = latent_N + 0.5 * rng.normal(size=2 * size) > 0
        write(data / "labels" / "sick" / f"{split}.parquet", keys | {"boolean_value": true_N})
        duration_N = rng.exponential(np.exp(-latent_N))
        survival = {"duration_days": duration_N, "event": rng.random(2 * size) < 0.8}
        write(data / "labels" / "late" / f"{split}.parquet", keys | survival)
        chance_N = 1 / (1 + np.exp(-3 * latent_N))
        scores = {"bayes_filter": chance_N, "latent": chance_N}
        write(data / "oracles" / "sick" / f"{split}.parquet", keys | scores)
        scores = {"bayes_filter": latent_N, "latent": latent_N}
        write(data / "oracles" / "late" / f"{split}.parquet", keys | scores)
        nodes["subject"] += subject_N.tolist()
        nodes["day"] += day_N.tolist()
        nodes["split"] += [split] * len(subject_N)
        nodes["latent"] += latent_N.tolist()
    nodes["latent"] = np.array(nodes["latent"])
    return {
        "data": data,
        "nodes": nodes,
        "online": write_embeddings(tmp_path / "run" / "online.parquet", nodes, 2.0),
        "untrained": write_embeddings(tmp_path / "run" / "untrained.parquet", nodes, 0.0),
        "out": tmp_path / "out",
    }


def config(world: dict, **other: object) -> ProbeCommandSettings:
    values = {
        "embeddings": world["online"],
        "untrained": world["untrained"],
        "data": world["data"],
        "out": world["out"],
        "bootstraps": 20,
        "cox_bootstraps": 10,
    }
    return ProbeCommandSettings(**(values | other))


def probe(world: dict, **other: object) -> dict:
    return run_probe(config(world, **other), say=lambda _: None)


@pytest.mark.parametrize("final", [False, True])
def test_models_baselines_oracles_and_differences(world: dict, final: bool) -> None:
    record = probe(world, final=final, bootstraps=100, cox_bootstraps=50)
    assert record == json.loads((world["out"] / "probe.json").read_text())
    assert record["judged_on"] == ("held_out" if final else "tuning")
    assert record["num_looks"] == final
    splits = SIZES if final else ("train", "tuning")
    late, sick = record["tasks"]
    for task in (sick, late):
        binary = task is sick
        trees = {"smbfast_boosting", "values_boosting"} if binary else set()
        names = {model["name"] for model in task["models"] if not model.get("reason")}
        assert names == {*NAMES, *trees} and task["models"][0]["name"] == "smbfast"
        assert task["rows"] == {split: 2 * SIZES[split] for split in splits}
        assert task["patients"] == {split: SIZES[split] for split in splits}
        judged = record["judged_on"]
        assert task["first"]["rows"] == SIZES[judged]
        assert task["unmatched"] == 0 and task["reason"] is None
        metrics = set(BINARY if binary else TIMES)
        value = {}
        for model in task["models"]:
            own = model["metrics"]
            if not model.get("reason"):
                oracle = model["role"] == "oracle" and not binary
                known = {m for m in metrics if not (oracle and m.startswith(("brier", "ibs")))}
                assert set(own) == known
                value[model["name"]] = own | {"first": model["primary"]}
        for d in task["differences"]:
            metric = "first" if d["rows"] == "first" else d["metric"]
            one, other = value[d["model"]][metric], value[d["against"]][metric]
            if d["value"] is not None:
                assert d["value"] == pytest.approx(one["value"] - other["value"])
            if (d["model"], d["against"], metric) == ("smbfast", "untrained", "first") and final:
                assert d["low"] > 0
    assert [v["task"] for v in record["headline"]] != []
    assert {v["verdict"] for v in record["headline"]} <= {"better", "undecided", "worse"}
    metrics = {model["name"]: model["metrics"] for model in sick["models"]}
    assert metrics["smbfast"]["auroc"]["value"] > 0.85
    assert metrics["smbfast_boosting"]["auroc"]["value"] > 0.75
    assert metrics["counts"]["auroc"]["value"] > 0.75
    assert abs(metrics["untrained"]["auroc"]["value"] - 0.5) < 0.25


@pytest.mark.parametrize("judged_on", ["tuning", "held_out"])
def test_the_predictions_are_those_of_the_judged_rows(world: dict, judged_on: str) -> None:
    record = probe(world, labels=["sick"], final=judged_on == "held_out")
    file = world["out"] / "predictions" / "sick" / "smbfast.parquet"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = pq.read_table(file)
    assert found.schema.remove_metadata().equals(PREDICTIONS)
    assert {name: str(found.schema.field(name).type) for name in found.column_names} == {
        "subject_id": "int64",
        "prediction_time": "timestamp[us]",
        "boolean_value": "bool",
        "predicted_boolean_value": "bool",
        "predicted_boolean_probability": "double",
    }
    labels = pq.read_table(world["data"] / "labels" / "sick" / f"{judged_on}.parquet")
    assert found.select(labels.column_names).equals(labels)
    probability_N = found["predicted_boolean_probability"].to_numpy()
    assert (found["predicted_boolean_value"].to_numpy() == (probability_N >= 0.5)).all()
    brier = np.mean((probability_N - labels["boolean_value"].to_numpy()) ** 2)
    assert record["tasks"][0]["models"][0]["metrics"]["brier"]["value"] == pytest.approx(brier)
    assert not (world["out"] / "predictions" / "late").exists()


def test_meds_evaluation_accepts_the_predictions(world: dict) -> None:
    schema = pytest.importorskip("meds_evaluation.schema").PredictionSchema
    probe(world, labels=["sick"])
    found = pq.read_table(world["out"] / "predictions" / "sick" / "counts.parquet")
    assert schema.align(found).num_rows == 2 * SIZES["tuning"]


def test_rows_without_an_embedding_are_counted(world: dict) -> None:
    nodes = world["nodes"]
    kept = np.arange(len(nodes["subject"])) % 10 != 3
    some = {key: np.array(value)[kept] for key, value in nodes.items()}
    write_embeddings(world["untrained"], some, 0.0)
    record = probe(world, labels=["sick"], final=True)
    task = record["tasks"][0]
    assert task["unmatched"] == int(np.sum(~kept)) > 0
    assert sum(task["rows"].values()) == int(kept.sum())
    assert pq.read_table(world["out"] / "predictions" / "sick" / "counts.parquet").num_rows < 80
    assert "label rows have no embedding" in table(record)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("split", ["train", "tuning", "held_out"])
def test_one_class(world: dict, split: str, final: bool) -> None:
    file = world["data"] / "labels" / "sick" / f"{split}.parquet"
    labels = pq.read_table(file)
    one = pa.array([False] * len(labels))
    pq.write_table(labels.set_column(2, "boolean_value", one), file)
    record = probe(world, final=final)
    late, sick = record["tasks"]
    assert late["reason"] is None
    if split == "held_out" and not final:
        assert sick["reason"] is None and sick["models"][0]["metrics"]
    elif split == "tuning" and final:
        chosen = sick["models"][0]["chosen"]
        assert chosen["calibration"] == {"slope": 1.0, "intercept": 0.0}
        assert chosen["at_border"] == ("first or last of the grid" in table(record))
    else:
        assert sick["reason"] == f"{split} has one class only" and sick["models"] == []
        assert f"not measurable: {split} has one class only" in table(record)
        assert not (world["out"] / "predictions" / "sick").exists()


def test_small_counts_are_in_no_output(world: dict) -> None:
    file = world["data"] / "labels" / "sick" / "tuning.parquet"
    labels = pq.read_table(file)
    for few, said in ((7, "<=10"), (len(labels) - 7, "all but <=10")):
        true = pa.array([row < few for row in range(len(labels))])
        pq.write_table(labels.set_column(2, "boolean_value", true), file)
        record = probe(world, labels=["sick"])
        task = record["tasks"][0]
        assert task["positives"]["tuning"] == said and task["prevalence"] is None
        assert not any(model["curve"] for model in task["models"])
        assert f"tuning 60 ({said} positive)" in table(record)
        assert json.loads((world["out"] / "probe.json").read_text())["tasks"] == record["tasks"]
    assert "tuning 60 (53 positive)" in table(probe(world, labels=["sick"], small_cells=0))
    assert "Bayes filter = bound for any model in expectation" in table(record)


def broken(world: dict, **other: object) -> Path:
    return write_embeddings(world["online"], world["nodes"], 1.0, **other)


def refused(world: dict, *words: str, **other: object) -> None:
    with pytest.raises(ValueError) as caught:
        probe(world, **other)
    for word in words:
        assert word in str(caught.value)
    assert str(int(SECRET)) not in str(caught.value)
    assert not world["out"].exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_embeddings_that_are_not_finite(world: dict, bad: float) -> None:
    embedding_ND = np.full((len(world["nodes"]["subject"]), 3), SECRET)
    embedding_ND[17, 1] = bad
    broken(world, embedding=vectors(embedding_ND))
    refused(world, "online.parquet", "`embedding`", "finite", "row 17")


def test_embeddings_of_a_wrong_column(world: dict) -> None:
    rows = len(world["nodes"]["subject"])
    broken(world, embedding=pa.array([[SECRET]] * rows))
    refused(world, "online.parquet", "fixed_size_list<float32>")
    broken(world, split=["test"] * rows)
    refused(world, "online.parquet", "`split`", "row 0")
    broken(world, prediction_time=stamps([2] * rows))
    refused(world, "online.parquet", f"{rows // 2} rows repeat")
    table = pq.read_table(broken(world)).drop_columns(["embedding"])
    pq.write_table(table, world["online"])
    refused(world, "online.parquet", "`embedding`")
    world["online"].write_bytes(b"no parquet")
    refused(world, "online.parquet")
    refused(world, "nowhere.parquet", embeddings=Path("nowhere.parquet"))


def test_embeddings_of_other_nodes_or_splits(world: dict) -> None:
    rows = len(world["nodes"]["subject"])
    broken(world, subject_id=pa.array(range(5000, 5000 + rows), pa.int64()))
    refused(world, "online.parquet", "none of them")
    broken(world, split=["train"] * rows)
    refused(world, "online.parquet", "another")


def test_labels_that_cannot_be_probed(world: dict) -> None:
    refused(world, "no_such_task", labels=["no_such_task"])
    refused(world, "once", labels=["sick", "sick"])
    (world["data"] / "labels" / "sick" / "tuning.parquet").unlink()
    refused(world, "sick", "no row in tuning")


def test_an_oracle_must_score_every_row(world: dict) -> None:
    file = world["data"] / "oracles" / "sick" / "held_out.parquet"
    scores = pq.read_table(file)
    pq.write_table(scores.slice(3), file)
    refused(world, "held_out.parquet", "<=10 of 80", final=True)
    wild = pa.array([SECRET] * len(scores))
    pq.write_table(scores.set_column(2, "bayes_filter", wild), file)
    refused(world, "held_out.parquet", "`bayes_filter`", "probabilities", final=True)
    assert probe(world)["judged_on"] == "tuning"


def test_held_out_figures_are_counted_beside_the_run(world: dict) -> None:
    """In the folder of the run that wrote the embeddings, before anything is shown."""
    run = world["online"].parents[1] / "theirs"
    online = run / "embeddings" / "online.parquet"
    write(online, {name: pq.read_table(world["online"])[name] for name in KEYS})
    (run / "run.json").write_text("{}")
    asked = [f"--embeddings={online}", f"--data={world['data']}", f"--out={world['out']}"]
    asked += ["--labels=sick", "--bootstraps=0"]
    main(asked)
    assert not (run / "held_out.json").exists()
    main([*asked, "--final"])
    main([*asked, "--final=true"])
    looks = json.loads((run / "held_out.json").read_text())["looks"]
    words = [look["command"].split()[-1] for look in looks]
    assert words == ["--final", "--final=true"]
    assert all(datetime.fromisoformat(look["at"]).tzinfo for look in looks)
    assert stat.S_IMODE((run / "held_out.json").stat().st_mode) == 0o600
    record = json.loads((world["out"] / "probe.json").read_text())
    assert (record["judged_on"], record["num_looks"]) == ("held_out", 2)
    assert "looked at 2 times" in table(record)
    assert "looked at 2 times" in table(run_probe(config(world, embeddings=online), lambda _: None))
    (run / "held_out.json").write_text("{}")
    shutil.rmtree(world["out"])
    refused(world, "held_out.json", "`looks`", embeddings=online)


def test_the_command_line(world: dict, capsys: pytest.CaptureFixture) -> None:
    arguments = [f"--embeddings={world['online']}", f"--data={world['data']}", "--bootstraps=20"]
    main([*arguments, "--labels=sick", f"--out={world['out']}"])
    shown = capsys.readouterr().out
    assert "AUROC" in shown and "age, sex and code counts" in shown
    with pytest.raises(SystemExit, match="no such folder"):
        main([f"--embeddings={world['online']}", "--data=nowhere"])
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"--{name}=" in shown for name in ProbeCommandSettings.model_fields)
    with pytest.raises(SystemExit):
        main([*arguments, "--bootstrap=3"])
    assert "unknown key `bootstrap`; here it is `bootstraps`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--cox_components=10"])  # of older command lines
    assert "unknown key `cox_components`\n" in capsys.readouterr().err


def test_join_is_exact_for_large_ids() -> None:
    subject_K = np.array([2**62, 2**62 + 1, -5, 2**62])
    time_K = np.array([1, 1, 2, 3])
    subject_N = np.array([2**62 + 1, 2**62, -5, 2**62 + 2, -5])
    time_N = np.array([1, 3, 2, 1, 1])
    assert join(subject_N, time_N, subject_K, time_K).tolist() == [1, 3, 2, -1, -1]
    assert join(subject_N, time_N, subject_K[:0], time_K[:0]).tolist() == [-1] * 5


def test_embeddings_keep_their_rows(world: dict) -> None:
    found = read_embeddings(world["online"])
    labels = read_labels(world["data"] / "labels" / "sick")
    row_N = join(labels.subject_N, labels.time_N, found.subject_M, found.time_M)
    assert (found.split_M[row_N] == labels.split_N).all()
    assert found.embedding_MD.dtype == np.float32 and found.embedding_MD.shape == (260, 6)


def test_a_probe_of_embeddings_in_a_file_has_the_results_of_one_in_memory(
    world: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both fits stop at a gradient of 1e-8. Six scaled directions on 120 rows have a curvature of
    at least 1e-2, so a weight moves by less than 1e-6, and no two held-out rows swap."""
    monkeypatch.setattr(ridge, "TOL", 1e-8)
    whole = pq.read_table(world["online"])
    more = whole.slice(0, 5).set_column(1, "prediction_time", stamps([9, 10, 11, 12, 13]))
    pq.write_table(pa.concat_tables([more, whole]), world["online"], row_group_size=7)
    records = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(features, "_HELD", limit)
        out = tmp_path / str(limit)
        config = ProbeCommandSettings(
            embeddings=world["online"], data=world["data"], out=out, bootstraps=0, cox_bootstraps=0
        )
        tasks = run_probe(config, lambda _: None)["tasks"]
        records.append({(t["task"], m): v["value"] for t in tasks for m, v in own_metrics(t)})
    assert len(records[0]) == len(BINARY) + len(TIMES)
    for key, value in records[0].items():
        assert records[1][key] == pytest.approx(value, abs=1e-6), key
    assert sorted(p.name for p in world["online"].parent.iterdir() if "tmp" in p.name) == []


def own_metrics(task: dict) -> list[tuple[str, dict]]:
    return list(next(m for m in task["models"] if m["name"] == "smbfast")["metrics"].items())


def test_rows_that_no_node_asks_for_are_not_read(world: dict, monkeypatch) -> None:
    nodes = distinct_nodes([read_labels(world["data"] / "labels" / "sick").take(np.arange(3))])
    pq.write_table(pq.read_table(world["online"]), world["online"], row_group_size=10)
    groups = []
    real = features._group
    monkeypatch.setattr(features, "_group", lambda *a: (groups.append(a[2]), real(*a))[1])
    few = read_embeddings(world["online"], nodes)
    everything = read_embeddings(world["online"])
    row_N = join(nodes.subject_K, nodes.time_K, everything.subject_M, everything.time_M)
    assert len(few.embedding_MD) == 3 and len(groups) < 3 + 26
    own_N = join(nodes.subject_K, nodes.time_K, few.subject_M, few.time_M)
    np.testing.assert_array_equal(few.embedding_MD[own_N], everything.embedding_MD[row_N])


def test_memory_of_a_probe_in_chunks_does_not_grow_with_the_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the rows hold 6 MiB more embeddings, and keys of some bytes each."""
    monkeypatch.setattr(features, "_HELD", 0)
    monkeypatch.setattr(features, "_CHUNK", 1 << 18)
    monkeypatch.setattr(features, "_CACHED", 1 << 18)
    monkeypatch.setattr(ridge, "PENALTIES", (1e-2,))

    def peak(rows: int) -> int:
        value_ND = np.random.default_rng(0).normal(size=(rows, 256))
        split_N = np.array(["train", "tuning", "held_out"])[np.arange(rows) % 3]
        keys = {"subject_id": np.arange(rows), "prediction_time": stamps([1] * rows)}
        file = write(tmp_path / "e", keys | {"split": split_N, "embedding": vectors(value_ND)})
        true_N = value_ND[:, 0] > 0
        del value_ND
        tracemalloc.start()
        read = read_embeddings(file)
        fit = logistic.fit_logistic(read.features(np.arange(rows)), true_N, split_N)
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert fit.converged and len(fit.probability_N) == rows
        return held

    fewer, more = peak(2_000), peak(8_000)
    assert more < fewer + (2 << 20)
