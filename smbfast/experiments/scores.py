"""Statistics over simulated cohorts: AUROC, shares of a gap and differences, with intervals.

Two things are chance: which patients judge, and which training seed a run had. A draw of the
bootstrap takes both: patients with replacement, and for each cohort training seeds with
replacement. Cohorts are not drawn: what is said holds for these cohorts. A draw is the same for all
models and tasks of a cohort, so every difference is paired, by patient and by training seed.

How few seeds are drawn without an interval that is too narrow: `smbfast.statistics.seeds`.

Legend: N label rows of all tasks, P patients, B draws, R rows of one task, S training seeds,
Q rows with the outcome, M rows without it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smbfast.experiments.patients import TASKS
from smbfast.statistics import resample, seeds

MEAN = "mean"  # of the tasks
COUNTS, FILTER = "counts", "filter"  # the two ends of the gap
_DRAWS_AT_ONCE = 50  # draws whose weights are held together: 6 MB for 16,000 patients
_KEYS = ("task_N", "subject_N", "time_N", "true_N", "duration_N")
_C_DRAWS = 200  # of Harrell's C, which takes longer
Key = tuple[str, str]  # model and task
Estimate = tuple[float, np.ndarray]  # on all patients and seeds, and in each draw [B]
Estimates = dict[Key, Estimate]


@dataclass(frozen=True)
class Scores:
    """What every model says of the patients that judge one cohort, all tasks below each other.

    models: float64 [S, N] each, higher = riskier; S is 1 for a model that no training seed changes.
        nan in the rows of a task that a model does not score.
    """

    task_N: np.ndarray  # str
    subject_N: np.ndarray  # int64
    time_N: np.ndarray  # int64 microseconds since 1970
    true_N: np.ndarray  # bool; of time to event, whether it was seen
    duration_N: np.ndarray  # float64 days; nan in a binary task
    models: dict[str, np.ndarray]

    def beside(self, other: "Scores") -> "Scores":
        """Return the scores with the models of `other` as well.

        Raises:
            ValueError: the two are of other nodes or outcomes, or in another order.
        """
        for name in _KEYS:
            one, two = getattr(self, name), getattr(other, name)
            if not np.array_equal(one, two, equal_nan=name == "duration_N"):
                raise ValueError(
                    f"models must be scored on the same patients; they differ in {name}"
                )
        return replace(self, models={**self.models, **other.models})

    def write(self, file: BinaryIO, about: dict[str, Any]) -> None:
        """Write the scores, and what is said of them as JSON values."""
        names = {f"model {name}": score_SN for name, score_SN in self.models.items()}
        own = {n: getattr(self, n) for n in _KEYS}
        np.savez(file, allow_pickle=False, about=np.array(json.dumps(about)), **own, **names)

    @classmethod
    def read(cls, path: Path) -> tuple["Scores", dict[str, Any]]:
        """Read what `write` wrote."""
        with np.load(path, allow_pickle=False) as file:
            own = {n: file[n] for n in _KEYS}
            models = {n.removeprefix("model "): file[n] for n in file if n.startswith("model ")}
            return cls(models=models, **own), json.loads(str(file["about"]))


def together(parts: list[Scores]) -> Scores:
    """Put scores of different models on the same rows beside each other."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.beside(part)
    return whole


def by_seed(runs: list[Scores]) -> Scores:
    """Put scores of the same models with several training seeds beside each other.

    Raises:
        ValueError: they are of other nodes or outcomes, or not of the same models.
    """
    first = runs[0]
    for run in runs[1:]:
        first.beside(run)
        if run.models.keys() != first.models.keys():
            raise ValueError(
                "every training seed must have the same models; they differ in "
                f"{', '.join(sorted(run.models.keys() ^ first.models.keys()))}"
            )
    return replace(
        first, models={n: np.concatenate([run.models[n] for run in runs]) for n in first.models}
    )


@dataclass(frozen=True)
class Areas:
    """AUROC by model and task of one cohort: of each seed [S], and in each draw of patients [B, S].

    The task `mean` is the mean over the binary tasks; of time to event it is Harrell's C.
    """

    of_seed: dict[Key, np.ndarray]
    drawn: dict[Key, np.ndarray]

    @property
    def models(self) -> list[str]:
        """The models, in their order."""
        return list(dict.fromkeys(model for model, _ in self.of_seed))

    @property
    def tasks(self) -> list[str]:
        """The tasks, their mean last."""
        return list(dict.fromkeys(task for _, task in self.of_seed))


@dataclass(frozen=True)
class Ranks:
    """The order of the rows of a task by a score: their AUROC under any weights of the rows.

    That of `smbfast.statistics.resample`, an order of magnitude faster for many draws and few
    positive rows: per draw only the negative rows are summed up, and read at the positive ones.
    """

    positive_Q: np.ndarray  # rows with the outcome
    negative_M: np.ndarray  # rows without it, ascending by score
    below_Q: np.ndarray  # how many of them are below each positive row
    upto_Q: np.ndarray  # and how many are not above it

    @classmethod
    def of(cls, score_R: np.ndarray, true_R: np.ndarray) -> "Ranks":
        """Sort the rows once."""
        positive_Q, negative_M = np.flatnonzero(true_R), np.flatnonzero(~true_R)
        negative_M = negative_M[np.argsort(score_R[negative_M], kind="stable")]
        below_Q, upto_Q = (
            np.searchsorted(score_R[negative_M], score_R[positive_Q], side)
            for side in ("left", "right")
        )
        return cls(positive_Q, negative_M, below_Q, upto_Q)

    def auroc(self, weight_RB: np.ndarray) -> np.ndarray:
        """Return the AUROC, float64 [B], of rows with whole weights int32 [R, B]; nan for one class
        only. Equal scores count one half."""
        sum_MB = np.zeros((len(self.negative_M) + 1, weight_RB.shape[1]), np.int32)
        np.cumsum(weight_RB[self.negative_M], 0, out=sum_MB[1:])
        positive_QB = weight_RB[self.positive_Q]
        twice_QB = sum_MB[self.below_Q] + sum_MB[self.upto_Q]
        twice_B = (positive_QB * twice_QB.astype(np.float64)).sum(0)
        with np.errstate(invalid="ignore"):
            return twice_B / (2.0 * positive_QB.sum(0) * sum_MB[-1])


