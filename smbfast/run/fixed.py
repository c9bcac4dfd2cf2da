"""What every evaluation of a run looks at: the same windows, bucket ends and decision nodes.

They are chosen and packed once, so that evaluations can be compared and each costs forwards alone.
Nothing of them is of the split held_out.

Legend: N label rows, K nodes, E bucket ends, W windows, D width.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from smbfast.batch import PackedBatch, Timeline, pack_segments
from smbfast.data.draws import FIXED
from smbfast.data.labels import Labels
from smbfast.data.loader import make_batch, make_micro_batches
from smbfast.data.masking import needs_cuts
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import Nodes, node_texts, shared_windows, sorted_nodes, split_index
from smbfast.data.packing import plan_micro_batches
from smbfast.data.source_index import FOLDER
from smbfast.data.splits import SPLITS
from smbfast.probing.pooling import Packed, Row, pooled
from smbfast.run.open_run import OpenRun
from smbfast.settings import Pool

SLICE = 1024  # tokens of the windows whose gradients are compared: our choice
PENALTY = 1e-2  # C of the online probe: our choice, as a choice on tuning would need more nodes
_TUNING = SPLITS.index("tuning") + 1  # in `SPLIT_NAMES`


@dataclass(frozen=True)
class Ends:
    """Whole windows, packed, and the last token of each of their buckets."""

    batch: PackedBatch
    row_E: Tensor  # int64: rows of the pack

    @classmethod
    def of(cls, windows: Sequence[Timeline], tokens: int) -> list["Ends"]:
        """Pack windows into as few forwards of at most `tokens` tokens as they need."""
        size_W = np.array([len(window) for window in windows])
        packs = []
        for places in plan_micro_batches(size_W, size_W, tokens):
            group = [windows[i] for i in places.tolist()]
            start_W = np.cumsum([0, *(len(window) for window in group[:-1])])
            pairs = zip(start_W, group, strict=True)
            row_E = np.concatenate(
                [start + w.bucket_end_B.astype(np.int64) - 1 for start, w in pairs]
            )
            batch = pack_segments([w.ids_T for w in group], [[] for _ in group])
            packs.append(cls(batch, torch.from_numpy(row_E)))
        return packs

    def states(self, packed: Packed, device: torch.device) -> Tensor:
        """Return the states of an encoder there, [E, D]."""
        batch = self.batch.to(device)
        return packed(batch.ids_T, batch.position_T, batch.segments, rows=self.row_E.to(device))


@dataclass(frozen=True)
class ProbeNodes:
    """Decision nodes of train and of tuning with the labels of one task, packed."""

    task: str
    rows: list[Row]
    true_K: np.ndarray  # bool, in the order of `rows`
    tuning_K: np.ndarray  # bool; the others are of train

    @torch.inference_mode()
    def embedded(self, packed: Packed, pool: Pool, device: torch.device) -> np.ndarray:
        """Return the embeddings of all nodes, fp64 [K, D], as the run's probes read them."""
        return np.concatenate([pooled(packed, row, pool, device) for row in self.rows])

    def auroc(self, embedding_KD: np.ndarray) -> float | None:
        """Return the AUROC on tuning of a logistic probe that is fitted on train.

        Features are standardized on train, and the penalty is fixed. It is None where a split has
        one class only, or an embedding is not finite.
        """
        train_K = ~self.tuning_K
        classes = [len(np.unique(self.true_K[own_K])) for own_K in (train_K, self.tuning_K)]
        if min(classes) < 2 or not np.isfinite(embedding_KD).all():
            return None
        mean_D, sd_D = embedding_KD[train_K].mean(0), embedding_KD[train_K].std(0)
        scaled_KD = (embedding_KD - mean_D) / np.where(sd_D > 0, sd_D, 1.0)
        model = LogisticRegression(C=PENALTY)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a sign of health, not a result
            model.fit(scaled_KD[train_K], self.true_K[train_K])
        score_K = model.decision_function(scaled_KD[self.tuning_K])
        return float(roc_auc_score(self.true_K[self.tuning_K], score_K))


@dataclass(frozen=True)
class Fixed:
    """What every evaluation of a run looks at.

    The key True is for phases with a target encoder, the key False for those without.
    """

    batches: dict[bool, list[PackedBatch]]  # for the losses
    gradients: dict[bool, PackedBatch | None]  # for the gradients of each loss; None: no windows
    ends: list[Ends]  # empty where all of them would read the same tokens
    nodes: ProbeNodes | None  # None: `eval.nodes` is 0, or there is no yes-or-no task
    horizons: tuple[str, ...]  # names of those that the run predicts within

    @classmethod
    def of(cls, run: OpenRun) -> "Fixed":
        """Choose and pack them."""
        windows = {jepa: _windows(run, jepa=jepa) for jepa in (False, True)}
        return cls(
            {jepa: _batches(run, own, jepa=jepa) for jepa, own in windows.items()},
            {jepa: _slice(run, own, jepa=jepa) for jepa, own in windows.items()},
            Ends.of(windows[False], run.micro_tokens) if _differ(windows[False]) else [],
            probe_nodes(run),
            run.tuning.horizons.names if run.tuning.horizons else (),
        )


