"""The bench of cohorts: who judges a run, what is counted, how arms are compared."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import norm, t
from sklearn.metrics import roc_auc_score

from bench import cohorts, records
from smbfast import train
from smbfast.base.config import build
from smbfast.base.entry import RunFailed
from smbfast.base.held_out import num_looks
from smbfast.data.labels import read_labels
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import NodeText
from smbfast.experiments import models as cohort_models
from smbfast.experiments import patients as cohort_data
from smbfast.experiments import scores as cohort_stats
from smbfast.experiments.models import BOOSTING, Probed
from smbfast.experiments.scores import COUNTS, FILTER, MEAN
from smbfast.run.folder import data_of, prepared_data
from smbfast.settings import POOLS
from smbfast.simulation.dataset import simulate
from smbfast.statistics.resample import patient_weights
from smbfast.statistics.seeds import stretched
from tests.tiny import tiny_encoder

SEED = 5
PATIENTS = 300  # few, of which every split has some
SMALL = (
    f"--cohort.patients={PATIENTS} --cohort.held_out=9 "
    "--phases.0.steps=2 --phases.1.steps=2 --eval.windows=2"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's own cohort, that of the patients who judge it, and what is made of both."""
    work = tmp_path_factory.mktemp("work")
    own, other = work / "own", work / "other"
    simulate(own, PATIENTS, SEED)
    simulate(other, PATIENTS, SEED + cohort_data.APART)
    return own, other, cohort_data.judged_by(work, own, SEED, PATIENTS, "tuning")


def bench_of(work: Path, **more: object) -> cohorts.CohortsBench:
    values = {"cohorts": [SEED], "work": work, "arms": f"tiny: {SMALL}", "draws": 20, **more}
    return build(cohorts.CohortsBench, {"patients": PATIENTS, "seeds": [0], **values}, [])


KNOWN = {"run": 0.5, COUNTS: 0.2, FILTER: 1.0}  # how much each model knows of the truth


def random_scores(seed: int, patients: int = 60, seeds: int = 1) -> cohort_stats.Scores:
    """Scores of models, with patients of several rows and tasks of other patients."""
    random = np.random.default_rng(seed)
    size = 4 * patients
    true_N = random.random(size) < 0.3
    return cohort_stats.Scores(
        task_N=random.choice(cohort_data.TASKS, size),
        subject_N=random.integers(0, patients, size),
        time_N=np.arange(size),
        true_N=true_N,
        duration_N=np.full(size, np.nan),
        # rounded, so that several are equal
        models={
            n: np.round(true_N * s + random.random((seeds if n == "run" else 1, size)), 1)
            for n, s in KNOWN.items()
        },
    )


def test_a_run_is_judged_by_tuning_patients_of_another_cohort(folders):
    own, other, joined = folders
    data = MedsDataset.open(joined)
    for name in ("train", "tuning"):
        assert np.array_equal(data.subjects(name), MedsDataset.open(own).subjects(name))
    judges = MedsDataset.open(other).subjects("tuning")
    assert len(judges) and np.array_equal(data.subjects("held_out"), judges + cohort_data.SHIFT)
    for kind in ("labels", "oracles"):
        for task in cohort_data.TASKS:
            judge = pq.read_table(joined / kind / task / "held_out.parquet").to_pydict()
            wanted = pq.read_table(other / kind / task / "tuning.parquet").to_pydict()
            wanted["subject_id"] = [s + cohort_data.SHIFT for s in wanted["subject_id"]]
            assert judge == wanted
    events = pq.read_table(joined / "data" / "held_out" / "0.parquet")
    assert events.num_rows == pq.read_table(other / "data" / "tuning" / "0.parquet").num_rows


def test_held_out_judges_are_those_of_the_cohort_itself(folders, tmp_path):
    own = folders[0]
    assert cohort_data.judged_by(tmp_path, own, SEED, PATIENTS, "held_out") == own
    assert not list(tmp_path.iterdir())


def test_other_patients_of_the_same_seed_have_a_folder_of_their_own(folders, tmp_path):
    own, _, joined = folders
    simulate(tmp_path / "own", PATIENTS + 1, SEED)
    assert cohort_data.digest(own) in joined.name
    assert cohort_data.digest(tmp_path / "own") != cohort_data.digest(own)