def areas(scores: Scores, draws: int, seed: int) -> Areas:
    """Return the AUROC of every model, seed and binary task, in `draws` draws of patients.

    Of tasks of time to event it is Harrell's C, in the first 200 of the draws, and no part of the
    mean. A model that does not score a task has no entry for it.
    """
    subject_P, at_N = np.unique(scores.subject_N, return_inverse=True)
    rows = {t: np.flatnonzero(scores.task_N == t) for t in dict.fromkeys(scores.task_N.tolist())}
    binary = [task for task, row_R in rows.items() if np.isnan(scores.duration_N[row_R]).all()]
    of_seed, drawn = {}, {}
    ranks = {
        (model, task): [Ranks.of(s[rows[task]], scores.true_N[rows[task]]) for s in score_SN]
        for model, score_SN in scores.models.items()
        for task in binary
        if np.isfinite(score_SN[:, rows[task]]).all()
    }
    for key, own in ranks.items():
        one_R1 = np.ones((len(rows[key[1]]), 1), np.int32)
        of_seed[key] = np.array([rank.auroc(one_R1)[0] for rank in own])
        drawn[key] = np.empty((draws, len(own)))
    for start in range(0, draws, _DRAWS_AT_ONCE):
        chosen = range(start, min(start + _DRAWS_AT_ONCE, draws))
        weight_NB = resample.patient_weights(subject_P, chosen, seed).T[at_N]
        for task in binary:
            weight_RB = weight_NB[rows[task]]
            for key in (key for key in ranks if key[1] == task):
                values = [rank.auroc(weight_RB) for rank in ranks[key]]
                drawn[key][chosen.start : chosen.stop] = np.stack(values, 1)
    for model in scores.models:
        keys = [(model, task) for task in binary]
        if all(key in ranks for key in keys):
            of_seed[model, MEAN] = np.mean([of_seed[key] for key in keys], 0)
            drawn[model, MEAN] = np.mean([drawn[key] for key in keys], 0)
    weight_BN = resample.patient_weights(subject_P, range(min(draws, _C_DRAWS)), seed)[:, at_N]
    for task in (task for task in rows if task not in binary):
        row_R = rows[task]
        for model, score_SN in scores.models.items():
            if np.isfinite(score_SN[:, row_R]).all():
                of_row = scores.duration_N[row_R], scores.true_N[row_R]
                metrics = [resample.c_index(score_N[row_R], *of_row) for score_N in score_SN]
                one_1R = np.ones((1, len(row_R)), np.int32)
                of_seed[model, task] = np.array([metric(one_1R)[0] for metric in metrics])
                drawn[model, task] = np.stack([m(weight_BN[:, row_R]) for m in metrics], 1)
    return Areas(of_seed, drawn)


def over_seeds(own: Areas, seed: int, cohorts: int = 1) -> Estimates:
    """Return the mean over training seeds; a draw is one of patients and of training seeds.

    All models of several seeds have the same draw of them. `seed` and `cohorts` are those of
    `seed_weights`.
    """
    estimates = {}
    for key, drawn_BS in own.drawn.items():
        estimates[key] = float(own.of_seed[key].mean()), seeds.over_seeds(drawn_BS, seed, cohorts)
    return estimates


def shares(own: Estimates) -> Estimates:
    """Return the share of the gap from code counts to the filter that each model closes.

    That of the task `mean` is of the gap between the mean AUROCs.
    """
    closed = {}
    for (model, task), (value, drawn_B) in own.items():
        if model not in (COUNTS, FILTER):
            (low, low_B), (high, high_B) = own[COUNTS, task], own[FILTER, task]
            with np.errstate(divide="ignore", invalid="ignore"):  # of few patients, no gap
                share_B = (drawn_B - low_B) / (high_B - low_B)
                closed[model, task] = float(np.divide(value - low, high - low)), share_B
    return closed


def over_cohorts(cohorts: list[Estimates]) -> Estimates:
    """Return the mean over cohorts, draw by draw: their patients and runs are independent."""
    keys = [key for key in cohorts[0] if all(key in own for own in cohorts)]
    return {
        key: (
            float(np.mean([own[key][0] for own in cohorts])),
            np.mean([own[key][1] for own in cohorts], axis=0),
        )
        for key in keys
    }


def differences(own: Estimates, pairs: Iterable[tuple[str, str]]) -> Estimates:
    """Return one model's AUROC less another's for each pair, under the name `one - other`."""
    return {
        (f"{one} - {other}", task): (
            own[one, task][0] - own[other, task][0],
            own[one, task][1] - own[other, task][1],
        )
        for one, other in pairs
        for task in (*TASKS, MEAN)
        if (one, task) in own and (other, task) in own
    }


def cells(own: Estimates) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return value, low and high (95 %) by model and task, as JSON values."""
    shown: dict[str, dict[str, dict[str, float | None]]] = {}
    for (model, task), (value, drawn_B) in own.items():
        shown.setdefault(model, {})[task] = resample.interval(value, drawn_B)._asdict()
    return shown
