"""Opens what the tasks of a probe are measured with: embeddings, baselines and oracles.

Shape suffixes: N label rows of a task that every embeddings file has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from smbfast.data.labels import Labels
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import distinct_nodes
from smbfast.judging.scored import Scored, Traits
from smbfast.probing.baselines import HEADS, LABELS, Baselines, baselines
from smbfast.probing.features import Embeddings, Features, matched, read_embeddings, read_oracle
from smbfast.probing.models import Model, scored
from smbfast.settings import ProbeCommandSettings

_UNTRAINED = "same backbone, untrained"


@dataclass(frozen=True)
class Contestants:
    """The models of a probe.

    tasks: the rows that every file of embeddings has; unmatched: by task, how many others there
    are.
    """

    data: Path
    tasks: list[Labels]
    unmatched: dict[str, int]
    own: Embeddings
    untrained: list[Embeddings]
    plain: Baselines

    @classmethod
    def open(
        cls,
        config: ProbeCommandSettings,
        dataset: MedsDataset,
        tasks: list[Labels],
        progress: Callable[[str], None] = lambda _: None,
    ) -> "Contestants":
        """Read the files of embeddings, and the events for the baselines.

        Args:
            tasks: their rows of all splits that are read, with splits.

        Raises:
            ValueError: a file, which is named, is unreadable or of the wrong form, or has no node
                in common with a task.
        """
        nodes = distinct_nodes(tasks)
        own = read_embeddings(config.embeddings, nodes)
        untrained = [read_embeddings(config.untrained, nodes)] if config.untrained else []
        in_all = [_in_all(labels, [own, *untrained]) for labels in tasks]
        matched_tasks = [labels.take(has_N) for labels, has_N in zip(tasks, in_all, strict=True)]
        unmatched = {
            labels.task: int(np.sum(~has_N)) for labels, has_N in zip(tasks, in_all, strict=True)
        }
        plain = baselines(
            dataset,
            np.concatenate([labels.subject_N for labels in matched_tasks]),
            np.concatenate([labels.time_N for labels in matched_tasks]),
            lambda text: progress(f"events of {text}"),
        )
        return cls(config.data, matched_tasks, unmatched, own, untrained, plain)

    def models(self, labels: Labels) -> list[Model]:
        """Return the models of a task, one of `tasks`: the trained one first."""
        label = own_label(self.own.path)
        of_own = partial(self._embedded, [self.own], labels)
        models = [Model("smbfast", label, "own", of_own)]
        if labels.kind == "binary":
            trees = f"{label}, boosted trees"
            models.append(Model("smbfast_boosting", trees, "own", of_own, "boosting"))
        if self.untrained:
            versions = partial(self._embedded, self.untrained, labels)
            models.append(Model("untrained", _UNTRAINED, "baseline", versions))
        for name, text in LABELS.items():
            head = HEADS.get(name, "linear")
            if labels.kind == "binary" or head != "boosting":
                versions = partial(self._plain, name, labels)
                models.append(Model(name, text, "baseline", versions, head))
        return models

    def scored(
        self, labels: Labels, judged_on: str, progress: Callable[[str], None] = lambda _: None
    ) -> list[Scored]:
        """Fit and score the models of a task, one of `tasks`, and read the oracles."""
        oracle = oracle_of(self.data, labels, judged_on)
        return scored(labels, self.models(labels), oracle, progress)

    def traits(self, labels: Labels) -> Traits:
        """Return what is known of each row of a task, one of `tasks`."""
        return self.plain.traits(labels)

    def _embedded(self, files: list[Embeddings], labels: Labels) -> Iterator[Features]:
        for file in files:
            yield file.features(matched(labels, file))

    def _plain(self, name: str, labels: Labels) -> Iterator[Features]:
        yield self.plain.features(name, labels)


def own_label(path: Path) -> str:
    """Return what tables call the model whose embeddings are probed."""
    return f"smbfast, {path.stem} encoder" if path.stem in ("online", "target") else "smbfast"


def oracle_of(data: Path, labels: Labels, judged_on: str) -> dict[str, np.ndarray]:
    """Return the oracles' scores for each row: those of the judged split, and nan elsewhere, as
    nothing is fitted; none where the dataset has none."""
    file = data / "oracles" / labels.task / f"{judged_on}.parquet"
    if not file.is_file():
        return {}
    judged_N = labels.split_N == judged_on
    scores = read_oracle(file, labels.take(judged_N)) if judged_N.any() else {}
    full = {name: np.full(len(labels), np.nan) for name in scores}
    for name, score_J in scores.items():
        full[name][judged_N] = score_J
    return full


def _in_all(labels: Labels, files: list[Embeddings]) -> np.ndarray:
    """Return whether every file has the node of each label row, bool [N]."""
    own, *others = files
    in_all_N = matched(labels, own) >= 0
    for other in others:
        in_all_N &= matched(labels, other) >= 0
        if not in_all_N.any():
            raise ValueError(
                f"{other.path} must hold the nodes of {own.path}; for {labels.task} they have none "
                "in common"
            )
    return in_all_N