def test_runs_share_what_a_run_would_make_by_itself(tmp_path):
    """The cohort and the shards are byte for byte those of the run's own folder."""
    run = cohorts.Run(bench_of(tmp_path), "tiny", SMALL, SEED, 0)
    shared = cohort_data.Shared.of(tmp_path, run.settings)
    alone = tmp_path / "alone"
    data = data_of(run.settings, alone)
    own = prepared_data(run.settings, data, alone)
    assert own.record["shards"] == shared.prepared.record["shards"]
    assert own.record["encoder"] == shared.prepared.record["encoder"]
    words = shared.lend(run.folder)
    assert words == shared.lend(run.folder) == [f"--data.prepared={shared.prepared.folder}"]
    lent = data_of(run.settings, run.folder)  # what the run takes for its own, and simulates not
    assert (run.folder / Path(str(lent.path)).name).resolve() == shared.cohort
    other = cohorts.Run(bench_of(tmp_path), "tiny", f"{SMALL} --data.window=128", SEED, 0)
    assert cohort_data.shared_key(other.settings) != cohort_data.shared_key(run.settings)
    assert other.folder != run.folder


def test_areas_are_those_of_rows_that_are_repeated():
    """A draw in which a patient comes twice has the AUROC of a table that repeats its rows."""
    scores, draws = random_scores(0, seeds=2), 120  # more than are held at once
    areas = cohort_stats.areas(scores, draws, SEED)
    subject_P, at_N = np.unique(scores.subject_N, return_inverse=True)
    weight_BN = patient_weights(subject_P, range(draws), SEED)[:, at_N]
    for model, score_SN in scores.models.items():
        for s, score_N in enumerate(score_SN):
            for b in (None, 0, 49, 50, draws - 1):
                weight_N = np.ones(len(at_N), int) if b is None else weight_BN[b]
                by_task = []
                for task in (*cohort_data.TASKS, MEAN):
                    key = model, task
                    value = areas.of_seed[key][s] if b is None else areas.drawn[key][b, s]
                    if task != MEAN:
                        row_R = np.repeat(np.arange(len(at_N)), weight_N * (scores.task_N == task))
                        by_task.append(roc_auc_score(scores.true_N[row_R], score_N[row_R]))
                    wanted = np.mean(by_task) if task == MEAN else by_task[-1]
                    assert value == pytest.approx(wanted, abs=1e-12)


def test_a_draw_without_an_outcome_has_no_area():
    ranks = cohort_stats.Ranks.of(np.array([0.1, 0.2, 0.3]), np.array([True, False, False]))
    weight_RB = np.array([[1, 0], [1, 1], [1, 2]], np.int32)
    assert np.isnan(ranks.auroc(weight_RB)).tolist() == [False, True]


@pytest.mark.parametrize(("seeds", "cohorts"), [(2, 3), (3, 1), (3, 3), (4, 2)])
def test_drawn_seeds_vary_as_much_as_their_mean_is_uncertain(seeds, cohorts):
    """Over all draws, each as likely, the variance is the unbiased one over the number of seeds,
    times the square of how much wider a t interval is than a normal one."""
    value_S = np.random.default_rng(seeds).normal(size=seeds)
    every = itertools.product(range(seeds), repeat=seeds)
    count_BS = np.array([np.bincount(own, minlength=seeds) for own in every])
    weight_BS = stretched(count_BS, cohorts)
    assert np.allclose(weight_BS.sum(1), 1)
    drawn_B = weight_BS @ value_S
    assert drawn_B.mean() == pytest.approx(value_S.mean())
    wider = t.interval(0.95, cohorts * (seeds - 1))[1] / norm.interval(0.95)[1]
    assert drawn_B.var() == pytest.approx(wider**2 * value_S.var(ddof=1) / seeds)


def test_a_draw_is_of_patients_and_of_training_seeds():
    one = random_scores(0)
    same = replace(one, models={n: np.repeat(s, 3, 0) for n, s in one.models.items()})
    alone = cohort_stats.over_seeds(cohort_stats.areas(one, 200, SEED), SEED)
    equal = cohort_stats.over_seeds(cohort_stats.areas(same, 200, SEED), SEED)
    for key, (value, drawn_B) in alone.items():  # seeds that are alike add nothing
        assert equal[key][0] == pytest.approx(value)
        assert np.allclose(equal[key][1], drawn_B)
    # of seeds that are not alike, the interval is wider
    unlike = replace(one, models={"run": np.concatenate([one.models[n] for n in KNOWN])})
    wide = cohort_stats.over_seeds(cohort_stats.areas(unlike, 200, SEED), SEED)
    assert wide["run", MEAN][1].std() > 2 * alone["run", MEAN][1].std()


