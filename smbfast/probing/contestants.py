"""Opens what the tasks of a probe are measured with: embeddings, baselines and oracles.

Shape suffixes: N label rows of a task that every embeddings file has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from smbfast.base.counts import few, of_whole
from smbfast.base.held_out import run_of
from smbfast.data.labels import Labels
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import distinct_nodes
from smbfast.judging.scored import Scored, Traits
from smbfast.probing.bag import TokenBag, bag_of_tokens, serializer_at, tokens_digest
from smbfast.probing.baselines import HEADS, LABELS, Baselines, baselines
from smbfast.probing.beside import Beside, parsed
from smbfast.probing.embedding_file import read_origin
from smbfast.probing.features import Embeddings, Features, matched, read_embeddings, read_oracle
from smbfast.probing.models import ORACLES, Model, oracles, scored
from smbfast.settings import ProbeCommandSettings

_UNTRAINED = "same backbone, untrained"
_BAG = "bag of the model's tokens"
NAMES = {"smbfast", "smbfast_boosting", "stack", *LABELS, "bag", "untrained"}
NAMES |= {name for name, _ in ORACLES.values()}
"""Of the models of a probe, which no other may have."""


@dataclass(frozen=True)
class Contestants:
    """The models of a probe.

    tasks: the rows that the files of embeddings of the trained and the untrained model have;
    unmatched: by task, how many others there are. bag: the tokens of the model, or why there are
    none.
    """

    data: Path
    tasks: list[Labels]
    unmatched: dict[str, int]
    own: Embeddings
    untrained: list[Embeddings]
    plain: Baselines
    bag: TokenBag | str
    beside: list[Beside]
    embedded: dict[str, Embeddings]

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
        untrained = [read_embeddings(path, nodes) for path in config.untrained]
        beside = parsed(config.beside, NAMES)
        embedded = {b.name: read_embeddings(b.path, nodes) for b in beside if b.embeddings}
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
        bag = _bag(config, dataset, plain, matched_tasks, progress)
        models = own, untrained, plain, bag, beside, embedded
        return cls(config.data, matched_tasks, unmatched, *models)

    def models(self, labels: Labels) -> list[Model]:
        """Return the models of a task, one of `tasks`: the trained one first."""
        label = own_label(self.own.path)
        of_own = partial(self._embedded, [self.own], labels)
        models = [Model("smbfast", label, "own", of_own)]
        if labels.kind == "binary":
            trees = f"{label}, boosted trees"
            models.append(Model("smbfast_boosting", trees, "own", of_own, "boosting"))
        for name, text in LABELS.items():
            head = HEADS.get(name, "linear")
            if labels.kind == "binary" or head != "boosting":
                versions = partial(self._plain, name, labels)
                models.append(Model(name, text, "baseline", versions, head))
        reason = self.bag if isinstance(self.bag, str) else None
        bag = partial(self._tokens, labels)
        models.append(Model("bag", _BAG, "baseline", bag, reason=reason))
        if self.untrained:
            of_untrained = partial(self._embedded, self.untrained, labels)
            models.append(Model("untrained", _UNTRAINED, "baseline", of_untrained))
        for name, file in self.embedded.items():
            _require_rows(labels, name, file)
            models.append(Model(name, name, "beside", partial(self._embedded, [file], labels)))
        return models

    def scored(
        self, labels: Labels, judged_on: str, progress: Callable[[str], None] = lambda _: None
    ) -> list[Scored]:
        """Fit and score the models of a task, one of `tasks`, and read predictions and oracles.

        Raises:
            ValueError: a file beside does not have every judged row.
        """
        beside = [b.scored(labels, judged_on) for b in self.beside if not b.embeddings]
        oracle = oracle_of(self.data, labels, judged_on)
        fitted = scored(labels, self.models(labels), progress)
        return [*fitted, *beside, *oracles(oracle)]

    def traits(self, labels: Labels) -> Traits:
        """Return what is known of each row of a task, one of `tasks`."""
        return self.plain.traits(labels)

    def _embedded(self, files: list[Embeddings], labels: Labels) -> Iterator[Features]:
        for file in files:
            yield file.features(matched(labels, file))

    def _tokens(self, labels: Labels) -> Iterator[Features]:
        assert isinstance(self.bag, TokenBag)
        key = labels.subject_N, labels.time_N, labels.split_N == "train"
        age_N2 = self.plain.counts.features(*key)[:, :2]
        yield self.bag.features(*key, age_N2)

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


def _bag(
    config: ProbeCommandSettings,
    dataset: MedsDataset,
    plain: Baselines,
    tasks: list[Labels],
    progress: Callable[[str], None],
) -> TokenBag | str:
    """Count the tokens of the model, or return why there are none."""
    run = run_of(config.embeddings)
    model = config.model or (run / "final" if run else None)
    if model is None or not (config.model or model.is_dir()):
        return "no model is given (--model), and the embeddings lie in no run"
    try:
        serializer = serializer_at(model, dataset)
        made_by = (read_origin(config.embeddings) or {}).get("tokens")
        if made_by is not None and tokens_digest(model) != made_by:
            raise ValueError(
                f"`model` must have the tokens of {config.embeddings}, whose digest is {made_by}; "
                f"those of {model} have {tokens_digest(model)}"
            )
    except ValueError as error:
        if config.model:
            raise
        return str(error)
    counts = plain.counts
    days = plain.recency.longest([plain.rows(t.take(t.split_N == "train")) for t in tasks])
    key = counts.subject_K, counts.time_K
    return bag_of_tokens(dataset, serializer, *key, days, lambda t: progress(f"tokens of {t}"))


def _require_rows(labels: Labels, name: str, file: Embeddings) -> None:
    missing = int(np.sum(matched(labels, file) < 0))
    if missing:
        raise ValueError(
            f"beside `{name}`: {file.path} must have every row of {labels.task}; "
            f"{of_whole(missing, len(labels))} of {few(len(labels))} are missing"
        )


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
