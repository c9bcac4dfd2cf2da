"""Tasks with planted scores, and a record of probe.json made of them."""

from typing import Any

import numpy as np

from smbfast.data.labels import Labels
from smbfast.judging.headline import headline
from smbfast.judging.judge import FewShot, Protocol, judge
from smbfast.judging.measures import PRIMARY
from smbfast.judging.scored import Scored, Traits

HORIZONS = (90.0, 365.0, 1095.0)


def planted(
    gain: float, *, kind: str = "binary", name: str = "task", patients: int = 150, seed: int = 0
) -> tuple[Labels, list[Scored], Traits]:
    """Return judged rows, two nodes a patient, and models whose scores hold more or less of what
    decides: smbfast `gain` times as much as the best baseline."""
    rng = np.random.default_rng(seed)
    rows = 2 * patients
    subject_N = np.repeat(np.arange(patients), 2)
    latent_N = np.repeat(rng.normal(size=patients), 2)
    outcome: dict[str, Any] = {}
    if kind == "binary":
        outcome["value_N"] = latent_N + 0.6 * rng.normal(size=rows) > 0.5
    else:
        event_N, censored_N = rng.exponential(700 * np.exp(-latent_N)), rng.uniform(100, 3000, rows)
        outcome["duration_N"] = np.minimum(event_N, censored_N)
        outcome["event_N"] = event_N <= censored_N
    judged = Labels(
        name, kind, subject_N, np.arange(rows), np.full(rows, "tuning", "<U16"), **outcome
    )

    def score(signal: float, versions: int = 1) -> np.ndarray:
        own_SN = signal * latent_N + rng.normal(size=(versions, rows))
        own_SN /= np.sqrt(1 + signal**2)
        return 1 / (1 + np.exp(0.7 - own_SN)) if kind == "binary" else own_SN

    models = [
        ("smbfast", "smbfast, online encoder", "own", gain, 1),
        ("smbfast_boosting", "smbfast, boosted trees", "own", 0.9 * gain, 1),
        ("stack", "smbfast and the best baseline", "own", 1.0 + gain / 2, 1),
        ("age_sex", "age and sex", "baseline", 0.1, 1),
        ("counts", "counts of codes", "baseline", 0.5, 1),
        ("values", "counts and values", "baseline", 1.0, 1),
        ("untrained", "same backbone, untrained", "baseline", 0.3, 5),
        ("oracle_filter", "oracle: Bayes filter on the observed history", "oracle", 4.0, 1),
    ]
    scored = [
        Scored(n, label, role, score(signal, versions), {"C": 0.1})
        for n, label, role, signal, versions in models
    ]
    if kind != "binary":
        for at, model in enumerate(scored[:-1]):
            chance_SN1 = 1 / (1 + np.exp(-model.score_SN[..., None]))
            chance_SNH = chance_SN1 * np.array([0.3, 0.6, 0.9])
            scored[at] = Scored(**{**vars(model), "chance_SNH": chance_SNH})
    none = Scored("bag", "bag of tokens", "baseline", np.empty((0, rows)), {}, "no tokenizer given")
    traits = Traits(
        age_N=np.repeat(rng.uniform(20, 95, patients), 2),
        sex_N=np.repeat(np.array(["F", "M"])[np.arange(patients) % 2], 2),
        events_N=rng.integers(1, 400, rows),
        order_N=np.tile([0, 1], patients),
    )
    return judged, [*scored, none], traits


def example_record(draws: int = 240) -> dict[str, Any]:
    """Return the content of probe.json: tasks that are lost, won, undecided and below chance, one
    of time to event, and one that cannot be measured."""
    protocol = Protocol(draws, 20)
    gains = {"lost_1y": 0.15, "won_1y": 4.0, "equal_1y": 1.0, "wrong_1y": -1.0}
    tasks = []
    for at, (name, gain) in enumerate(gains.items()):
        judged, scored, traits = planted(gain, name=name, seed=at)
        fits = [
            FewShot(model, k, np.repeat(scored[0].score_SN, 5, 0) + np.arange(5)[:, None] / 100)
            for model in ("smbfast", "counts", "values_boosting")
            for k in (8, 16, "all")
        ]
        tasks.append(judge(judged, scored, traits, protocol, few_shot=fits))
    judged, scored, traits = planted(0.5, kind="time_to_event", name="tte_death", seed=9)
    tasks.append(judge(judged, scored, traits, protocol, horizons_H=HORIZONS))
    judged, scored, traits = planted(1.0, name="rare_1y")
    judged = Labels(**{**vars(judged), "value_N": np.zeros(len(judged), bool)})
    tasks.append(judge(judged, scored, traits, protocol))
    for task in tasks:  # as a probe adds them
        for name in ("rows", "positives", "patients"):
            task[name] = {"train": 4 * task[name]["tuning"]} | task[name]
    return {
        "judged_on": "tuning",
        "num_looks": 0,
        "primary": PRIMARY,
        "headline": headline(tasks, PRIMARY),
        "tasks": tasks,
        "protocol": "Scores are planted.",
        "read_out": {"pool": "last", "choice": None},
        "small_cells": 10,
    }
