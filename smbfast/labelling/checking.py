"""Checks label files for leakage: what of an outcome may a model read at the prediction time?

Of labels with a definition beside them each row is computed again from the events: the outcome
window begins after the prediction time, the outcome is not already present, and the record is
followed to the end of the window or the row is censored. Without one there remain what holds for
any task (no node at or after a death, no event at the prediction time itself) and a search for
codes that give the outcome away alone (`smbfast.labelling.giveaways`).

Legend: N label rows, Q rows of a batch, in order of subject and time.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from smbfast.base.counts import few, of_whole
from smbfast.data.labels import Labels, find_tasks, read_labels, with_splits
from smbfast.data.meds import EventBatch, MedsDataset
from smbfast.labelling.giveaways import Giveaways
from smbfast.labelling.making import nodes_in
from smbfast.labelling.moments import LONG_AGO, Record, SetsOfCodes
from smbfast.labelling.outcomes import (
    Candidates,
    answers,
    candidates,
    exclusions,
)
from smbfast.settings.tasks import (
    DEATH,
    DEFINITION,
    CodeSet,
    TaskDefinition,
    TaskFile,
    TasksSettings,
    load_tasks,
)

_SECOND = 1.0 / 86_400  # days: what writing a duration in another unit may round
_FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """What is wrong with labels: a fault if figures on them mean nothing, else a warning."""

    task: str
    level: Literal["fault", "warning"]
    text: str  # a whole sentence without the task


@dataclass
class _Checked:
    """One task while it is checked."""

    labels: Labels  # sorted by subject and time
    task: TaskDefinition | None
    sets: SetsOfCodes
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    num_seen: int = 0

    def add(self, batch: EventBatch) -> None:
        """Take the rows whose subjects are in a batch."""
        record = Record.of(batch, self.sets)
        at, row_Q = nodes_in(record, self.labels.subject_N, self.labels.time_N)
        self.num_seen += len(at)
        if not len(at):
            return
        wrong = _general(self.labels, record, at, row_Q)
        if self.task is not None:
            wrong |= _against(self.task, self.labels, record, at, row_Q)
        for (level, text), wrong_Q in wrong.items():
            if wrong_Q.any():
                self.counts[level, text] += int(wrong_Q.sum())

    def findings(self, all_splits: bool) -> list[Finding]:
        """Return what is wrong, faults first."""
        whole = len(self.labels)
        counts = dict(self.counts)
        if all_splits and self.num_seen < whole:
            counts["warning", "are of subjects that the data do not hold"] = whole - self.num_seen
        ordered = sorted(counts.items(), key=lambda item: (item[0][0] != _FAULT, -item[1], item[0]))
        return [
            Finding(
                self.labels.task,
                "fault" if level == _FAULT else "warning",
                f"{of_whole(count, whole)} of {whole:,} rows {text}.",
            )
            for (level, text), count in ordered
        ]


def definition_beside(folder: Path) -> Path | None:
    """Return the definition that lies beside label files, or None."""
    file = Path(folder) / DEFINITION
    return file if file.is_file() else None


def check_against_definitions(
    dataset: MedsDataset, tasks: Iterable[tuple[Path, Labels]]
) -> list[Finding]:
    """Check the labels that have a definition beside them, in one pass; of the others nothing.

    Args:
        tasks: the folder and the labels of each; rows of splits that are left out are not read.

    Raises:
        ValueError: a definition is of the wrong form, or not of one task.
    """
    checked = [_checked(folder, labels) for folder, labels in tasks if definition_beside(folder)]
    _read(dataset, checked, [])
    return [finding for one in checked for finding in one.findings(all_splits=False)]


def check_labels(config: TasksSettings, say: Callable[[str], None] = print) -> bool:
    """Check the labels of `config.check`, say what is wrong; return whether none has a fault.

    Raises:
        ValueError: labels, a definition or the dataset cannot be read, or a file of definitions
            that is given has no task of the name of a label folder.
    """
    file = None if config.definitions is None else load_tasks(config.definitions)
    dataset = MedsDataset.open(config.data, split=config.split)
    folders = find_tasks(config.check, config.data)
    tasks = [(folder, with_splits(read_labels(folder), dataset)) for folder in folders]
    checked = [_checked(folder, labels, file) for folder, labels in tasks]
    searches = [Giveaways(labels) for _, labels in tasks]
    _read(dataset, checked, searches)
    sound = True
    for one, search in zip(checked, searches, strict=True):
        findings = one.findings(all_splits=True)
        findings += [Finding(one.labels.task, "warning", text) for text in search.sentences()]
        how = "against its definition" if one.task is not None else "without a definition"
        say(f"{one.labels.task}: {few(len(one.labels))} rows checked {how}")
        for finding in findings:
            say(f"  {finding.level}: {finding.text}")
        if not findings:
            say("  nothing is wrong")
        sound = sound and not any(finding.level == _FAULT for finding in findings)
    return sound


def _checked(folder: Path, labels: Labels, given: TaskFile | None = None) -> _Checked:
    order_N = np.lexsort((labels.time_N, labels.subject_N))
    task, sets = None, {DEATH: CodeSet(exact=["MEDS_DEATH"])}
    if given is not None:
        task, sets = _of_name(labels.task, given), given.sets
    elif (file := definition_beside(folder)) is not None:
        read = load_tasks(file)
        if len(read.each()) != 1:
            raise ValueError(f"{file} must define one task, that of its folder; it defines several")
        [task], sets = read.each(), read.sets
    if task is not None and task.kind != labels.kind:
        raise ValueError(
            f"the definition of {labels.task} must be of kind {labels.kind}, is {task.kind}"
        )
    return _Checked(labels.take(order_N), task, SetsOfCodes(sets))


def _of_name(name: str, file: TaskFile) -> TaskDefinition:
    tasks = {task.name: task for task in file.each()}
    if name not in tasks:
        raise ValueError(f"TASKS must define the task {name}; it defines {', '.join(tasks)}")
    return tasks[name]


def _read(dataset: MedsDataset, checked: list[_Checked], searches: list[Giveaways]) -> None:
    if not checked:
        return
    subjects = np.unique(np.concatenate([one.labels.subject_N for one in checked]))
    for split in dataset.splits:
        for batch in dataset.batches(split, subjects, text_chars=0):
            for one in checked:
                one.add(batch)
            for search in searches:
                search.add(batch)


def _general(
    labels: Labels, record: Record, at: Candidates, row_Q: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Return which rows break what holds for any task, by level and text: bool [Q]."""
    dead_Q = record.moments[DEATH].last_upto(at.subject_Q, at.time_Q) != LONG_AGO
    early_Q = record.first_S[at.subject_Q] > at.time_Q
    wrong = {
        (_FAULT, "have their prediction time at or after the patient's death"): dead_Q,
        ("warning", "lie before the first event of their patient"): early_Q,
    }
    if labels.kind == "time_to_event":
        duration_N, event_N = labels.survival_N
        now_Q = event_N[row_Q] & (duration_N[row_Q] <= 0)
        wrong[_FAULT, "have their event at the prediction time, where it may be read"] = now_Q
    return wrong


