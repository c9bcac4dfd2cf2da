"""Which task competes with which, as `probe.competing` says: the event of one ends the rows of the
other, such as a discharge alive those of a death in hospital."""

from collections.abc import Sequence
from pathlib import Path

from smbfast.data.labels import Labels, find_tasks, read_labels, with_competing, with_splits
from smbfast.data.meds import MedsDataset


def competing_tasks(
    tasks: list[Labels], pairs: Sequence[str], data: Path, dataset: MedsDataset
) -> list[Labels]:
    """Return tasks with the competing events that `TASK=OTHER` pairs name.

    Args:
        pairs: OTHER is one of the tasks, or a folder of labels, or the name of one under
            `<data>/labels`.

    Raises:
        ValueError: a pair is of another form, its task is not among those given, or the labels do
            not go together (see `with_competing`).
    """
    by_name = {labels.task: labels for labels in tasks}
    result = dict(by_name)
    for pair in pairs:
        name, separator, other = pair.partition("=")
        if not (separator and other):
            raise ValueError(f"`competing` must be TASK=OTHER_TASK, got {pair!r}")
        if name not in by_name:
            raise ValueError(
                f"`competing` must name a task that is probed ({', '.join(by_name)}), got {name!r}"
            )
        if other in by_name:
            rival = by_name[other]
        else:
            [folder] = find_tasks([other], data)
            rival = with_splits(read_labels(folder), dataset)
        result[name] = with_competing(by_name[name], rival)
    return list(result.values())
