"""Compares methods on the rows that all of them have: paired differences, and a verdict a task.

Predictions are joined by patient and prediction time; nothing is fitted. The verdict of a pair is
about the primary metric on each patient's first row, with p corrected by Holm over all comparisons
that are made. One word alone stands for all models of a run, of which the trained one is judged
against its best rival, as a probe does.

Legend: N rows of one file, J rows that all methods have, S runs of a method, H horizons.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal, cast

import numpy as np

from smbfast.base.counts import few, of_whole
from smbfast.data.labels import Labels
from smbfast.judging import measures
from smbfast.judging.headline import headline, too_few_draws
from smbfast.judging.judge import OWN, STACK, Protocol, judge, unmeasurable
from smbfast.judging.methods import Method, read_methods
from smbfast.judging.prediction_files import Predictions
from smbfast.judging.scored import Role, Scored, Traits
from smbfast.judging.small_cells import without_small_cells
from smbfast.judging.verdicts import verdicts
from smbfast.settings.compare import CompareSettings

_ROLES = ("own", "baseline", "beside", "oracle")
_FEW_RUNS = 3


@dataclass(frozen=True)
class Paired:
    """One task on the rows that all methods have.

    left_out: by method, how many of its rows were not used, because another method or another of
    its runs does not have them.
    """

    labels: Labels
    scored: list[Scored]
    horizons_H: tuple[float, ...]
    judged_on: list[str]
    left_out: dict[str, int]


def compare(
    config: CompareSettings,
    tell: Callable[[str], None],
    traits_of: Callable[[Labels], Traits] | None = None,
) -> dict[str, Any]:
    """Return the content of `compare.json`: that of `probe.json`, with methods in place of models.

    Args:
        traits_of: what is known of rows beside their order, for figures by age, sex and history;
            prediction files do not hold it.

    Raises:
        ValueError: a method cannot be read, methods have no task or no row in common, their
            outcomes disagree, or a row is in two folds.
    """
    methods = read_methods(config.methods, config.folds, tell)
    alone = len(config.methods) == 1
    if len(methods) < 2:
        raise ValueError(
            f"`{config.methods[0]}` must be compared with another method; it holds the model "
            f"`{methods[0].model}` alone"
        )
    tasks, notes = _tasks(methods, config.tasks, alone)
    pairs = _pairs(methods, config.against, alone)
    records, looked = [], set()
    for task, own in tasks.items():
        paired = pair(task, own, alone=alone)
        looked |= set(paired.judged_on)
        tell(f"{task}: {few(len(paired.labels))} rows of {', '.join(m.name for m in own)}")
        here = [pair for pair in pairs if {m.name for m in own} >= set(pair)]
        record = _judged(paired, here, config, traits_of or _traits)
        records.append(record | {"left_out": paired.left_out, "judged_on": paired.judged_on})
    primary = measures.PRIMARY
    made = headline(records, primary) if alone else verdicts(records, pairs, primary)
    records = [without_small_cells(record, config.small_cells) for record in records]
    return {
        "methods": [
            _about(m, word) for m, word in zip(methods, _words(config, methods), strict=True)
        ],
        "judged_on": sorted(looked),
        "folds": config.folds,
        "primary": primary,
        "headline": made,
        "tasks": records,
        "notes": [
            *too_few_draws(made, config.bootstraps),
            *notes,
            *_notes(methods, looked, config),
        ],
        "protocol": _protocol(config),
        "small_cells": config.small_cells,
    }


def pair(task: str, methods: list[Method], *, alone: bool = False) -> Paired:
    """Return the rows of a task that every run of every method has, in the order of patients and
    times.

    Args:
        alone: whether the methods are models of one run, each with a role of its own.

    Raises:
        ValueError: there is no such row, or outcomes disagree.
    """
    runs = [(method.name, run) for method in methods for run in method.runs[task]]
    kinds = {name: run.kind for name, run in runs}
    if len(set(kinds.values())) > 1:
        shown = ", ".join(f"{name}: {kind.replace('_', ' ')}" for name, kind in kinds.items())
        raise ValueError(f"{task} must be of one kind in all methods; it is {shown}")
    rows = _shared([run for _, run in runs])
    if not len(rows[0]):
        sizes = ", ".join(f"{m.name} {few(max(len(run) for run in m.runs[task]))}" for m in methods)
        raise ValueError(
            f"methods must have rows of the same patients at the same times; of {task} ({sizes} "
            f"rows) none is in all of them{_why(runs)}"
        )
    taken = [run.take(row_J) for (_, run), row_J in zip(runs, rows, strict=True)]
    for (name, _), run in zip(runs, taken, strict=True):
        _require_equal(task, (runs[0][0], taken[0]), (name, run))
    horizons_H = _horizons(taken)
    left_out = {m.name: max(len(run) for run in m.runs[task]) - len(rows[0]) for m in methods}
    scored, at = [], 0
    for method in methods:
        own = taken[at : at + len(method.runs[task])]
        at += len(own)
        scored.append(_scored(method, own, horizons_H, alone))
    judged_on = sorted({str(run.about["judged_on"]) for run in taken if "judged_on" in run.about})
    # what competes is not in every file of others
    said = next((run for run in taken if run.competing_N is not None), taken[0])
    return Paired(_labels(task, said), scored, horizons_H, judged_on, left_out)


def _shared(runs: list[Predictions]) -> list[np.ndarray]:
    """Return for each run the rows, int64 [J], that all runs have, in the same order."""
    parts = [len(run) for run in runs]
    _, subject_N = np.unique(np.concatenate([run.subject_N for run in runs]), return_inverse=True)
    time_M, time_N = np.unique(np.concatenate([run.time_N for run in runs]), return_inverse=True)
    key_N = subject_N.astype(np.int64) * len(time_M) + time_N
    keys = np.split(key_N, np.cumsum(parts)[:-1])
    shared_J = keys[0]
    for key in keys[1:]:
        shared_J = np.intersect1d(shared_J, key, assume_unique=True)
    shared_J = np.sort(shared_J)
    orders = [np.argsort(key) for key in keys]
    return [
        order[np.searchsorted(key, shared_J, sorter=order)]
        for key, order in zip(keys, orders, strict=True)
    ]


def _why(runs: list[tuple[str, Predictions]]) -> str:
    """Say why no row may be shared, as far as files say it."""
    splits = {str(run.about.get("judged_on")) for _, run in runs}
    if len(splits) > 1:
        return f": they are of {' and '.join(sorted(splits))}"
    people = [set(np.unique(run.subject_N).tolist()) for _, run in runs]
    if set.intersection(*people):
        return ": they share patients, at other times"
    return (
        ": they share no patient. Folds of a cross-validation need --folds, and a pattern that "
        "names them quotes"
    )


def _require_equal(task: str, one: tuple[str, Predictions], other: tuple[str, Predictions]) -> None:
    """Raise a ValueError if two methods disagree about what happened."""
    wrong_J = one[1].true_N != other[1].true_N
    days = [run.duration_N for run in (one[1], other[1]) if run.duration_N is not None]
    if len(days) == 2:
        # a file of others may hold float32
        wrong_J = wrong_J | (days[0].astype(np.float32) != days[1].astype(np.float32))
    if one[1].competing_N is not None and other[1].competing_N is not None:
        wrong_J = wrong_J | (one[1].competing_N != other[1].competing_N)
    if wrong_J.any():
        raise ValueError(
            f"outcomes of {task} must be the same in all methods; {one[0]} and {other[0]} differ "
            f"in {of_whole(int(wrong_J.sum()), len(wrong_J))} of {few(len(wrong_J))} rows that "
            "both have. Their labels are not of the same task or data"
        )


def _labels(task: str, run: Predictions) -> Labels:
    """Return the outcomes of rows as labels; the split is not of interest here."""
    split_J = np.full(len(run), "held_out")
    if run.kind == "binary":
        return Labels(task, "binary", run.subject_N, run.time_N, split_J, value_N=run.true_N)
    competes = run.competing_N is not None and run.competing_N.any()
    own = {
        "duration_N": run.duration_N,
        "event_N": run.true_N,
        "competing_N": run.competing_N if competes else None,
    }
    return Labels(task, run.kind, run.subject_N, run.time_N, split_J, **own)


def _scored(
    method: Method, runs: list[Predictions], horizons_H: tuple[float, ...], alone: bool
) -> Scored:
    known = bool(horizons_H) and all(
        run.probability_NH is not None
        and run.horizons == horizons_H
        and run.probability_NH.shape[1] == len(horizons_H)
        for run in runs
    )
    chances = [run.probability_NH for run in runs if run.probability_NH is not None]
    role = method.role if alone and method.role in _ROLES else "own"
    return Scored(
        method.name,
        method.name,
        cast(Role, role),
        np.stack([run.score_N for run in runs]),
        chance_SNH=np.stack(chances) if known else None,
    )


def _horizons(runs: list[Predictions]) -> tuple[float, ...]:
    """Return the horizons of time to event, in days: those of the first file that names any, or
    quartiles of the times of events (our choice)."""
    named = next((run.horizons for run in runs if run.horizons), ())
    if named or runs[0].duration_N is None or not runs[0].true_N.any():
        return named
    quartiles = np.quantile(runs[0].duration_N[runs[0].true_N], [0.25, 0.5, 0.75])
    return tuple(float(days) for days in np.unique(quartiles) if days < runs[0].duration_N.max())


def _tasks(
    methods: list[Method], asked: list[str], alone: bool
) -> tuple[dict[str, list[Method]], list[str]]:
    """Return the methods of each task that two have, and what is said of the others."""
    methods = _aligned(methods, asked)
    names = list(dict.fromkeys(task for method in methods for task in method.runs))
    having = {task: [m for m in methods if task in m.runs] for task in names}
    shared = {task: own for task, own in having.items() if len(own) > 1}
    unknown = [task for task in asked if task not in shared]
    if not shared or unknown:
        own = "; ".join(f"{m.name} has {', '.join(m.runs) or 'none'}" for m in methods)
        what = f"`{unknown[0]}` is not" if unknown else "none is"
        hint = " --tasks=TASK says which one a file of others is of." if not shared else ""
        raise ValueError(f"a task must be in two methods to be compared; {what}: {own}.{hint}")
    if asked:
        return {task: shared[task] for task in asked}, []
    notes = [
        f"{task}: left out, because {having[task][0].name} alone has it."
        for task in names
        if task not in shared
    ]
    if not alone:
        notes += [
            f"{task}: {', '.join(m.name for m in methods if task not in m.runs)} has no "
            "predictions of it."
            for task, own in shared.items()
            if len(own) < len(methods)
        ]
    return shared, notes


def _aligned(methods: list[Method], asked: list[str]) -> list[Method]:
    """Let a file of others, which does not say its task, be of the only one that may be meant."""
    said = {
        task
        for method in methods
        for task, runs in method.runs.items()
        if task in asked or any("task" in run.about for run in runs)
    }
    single = [method for method in methods if len(method.runs) == 1]
    if asked or len(single) == len(methods):
        own = {task for method in methods for task in method.runs}
        meant = asked or sorted(said) or (list(own) if len(own) == 1 else ["task"])
        if len(meant) == 1:
            return [
                replace(method, runs={meant[0]: next(iter(method.runs.values()))})
                if method in single and not said & set(method.runs)
                else method
                for method in methods
            ]
    return methods


def _pairs(
    methods: list[Method], against: Literal["first", "all"], alone: bool
) -> list[tuple[str, str]]:
    names = [method.name for method in methods]
    if alone:
        rivals = [m.name for m in methods if m.role in ("baseline", "beside")]
        pairs = [(OWN, name) for name in names if OWN in names and name != OWN]
        pairs += [(STACK, name) for name in rivals if STACK in names]
        return pairs or list(combinations(names, 2))
    if against == "all":
        return list(combinations(names, 2))
    return [(names[0], name) for name in names[1:]]


def _judged(
    paired: Paired,
    pairs: list[tuple[str, str]],
    config: CompareSettings,
    traits_of: Callable[[Labels], Traits],
) -> dict[str, Any]:
    draws = config.bootstraps
    protocol = Protocol(draws, draws, config.seed, "held_out")
    labels = paired.labels
    record = judge(
        labels,
        paired.scored,
        traits_of(labels),
        protocol,
        horizons_H=paired.horizons_H,
        pairs=pairs,
    )
    return record | {"reason": unmeasurable(labels, "what all methods share")}


def _traits(labels: Labels) -> Traits:
    """Return the place of each row among its patient's; rows are in the order of both."""
    num_rows = len(labels)
    new_J = np.r_[True, labels.subject_N[1:] != labels.subject_N[:-1]]
    start_J = np.maximum.accumulate(np.where(new_J, np.arange(num_rows), 0))
    unknown = np.full(num_rows, np.nan), np.full(num_rows, ""), np.zeros(num_rows, np.int64)
    return Traits(*unknown, order_N=np.arange(num_rows) - start_J)


