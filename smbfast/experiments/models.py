"""What is scored on a simulated cohort: read-outs of a run's encoder, and baselines, under probes.

All read-outs of an encoder come from one forward of each decision node. A probe is fitted on train,
its penalty chosen by tuning log loss (of time to event, a Cox regression by the partial likelihood
of tuning). `auto` is the one of `POOLS` with the least tuning log loss,
mean over the tasks; `last+layers` is the mean of the logits of two probes.

Legend: K nodes, N label rows of a task, R of them who judge, M nodes of a call, D width, C codes, V
tokens, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from smbfast.data.labels import Labels, read_labels
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import Nodes, NodeText, distinct_nodes, node_texts
from smbfast.data.prepared import Prepared
from smbfast.experiments.patients import TASKS, rows_of
from smbfast.experiments.scores import COUNTS, FILTER, Scores
from smbfast.model.backbone import PatientEncoder
from smbfast.probing.bag import bag_of_tokens
from smbfast.probing.binary import log_loss
from smbfast.probing.boosting import fit_boosting
from smbfast.probing.embedding import Model, embed_into
from smbfast.probing.features import dense, read_oracle
from smbfast.probing.logistic import fit_logistic
from smbfast.probing.survival import fit_cox
from smbfast.probing.values import code_values
from smbfast.settings import POOLS, Pool

AUTO, BLEND = "auto", "last+layers"
READOUTS = (*POOLS, AUTO, BLEND)
VALUES, BAG, BOOSTING = "values", "bag", "boosting"
BASELINES = (COUNTS, VALUES, BAG, BOOSTING)
_YEAR = 365.25  # days: the recent past in the bag of tokens
_TOKENS = 16384  # of a forward, as many as a run has by default


@dataclass(frozen=True)
class Judged:
    """Labels of train, of tuning and of those who judge (split held_out), and their nodes."""

    data: Path
    dataset: MedsDataset
    prepared: Prepared
    tasks: list[Labels]
    nodes: Nodes
    texts: list[NodeText]

    @classmethod
    def open(
        cls, data: Path, prepared: Prepared, window: int, names: Sequence[str] = TASKS
    ) -> "Judged":
        """Read the labels and make the tokens of every node, once for all runs of a cohort.

        Args:
            names: the tasks, folders under `labels` of `data`.

        Raises:
            ValueError: a node cannot be embedded.
        """
        dataset = MedsDataset.open(data)
        tasks = [read_labels(data / "labels" / task) for task in names]
        nodes, counts = distinct_nodes(tasks), dict[str, int]()
        texts = list(node_texts(dataset, prepared.serializer(dataset), nodes, window, counts))
        if len(texts) != len(nodes.subject_K):
            missing = len(nodes.subject_K) - len(texts)
            raise ValueError(f"{data} must hold an event of every node; {missing} have none")
        return cls(data, dataset, prepared, tasks, nodes, texts)

    def rows(self, labels: Labels) -> np.ndarray:
        """Return the node of each label row, int64 [N]."""
        own = self.nodes
        return rows_of(labels.subject_N, labels.time_N, own.subject_K, own.time_K)


@dataclass
class Probed:
    """Logits of models for the rows that judge, by model and task, and what was chosen."""

    logit_R: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    loss: dict[tuple[str, str], float] = field(default_factory=dict)  # tuning log loss
    chosen: dict[str, dict[str, Any]] = field(default_factory=dict)

    def fit(self, name: str, labels: Labels, feature_NF: np.ndarray | csr_matrix) -> np.ndarray:
        """Fit the probe of a model for a task and return its logits (of time to event: log
        hazards) of all rows, [N]."""
        self.chosen.setdefault(name, {})
        if labels.kind == "time_to_event":
            cox = fit_cox(feature_NF, *labels.survival_N, labels.split_N)
            self.logit_R[name, labels.task] = cox.risk_N[labels.split_N == "held_out"]
            self.chosen[name][labels.task] = cox.penalty
            return cox.risk_N
        probe = fit_logistic(feature_NF, labels.binary_N, labels.split_N)
        self.put(name, labels, probe.logit_N)
        self.chosen[name][labels.task] = probe.penalty
        return probe.logit_N

    def put(self, name: str, labels: Labels, logit_N: np.ndarray) -> None:
        """Take the logits of a model for a binary task."""
        key, tuning_N = (name, labels.task), labels.split_N == "tuning"
        self.logit_R[key] = logit_N[labels.split_N == "held_out"]
        self.loss[key] = log_loss(logit_N[tuning_N], labels.binary_N[tuning_N])

    def scores(self, tasks: list[Labels]) -> Scores:
        """Return the logits as scores of one training seed, all tasks below each other."""
        held = [labels.take(labels.split_N == "held_out") for labels in tasks]
        names = dict.fromkeys(name for name, _ in self.logit_R)
        missing = {own.task: np.full(len(own), np.nan) for own in held}
        score_R = {
            name: [self.logit_R.get((name, own.task), missing[own.task]) for own in held]
            for name in names
        }
        outcomes = [_outcome(own) for own in held]
        return Scores(
            np.concatenate([np.full(len(own), own.task) for own in held]),
            np.concatenate([own.subject_N for own in held]),
            np.concatenate([own.time_N for own in held]),
            np.concatenate([true_R for true_R, _ in outcomes]),
            np.concatenate([duration_R for _, duration_R in outcomes]),
            {name: np.concatenate(parts)[None] for name, parts in score_R.items()},
        )


def _outcome(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Return outcomes, bool [R], and durations, float64 [R], which are nan in a binary task."""
    if labels.kind == "time_to_event":
        return labels.survival_N[1], labels.survival_N[0]
    return labels.binary_N, np.full(len(labels), np.nan)


