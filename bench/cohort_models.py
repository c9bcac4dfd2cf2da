"""Models of `bench.cohorts`: read-outs of a run's encoder, and the baselines, each under a probe.

All read-outs of an encoder come from one forward of each decision node. A probe is fitted on train,
its penalty chosen by tuning log loss. `auto` is the one of `POOLS` with the least tuning log loss,
mean over the tasks; `last+layers` is the mean of the logits of two probes.

Legend: K nodes, N label rows of a task, R of them who judge, B nodes of a forward, T tokens, L
layers, D width, F features, S training seeds (always 1 here).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import MaxAbsScaler, StandardScaler
from torch import Tensor

from bench.cohort_data import TASKS, bag_features, bag_of_tokens, rows_of
from bench.cohort_stats import COUNTS, FILTER, Scores
from smbfast.data.labels import Labels, read_labels
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import Nodes, NodeText, distinct_nodes, node_texts
from smbfast.data.prepared import Prepared
from smbfast.model.backbone import PatientEncoder, padded
from smbfast.probing.counts import count_codes
from smbfast.probing.features import read_oracle

POOLS = ("last", "mean", "layers", "spread")
AUTO, BLEND = "auto", "last+layers"
READOUTS = (*POOLS, AUTO, BLEND)
BAG, BOOSTING = "bag", "boosting"
BASELINES = (COUNTS, BAG)
_TOKENS = 8192  # of a forward, its padding included: our choice
_PENALTIES = 10.0 ** np.arange(-6, 2.5, 0.5)


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
    def open(cls, data: Path, prepared: Prepared, window: int) -> "Judged":
        """Read the labels and make the tokens of every node, once for all runs of a cohort.

        Raises:
            ValueError: a node cannot be embedded.
        """
        dataset = MedsDataset.open(data)
        tasks = [read_labels(data / "labels" / task) for task in TASKS]
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
        """Fit the probe of a model for a task and return its logits of all rows, [N]."""
        logit_N, penalty = _fit(feature_NF, labels.binary_N, labels.split_N)
        self.put(name, labels, logit_N)
        self.chosen.setdefault(name, {})[labels.task] = penalty
        return logit_N

    def put(self, name: str, labels: Labels, logit_N: np.ndarray) -> None:
        """Take the logits of a model for a task."""
        key, tuning_N = (name, labels.task), labels.split_N == "tuning"
        self.logit_R[key] = logit_N[labels.split_N == "held_out"]
        true_N = labels.binary_N[tuning_N]
        self.loss[key] = log_loss(true_N, expit(logit_N[tuning_N]), labels=[False, True])

    def scores(self, tasks: list[Labels]) -> Scores:
        """Return the logits as scores of one training seed, all tasks below each other."""
        held = [labels.take(labels.split_N == "held_out") for labels in tasks]
        names = dict.fromkeys(name for name, _ in self.logit_R)
        return Scores(
            np.concatenate([np.full(len(own), own.task) for own in held]),
            np.concatenate([own.subject_N for own in held]),
            np.concatenate([own.time_N for own in held]),
            np.concatenate([own.binary_N for own in held]),
            {n: np.concatenate([self.logit_R[n, own.task] for own in held])[None] for n in names},
        )


def _fit(
    feature_NF: np.ndarray | csr_matrix, true_N: np.ndarray, split_N: np.ndarray
) -> tuple[np.ndarray, float]:
    train_N, tuning_N = split_N == "train", split_N == "tuning"
    scaler = StandardScaler() if isinstance(feature_NF, np.ndarray) else MaxAbsScaler()
    scaled_NF = scaler.fit(feature_NF[train_N]).transform(feature_NF)
    model = LogisticRegression(tol=1e-6, max_iter=1000, warm_start=True)
    best, least = (np.empty(0), 0.0), np.inf
    for penalty in _PENALTIES:
        model.set_params(C=penalty).fit(scaled_NF[train_N], true_N[train_N])
        logit_N = model.decision_function(scaled_NF)
        loss = log_loss(true_N[tuning_N], expit(logit_N[tuning_N]), labels=[False, True])
        if loss < least - 1e-6:
            best, least = (logit_N, float(penalty)), loss
    return best


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
    about = {"auto": chosen, "penalty": probed.chosen, "tuning_log_loss": loss}
    return Scores(**{**vars(scores), "models": named}), about


def chosen_pool(loss: dict[tuple[str, str], float]) -> str:
    """Return the pool with the least tuning log loss, mean over tasks; of equal ones the first."""
    return min(
        POOLS, key=lambda pool: float(np.mean([v for (name, _), v in loss.items() if name == pool]))
    )


@torch.inference_mode()
def pooled(encoder: PatientEncoder, texts: list[NodeText]) -> dict[str, np.ndarray]:
    """Return each of `POOLS` of every node, float32 [K, F], from one forward of transformers.

    `last` and `mean` are of the states after the final norm; `layers` puts the means of all layers
    beside each other, input embeddings included; `spread` is last, mean, max and standard deviation
    over tokens.
    """
    parts: dict[str, list[np.ndarray]] = {pool: [] for pool in POOLS}
    index: list[int] = []
    for batch in _batches(texts):
        ids_BT = padded([torch.from_numpy(text.ids_T).long() for text in batch], 0)
        length_B = torch.tensor([len(text.ids_T) for text in batch])
        # no real position sees the padding behind it
        states = encoder.decoder(
            inputs_embeds=encoder.embed(ids_BT), use_cache=False, output_hidden_states=True
        ).hidden_states
        for pool, value_BF in _pools(states, length_B).items():
            parts[pool].append(value_BF.float().numpy())
        index += [text.index for text in batch]
    order = np.argsort(index)
    return {pool: np.concatenate(own)[order] for pool, own in parts.items()}


def _batches(texts: list[NodeText]) -> Iterator[list[NodeText]]:
    """Yield nodes of like length, at most `_TOKENS` together with their padding."""
    batch: list[NodeText] = []
    for text in sorted(texts, key=lambda text: len(text.ids_T)):
        if batch and (len(batch) + 1) * len(text.ids_T) > _TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


def _pools(states: tuple[Tensor, ...], length_B: Tensor) -> dict[str, Tensor]:
    real_BT1 = (torch.arange(states[-1].shape[1]) < length_B[:, None])[..., None]
    means = [(s_BTD * real_BT1).sum(1) / length_B[:, None] for s_BTD in states]
    top_BTD, mean_BD = states[-1], means[-1]
    last_BD = top_BTD[torch.arange(len(length_B)), length_B - 1]
    square_BD = ((top_BTD - mean_BD[:, None]).square() * real_BT1).sum(1) / length_B[:, None]
    largest_BD = top_BTD.masked_fill(~real_BT1, -torch.inf).amax(1)
    spread = torch.cat([last_BD, mean_BD, largest_BD, square_BD.sqrt()], 1)
    return {"last": last_BD, "mean": mean_BD, "layers": torch.cat(means, 1), "spread": spread}


def baselines(judged: Judged) -> tuple[Scores, dict]:
    """Return the scores of code counts, of the bag of the model's own tokens and of the filter."""
    probed, nodes = Probed(), judged.nodes
    counts = count_codes(judged.dataset, nodes.subject_K, nodes.time_K)
    bag_KV = bag_of_tokens(judged.dataset, judged.prepared, nodes.subject_K, nodes.time_K)
    for labels in judged.tasks:
        train_N = labels.split_N == "train"
        count_NC = counts.features(labels.subject_N, labels.time_N, train_N)
        probed.fit(COUNTS, labels, count_NC)
        bag_NF = bag_features(bag_KV, judged.rows(labels), count_NC[:, :2], train_N)
        probed.fit(BAG, labels, bag_NF)
        held = labels.take(labels.split_N == "held_out")
        oracle = read_oracle(judged.data / "oracles" / labels.task / "held_out.parquet", held)
        probed.logit_R[FILTER, labels.task] = oracle["bayes_filter"]
    about = {
        "penalty": probed.chosen,
        "rows": {labels.task: labels.counts() for labels in judged.tasks},
        "positives": {labels.task: labels.positives() for labels in judged.tasks},
    }
    return probed.scores(judged.tasks), about