def _about(method: Method, word: str) -> dict[str, Any]:
    said = any("model" in run.about for runs in method.runs.values() for run in runs)
    return {
        "name": method.name,
        "given": word,
        "model": method.model if said else None,
        "role": method.role or None,
        "runs": max(len(runs) for runs in method.runs.values()),
    }


def _words(config: CompareSettings, methods: list[Method]) -> list[str]:
    alone = len(config.methods) == 1
    return config.methods * len(methods) if alone else config.methods


def _notes(methods: list[Method], looked: set[str], config: CompareSettings) -> Iterator[str]:
    """Yield what a reader must know before the figures are believed."""
    counts = {m.name: max(len(runs) for runs in m.runs.values()) for m in methods}
    fixed = {m.name for m in methods if m.role in ("baseline", "oracle")}
    single = [name for name, count in counts.items() if count == 1 and name not in fixed]
    several = {name: count for name, count in counts.items() if count > 1}
    if len(config.methods) == 1:
        single = [name for name in single if name == OWN]
    if single:
        be = "is one training run" if len(single) == 1 else "are one training run each"
        be += " of every fold" if config.folds else ""
        yield (
            f"{', '.join(single)} {be}: an interval is of patients alone and says nothing of "
            "another training seed."
        )
    if several:
        shown = ", ".join(f"{name} {count}" for name, count in several.items())
        yield (
            f"Runs: {shown}. Intervals are of patients and runs, widened for how few runs there "
            "are; methods of as many runs are paired in the order given."
        )
    if any(count < _FEW_RUNS for count in several.values()):
        yield "Two runs say very little of a third one."
    if config.folds:
        yield (
            "Out-of-fold predictions are put together: each row was predicted by the model of one "
            "fold. AUROC compares rows across folds, and so suffers where folds are calibrated "
            "differently; log hazards of folds have no common zero."
        )
    if "held_out" in looked:
        yield (
            "These are held-out patients. The look was counted when the predictions were written; "
            "who chooses by these figures needs other patients to judge by."
        )
    if "tuning" in looked:
        yield (
            "These are tuning patients: models were chosen and calibrated on them, so new patients "
            "will be predicted somewhat worse. Where a probe was calibrated there, slope 1 and "
            "intercept 0 say nothing, and a stack was fitted on these very rows."
        )
    yield "Not to be told from each other is not equal: see which differences an interval holds."


def _protocol(config: CompareSettings) -> str:
    return (
        "Rows are paired by patient and prediction time. Metrics are of all rows that the methods "
        "share; the primary one, which the verdict is about, is of each patient's first such row: "
        "AUROC, or the mean cumulative/dynamic AUC over the horizons. 95 % intervals and two-sided "
        f"p from {config.bootstraps} draws of patients, and of runs where there are several, the "
        "same for all methods; p corrected by Holm over all comparisons that are made."
    )
