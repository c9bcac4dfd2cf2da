"""The bench of cohorts: who judges a run, what is counted, how two variants are compared."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from bench import cohort_data, cohorts, embed, records
from smbfast.base.config import build
from smbfast.base.entry import RunFailed
from smbfast.data.meds import MedsDataset
from smbfast.probing.resample import patient_weights
from smbfast.simulation.dataset import simulate
from tests.tiny import random_window

SEED = 5
PATIENTS = 300  # few, of which every split has some


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's own cohort, that of the patients who judge it, and what is made of both."""
    work = tmp_path_factory.mktemp("work")
    own, other = work / "own", work / "other"
    simulate(own, PATIENTS, SEED)
    simulate(other, PATIENTS, SEED + cohort_data.APART)
    return (
        own,
        other,
        {
            split: cohort_data.joined(work, own, SEED, PATIENTS, split)
            for split in ("held_out", "tuning")
        },
    )


def settings_of(work: Path, **more: object) -> cohorts.CohortsBench:
    return build(cohorts.CohortsBench, {"name": "x", "seeds": [SEED], "work": work, **more}, [])


def random_scores(seed: int, patients: int = 60) -> cohorts.Scores:
    """Scores of two models, with patients of several rows and tasks of other patients."""
    random = np.random.default_rng(seed)
    size = 4 * patients
    true_N = random.random(size) < 0.3
    return cohorts.Scores(
        task_N=random.choice(cohort_data.TASKS, size),
        subject_N=random.integers(0, patients, size),
        time_N=np.arange(size),
        true_N=true_N,
        # rounded, so that some are equal
        models={n: np.round(true_N * s + random.random(size), 1) for n, s in MODELS.items()},
    )


MODELS = {"run": 0.5, "counts": 0.2}  # how much each knows of the truth


@pytest.mark.parametrize("split", ["held_out", "tuning"])
def test_a_run_is_judged_by_patients_of_another_cohort(folders, split):
    own, other, joined = folders
    data = MedsDataset.open(joined[split])
    for name in ("train", "tuning"):
        assert np.array_equal(data.subjects(name), MedsDataset.open(own).subjects(name))
    judges = MedsDataset.open(other).subjects(split)
    assert len(judges) and np.array_equal(data.subjects("held_out"), judges + cohort_data.SHIFT)
    for kind in ("labels", "oracles"):
        for task in cohort_data.TASKS:
            judge = pq.read_table(joined[split] / kind / task / "held_out.parquet").to_pydict()
            wanted = pq.read_table(other / kind / task / f"{split}.parquet").to_pydict()
            wanted["subject_id"] = [s + cohort_data.SHIFT for s in wanted["subject_id"]]
            assert judge == wanted
    events = pq.read_table(joined[split] / "data" / "held_out" / "0.parquet")
    assert events.num_rows == pq.read_table(other / "data" / split / "0.parquet").num_rows


def test_other_patients_of_the_same_seed_have_a_folder_of_their_own(folders, tmp_path):
    own, _, joined = folders
    simulate(tmp_path / "own", PATIENTS + 1, SEED)
    assert cohort_data.digest(own) in joined["held_out"].name
    assert cohort_data.digest(tmp_path / "own") != cohort_data.digest(own)


@pytest.mark.parametrize("seed", range(3))
def test_a_node_sees_the_tokens_up_to_its_time_and_of_the_year_before(seed):
    timeline = random_window(seed, buckets=8)
    lines = np.array([seed, 40, 80, 200, 400, 500, 700, 900]) * 86_400_000_000
    bucket_L = timeline.line_time_L // 86_400_000_000
    timeline = replace(timeline, line_time_L=lines[bucket_L])
    for time in (*lines, lines[-1] + cohort_data.YEAR - 1, lines[-1] + cohort_data.YEAR, -1):
        ever, year = list(timeline.ids_T[: timeline.header]), []
        for start, end, at in zip(
            timeline.line_start_L, timeline.line_end_L, timeline.line_time_L, strict=True
        ):
            ever += list(timeline.ids_T[start:end]) if at <= time else []
            year += list(timeline.ids_T[start:end]) if time - cohort_data.YEAR < at <= time else []
        seen = cohort_data.seen_tokens(timeline, int(time))
        assert [list(ids) for ids in seen] == [ever, year]


def test_bag_features_are_columns_of_train_alone():
    ids = [np.array([0, 0, 2]), np.array([2]), np.array([1])]
    count_KV = cohort_data._counts(ids, 4)
    age_N2 = np.array([[50.0, 1.0], [60.0, 1.0], [0.0, 0.0]])
    train_N = np.array([True, True, False])
    feature_NF = cohort_data.bag_features(count_KV, np.arange(3), age_N2, train_N).toarray()
    log2, log3 = np.log(2), np.log(3)
    assert feature_NF.tolist() == [[50, 1, log3, log2], [60, 1, 0, log2], [0, 0, 0, 0]]


def test_areas_are_those_of_rows_that_are_repeated():
    """A draw in which a patient comes twice has the AUROC of a table that repeats its rows."""
    scores, draws = random_scores(0), 120  # more than are held at once
    areas = cohorts.areas(scores, draws, SEED)
    subject_P, at_N = np.unique(scores.subject_N, return_inverse=True)
    weight_BN = patient_weights(subject_P, range(draws), SEED)[:, at_N]
    for model, score_N in scores.models.items():
        for weight_N, get in [
            (np.ones(len(at_N), int), lambda cell: cell[0]),
            *((weight_BN[b], lambda cell, b=b: cell[1][b]) for b in (0, 49, 50, draws - 1)),
        ]:
            by_task = []
            for task in cohort_data.TASKS:
                row_R = np.repeat(np.arange(len(at_N)), weight_N * (scores.task_N == task))
                by_task.append(roc_auc_score(scores.true_N[row_R], score_N[row_R]))
                assert get(areas[model, task]) == pytest.approx(by_task[-1], abs=1e-12)
            assert get(areas[model, "mean"]) == pytest.approx(np.mean(by_task), abs=1e-12)