def _against(
    task: TaskDefinition, labels: Labels, record: Record, at: Candidates, row_Q: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Return which rows contradict their definition, by level and text: bool [Q], each row in one
    at most."""
    at, is_node_Q = _with_index(task, record, at)
    reason_Q, answer = exclusions(task, record, at), answers(task, record, at)
    said_Q = (labels.binary_N if labels.kind == "binary" else labels.survival_N[1])[row_Q]
    outcome = record.moments[task.outcome]
    known_Q = outcome.known(at.subject_Q, at.time_Q)
    dead_Q = record.moments[DEATH].last_upto(at.subject_Q, at.time_Q) != LONG_AGO
    present_Q = known_Q & task.first_only
    if task.value == "lasts":  # what began with the index event is over
        present_Q |= outcome.last_upto(at.subject_Q, at.time_Q) > at.index_Q
    over_Q = np.zeros(len(at), bool)
    for name in task.not_after:  # the stay has ended, and how may be read
        over_Q |= record.moments[name].last_upto(at.subject_Q, at.time_Q) > at.index_Q
    unlabelled_Q = answer.reason_Q != ""
    lost_Q = unlabelled_Q & np.char.startswith(answer.reason_Q, "not followed") & ~said_Q
    occurs = task.value == "occurs"
    classes = [
        (_FAULT, "have an outcome already present", present_Q),
        (_FAULT, "lie after an event that ends what the index event began", over_Q),
        (
            _FAULT,
            "are true by an outcome at or before the prediction time alone, which may be read",
            occurs & said_Q & ~answer.true_Q & known_Q,
        ),
        (_FAULT, "are false although the record ends within the outcome window", lost_Q),
        (
            _FAULT,
            "are true without an outcome in the window of the definition",
            occurs & said_Q & ~answer.true_Q,
        ),
        (
            "warning",
            "have another outcome than the definition gives",
            (said_Q != answer.true_Q) & ~unlabelled_Q,
        ),
        (
            "warning",
            "have another duration or competing event than the definition gives",
            np.zeros(len(at), bool),
        ),
        ("warning", "have no label by the definition, as it excludes them", unlabelled_Q),
        ("warning", "are no decision node of the definition", ~is_node_Q | (reason_Q != "")),
    ]
    if labels.kind == "time_to_event":
        off_Q = np.abs(labels.survival_N[0][row_Q] - answer.days_Q) > _SECOND
        if labels.competing_N is not None:
            off_Q |= labels.competing_N[row_Q] != answer.competing_Q
        classes[6] = (*classes[6][:2], off_Q & ~unlabelled_Q)
    taken_Q = dead_Q.copy()  # which is wrong whatever the task
    wrong = {}
    for level, text, wrong_Q in classes:
        wrong[level, text] = wrong_Q & ~taken_Q
        taken_Q |= wrong_Q
    return wrong


def _with_index(
    task: TaskDefinition, record: Record, at: Candidates
) -> tuple[Candidates, np.ndarray]:
    """Return the nodes with the index event each is counted from, and whether the definition has
    that node. Where it has not, the index is the last such event up to the node."""
    if task.index is None:
        return at, np.ones(len(at), bool)
    index_Q = record.moments[task.index].last_upto(at.subject_Q, at.time_Q)
    index_Q = np.where(index_Q == LONG_AGO, at.time_Q, index_Q)
    by_definition = candidates(task, record)
    columns = (by_definition.subject_Q, by_definition.time_Q, by_definition.index_Q)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    place = {(subject, time): index for subject, time, index in rows}
    keys = zip(at.subject_Q.tolist(), at.time_Q.tolist(), strict=True)
    indices = [place.get(key) for key in keys]
    is_node_Q = np.array([index is not None for index in indices], bool)
    index_Q = np.array(
        [own if index is None else index for own, index in zip(index_Q, indices, strict=True)],
        np.int64,
    )
    return Candidates(at.subject_Q, at.time_Q, index_Q), is_node_Q
