"""Windows to steps to batches. Every draw is seeded by identity (seed, step, subject, window, cut).

The windows of a step are a pure function of (seed, step): the loader has no state but the step,
and neither workers nor micro-batches nor a restart change a mask or a cut.

Legend: W windows, T tokens, L lines, B buckets.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from smbfast.batch import PackedBatch, Timeline
from smbfast.data.sections import SECTIONS
from smbfast.data.shards import Shard
from smbfast.data.timelines import window_of, window_spans
from smbfast.settings import ObjectiveSettings

_NEVER_MASKED = SECTIONS.index("demographics")
_DRAW = {"order": 0, "cut": 1, "mask": 2}
FIXED = -1  # the step that draws of fixed positions (tuning, a sample) are seeded by


@dataclass(frozen=True)
class WindowSet:
    """All windows of all timelines of some shards, every one once."""

    shards: list[Shard]
    begin: int | None
    window: int
    place_W4: np.ndarray  # int64: shard, timeline, first and last bucket
    tokens: int  # of all windows
    lost: int  # tokens that single buckets longer than a window lose

    @classmethod
    def of(cls, shards: list[Shard], window: int, begin: int | None) -> "WindowSet":
        """Cut every timeline into its windows."""
        places, tokens, lost = [], 0, 0
        for s, shard in enumerate(shards):
            for t, timeline in enumerate(shard):
                for first, last in window_spans(timeline, window, begin is not None):
                    places.append((s, t, first, last))
                    cut, gone = window_of(timeline, first, last, window, begin)
                    tokens += len(cut)
                    lost += gone
        place_W4 = np.array(places, np.int64).reshape(-1, 4)
        return cls(shards, begin, window, place_W4, tokens, lost)

    def __len__(self) -> int:
        return len(self.place_W4)

    def __getitem__(self, index: int) -> Timeline:
        shard, timeline, first, last = self.place_W4[index].tolist()
        return window_of(self.shards[shard][timeline], first, last, self.window, self.begin)[0]


@dataclass(frozen=True)
class Step:
    """The micro-batches of one optimizer step, with the counts its means divide by."""

    index: int
    micro: list[PackedBatch]
    labels: int
    masked: int
    tokens: int  # trunk tokens

    @classmethod
    def of(cls, index: int, micro: list[PackedBatch]) -> "Step":
        """Count over all micro-batches."""
        return cls(
            index,
            micro,
            sum(b.labels for b in micro),
            sum(b.masked for b in micro),
            sum(b.trunk_tokens for b in micro),
        )


def step_windows(n_windows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The windows of a step: an epoch is every window once, in an order drawn per epoch."""
    first = step * batch
    index = np.arange(first, first + batch)
    orders = ((_epoch(n_windows, seed, i // n_windows), i % n_windows) for i in index.tolist())
    return np.array([order[place] for order, place in orders])


@lru_cache(maxsize=2)
def _epoch(n_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: drawn once, not at every step."""
    return generator(seed, "order", epoch).permutation(n_windows)


def make_step(
    windows: WindowSet,
    objective: ObjectiveSettings,
    step: int,
    *,
    batch: int,
    micro_batch: int,
    seed: int,
    jepa: bool,
) -> Step:
    """The batches of step `step` (from 0)."""
    chosen = [windows[i] for i in step_windows(len(windows), batch, seed, step)]
    chosen.sort(key=len, reverse=True)  # neighbours of like length pad least; order is not a draw
    groups = [chosen[i : i + micro_batch] for i in range(0, len(chosen), micro_batch)]
    return Step.of(step, [make_batch(g, objective, seed, step, jepa=jepa) for g in groups])


def prefetched(make: "list", depth: int = 2) -> Iterator[Step]:
    """Results of the callables `make`, computed one or two ahead by a thread."""
    with ThreadPoolExecutor(1) as pool:
        pending = [pool.submit(f) for f in make[:depth]]
        for i in range(len(make)):
            ready = pending.pop(0)
            if i + depth < len(make):
                pending.append(pool.submit(make[i + depth]))
            yield ready.result()


def make_batch(
    windows: list[Timeline],
    objective: ObjectiveSettings,
    seed: int,
    step: int,
    *,
    jepa: bool,
) -> PackedBatch:
    """Trunks of `windows` and, with `jepa`, one masked branch per cut."""
    trunks, branches, labels, masked, target, prefixes, starts = [], [], [], [], [], [], []
    offset = 0
    drawn = jepa or objective.sft_labels == "future"  # labels of the future need the cut as well
    cuts_of = [cut_points(w, objective, seed, step) if drawn else [] for w in windows]
    for window, cuts in zip(windows, cuts_of, strict=True):
        trunks.append(window.ids_T.astype(np.int64))
        labels.append(_labels(window, objective, cuts))
        starts.append(offset)
        offset += len(window)
    trunk_tokens = offset
    for window, cuts, start in zip(windows, cuts_of, starts, strict=True):
        for k, cut in enumerate(cuts if jepa else []):
            end = future_end(window, cut, objective)
            mask = masked_tokens(window, cut, objective, seed, step, k)
            future = window.ids_T[cut:end].astype(np.int64)
            future[mask - cut] = 0
            branches.append(future)
            masked.append(mask - cut + offset)
            target.append(mask + start)
            prefixes.append((cut, start))
            offset += len(future)
    n_trunks, rows = len(trunks), [*trunks, *branches]
    length_S = np.array([len(r) for r in rows], np.int64)
    prefix_S = np.array([0] * n_trunks + [p for p, _ in prefixes], np.int64)
    position_T = np.concatenate(
        [np.arange(len(r)) + p for r, p in zip(rows, prefix_S, strict=True)]
    )
    labels.append(np.full(offset - trunk_tokens, -100, np.int64))
    arrays = {
        "ids_T": np.concatenate(rows),
        "position_T": position_T,
        "labels_T": np.concatenate(labels),
        "start_S": np.cumsum(length_S) - length_S,
        "length_S": length_S,
        "trunk_start_S": np.array([*starts, *(s for _, s in prefixes)], np.int64),
        "prefix_S": prefix_S,
        "masked_M": np.concatenate([*masked, np.empty(0, np.int64)]),
        "target_M": np.concatenate([*target, np.empty(0, np.int64)]),
    }
    tensors = {k: torch.from_numpy(v.astype(np.int64)) for k, v in arrays.items()}
    return PackedBatch(**tensors, trunk_tokens=trunk_tokens)


def cut_points(window: Timeline, objective: ObjectiveSettings, seed: int, step: int) -> list[int]:
    """Up to `cuts` distinct bucket ends, uniform among those the settings allow, ascending."""
    ends = window.bucket_end_B[:-1].astype(np.int64)
    low, high = (share * len(window) for share in objective.context)
    ends = ends[(ends >= low) & (ends <= high) & (len(window) - ends >= objective.min_future)]
    allowed = [c for c in ends.tolist() if _line_spans(window, c, future_end(window, c, objective))]
    if not allowed:
        return []
    random = generator(seed, "cut", step, window.subject, window.first_bucket)
    return sorted(random.choice(allowed, min(objective.cuts, len(allowed)), replace=False).tolist())


def future_end(window: Timeline, cut: int, objective: ObjectiveSettings) -> int:
    """Where the future of a cut ends: at the window's end or the horizon."""
    return min(len(window), cut + (objective.horizon or len(window)))


def masked_tokens(
    window: Timeline, cut: int, objective: ObjectiveSettings, seed: int, step: int, k: int
) -> np.ndarray:
    """The masked positions of the k-th cut, ascending: lines only, no header, tag, demographics.

    Exactly max(1, round(ratio * n)) of the n eligible positions. Units are drawn without
    replacement until the count is reached; the last unit is cut short, so that the count holds for
    lines and spans as well.
    """
    spans = _line_spans(window, cut, future_end(window, cut, objective))
    eligible = np.concatenate(spans)
    count = max(1, round(objective.mask_ratio * len(eligible)))
    random = generator(seed, "mask", step, k, window.subject, window.first_bucket)
    if objective.mask_unit == "token":
        units = random.permutation(eligible)
        return np.sort(units[:count])
    if objective.mask_unit == "span":
        edges = np.flatnonzero(random.random(len(eligible) - 1) < 1 / objective.span) + 1
        spans = np.split(eligible, edges)
    order = random.permutation(len(spans))
    return np.sort(np.concatenate([spans[i] for i in order])[:count])


def generator(seed: int, kind: str, *identity: int) -> np.random.Generator:
    """Random numbers that depend on what is drawn, never on who draws or when."""
    words = [int(i) & 0xFFFFFFFFFFFFFFFF for i in (seed, _DRAW[kind], *identity)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def _line_spans(window: Timeline, cut: int, end: int) -> list[np.ndarray]:
    keep = (window.line_start_L >= cut) & (window.line_start_L < end)
    keep &= window.line_section_L != _NEVER_MASKED
    return [
        np.arange(a, min(b, end))
        for a, b in zip(
            window.line_start_L[keep].tolist(), window.line_end_L[keep].tolist(), strict=True
        )
    ]


def _labels(window: Timeline, objective: ObjectiveSettings, cuts: list[int]) -> np.ndarray:
    labels = np.full(len(window), -100, np.int64)
    labels[:-1] = window.ids_T[1:]
    if window.first_bucket > 0:  # demographics repeated in a later window were predicted before
        labels[: max(window.header - 1, 0)] = -100
    if objective.sft_labels == "future":
        labels[: cuts[0] - 1 if cuts else None] = -100
    return labels
