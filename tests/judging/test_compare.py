"""Comparisons of prediction files: pairing, refusals, runs, folds, verdicts and the page."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smbfast.compare import main
from smbfast.data.labels import Labels
from smbfast.judging.compare import compare
from smbfast.judging.predictions import write_predictions
from smbfast.judging.scored import Scored
from smbfast.judging.verdicts import verdicts
from smbfast.settings.compare import compare_arguments
from smbfast.statistics.binary import auroc
from smbfast.statistics.resample import interval, patient_weights

PATIENTS, DRAWS = 120, 200
SUBJECT_N = np.repeat(np.arange(PATIENTS), 2)
TIME_N = np.tile([10**9, 10**12], PATIENTS)
LATENT_N = np.repeat(np.random.default_rng(0).normal(size=PATIENTS), 2)
TRUE_N = LATENT_N + np.random.default_rng(1).normal(size=2 * PATIENTS) > 0
FIRST_N = np.arange(2 * PATIENTS) % 2 == 0


def labels(task="death", kind="binary"):
    split_N = np.full(len(SUBJECT_N), "held_out")
    if kind == "binary":
        return Labels(task, kind, SUBJECT_N, TIME_N, split_N, value_N=TRUE_N)
    days_N = 100 * np.exp(-LATENT_N)
    return Labels(
        task, kind, SUBJECT_N, TIME_N, split_N, duration_N=days_N, event_N=SUBJECT_N % 3 > 0
    )


def scores(signal, seed=0):
    score_N = signal * LATENT_N + np.random.default_rng(seed + 7).normal(size=len(LATENT_N))
    return 1 / (1 + np.exp(-score_N))


def write(folder, signal, seed=0, *, task="death", kind="binary", model="smbfast", role="own"):
    own = Scored(model, model, role, scores(signal, seed)[None])
    write_predictions(folder, labels(task, kind), [own], "held_out")
    return folder


def write_foreign(file, rows=slice(None), **changed):
    """A file as meds-evaluation takes it, without metadata of ours."""
    columns = {
        "subject_id": SUBJECT_N,
        "prediction_time": TIME_N.astype("datetime64[us]"),
        "boolean_value": TRUE_N,
        "predicted_boolean_probability": scores(1.0, 3),
        **changed,
    }
    table = pa.table({name: pa.array(column[rows]) for name, column in columns.items()})
    pq.write_table(table, file)
    return file


def compared(*words):
    return compare(compare_arguments([*map(str, words), f"--bootstraps={DRAWS}"]), lambda _: None)


def gap_of(record, metric, rows):
    return next(
        gap
        for gap in record["tasks"][0]["differences"]
        if (gap["metric"], gap["rows"]) == (metric, rows)
    )


def test_a_difference_is_that_of_the_same_draws_by_hand(tmp_path):
    a, b = write(tmp_path / "a", 2.0), write(tmp_path / "b", 0.5, 1)
    record = compared(a, b)
    own, other = scores(2.0), scores(0.5, 1)
    gap = gap_of(record, "auroc", "all")
    weight_BN = patient_weights(SUBJECT_N, range(DRAWS), 0)
    drawn_B = auroc(own, TRUE_N)(weight_BN) - auroc(other, TRUE_N)(weight_BN)
    whole_1N = np.ones((1, len(TRUE_N)), np.int32)
    value = float((auroc(own, TRUE_N)(whole_1N) - auroc(other, TRUE_N)(whole_1N))[0])
    assert (gap["value"], gap["low"], gap["high"]) == pytest.approx(interval(value, drawn_B))
    first = gap_of(record, "auroc", "first")["value"]
    one_1F = np.ones((1, PATIENTS), np.int32)
    of_first = [auroc(s[FIRST_N], TRUE_N[FIRST_N])(one_1F)[0] for s in (own, other)]
    assert first == pytest.approx(of_first[0] - of_first[1]) and first != pytest.approx(value)


def test_rows_are_paired_by_node_whatever_their_order(tmp_path):
    a = write(tmp_path / "a", 2.0) / "predictions/death/smbfast.parquet"
    shuffled = np.random.default_rng(5).permutation(len(TRUE_N))[:200]
    b = write_foreign(tmp_path / "peer.parquet", shuffled)
    record = compared(a, b)
    [task] = record["tasks"]
    assert task["left_out"] == {"a": 40, "peer": 0} and sum(task["rows"].values()) == 200
    kept_N = np.isin(np.arange(len(TRUE_N)), shuffled)
    one_1J = np.ones((1, 200), np.int32)
    expected = [auroc(s[kept_N], TRUE_N[kept_N])(one_1J)[0] for s in (scores(2.0), scores(1.0, 3))]
    assert [m["metrics"]["auroc"]["value"] for m in task["models"]] == pytest.approx(expected)
    assert task["task"] == "death"  # the peer's file does not say it


def test_several_runs_widen_the_interval_and_one_is_said_to_be_one(tmp_path):
    for seed in range(3):
        write(tmp_path / f"a-{seed}", 1.2, seed)
        write(tmp_path / f"b-{seed}", 0.8, 10 + seed)
    one = compared(tmp_path / "a-0", tmp_path / "b-0")
    several = compared(f"x={tmp_path}/a-*", f"{tmp_path}/b-0,{tmp_path}/b-1,{tmp_path}/b-2")
    assert [method["runs"] for method in several["methods"]] == [3, 3]
    assert several["methods"][0]["name"] == "x"
    assert any("one training run" in note for note in one["notes"])
    assert not any("one training run" in note for note in several["notes"])
    values = [compared(f"{tmp_path}/a-{seed}", f"{tmp_path}/b-{seed}") for seed in range(3)]
    mean = np.mean([gap_of(own, "auroc", "first")["value"] for own in values])
    gap = gap_of(several, "auroc", "first")
    assert gap["value"] == pytest.approx(mean)
    alone = gap_of(one, "auroc", "first")
    assert gap["high"] - gap["low"] > alone["high"] - alone["low"]


def test_folds_are_one_set_of_rows(tmp_path):
    whole = write(tmp_path / "run-a", 2.0)
    rival = write(tmp_path / "run-b", 0.5, 1)
    for name in ("run-a", "run-b"):
        table = pq.read_table(tmp_path / name / "predictions/death/smbfast.parquet")
        for fold in range(1, 4):
            part = table.filter(pa.array(fold - 1 == SUBJECT_N % 3))
            file = tmp_path / f"cv-{name}/fold-{fold}/predictions/death/smbfast.parquet"
            file.parent.mkdir(parents=True)
            pq.write_table(part, file)
    folds = compared(f"run-a={tmp_path}/cv-run-a", f"run-b={tmp_path}/cv-run-b/fold-*", "--folds")
    assert folds["tasks"][0]["differences"] == compared(whole, rival)["tasks"][0]["differences"]
    with pytest.raises(ValueError, match="need --folds"):
        compared(f"{tmp_path}/cv-run-a/fold-*", rival)
    with pytest.raises(ValueError, match=r"each row once; 240 rows are in two"):
        compared(f"{tmp_path}/run-?", f"{tmp_path}/cv-run-a", "--folds")


def test_one_word_compares_the_models_of_a_run(tmp_path):
    run = tmp_path / "run"
    own = [
        Scored("smbfast", "ours", "own", scores(0.2)[None]),
        Scored("counts", "counts", "baseline", scores(0.5, 1)[None]),
        Scored("values", "values", "baseline", scores(3.0, 2)[None]),
        Scored("oracle_filter", "oracle", "oracle", scores(9.0, 3)[None]),
    ]
    write_predictions(run, labels(), own, "held_out")
    record = compared(run)
    [verdict] = record["headline"]
    assert (verdict["verdict"], verdict["against"]) == ("worse", "values")
    assert record["tasks"][0]["models"][0]["name"] == "smbfast"


def test_time_to_event_has_its_own_primary_metric(tmp_path):
    a = write(tmp_path / "a", 2.0, task="tte", kind="time_to_event")
    b = write(tmp_path / "b", 0.1, 1, task="tte", kind="time_to_event")
    record = compared(a, b)
    [verdict] = record["headline"]
    assert (verdict["metric"], verdict["verdict"]) == ("auc", "better")
    assert len(record["tasks"][0]["horizons_days"]) == 3


def test_p_is_corrected_over_all_comparisons_and_losses_come_first():
    def task(name, value, p):
        models = [
            {"name": n, "primary": {"value": v, "low": 0.0, "high": 1.0}}
            for n, v in (("a", 0.75 + value), ("b", 0.75))
        ]
        gap = {"value": value, "low": value - 0.1, "high": value + 0.1, "p": p}
        names = {"model": "a", "against": "b", "metric": "auroc", "rows": "first"}
        return {
            "task": name,
            "kind": "binary",
            "models": models,
            "differences": [names | gap],
            "reason": None,
        }

    tasks = [task("w", 0.2, 0.01), task("u", 0.1, 0.03), task("l", -0.2, 0.01), task("c", -0.3, 1)]
    made = verdicts(tasks, [("a", "b")], {"binary": "auroc"})
    assert [(v["task"], v["verdict"]) for v in made] == [
        ("c", "undecided"),  # below chance
        ("l", "worse"),
        ("u", "undecided"),
        ("w", "better"),
    ]
    assert made[0]["below_chance"] and "BELOW CHANCE" in made[0]["text"]
    # Holm by hand: 4 x .01, then 3 x .01 raised to it, 2 x .03
    assert {v["task"]: v["p_holm"] for v in made} == pytest.approx(
        {"w": 0.04, "l": 0.04, "u": 0.06, "c": 1.0}
    )


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"boolean_value": ~TRUE_N}, "differ in 240 of 240 rows"),
        ({"subject_id": SUBJECT_N + 10**6}, "they share no patient"),
        ({"prediction_time": (TIME_N + 7).astype("datetime64[us]")}, "at other times"),
        ({"predicted_boolean_probability": 2 * scores(1.0)}, "from 0 to 1"),
        ({"predicted_boolean_probability": np.full(240, np.nan)}, "must be finite"),
        ({"subject_id": np.zeros(240, np.int64)}, "once; 238 rows repeat"),
        ({"boolean_value": TRUE_N.astype(int)}, "`boolean_value` must be boolean"),
    ],
)
def test_files_that_cannot_be_paired_are_refused(changed, words, tmp_path):
    a = write_foreign(tmp_path / "a.parquet")
    b = write_foreign(tmp_path / "b.parquet", **changed)
    with pytest.raises(ValueError, match=words):
        compared(a, b)


def test_a_wrong_path_model_or_task_names_what_is_there(tmp_path):
    run = write(tmp_path / "default", 1.0)
    write(tmp_path / "other", 1.0, task="stay")
    for words, message in [
        ((f"{tmp_path}/defualt", run), "did you mean .*default"),
        ((f"{run}:conts", run), r"models there \(smbfast\)"),
        ((run, tmp_path / "other"), "default has death; other has stay"),
        ((run, run, "--tasks=deth"), "`deth` is not"),
        ((tmp_path, run), "must hold predictions"),
        ((f"{run},{run}", run), "each file once"),
        ((run,), "compared with another method"),
        ((f"x={run}", f"x={run}"), "`x` is there twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            compared(*words)


def test_one_class_is_not_measured_and_said(tmp_path):
    only = np.flatnonzero(TRUE_N)
    a, b = (write_foreign(tmp_path / f"{n}.parquet", only) for n in "ab")
    record = compared(a, b)
    assert record["headline"][0]["verdict"] == "unmeasured"
    assert "one class only" in record["headline"][0]["text"]


def test_the_page_and_record_are_written_and_small_counts_are_not_shown(tmp_path, capsys):
    rows = np.r_[np.flatnonzero(~TRUE_N), np.flatnonzero(TRUE_N)[:7]]
    a = write_foreign(tmp_path / "a<b>.parquet", rows)
    b = write_foreign(tmp_path / "b.parquet", rows, predicted_boolean_probability=scores(0.1, 5))
    out = tmp_path / "out"
    main([str(a), str(b), f"--out={out}", "--bootstraps=50"])
    printed = capsys.readouterr().out
    page = (out / "compare.html").read_text()
    for text in (printed, page):
        assert "=10 positive" in text.replace("&lt;", "<") and " 7 " not in text
    assert "<script" not in page and "<b>" not in page and "</svg>" in page
    record = json.loads((out / "compare.json").read_text())
    assert record["command"].startswith("python -m smbfast.compare")
    assert (out / "compare.html").stat().st_mode & 0o077 == 0
    main([str(a), str(b), f"--out={out}", "--bootstraps=0"])  # ours is replaced
    (out / "compare.json").write_text("{}")
    with pytest.raises(SystemExit, match="was not written by smbfast"):
        main([str(a), str(b), f"--out={out}"])


def test_too_few_draws_for_a_verdict_are_said(tmp_path):
    a, b = write(tmp_path / "a", 9.0), write(tmp_path / "b", 0.0, 1)
    few = compare(compare_arguments([str(a), str(b), "--bootstraps=30"]), lambda _: None)
    assert few["headline"][0]["p"] > 0.05 and "Too few draws" in few["notes"][0]
    assert "--bootstraps=40 " in few["notes"][0]
    enough = compare(compare_arguments([str(a), str(b), "--bootstraps=40"]), lambda _: None)
    assert enough["headline"][0]["verdict"] == "better"
    assert not any("Too few" in note for note in enough["notes"])


def test_words_are_methods_and_keys_are_settings():
    config = compare_arguments(["a=b.parquet", "c,d", "--folds", "against=all", "tasks=x,y"])
    assert config.methods == ["a=b.parquet", "c,d"] and config.folds
    assert (config.against, config.tasks) == ("all", ["x", "y"])
    with pytest.raises(ValueError, match="did you mean `bootstraps`"):
        compare_arguments(["a", "b", "--bootstrap=3"])
    with pytest.raises(ValueError, match="at least one method"):
        compare_arguments(["--folds"])