def test_differences_are_paired_by_patient_and_training_seed():
    scores = random_scores(1, seeds=3)
    both = scores.beside(replace(scores, models={"other": 2 * scores.models["run"] - 1}))
    own = cohort_stats.over_seeds(cohort_stats.areas(both, 60, SEED), SEED)
    gain = cohort_stats.cells(cohort_stats.differences(own, [("run", "other")]))["run - other"]
    assert set(gain) == {*cohort_data.TASKS, MEAN}
    # the same order of patients in every seed: no draw tells the two from each other
    for cell in gain.values():
        assert all(value is not None and abs(value) < 1e-12 for value in cell.values())
    for other in (
        replace(scores, subject_N=scores.subject_N + 1),
        replace(scores, true_N=~scores.true_N),
    ):
        with pytest.raises(ValueError, match="on the same patients; they differ in"):
            scores.beside(other)


def test_scores_of_training_seeds_are_put_together(tmp_path):
    one, other = (random_scores(1), random_scores(1))
    other = replace(other, models={n: s + 1 for n, s in other.models.items()})
    both = cohort_stats.by_seed([one, other])
    wanted = [*one.models["run"].tolist(), *other.models["run"].tolist()]
    assert both.models["run"].tolist() == wanted
    with pytest.raises(ValueError, match="must have the same models; they differ in filter, run"):
        cohort_stats.by_seed([one, replace(other, models={COUNTS: other.models[COUNTS]})])
    with open(tmp_path / "x.npz", "wb") as file:
        both.write(file, {"a": [1]})
    read, about = cohort_stats.Scores.read(tmp_path / "x.npz")
    assert about == {"a": [1]} and read.models.keys() == both.models.keys()
    assert np.array_equal(read.beside(both).models["run"], both.models["run"])


def test_shares_are_of_the_gap_from_counts_to_the_filter():
    scores = random_scores(1)
    models = {**scores.models, "low": scores.models[COUNTS], "high": scores.models[FILTER]}
    own = cohort_stats.over_seeds(
        cohort_stats.areas(replace(scores, models=models), 30, SEED), SEED
    )
    closed = cohort_stats.shares(own)
    assert {model for model, _ in closed} == {"run", "low", "high"}
    for task in (*cohort_data.TASKS, MEAN):
        assert closed["low", task][0] == 0 and closed["high", task][0] == 1
        assert (closed["low", task][1] == 0).all() and np.allclose(closed["high", task][1], 1)
        low, high = own[COUNTS, task], own[FILTER, task]
        value = (own["run", task][0] - low[0]) / (high[0] - low[0])
        assert closed["run", task][0] == pytest.approx(value)
        assert closed["run", task][1][7] == pytest.approx(
            (own["run", task][1][7] - low[1][7]) / (high[1][7] - low[1][7])
        )


def test_the_mean_over_cohorts_is_taken_draw_by_draw():
    one, other = (
        cohort_stats.over_seeds(cohort_stats.areas(random_scores(s), 30, s), s) for s in (2, 3)
    )
    mean = cohort_stats.over_cohorts([one, other])
    for key in one:
        assert mean[key][0] == pytest.approx((one[key][0] + other[key][0]) / 2)
        assert np.allclose(mean[key][1], (one[key][1] + other[key][1]) / 2)


def planted(**changed: float) -> dict[str, cohort_stats.Estimates]:
    """Figures that reach every bar exactly, but for those that are changed, by their key."""
    spread_B = np.linspace(-0.005, 0.005, 101)

    def estimate(value: float) -> cohort_stats.Estimate:
        return value, value + spread_B

    tasks, rivals = cohort_data.TASKS, {"untrained/auto": 0.006, COUNTS: 0.006, BOOSTING: -0.01}
    share = {("a/auto", t): estimate(changed.get(f"share {t}", 0.65)) for t in tasks}
    share["a/auto", MEAN] = estimate(changed.get("share mean", 0.75))
    wanted = {f"a/auto - {name}": value for name, value in rivals.items()}
    wanted["a/last - b/last"] = 0.01
    difference = {
        (name, t): estimate(changed.get(f"{name}, {t}", value))
        for name, value in wanted.items()
        for t in tasks
    }
    return {"share": share, "difference": difference}