def _windows(run: OpenRun, *, jepa: bool) -> list[Timeline]:
    """Return the tuning windows that evaluations look at, spread evenly over the subjects.

    Where cuts or pairs of positions and horizons are needed, they are some that have them, as in
    training; if no tuning window has one, JEPA is not evaluated.
    """
    settings, tuning = run.settings, run.tuning
    usable: Sequence[int] | np.ndarray = range(len(tuning))
    if needs_cuts(settings.objective, jepa=jepa) and tuning.num_with_cut:
        usable = np.flatnonzero(tuning.has_cut_W)
    elif tuning.num_with_pair:
        usable = np.flatnonzero(tuning.has_pair_W)
    count = min(settings.eval.windows, len(usable))
    places = np.linspace(0, len(usable) - 1, count).astype(np.int64)
    return [tuning[usable[i]] for i in places.tolist()]


def _differ(windows: list[Timeline]) -> bool:
    """Whether two bucket ends of the windows read different tokens; if not, states are equal."""
    texts = {window.ids_T.tobytes() for window in windows}
    return len(texts) > 1 or any(len(window.bucket_end_B) > 1 for window in windows)


def _wanted(run: OpenRun, *, jepa: bool) -> dict[str, Any]:
    """Return what the loader makes of a window, as `smbfast.data.loader.Wanted` has it."""
    codes, horizons = run.encoder.codes is not None, run.tuning.horizons
    return {"jepa": jepa, "codes": codes, "horizons": horizons}


def _batches(run: OpenRun, windows: list[Timeline], *, jepa: bool) -> list[PackedBatch]:
    return make_micro_batches(
        windows,
        run.settings.objective,
        run.settings.run.seed,
        FIXED,
        tokens=run.micro_tokens,
        ratio=run.shape.attention_ratio,
        **_wanted(run, jepa=jepa),
    )


def _slice(run: OpenRun, windows: list[Timeline], *, jepa: bool) -> PackedBatch | None:
    """Return the first windows in one micro-batch, at least one and up to `SLICE` tokens."""
    size_W = np.cumsum([len(window) for window in windows])
    chosen = windows[: max(int(np.searchsorted(size_W, SLICE, side="right")), 1)]
    if not chosen:
        return None
    objective, seed = run.settings.objective, run.settings.run.seed
    return make_batch(chosen, objective, seed, FIXED, **_wanted(run, jepa=jepa))


def probe_nodes(run: OpenRun) -> ProbeNodes | None:
    """Choose the nodes of the first yes-or-no task, and pack what they are embedded from."""
    binary = [labels for _, labels in run.tasks if labels.kind == "binary"]
    count = run.settings.eval.nodes
    if not (binary and count):
        return None
    labels, prepared = binary[0], run.prepared
    index = prepared.folder / FOLDER
    dataset = MedsDataset.open(run.data.folder, index=index, split=run.data.split)
    chosen_N = np.concatenate(
        [_chosen(labels, dataset, split, count) for split in ("train", "tuning")]
    )
    nodes = sorted_nodes(
        labels.subject_N[chosen_N],
        labels.time_N[chosen_N],
        split_index(labels.split_N[chosen_N]),
    )
    texts = node_texts(dataset, prepared.serializer(dataset), nodes, run.data.window, {})
    windows = list(shared_windows(texts, run.settings.probe.tokens))
    size_W = np.array([len(window) for window in windows])
    tokens = min(run.micro_tokens, run.settings.probe.tokens)
    plan = plan_micro_batches(size_W, size_W, tokens) if windows else []
    rows = [Row.of([windows[w] for w in places.tolist()]) for places in plan]
    index_K = np.array([node.index for row in rows for node in row.nodes], np.int64)
    return ProbeNodes(
        labels.task,
        rows,
        _values(labels, chosen_N, nodes)[index_K],
        nodes.split_K[index_K] == _TUNING,
    )


def _chosen(labels: Labels, dataset: MedsDataset, split: str, count: int) -> np.ndarray:
    """Return up to `count` label rows of a split, int64: up to half positive, spread evenly."""
    known_N = (labels.split_N == split) & np.isin(labels.subject_N, dataset.subjects(split))
    order = np.lexsort((labels.time_N, labels.subject_N))
    order = order[known_N[order]]
    positive, negative = order[labels.binary_N[order]], order[~labels.binary_N[order]]
    least = max(count // 2, count - len(negative))
    positive = _spread(positive, min(least, len(positive)))
    return np.concatenate([positive, _spread(negative, min(count - len(positive), len(negative)))])


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _values(labels: Labels, chosen_N: np.ndarray, nodes: Nodes) -> np.ndarray:
    """Return the label of each node, bool [K]; of two of one node, any that is true."""
    key_of = {key: k for k, key in enumerate(_keys(nodes.subject_K, nodes.time_K))}
    true_K = np.zeros(len(nodes.subject_K), bool)
    keys = _keys(labels.subject_N[chosen_N], labels.time_N[chosen_N])
    for key, value in zip(keys, labels.binary_N[chosen_N].tolist(), strict=True):
        true_K[key_of[key]] |= value
    return true_K


def _keys(subject: np.ndarray, time: np.ndarray) -> Iterator[tuple[int, int]]:
    return zip(subject.tolist(), time.tolist(), strict=True)
