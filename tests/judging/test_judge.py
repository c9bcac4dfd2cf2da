"""The record of a task and its verdicts, on planted scores."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from smbfast.judging.groups import FEW, Group, groups
from smbfast.judging.headline import headline, too_few_draws
from smbfast.judging.judge import Protocol, judge
from smbfast.judging.measures import PRIMARY, incidence_curve
from smbfast.judging.scored import Scored
from smbfast.probing.table import table
from tests.judging.planted import HORIZONS, example_record, planted

QUICK = Protocol(100, 50)
NONE = {"value": None, "low": None, "high": None}


@pytest.fixture(scope="module")
def record() -> dict:
    return example_record()


def of(task: dict, name: str) -> dict:
    return next(model for model in task["models"] if model["name"] == name)


def test_verdicts_stand_worst_first_and_below_chance_leads(record: dict) -> None:
    shown = [(verdict["task"], verdict["verdict"]) for verdict in record["headline"]]
    assert shown[0] == ("wrong_1y", "worse") and shown[1] == ("lost_1y", "worse")
    assert [word for _, word in shown[2:4]] == ["undecided"] * 2
    assert shown[4:] == [("won_1y", "better"), ("rare_1y", "unmeasured")]
    first, lost, won = (record["headline"][at] for at in (0, 1, 4))
    assert first["below_chance"] and first["text"].startswith("wrong_1y: BELOW CHANCE")
    assert not lost["below_chance"] and "worse than" in lost["text"]
    assert "better than" in won["text"] and won["difference"]["low"] > 0
    # a loss is said in the words of a win
    assert lost["text"].split("(")[1].split()[0] == won["text"].split("(")[1].split()[0]
    json.dumps(record, allow_nan=False)


def test_below_chance_leads_even_where_it_is_not_worse() -> None:
    """A task below chance that is undecided stands before one that is clearly lost."""
    tasks = []
    for name, own, p in (("lost", 0.6, 0.001), ("wrong", 0.49, 0.9)):
        cell = {"value": own - 0.7, "low": -0.2, "high": -0.1, "p": p}
        named = {"model": "smbfast", "against": "counts", "metric": "auroc", "rows": "first"}
        models = [
            {"name": n, "label": n, "primary": {"value": value}}
            for n, value in (("smbfast", own), ("counts", 0.7))
        ]
        task = {"task": name, "kind": "binary", "reason": None, "best": "counts"}
        tasks.append(task | {"models": models, "differences": [named | cell]})
    assert [v["task"] for v in headline(tasks, PRIMARY)] == ["wrong", "lost"]


@pytest.mark.parametrize(
    "rows, positives, words",
    [(15, 1, "fewer than 10 patients with"), (15, 12, "patients without"), (90, 45, None)],
)
def test_a_verdict_says_where_it_rests_on_few_patients(
    rows: int, positives: int, words: str | None
) -> None:
    models = [{"name": n, "label": n, "primary": {"value": 0.4}} for n in ("smbfast", "counts")]
    named = {"model": "smbfast", "against": "counts", "metric": "auroc", "rows": "first"}
    gap = named | {"value": 0.0, "low": -0.1, "high": 0.1, "p": 0.9}
    task = {"task": "t", "kind": "binary", "models": models, "best": "counts", "reason": None}
    task |= {"differences": [gap], "first": {"rows": rows, "positives": positives}}
    [verdict] = headline([task], {"binary": "auroc"})
    said = "chance, not a comparison" in verdict["text"]
    assert said == (words is not None) and (words or "t: BELOW") in verdict["text"]


def test_verdicts_are_corrected_over_tasks() -> None:
    """A p of 0.03 decides one task, and none of two."""

    def task(name: str) -> dict:
        cell = {"value": 0.1, "low": 0.01, "high": 0.2, "p": 0.03}
        named = {"model": "smbfast", "against": "counts", "metric": "auroc", "rows": "first"}
        models = [
            {"name": n, "label": n, "primary": {"value": value}}
            for n, value in (("smbfast", 0.8), ("counts", 0.7))
        ]
        own = {"task": name, "kind": "binary", "reason": None, "best": "counts"}
        return own | {"models": models, "differences": [named | cell]}

    assert [v["verdict"] for v in headline([task("a")], PRIMARY)] == ["better"]
    both = headline([task("a"), task("b")], PRIMARY)
    assert [(v["verdict"], v["p_holm"]) for v in both] == [("undecided", 0.06)] * 2


def test_primary_figures_are_of_first_nodes() -> None:
    judged, scored, traits = planted(1.0)
    task = judge(judged, scored, traits, QUICK)
    first_J = traits.order_N == 0
    for model in scored[:-1]:
        own = of(task, model.name)
        for cell, rows in ((own["primary"], first_J), (own["metrics"]["auroc"], first_J | True)):
            value = np.mean([roc_auc_score(judged.value_N[rows], s[rows]) for s in model.score_SN])
            assert cell["value"] == pytest.approx(value, abs=1e-12)
            assert cell["low"] <= cell["value"] <= cell["high"]
    assert task["first"] == {"rows": 150, "positives": int(judged.value_N[first_J].sum())}
    rivals = {m["name"]: m["primary"]["value"] for m in task["models"] if m["role"] == "baseline"}
    assert rivals.pop("bag") is None and of(task, "bag")["reason"] == "no tokenizer given"
    assert task["best"] == max(rivals, key=rivals.get)


def test_differences_are_paired_and_of_every_model() -> None:
    judged, scored, traits = planted(1.0)
    task = judge(judged, scored, traits, QUICK)
    names = [model.name for model in scored[:-1]]
    pairs = {(d["model"], d["against"]) for d in task["differences"]}
    baselines = ["age_sex", "counts", "values", "untrained"]
    assert pairs == {("smbfast", n) for n in names[1:]} | {("stack", n) for n in baselines}
    # a model less itself is 0 in every draw, so its interval is 0 wide
    twin = replace(scored[0], name="twin", role="beside")
    again = judge(judged, [*scored[:-1], twin], traits, QUICK)
    for gap in again["differences"]:
        if (gap["model"], gap["against"]) == ("smbfast", "twin"):
            assert (gap["value"], gap["low"], gap["high"], gap["p"]) == (0, 0, 0, 1)
    keys = [(d["metric"], d["rows"]) for d in again["differences"] if d["against"] == "twin"]
    assert ("auroc", "first") in keys and ("brier_skill", "all") in keys


def test_versions_are_averaged_and_widen_the_interval() -> None:
    """One version that was drawn well is not a method: five that differ have a wider interval."""
    judged, scored, traits = planted(1.0)
    alone = scored[0]
    shifted = [alone.score_SN[0], 1 - alone.score_SN[0]]
    both = replace(alone, score_SN=np.stack(shifted), name="both", role="beside")
    task = judge(judged, [alone, both], traits, QUICK)
    cell, own = of(task, "both")["primary"], of(task, "smbfast")["primary"]
    assert of(task, "both")["versions"] == 2
    assert cell["value"] == pytest.approx(0.5, abs=1e-12)  # of AUROC a and 1 - a
    assert cell["high"] - cell["low"] > 4 * (own["high"] - own["low"])


def test_time_to_event_is_judged_at_its_horizons() -> None:
    judged, scored, traits = planted(1.0, kind="time_to_event")
    task = judge(judged, scored, traits, QUICK, horizons_H=HORIZONS)
    own = of(task, "smbfast")
    names = {"auc", "c_harrell", "c_uno", "ibs", *(f"auc_{h}" for h in range(3))}
    assert set(own["metrics"]) == names | {f"brier_{h}" for h in range(3)}
    assert "ibs" not in of(task, "oracle_filter")["metrics"]  # it has no probabilities
    assert task["horizons_days"] == list(HORIZONS)
    event = task["incidence"]["event"]
    assert event[0] == 0 and event == sorted(event) and task["incidence"]["competing"] is None
    people = sum(part["num"] for part in own["curve"])
    assert people >= 150 and all(part["num"] >= 10 for part in own["curve"])
    competing_N = ~judged.event_N & (np.arange(len(judged)) % 2 == 0)
    with_other = judge(
        replace(judged, competing_N=competing_N), scored, traits, QUICK, horizons_H=HORIZONS
    )
    assert max(with_other["incidence"]["competing"]) > 0
    # who dies of something else cannot have the event: it is less common than Kaplan-Meier says
    assert with_other["incidence"]["event"][-1] < event[-1]


def test_no_step_of_a_curve_of_incidence_tells_of_ten_people_or_fewer() -> None:
    """Steps of three people, or of a few who die of something else, would tell how many."""
    judged, _, _ = planted(1.0, kind="time_to_event")
    judged = judged.take(np.unique(judged.subject_N, return_index=True)[1][:120])
    row_N = np.arange(120)
    event_N = row_N < 26
    days = [10.0] * 12 + [50.0] * 3 + [90.0] * 11
    for others in (0, 5, 14):
        times = np.array(days + [30.0] * (others // 2) + [80.0] * (others - others // 2))
        times = np.pad(times, (0, 120 - len(times)), constant_values=100.0)
        competing_N = ~event_N & (row_N < 26 + others)
        own = replace(judged, duration_N=times, event_N=event_N, competing_N=competing_N)
        curve = incidence_curve(own)
        assert len(curve["days"]) > 1 and curve["event"][-1] > 0.2
        assert (curve["competing"] is None) == (others == 5)
        for kind_N in (event_N, competing_N) if others != 5 else (event_N,):
            starts = [-np.inf, *curve["days"][:-1]]
            for after, until in zip(starts, curve["days"], strict=True):
                people = int(np.sum(kind_N & (times > after) & (times <= until)))
                assert not 0 < people <= 10, curve["days"]


def test_what_cannot_be_measured_says_why() -> None:
    judged, scored, traits = planted(1.0)
    one_class = replace(judged, value_N=np.zeros(len(judged), bool))
    task = judge(one_class, scored, traits, QUICK)
    assert task["reason"] == "tuning has one class only" and task["best"] is None
    (verdict,) = headline([task], PRIMARY)
    assert verdict["verdict"] == "unmeasured" and "one class only" in verdict["text"]
    survival, models, traits = planted(1.0, kind="time_to_event")
    none = replace(survival, event_N=np.zeros(len(survival), bool))
    assert (
        judge(none, models, traits, QUICK, horizons_H=HORIZONS)["reason"] == "tuning has no event"
    )
    hole = Scored("hole", "hole", "own", np.full((1, len(judged)), np.nan))
    with pytest.raises(ValueError, match="hole must score every judged row"):
        judge(judged, [hole], planted(1.0)[2], QUICK)


def test_groups_are_of_enough_rows_or_say_so() -> None:
    judged, scored, traits = planted(1.0)
    aged = replace(traits, age_N=np.where(np.arange(300) < 12, 85.0, 50.0))
    task = judge(judged, scored, aged, QUICK)
    made = {(g["by"], g["name"]): g for g in task["groups"]}
    assert {by for by, _ in made} == {"node", "events", "sex", "age"}
    assert sum(g["rows"] for g in task["groups"] if g["by"] == "events") == 300
    old = made["age", "80 and up"]
    assert old["rows"] == 12 and old["models"] == {} and f"fewer than {FEW}" in old["reason"]
    second_J = traits.order_N == 1
    cell = made["node", "second"]["models"]["smbfast"]
    value = roc_auc_score(judged.value_N[second_J], scored[0].score_SN[0, second_J])
    assert cell["value"] == pytest.approx(value, abs=1e-12)
    assert set(cell) == set(NONE)
    # a hundred rows of two patients are figures of two patients
    both_N, women = np.arange(300) % 4 < 2, Group("sex", "F", np.arange(300) >= 0)
    assert women.reason(both_N, judged.subject_N, True) is None
    assert "people with the" in str(women.reason(both_N, np.arange(300) // 150, True))
    one_node = replace(traits, order_N=np.zeros(300, int), sex_N=np.full(300, "F"))
    assert {group.by for group in groups(one_node)} == {"events", "age"}


def test_the_table_is_narrow_and_leaves_out_what_tuning_fixes(record: dict) -> None:
    held_out = record | {"judged_on": "held_out"}
    held_out["tasks"] = [
        task | {n: {"held_out": task[n]["tuning"]} for n in ("rows", "positives", "patients")}
        for task in record["tasks"]
    ]
    on_tuning, on_held_out = table(record), table(held_out)
    for text in (on_tuning, on_held_out):
        assert max(len(line) for line in text.splitlines()) <= 110
    # a probe is calibrated on tuning: slope 1 and intercept 0 say nothing there
    assert "icept" not in on_tuning and "by construction" in on_tuning
    assert "icept" in on_held_out and "by construction" not in on_held_out


def test_groups_without_a_figure_share_a_line_and_tell_no_small_count(record: dict) -> None:
    task = record["tasks"][0]
    sizes = {"45 to 64": (4, "fewer than 10 people with the outcome"), "below 45": (106, None)}
    made = [
        g | dict(zip(("rows", "reason"), sizes.get(g["name"], (g["rows"], None)), strict=True))
        for g in task["groups"]
    ]
    text = table(record | {"tasks": [task | {"groups": made}]})
    assert "no figure in groups (fewer than 10 people with the outcome): by age: 45 to 64" in text
    lines = [line for line in text.splitlines() if line.startswith("  by age")]
    assert lines and not any(line.split("below 45")[-1].strip().startswith("106") for line in lines)
    positives = {"train": 20, "tuning": 296}
    text = table(record | {"tasks": [task | {"positives": positives}]})
    assert "(all but <=10 positive)" in text and "prevalence" not in text


def test_too_few_draws_for_any_verdict_are_said(record: dict) -> None:
    """Of 100 draws p is at least 2 / 101; over 5 tasks Holm asks for 0.05 / 5. Of 200: 2 / 201."""
    (said,) = too_few_draws(record["headline"], 100)
    assert "over 5 comparisons" in said and "--bootstraps=200" in said
    assert too_few_draws(record["headline"], 200) == []
    assert said in table(record | {"notes": [said]}).replace("\n", " ")
