"""Cuts and masks: where a window is split into context and future, and what of it JEPA predicts.

Every draw is seeded by its identity (seed, step, subject, window, cut), never by who draws or when.

Legend: L lines, B buckets.
"""

import numpy as np

from smbfast.batch import Timeline
from smbfast.data.sections import SECTIONS
from smbfast.settings import ObjectiveSettings

_NEVER_MASKED = SECTIONS.index("demographics")
_DRAW = {"order": 0, "cut": 1, "mask": 2}


def cut_points(window: Timeline, objective: ObjectiveSettings, seed: int, step: int) -> list[int]:
    """Draw up to `objective.cuts` distinct bucket ends among the allowed ones, ascending."""
    allowed = allowed_cuts(window, objective)
    if not len(allowed):
        return []
    random = generator(seed, "cut", step, window.subject, window.start)
    return sorted(random.choice(allowed, min(objective.cuts, len(allowed)), replace=False).tolist())


def allowed_cuts(window: Timeline, objective: ObjectiveSettings) -> np.ndarray:
    """Return the bucket ends at which a window may be cut, int64, ascending."""
    ends = window.bucket_end_B[:-1].astype(np.int64)
    low, high = (share * len(window) for share in objective.context)
    ends = ends[(ends >= low) & (ends <= high) & (len(window) - ends >= objective.min_future)]
    # the future must have a line that can be masked
    starts = window.line_start_L[window.line_section_L != _NEVER_MASKED]
    stops = np.minimum(len(window), ends + (objective.horizon or len(window)))
    return ends[np.searchsorted(starts, stops) > np.searchsorted(starts, ends)]


def future_end(window: Timeline, cut: int, objective: ObjectiveSettings) -> int:
    """Return the token after the future of a cut, which ends at the window's end or horizon."""
    return min(len(window), cut + (objective.horizon or len(window)))


def masked_tokens(
    window: Timeline, cut: int, objective: ObjectiveSettings, seed: int, step: int, k: int
) -> np.ndarray:
    """Draw the masked tokens of the k-th cut, as ascending positions in the window.

    Only tokens of lines are eligible: no headers, tags or demographics. Of n eligible tokens,
    exactly max(1, round(ratio * n)) are masked. Units (tokens, spans or lines) are drawn without
    replacement until that count is reached, and the last unit is cut short.
    """
    spans = _line_spans(window, cut, future_end(window, cut, objective))
    eligible = np.concatenate(spans)
    count = max(1, round(objective.mask_ratio * len(eligible)))
    random = generator(seed, "mask", step, k, window.subject, window.start)
    if objective.mask_unit == "token":
        units = random.permutation(eligible)
        return np.sort(units[:count])
    if objective.mask_unit == "span":
        edges = np.flatnonzero(random.random(len(eligible) - 1) < 1 / objective.span) + 1
        spans = np.split(eligible, edges)
    order = random.permutation(len(spans))
    return np.sort(np.concatenate([spans[i] for i in order])[:count])


def generator(seed: int, kind: str, *identity: int) -> np.random.Generator:
    """Return a generator that depends only on what is drawn, not on which process draws or when."""
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