def test_two_variants_are_compared_on_the_same_draws():
    scores = random_scores(1)
    both = scores.beside(replace(scores, models={"old": scores.models["run"]}))
    gain = cohorts.difference(cohorts.areas(both, 60, SEED), "run", "old")
    assert set(gain) == {*cohort_data.TASKS, "mean"}
    # equal scores are equal in every draw, so that the interval has no width
    assert all(cell == {"value": 0.0, "low": 0.0, "high": 0.0} for cell in gain.values())
    for other in (
        replace(scores, subject_N=scores.subject_N + 1),
        replace(scores, true_N=~scores.true_N),
    ):
        with pytest.raises(ValueError, match="on the same patients; they differ in"):
            scores.beside(other)


def test_a_variant_that_was_not_measured_is_no_rival(tmp_path):
    with pytest.raises(ValueError, match="must be measured before"):
        cohorts.with_other(settings_of(tmp_path, against="old"), SEED, random_scores(1))


def test_the_mean_over_seeds_is_taken_draw_by_draw():
    one, other = (cohorts.areas(random_scores(s), 30, s) for s in (2, 3))
    mean = cohorts.mean_areas([one, other])
    for key in one:
        assert mean[key][0] == pytest.approx((one[key][0] + other[key][0]) / 2)
        assert np.allclose(mean[key][1], (one[key][1] + other[key][1]) / 2)


def test_what_misses_the_bar():
    well = {21: (100.0, 110.0), 22: (110.0, 110.0)}
    assert cohorts.judged({21: 0.05, 22: 0.04}, well, 0.04) == []
    assert cohorts.judged({21: 0.05, 22: 0.0399}, well, 0.04) == [
        "seed 22: +0.0399 mean AUROC, and the bar is +0.0400"
    ]
    assert cohorts.judged({21: float("nan")}, {}, 0.04)
    assert cohorts.judged({21: 0.05}, {21: (111.0, 110.0)}, 0.04) == [
        "seed 21: 111 CPU seconds, and the other run took 110"
    ]
    assert "unknown" in cohorts.judged({21: 0.05}, {21: (None, 110.0)}, 0.04)[0]


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`work` must be outside"):
        cohorts.measure(settings_of(cohorts.ROOT / "build"))
    with pytest.raises(ValueError, match="needs the variant"):
        cohorts.measure(settings_of(tmp_path, bar=0.04))
    with pytest.raises(ValueError, match="must be none of"):
        cohorts.measure(settings_of(tmp_path, against="counts"))
    run = tmp_path / f"x-{SEED}"
    run.mkdir()
    with pytest.raises(ValueError, match="must hold a finished run, its state is unknown"):
        cohorts.trained(settings_of(tmp_path), SEED)
    (run / "status.json").write_text('{"state": "done"}')
    (run / "config.toml").write_text("[data]\nwindow = 64\n[cohort]\nseed = 6\n")
    with pytest.raises(ValueError, match=f"simulated cohort with seed {SEED}"):
        cohorts.trained(settings_of(tmp_path), SEED)
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(RunFailed, match=r"x-5\.log has more"):
        cohorts.trained(settings_of(tmp_path, train="--data.window=nothing"), SEED)


@pytest.mark.slow
def test_a_run_is_trained_measured_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    words = [f"--work={tmp_path}", "--seeds=31", "--patients=400", "--draws=20", "--save"]
    train = "--train=tiny --cohort.patients=400 --probe.pool=mean --phases.0.steps=2"
    cohorts.main(["--name=old", *words, train])
    with pytest.raises(SystemExit, match=r"seed 31: \+0.0000 mean AUROC"):
        (tmp_path / "new-31").symlink_to(tmp_path / "old-31")  # the same run by another name
        for file in list(tmp_path.glob("old-31.*")):
            (tmp_path / file.name.replace("old", "new")).symlink_to(file)
        cohorts.main(["--name=new", *words, "--against=old", "--bar=0.01"])
    lines = [
        json.loads(line)
        for line in (tmp_path / "results" / "cohorts.jsonl").read_text().splitlines()
    ]
    assert [line["variant"] for line in lines] == ["old", "new"]
    assert set(lines[0]["auroc"]) == {"run", "bag", "counts", "filter"}
    assert lines[1]["differences"]["run - old"]["mean"]["value"] == 0
    assert lines[0]["cost"]["cpu_s"] > 0 and lines[0]["settings"]["phases"][0]["steps"] == 2
    assert "CPU seconds" in capsys.readouterr().out

    # the nodes of train have the embeddings that the run itself wrote, but for rounding
    file = tmp_path / "old-31.400.held_out.mean.embeddings.parquet"
    own, other = (
        {(r["subject_id"], r["prediction_time"]): r["embedding"] for r in table.to_pylist()}
        for table in (
            pq.read_table(f, filters=[("split", "=", "train")])
            for f in (file, tmp_path / "old-31" / "embeddings" / "online.parquet")
        )
    )
    assert own and own.keys() <= other.keys()
    own_KD, other_KD = np.array([*own.values()]), np.array([other[k] for k in own])
    assert np.abs(own_KD - other_KD).max() < embed.TOLERANCE * np.abs(other_KD).max()
