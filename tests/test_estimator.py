"""Embeddings as a step of scikit-learn: those of the command, each made once, in any order."""

import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

import smbfast
from smbfast import PatientEmbedder, embed, train
from smbfast.base.claims import claimed
from smbfast.run.checkpoint import amend_final
from smbfast.serving import Embedder
from smbfast.settings import POOLS
from tests.factory import SPLITS, at, split_rows, table_of, tiny_run, write_meds, write_table
from tests.hub_server import COMMIT, hub
from tests.refusal import refused

SINGLE = 2e-6  # of the largest state: a product of few rows sums in another order than of many
NODES = pd.DataFrame(
    [(s, at(day, 15), bool(s * day % 2)) for s in range(1, 21) for day in (2, 3, 5)],
    columns=["subject_id", "prediction_time", "boolean_value"],
)
Y = NODES["boolean_value"].to_numpy()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, no_report: None) -> Path:
    """`data`, and `run`: a model in codes, with a target encoder."""
    home = tmp_path_factory.mktemp("estimator")
    data = write_meds(home / "data")
    short = ["--phases.0.steps=1", "--phases.1.steps=1", "--objective.self_check=false"]
    train.main([*tiny_run(data, home / "run"), *short, "--run.save_every=2"])
    return home


@pytest.fixture
def step(home: Path) -> Iterator[Callable[..., PatientEmbedder]]:
    def made(**more: Any) -> PatientEmbedder:
        model, data = home / "run" / "final", home / "data"
        return PatientEmbedder(**({"model": model, "data": data, "device": "cpu"} | more))

    yield made
    smbfast.clear_cache()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A line for each node that is embedded."""
    lines: list[str] = []
    embedded = Embedder.embedded

    def logged(self: Embedder, pools: Any, dataset: Any, nodes: Any, **more: Any) -> Any:
        for subject, time in zip(nodes.subject_K, nodes.time_K, strict=True):
            lines.append(f"{subject} {time} {more['encoder']}")
        return embedded(self, pools, dataset, nodes, **more)

    monkeypatch.setattr(Embedder, "embedded", logged)
    return lambda: lines


def risk(step: PatientEmbedder) -> Pipeline:
    return Pipeline([("e", step), ("z", StandardScaler()), ("p", LogisticRegression())])


def of_command(home: Path, nodes: pd.DataFrame, folder: Path, *more: str) -> dict[tuple, list]:
    """What the command writes for nodes, by node."""
    write_table(folder / "at.parquet", pa.Table.from_pandas(nodes, preserve_index=False))
    (folder / "e.parquet").unlink(missing_ok=True)
    words = [f"--at={folder / 'at.parquet'}", f"--out={folder / 'e.parquet'}", *more]
    paths = [f"--model={home / 'run' / 'final'}", f"--data={home / 'data'}", "--device=cpu"]
    embed.main([*paths, *words])
    rows = pq.read_table(folder / "e.parquet").to_pylist()
    return {(row["subject_id"], row["prediction_time"]): row["embedding"] for row in rows}


def test_rows_in_any_order_have_the_bits_of_the_command(
    home: Path, step: Any, tmp_path: Path
) -> None:
    mixed = NODES.sample(frac=1.5, replace=True, random_state=0)  # rows are repeated, and left out
    wanted = of_command(home, mixed, tmp_path)
    values = step().fit(mixed).transform(mixed)
    assert values.dtype == np.float32 and len(values) == len(mixed) > len(wanted)
    keys = zip(mixed["subject_id"], mixed["prediction_time"], strict=True)
    np.testing.assert_array_equal(values, np.array([wanted[key] for key in keys], np.float32))
    table = pa.Table.from_pandas(mixed, preserve_index=False)
    for other in (table, pl.from_arrow(table), table.to_pydict()):
        np.testing.assert_array_equal(step().transform(other), values)
    names = [f"embedding_{i}" for i in range(values.shape[1])]
    assert step().get_feature_names_out().tolist() == names
    frame = step().set_output(transform="pandas").fit_transform(mixed)
    assert frame.index.equals(mixed.index) and frame.columns.tolist() == names
    assert step().set_output(transform="polars").transform(mixed).columns == names


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_and_encoder_is_the_command_s(
    home: Path, step: Any, tmp_path: Path, pool: str
) -> None:
    nodes = NODES[NODES["subject_id"] > 14]
    wanted = of_command(home, nodes, tmp_path, f"--pool={pool}", "--encoder=target")
    values = step(pool=pool, encoder="target").transform(nodes)
    np.testing.assert_array_equal(values, np.array(list(wanted.values()), np.float32))
    assert len(step(pool=pool).get_feature_names_out()) == values.shape[1]


def test_a_search_over_pools_and_encoders_embeds_each_node_once(step: Any, made: Any) -> None:
    grid = {"e__pool": POOLS, "e__encoder": ["online", "target"]}
    folds = GroupKFold(3)
    search = GridSearchCV(risk(step()), grid, cv=folds, error_score="raise")
    search.fit(NODES, Y, groups=NODES["subject_id"])
    assert len(search.cv_results_["params"]) == 8 and np.isfinite(search.best_score_)
    scores = cross_val_score(
        risk(step(pool="mean")), NODES, Y, cv=folds, groups=NODES["subject_id"]
    )
    assert len(scores) == 3
    assert len(made()) == len(set(made())) == 2 * len(NODES)
    pool = search.best_params_["e__pool"]
    alone = clone(search.best_estimator_["e"]).transform(NODES)
    np.testing.assert_array_equal(alone, search.best_estimator_["e"].transform(NODES))
    smbfast.clear_cache()
    again = step(pool=pool, encoder=search.best_params_["e__encoder"]).transform(NODES)
    assert np.abs(again - alone).max() <= SINGLE * np.abs(alone).max()


def test_processes_share_a_folder_of_embeddings(
    step: Any, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with a memory of its own, in turn and while another one waits."""
    cache = tmp_path / "cache"
    memories: list[dict] = [{}, {}, {}]

    def asked(process: int, nodes: pd.DataFrame, **more: Any) -> np.ndarray:
        with monkeypatch.context() as patch:
            patch.setattr("smbfast.estimator._CACHES", memories[process])
            return step(cache=cache, **more).transform(nodes)

    asked(0, NODES[:20])
    values = asked(1, NODES)
    for process in (0, 2):
        np.testing.assert_array_equal(asked(process, NODES), values)
    assert len(made()) == len(set(made())) == len(NODES)

    @contextmanager
    def late(folder: Path, name: str, *, wait: bool) -> Iterator[bool]:
        assert wait
        monkeypatch.setattr("smbfast.estimator.claimed", claimed)
        asked(0, NODES, encoder="target")  # whoever had the claim
        with claimed(folder, name, wait=wait) as mine:
            yield mine

    monkeypatch.setattr("smbfast.estimator.claimed", late)
    assert (asked(1, NODES, encoder="target") != values).any()
    assert len(made()) == len(set(made())) == 2 * len(NODES)