def test_bars_are_judged_one_by_one(tmp_path):
    bench = bench_of(tmp_path, arms="a: ; b: --run.seed=1")
    reached = cohorts.bars(bench, planted())
    assert len(reached) == 4 + 3 * 3 + 2 and all(good for good, _ in reached)
    for key, value in {
        "share mean": 0.7499,
        "share death_3y": 0.6499,
        "a/auto - untrained/auto, death_1y": 0.004,  # its interval is not above zero
        "a/auto - counts, progression_1y": 0.004,
        "a/auto - boosting, death_3y": -0.0101,
        "a/last - b/last, death_1y": 0.0099,
    }.items():
        missed = [text for good, text in cohorts.bars(bench, planted(**{key: value})) if not good]
        assert len(missed) == 1 and key.removeprefix("share ").split(", ")[-1] in missed[0]


def test_one_read_out_is_chosen_on_tuning_for_all_tasks():
    loss = {(p, t): 0.5 for p in (*POOLS, "last+layers") for t in ("a", "b")}
    assert cohort_models.chosen_pool(loss) == "last"  # of equal ones the first
    assert cohort_models.chosen_pool(loss | {("layers", "a"): 0.4, ("mean", "a"): 0.41}) == "layers"
    # no pool by itself: not chosen, however good
    assert cohort_models.chosen_pool(loss | {("last+layers", "a"): 0.1}) == "last"


def test_every_read_out_of_a_node_comes_from_its_own_tokens():
    """In the order of the nodes, whatever their order in the data; equal but for rounding to
    transformers' own forward of each node by itself."""
    encoder = tiny_encoder()
    random = np.random.default_rng(0)
    texts = [
        NodeText(k, k, 0, 0, random.integers(0, 40, size).astype(np.int32))
        for k, size in enumerate((1, 7, 30, 7, 12))
    ]
    own = cohort_models.pooled(encoder, [texts[k] for k in (3, 0, 4, 2, 1)])
    assert set(own) == set(POOLS)
    for text in texts:
        hidden_TD = encoder.hidden(torch.from_numpy(text.ids_T)[None].long())[0].detach().numpy()
        wanted = {"last": hidden_TD[-1], "mean": hidden_TD.mean(0)}
        for pool, value_D in wanted.items():
            assert np.abs(own[pool][text.index] - value_D).max() < 1e-5 * np.abs(hidden_TD).max()


def test_values_without_nan_say_where_there_is_one():
    value_NF = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, 5.0], [np.nan, 7.0]])
    train_N = np.array([True, True, True, False])
    assert cohort_models.filled(value_NF, train_N).tolist() == [
        [1, 5, 1, 0],
        [2, 5, 0, 0],
        [3, 5, 1, 1],
        [2, 7, 0, 1],
    ]


def test_a_probe_is_fitted_on_train_and_chosen_on_tuning_alone(folders):
    """Outcomes of those who judge, turned round, change none of their scores."""
    labels = read_labels(folders[2] / "labels" / "death_3y")
    held_N = labels.split_N == "held_out"
    feature_NF = np.random.default_rng(0).normal(size=(len(labels), 3))
    feature_NF[:, 0] += labels.binary_N
    turned = replace(labels, value_N=labels.binary_N ^ held_N)
    one, other = Probed(), Probed()
    logit_N = one.fit("x", labels, feature_NF)
    assert np.array_equal(logit_N, other.fit("x", turned, feature_NF))
    assert one.loss == other.loss and one.chosen == other.chosen
    scores = one.scores([labels])
    assert np.array_equal(scores.models["x"], logit_N[None, held_N])
    assert np.array_equal(scores.subject_N, labels.subject_N[held_N])
    assert roc_auc_score(scores.true_N, scores.models["x"][0]) > 0.6


