"""Windows to steps to batches. Every draw is seeded by identity (seed, step, subject, window, cut).

The windows of a step are a pure function of (seed, step): the loader has no state but the step,
and neither workers nor micro-batches nor a restart change a mask or a cut.

Legend: W windows, T tokens, L lines, B buckets.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np

from smbfast.batch import PackedBatch, Timeline, pack_segments
from smbfast.data.packing import online_cost, plan_rows
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
    num_tokens: int  # of all windows
    num_lost: int  # tokens that single buckets longer than a window lose

    @classmethod
    def of(cls, shards: list[Shard], window: int, begin: int | None) -> "WindowSet":
        """Cut every timeline into its windows."""
        places, num_tokens, num_lost = [], 0, 0
        for s, shard in enumerate(shards):
            for t, timeline in enumerate(shard):
                for first, last in window_spans(timeline, window, begin is not None):
                    places.append((s, t, first, last))
                    cut, gone = window_of(timeline, first, last, window, begin)
                    num_tokens += len(cut)
                    num_lost += gone
        place_W4 = np.array(places, np.int64).reshape(-1, 4)
        return cls(shards, begin, window, place_W4, num_tokens, num_lost)

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
    num_labels: int
    num_masked: int
    num_tokens: int  # of trunks

    @classmethod
    def of(cls, index: int, micro: list[PackedBatch]) -> "Step":
        """Count over all micro-batches."""
        return cls(
            index,
            micro,
            num_labels=sum(b.num_labels for b in micro),
            num_masked=sum(b.num_masked for b in micro),
            num_tokens=sum(b.num_trunk_tokens for b in micro),
        )


def step_windows(num_windows: int, batch: int, seed: int, step: int) -> np.ndarray:
    """The windows of a step: an epoch is every window once, in an order drawn per epoch."""
    first = step * batch
    index = np.arange(first, first + batch)
    orders = (
        (_epoch(num_windows, seed, i // num_windows), i % num_windows) for i in index.tolist()
    )
    return np.array([order[place] for order, place in orders])


@lru_cache(maxsize=2)
def _epoch(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: drawn once, not at every step."""
    return generator(seed, "order", epoch).permutation(num_windows)


def make_step(
    windows: WindowSet,
    objective: ObjectiveSettings,
    step: int,
    *,
    batch: int,
    tokens: int,
    seed: int,
    sft: bool = True,
    jepa: bool,
    ratio: float = 0.0,
) -> Step:
    """The batches of step `step` (from 0): its windows in as few rows as `plan_rows` finds.

    Args:
        tokens: online tokens that a row holds.
        sft, jepa: which losses the step has.
        ratio: cost of a visible pair over that of a token (`smbfast.data.packing`).
    """
    chosen = [windows[i] for i in step_windows(len(windows), batch, seed, step)]
    chosen.sort(key=lambda w: (w.subject, w.first_bucket))  # identity, not arrival, breaks ties
    micro = make_rows(chosen, objective, seed, step, tokens=tokens, sft=sft, jepa=jepa, ratio=ratio)
    return Step.of(step, micro)


def make_rows(
    windows: list[Timeline],
    objective: ObjectiveSettings,
    seed: int,
    step: int,
    *,
    tokens: int,
    sft: bool = True,
    jepa: bool,
    ratio: float = 0.0,
) -> list[PackedBatch]:
    """The batches of some windows, in as few rows of `tokens` as `plan_rows` finds."""
    cuts_of = [_cuts(w, objective, seed, step, jepa=jepa) for w in windows]
    sizes = [
        _online_size(w, c, objective, sft=sft, jepa=jepa)
        for w, c in zip(windows, cuts_of, strict=True)
    ]
    used = [i for i, (n, _) in enumerate(sizes) if n]
    if not used:
        return []
    tokens_W, pairs_W = np.array([sizes[i] for i in used], np.int64).T
    rows = []
    for row in plan_rows(tokens_W, online_cost(tokens_W, pairs_W, ratio), tokens):
        mine = [used[i] for i in row.tolist()]
        group, cuts = [windows[i] for i in mine], [cuts_of[i] for i in mine]
        rows.append(_packed(group, cuts, objective, seed, step, sft=sft, jepa=jepa))
    return rows