def read_out(prefix: str, judged: Judged, encoder: PatientEncoder) -> tuple[Scores, dict]:
    """Return the scores of every read-out of an encoder, by the names `prefix/read-out`, and what
    the record says of them: penalties, tuning log losses, the read-out that `auto` chose."""
    features, probed = pooled(encoder, judged.texts), Probed()
    rows = [judged.rows(labels) for labels in judged.tasks]
    for labels, row_N in zip(judged.tasks, rows, strict=True):
        logits = {p: probed.fit(p, labels, features[p][row_N].astype(np.float64)) for p in POOLS}
        probed.put(BLEND, labels, (logits["last"] + logits["layers"]) / 2)
    chosen = chosen_pool(probed.loss)
    scores = probed.scores(judged.tasks)
    models = {**scores.models, AUTO: scores.models[chosen]}
    named = {f"{prefix}/{name}": models[name] for name in READOUTS}
    loss: dict[str, dict[str, float]] = {}
    for (name, task), value in probed.loss.items():
        loss.setdefault(name, {})[task] = value
    about = {"auto": chosen, "chosen": probed.chosen, "tuning_log_loss": loss}
    return Scores(**{**vars(scores), "models": named}), about


def chosen_pool(loss: dict[tuple[str, str], float]) -> str:
    """Return the pool with the least tuning log loss, mean over tasks; of equal ones the first."""
    return min(
        POOLS, key=lambda pool: float(np.mean([v for (name, _), v in loss.items() if name == pool]))
    )


def read_last(
    name: str, judged: Judged, encoder: PatientEncoder
) -> tuple[Scores, dict[str, Any], np.ndarray]:
    """Return the scores of the state at the last token, what the record says of its probes, and the
    embedding of every node, float32 [K, D]."""
    embedding_KD, probed = pooled(encoder, judged.texts, ["last"])["last"], Probed()
    for labels in judged.tasks:
        probed.fit(name, labels, embedding_KD[judged.rows(labels)].astype(np.float64))
    loss = {task: value for (_, task), value in probed.loss.items()}
    about = {"chosen": probed.chosen[name], "tuning_log_loss": loss}
    return probed.scores(judged.tasks), about, embedding_KD


def pooled(
    encoder: PatientEncoder, texts: list[NodeText], pools: Sequence[Pool] = POOLS
) -> dict[str, np.ndarray]:
    """Return the embeddings of every node by each pool, float32 [K, F], from one forward."""
    device = torch.device("cpu")
    taken = {pool: Taken(len(texts)) for pool in pools}
    model = Model(encoder.packed)
    embed_into([(taken, model)], len(texts), iter(texts), device, tokens=_TOKENS)
    return {pool: own.value_KF for pool, own in taken.items()}


class Taken:
    """Takes embeddings into an array, by their node."""

    def __init__(self, nodes: int) -> None:
        self._nodes = nodes
        self.value_KF = np.empty((0, 0), np.float32)

    def put(self, index_M: list[int], values_MD: np.ndarray) -> None:
        """Take the embeddings of the nodes `index_M`."""
        if not self.value_KF.size:
            self.value_KF = np.empty((self._nodes, values_MD.shape[1]), np.float32)
        self.value_KF[index_M] = values_MD


def baselines(judged: Judged) -> tuple[Scores, dict]:
    """Return the scores of the models that no training changes, and of the filter, with what the
    record says of them."""
    probed, nodes = Probed(), judged.nodes
    values = code_values(judged.dataset, nodes.subject_K, nodes.time_K)
    serializer = judged.prepared.serializer(judged.dataset)
    bag = bag_of_tokens(judged.dataset, serializer, nodes.subject_K, nodes.time_K, _YEAR)
    for labels in judged.tasks:
        train_N = labels.split_N == "train"
        count_NC = values.counts.features(labels.subject_N, labels.time_N, train_N)
        value_NF = dense(
            values.features(labels.subject_N, labels.time_N, train_N), np.arange(len(train_N))
        )
        probed.fit(COUNTS, labels, count_NC)
        probed.fit(VALUES, labels, filled(value_NF, train_N))
        at_N = labels.subject_N, labels.time_N
        probed.fit(BAG, labels, bag.features(*at_N, train_N, count_NC[:, :2]))
        if labels.kind == "binary":
            boosting = fit_boosting(value_NF, labels.binary_N, labels.split_N)
            probed.put(BOOSTING, labels, boosting.logit_N)
            probed.chosen.setdefault(BOOSTING, {})[labels.task] = boosting.num_trees
        held = labels.take(labels.split_N == "held_out")
        oracle = read_oracle(judged.data / "oracles" / labels.task / "held_out.parquet", held)
        probed.logit_R[FILTER, labels.task] = oracle["bayes_filter"]
    about = {
        "chosen": probed.chosen,
        "rows": {labels.task: labels.counts() for labels in judged.tasks},
        "positives": {labels.task: labels.positives() for labels in judged.tasks},
    }
    return probed.scores(judged.tasks), about


def filled(value_NF: np.ndarray, train_N: np.ndarray) -> np.ndarray:
    """Return features without nan, for a linear model: the mean of train in its place, and behind
    all of them whether there is a value, float64 [N, 2 F]."""
    has_NF = np.isfinite(value_NF)
    count_F = has_NF[train_N].sum(0)
    sum_F = np.where(has_NF, value_NF, 0.0)[train_N].sum(0)
    mean_F = sum_F / np.maximum(count_F, 1)
    return np.hstack([np.where(has_NF, value_NF, mean_F), has_NF.astype(np.float64)])