def test_arms_are_names_and_words():
    arms = "a: ; b: sft --optim.batch=4 --objective.horizons=30d,365d;c:x.toml"
    assert cohorts.arms_of(arms) == {
        "a": "",
        "b": "sft --optim.batch=4 --objective.horizons=30d,365d",
        "c": "x.toml",
    }
    for wrong in ("a", "a: ; a: sft", "counts: ", "untrained: ", "a-b: ", ": sft"):
        with pytest.raises(ValueError, match="`arms` must be `name: words"):
            cohorts.arms_of(wrong)


def test_the_arms_of_the_proof_are_of_equal_steps_and_of_equal_seconds(tmp_path):
    phases = {
        arm: cohorts.Run(bench_of(tmp_path), arm, words, SEED, 3).settings.phases
        for arm, words in cohorts.arms_of(None).items()
    }
    steps = {arm: sum(phase.steps for phase in own) for arm, own in phases.items()}
    assert steps["sft"] == steps["default"] and steps["sft_longer"] == steps["default"] * 9 // 5
    assert any(phase.w_jepa > 0 for phase in phases["default"])
    horizon = [phase.model_copy(update={"w_codes": 0}) for phase in phases["default"]]
    assert phases["horizon"] == horizon
    for arm in ("sft", "sft_longer"):
        assert all(p.w_jepa == p.w_codes == 0 and p.w_sft == 1 for p in phases[arm])
        assert [p.lr for p in phases[arm]] == [p.lr for p in phases["default"]]


def test_what_is_stored_is_not_made_again(tmp_path):
    bench, made = bench_of(tmp_path), []
    about: dict[str, dict] = {}

    def make():
        made.append(1)
        return random_scores(1), {"a": 1}

    for _ in range(2):
        scores = cohorts._stored(bench, "x", about, make)
    assert made == [1] and about == {"x": {"a": 1}} and scores.models.keys() == KNOWN.keys()
    cohorts._stored(bench_of(tmp_path, split="held_out"), "x", about, make)
    assert made == [1, 1]  # other patients judge


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`work` must be outside"):
        cohorts.measure(bench_of(cohorts.ROOT / "build"))
    with pytest.raises(RunFailed, match=r"x\.log has more"):
        cohorts.command_in(1, ["smbfast.no_such_command"], tmp_path / "x.log")


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_runs_are_trained_measured_and_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")

    def in_this_process(_threads: int, command: list[str], _log: Path) -> dict:
        train.main(command[1:])
        return {"wall_s": 2.0, "cpu_s": 1.0, "load": 0.0, "threads": 1}

    monkeypatch.setattr(cohorts, "command_in", in_this_process)
    arms = f"--arms=a: tiny {SMALL}; b: tiny {SMALL}"
    words = [f"--work={tmp_path}", f"--cohorts={SEED}", "--seeds=0", "--patients=400", arms]
    cohorts.main([*words, "--draws=20", "--save"])
    seconds = "seconds of a run  wall  CPU  runs\na                 2     1    1"
    assert seconds in capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "cohorts.jsonl").read_text())
    assert record["settings"]["b"]["phases"][1]["steps"] == 2
    # two arms of the same words are the same run, and the untrained encoder is another
    for pool in cohort_models.READOUTS:
        assert record["difference"][f"a/{pool} - b/{pool}"]["mean"]["value"] == 0
        assert record["difference"][f"a/{pool} - untrained/{pool}"]["mean"]["value"] != 0
        assert f"a/{pool}" in record["share"]
        assert f"a/{pool}" in record["by_cohort"][str(SEED)]["auroc"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    assert len(before) == 4
    cohorts.main([*words, "--draws=20"])
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "scores").iterdir()}
    with pytest.raises(SystemExit):  # two steps reach no bar
        cohorts.main([*words, "--draws=20", "--bars", "--split=held_out"])
    assert "of these runs were asked for 1 time." in capsys.readouterr().out
    assert [num_looks(run) for run in (tmp_path / "runs").iterdir() if run.is_dir()] == [1, 1]
    # held-out patients of the cohort judge then: those of `cohort.held_out` too
    file = next((tmp_path / "scores").glob("baselines-*-held_out.npz"))
    scores, about = cohort_stats.Scores.read(file)
    assert scores.subject_N.max() > PATIENTS
    assert len(scores.true_N) == sum(rows["held_out"] for rows in about["rows"].values())