def _online_size(
    window: Timeline, cuts: list[int], objective: ObjectiveSettings, *, sft: bool, jepa: bool
) -> tuple[int, int]:
    """Tokens and visible pairs of a trunk and its branches; none without a part in the step."""
    if not _has_part(cuts, objective, sft=sft):
        return 0, 0
    cuts = cuts if jepa else []
    trunk = len(window) if sft else cuts[-1]
    futures = [(cut, future_end(window, cut, objective) - cut) for cut in cuts]
    pairs = trunk * (trunk + 1) // 2 + sum(n * cut + n * (n + 1) // 2 for cut, n in futures)
    return trunk + sum(n for _, n in futures), pairs


def prefetched(
    make: Iterable[Callable[[], Step]], *, workers: int = 2, pin: bool = False
) -> Iterator[Step]:
    """Results of the callables `make`, in order, computed ahead by threads.

    Threads suffice: a step of 8 windows takes some milliseconds, mostly in NumPy, and the loop
    says how long it waited.

    Args:
        workers: threads, and steps that are kept ready beside those in the making.
        pin: into page-locked memory, for a GPU.
    """
    ready: deque[Future[Step]] = deque()
    ahead = iter(make)

    def made(function: Callable[[], Step]) -> Step:
        step = function()
        return replace(step, micro=[b.pinned() for b in step.micro]) if pin else step

    with ThreadPoolExecutor(workers) as pool:
        try:
            ready.extend(pool.submit(made, f) for f in islice(ahead, 2 * workers))
            while ready:
                step = ready.popleft().result()
                ready.extend(pool.submit(made, f) for f in islice(ahead, 1))
                yield step
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def make_batch(
    windows: list[Timeline],
    objective: ObjectiveSettings,
    seed: int,
    step: int,
    *,
    sft: bool = True,
    jepa: bool,
) -> PackedBatch:
    """Trunks of `windows` with their labels and, with `jepa`, one masked branch per cut.

    Without `sft` nothing is predicted on a trunk: it ends where the last branch leaves it. A
    window that has nothing to predict has no part in the batch.
    """
    cuts_of = [_cuts(w, objective, seed, step, jepa=jepa) for w in windows]
    return _packed(windows, cuts_of, objective, seed, step, sft=sft, jepa=jepa)


def _cuts(
    window: Timeline, objective: ObjectiveSettings, seed: int, step: int, *, jepa: bool
) -> list[int]:
    # labels of the future need the cut as well
    drawn = jepa or objective.sft_labels == "future"
    return cut_points(window, objective, seed, step) if drawn else []


def _packed(
    windows: list[Timeline],
    cuts_of: list[list[int]],
    objective: ObjectiveSettings,
    seed: int,
    step: int,
    *,
    sft: bool,
    jepa: bool,
) -> PackedBatch:
    trunks, branches, next_tokens, masked, whole = [], [], [], [], []
    for window, cuts in zip(windows, cuts_of, strict=True):
        if not _has_part(cuts, objective, sft=sft):
            continue
        whole.append(window.ids_T)
        trunks.append(window.ids_T if sft else window.ids_T[: cuts[-1]])
        next_tokens.append(_labels(window, objective, cuts) if sft else np.full(cuts[-1], -100))
        hung, masks = [], []
        for k, cut in enumerate(cuts if jepa else []):
            mask = masked_tokens(window, cut, objective, seed, step, k) - cut
            future = window.ids_T[cut : future_end(window, cut, objective)].copy()
            future[mask] = 0  # the identity of a masked token is not in the batch's online side
            hung.append((cut, future))
            masks.append(mask)
        branches.append(hung)
        masked.append(masks)
    return pack_segments(trunks, branches, next_tokens=next_tokens, masked=masked, windows=whole)


def _has_part(cuts: list[int], objective: ObjectiveSettings, *, sft: bool) -> bool:
    """Whether a window has anything to predict: without a cut, all its tokens or none."""
    return bool(cuts) or (sft and objective.sft_labels == "all")


def cut_points(window: Timeline, objective: ObjectiveSettings, seed: int, step: int) -> list[int]:
    """Up to `cuts` distinct bucket ends, uniform among those the settings allow, ascending."""
    ends = window.bucket_end_B[:-1].astype(np.int64)
    low, high = (share * len(window) for share in objective.context)
    ends = ends[(ends >= low) & (ends <= high) & (len(window) - ends >= objective.min_future)]
    # a future that has a line to mask
    starts = window.line_start_L[window.line_section_L != _NEVER_MASKED]
    stops = np.minimum(len(window), ends + (objective.horizon or len(window)))
    allowed = ends[np.searchsorted(starts, stops) > np.searchsorted(starts, ends)]
    if not len(allowed):
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
