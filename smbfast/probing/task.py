"""Measures one task: every model is fitted, and judged on the same rows of the judged split.

Shape suffixes: N label rows, J rows of the split that is judged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smbfast.base.counts import of_whole
from smbfast.data.labels import Labels
from smbfast.data.splits import SPLITS
from smbfast.judging.judge import Protocol, judge, outline
from smbfast.judging.scored import Scored, Traits
from smbfast.probing import binary, survival
from smbfast.probing.few_shot import few_shot
from smbfast.probing.horizons import horizons, with_chances
from smbfast.probing.models import Model

__all__ = ["Measured", "Protocol", "measure", "not_measurable"]


@dataclass(frozen=True)
class Measured:
    """The record of a task in probe.json; the judged rows, and what each model says of them (none
    if the task is not measurable); the horizons in days of time to event."""

    record: dict[str, Any]
    judged: Labels
    scored: list[Scored]
    horizons_H: tuple[float, ...] = ()


def measure(
    labels: Labels,
    traits: Traits,
    scored: Callable[[], list[Scored]],
    protocol: Protocol,
    *,
    models: Callable[[], list[Model]] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Fit and judge the models of a task.

    A task that cannot be measured gives a record with the reason and no models; nothing is fitted
    then.

    Args:
        labels: rows of the splits that are read, `Protocol.splits`, and of no other.
        traits: of each row.
        scored: fits and scores every model on all rows.
        models: gives the models to fit to few rows, or None if that is not asked for.

    Raises:
        ValueError: a row is of a split that is not read.
    """
    unread = [split for split in SPLITS if split not in protocol.splits]
    foreign = int(np.isin(labels.split_N, unread).sum())
    if foreign:
        raise ValueError(
            f"rows of {labels.task} must be of {', '.join(protocol.splits)}; "
            f"{of_whole(foreign, len(labels))} are of {', '.join(unread)}"
        )
    judged_N = labels.split_N == protocol.judged_on
    judged, own = labels.take(judged_N), traits.take(judged_N)
    reason = not_measurable(labels, protocol)
    if reason:
        record = outline(judged, own, protocol, reason)
        return Measured(record | _by_split(labels, protocol), judged, [])
    scores = scored()
    times_H = () if labels.kind == "binary" else horizons(labels)
    if labels.kind != "binary":
        scores = [with_chances(labels, model, times_H) for model in scores]
    shots = None
    if models is not None and labels.kind == "binary":
        shots = few_shot(labels, models(), scores, judged_N, protocol.seed, progress)
    judged_models = [model.take(judged_N) for model in scores]
    progress(f"{labels.task}: intervals")
    record = judge(judged, judged_models, own, protocol, horizons_H=times_H, few_shot=shots)
    return Measured(record | _by_split(labels, protocol), judged, judged_models, times_H)


def not_measurable(labels: Labels, protocol: Protocol) -> str | None:
    """Return why a task cannot be fitted or judged, or None."""
    empty = [split for split in protocol.splits if labels.counts()[split] == 0]
    if empty:
        return f"no row with an embedding in {', '.join(empty)}"
    if labels.kind == "binary":
        return binary.not_measurable(labels.binary_N, labels.split_N, protocol.judged_on)
    return survival.not_measurable(*labels.survival_N, labels.split_N, protocol.judged_on)


def _by_split(labels: Labels, protocol: Protocol) -> dict[str, Any]:
    """Return the counts of every split that is read."""
    rows, positives = labels.counts(), labels.positives()
    return {
        "rows": {split: rows[split] for split in protocol.splits},
        "positives": {split: positives[split] for split in protocol.splits},
        "patients": {
            split: len(np.unique(labels.subject_N[labels.split_N == split]))
            for split in protocol.splits
        },
    }