def test_a_folder_of_embeddings_is_private_and_lasts(step: Any, made: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    values = step(cache=cache).transform(NODES)
    smbfast.clear_cache()  # a later session
    np.testing.assert_array_equal(step(cache=cache).transform(NODES), values)
    assert len(made()) == len(NODES)
    files = sorted(cache.iterdir())
    assert {file.name.split("-")[1] for file in files} == {f"{pool}.parquet" for pool in POOLS}
    assert all(file.stat().st_mode & 0o077 == 0 for file in [cache, *files])
    smbfast.clear_cache()
    for file in files:
        file.write_bytes(b"PAR1 of somebody PAR1")
    said = refused(lambda: step(cache=cache).transform(NODES))
    assert "Remove it" in said and ".parquet" in said


def test_a_node_alone_is_within_rounding(step: Any) -> None:
    together = step().transform(NODES)
    smbfast.clear_cache()
    alone = np.concatenate([step().transform(NODES[i : i + 1]) for i in range(0, 60, 7)])
    assert np.abs(alone - together[::7]).max() <= SINGLE * np.abs(together).max()


def test_data_that_changed_are_embedded_anew(home: Path, tmp_path: Path, step: Any) -> None:
    data = shutil.copytree(home / "data", tmp_path / "data")
    first = step(data=data).transform(NODES)
    np.testing.assert_array_equal(step().transform(NODES), first)
    rows = [(*row[:3], 900.0 if row[3] else None, row[4]) for row in split_rows("train")]
    write_table(data / "data" / "train" / "0.parquet", rows)
    changed = (step(data=data).transform(NODES) != first).any(axis=1)
    np.testing.assert_array_equal(changed, NODES["subject_id"] <= SPLITS["train"][-1])


def test_events_in_memory(home: Path, step: Any, made: Any) -> None:
    events, codes = table_of(split_rows("tuning")), home / "data" / "metadata" / "codes.parquet"
    nodes = NODES[NODES["subject_id"].isin(SPLITS["tuning"])]
    model = smbfast.load(home / "run" / "final", device="cpu")
    wanted = model.embed(events, at=nodes, codes=codes).vector_KD
    for form in (events, events.to_pandas(), pl.from_arrow(events)):
        own = clone(step(model=model, data=form, codes=home / "data"))
        np.testing.assert_array_equal(own.transform(nodes), wanted)
    other = events.set_column(3, "numeric_value", pa.array([7.0] * len(events), pa.float32()))
    assert (step(model=model, data=other, codes=codes).transform(nodes) != wanted).any()
    num = len(made())
    bare = pa.table({"code": ["LAB//glucose"], "description": ["sugar"]})
    step(model=model, data=events, codes=bare).transform(nodes)
    assert len(made()) == num + len(nodes), "other codes are other data"


def test_rows_without_an_embedding(step: Any) -> None:
    rows = [(1, at(3)), (99, at(3)), (2, at(-9)), (1, at(3))]
    nodes = pd.DataFrame(rows, columns=["subject_id", "prediction_time"])
    for _ in range(2):  # also those that are known to have none
        said = refused(lambda: step().transform(nodes))
        assert all(word in said for word in ("<=10 of 4", "missing='nan'", "not in `data`")), said
    values = step(missing="nan").transform(nodes)
    assert np.isnan(values).all(axis=1).tolist() == [False, True, True, False]
    smbfast.clear_cache()
    assert np.isnan(step(missing="nan").transform(nodes[1:3])).all(), "none of them"
    assert step().transform(nodes[:0]).shape == (0, values.shape[1])


def test_a_fitted_pipeline_is_pickled_without_patients(
    home: Path, step: Any, tmp_path: Path
) -> None:
    final = shutil.copytree(home / "run" / "final", tmp_path / "final")
    fitted = risk(step(model=smbfast.load(final, device="cpu"), pool="layers")).fit(NODES, Y)
    wanted = fitted.predict_proba(NODES)
    content = pickle.dumps(fitted)
    # neither embeddings, which take 4 bytes a number, nor weights
    assert len(content) < 4 * len(NODES) * len(fitted[-1].coef_[0])
    np.testing.assert_array_equal(pickle.loads(content).predict_proba(NODES), wanted)
    amend_final(final, {"pool": "spread"}, lambda _record: "another model")
    assert "that was pickled" in refused(lambda: pickle.loads(content))


def test_a_model_of_the_hub(
    home: Path, step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded by name and revision, and asked for once however often an estimator is copied."""
    wanted = step().transform(NODES)
    shutil.copytree(home / "run" / "final", tmp_path / "hub" / "own" / "model" / COMMIT)
    with hub(tmp_path / "hub", tmp_path / "cache", monkeypatch) as asked:
        model = smbfast.load("own/model", revision=COMMIT, device="cpu")
        assert model.digest == smbfast.load(f"own/model@{COMMIT}", device="cpu").digest
        np.testing.assert_array_equal(step(model=model).transform(NODES), wanted)
        smbfast.clear_cache()
        np.testing.assert_array_equal(step(model="own/model").transform(NODES), wanted)
        num = len(asked)
        clone(step(model="own/model")).fit_transform(NODES)
        assert num and len(asked) == num
        refused(lambda: step(model="own/model", revision="none").transform(NODES), "none")


def test_what_cannot_be_meant(home: Path, step: Any) -> None:
    for nodes, words in [
        (NODES[["subject_id"]], ("`X`", "`prediction_time`", "`subject_id`")),
        (NODES.to_numpy(), ("`X`", "pandas", "ndarray")),
        (pl.from_pandas(NODES).lazy(), ("`X`", "lazy LazyFrame", ".collect()")),
    ]:
        for call in (step().fit, step().transform):
            said = refused(lambda call=call, nodes=nodes: call(nodes))
            assert all(word in said for word in words), said
    for more, words in [
        ({"pool": "max"}, ("`pool`", "spread", "'max'")),
        ({"encoder": "teacher"}, ("`encoder`", "target", "'teacher'")),
        ({"missing": "zero"}, ("`missing`", "nan", "'zero'")),
        ({"model": None}, ("`model`", "smbfast.load", "NoneType")),
        ({"data": None}, ("`data`", "MEDS folder", "None")),
        ({"data": home / "none"}, ("none",)),
        ({"model": home / "none"}, ("none", "no such folder")),
        ({"revision": "main"}, ("`revision`", "folder")),
        ({"tokens": 0}, ("`tokens`", "64", "0")),
        ({"cache": Path(__file__)}, ("`cache`", "folder", "file")),
        # all parquet of a folder of data is read as events
        ({"cache": home / "data"}, ("`cache`", "outside of `data`")),
        ({"cache": home / "data" / "new"}, ("`cache`", "outside of `data`")),
    ]:
        said = refused(lambda more=more: step(**more).fit_transform(NODES))
        assert all(word in said for word in words), said
    assert not (home / "data" / "new").exists()
