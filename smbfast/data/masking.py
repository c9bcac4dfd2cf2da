"""Cuts and masks: where a window is split into context and future, and what of it JEPA predicts.

Every draw is seeded by its identity (seed, step, subject, window, cut), never by who draws or when.

Legend: L lines, B buckets, W windows, C allowed cuts, E events of a future, M masked tokens, R
tokens whose place the mask vector takes, S timelines.
"""

import math

import numpy as np

from smbfast.batch import Timeline
from smbfast.data.draws import below, generator
from smbfast.data.sections import SECTIONS
from smbfast.data.shards import Block
from smbfast.settings import ObjectiveSettings

_NEVER_MASKED = SECTIONS.index("demographics")


def needs_cuts(objective: ObjectiveSettings, *, jepa: bool) -> bool:
    """Whether a step trains on windows with a cut alone: mask JEPA, and SFT on the future."""
    return (jepa and objective.jepa == "mask") or objective.sft_labels == "future"


def allowed_cuts(window: Timeline, objective: ObjectiveSettings) -> np.ndarray:
    """Return the tokens at which a window may be cut, ascending, int64 [C].

    These are bucket ends with a permitted share of context and enough future, before the window's
    end, whose future has a line that can be masked.
    """
    ends_B, num_tokens = window.bucket_end_B[:-1], len(window)
    low, high = (share * num_tokens for share in objective.context)
    first = ends_B.searchsorted(math.ceil(low))
    last = ends_B.searchsorted(min(math.floor(high), num_tokens - objective.min_future), "right")
    ends_B = ends_B[first:last].astype(np.int64)
    if not len(ends_B):
        return ends_B
    start_L = window.line_start_L[window.line_section_L != _NEVER_MASKED]
    stop_B = np.minimum(num_tokens, ends_B + (objective.horizon or num_tokens))
    return ends_B[start_L.searchsorted(stop_B) > start_L.searchsorted(ends_B)]


def have_cut(
    block: Block,
    owner_W: np.ndarray,
    start_W: np.ndarray,
    end_W: np.ndarray,
    lead_W: np.ndarray,
    objective: ObjectiveSettings,
) -> np.ndarray:
    """Return whether `allowed_cuts` has any for each window, without making one: bool [W].

    All timelines lie behind each other, so that a few searches answer for all windows.

    Args:
        owner_W: which of the timelines of the block a window is of.
        start_W, end_W: its tokens in the timeline.
        lead_W: the number of tokens that it has before these.
    """
    offset_S, (_, num_buckets_S, num_lines_S) = block.start_S3[:, 0], block.num_S3.T
    end_B = block.columns["bucket_end_B"] + np.repeat(offset_S, num_buckets_S)
    start_L = block.columns["line_start_L"] + np.repeat(offset_S, num_lines_S)
    start_L = start_L[block.columns["line_section_L"] != _NEVER_MASKED]
    length_W = lead_W + end_W - start_W
    shift_W = offset_S[owner_W] + start_W - lead_W  # from a token of the window to one of all
    low_W, high_W = (share * length_W for share in objective.context)
    low_W = np.maximum(np.ceil(low_W).astype(np.int64), lead_W + 1)
    high_W = np.minimum(np.floor(high_W).astype(np.int64), length_W - max(objective.min_future, 1))
    first_W = end_B.searchsorted(low_W + shift_W)
    last_W = end_B.searchsorted(high_W + shift_W, side="right")
    # the first line that can be masked behind each bucket: ascending, as bucket ends are
    next_B = np.append(start_L, np.iinfo(np.int64).max)[start_L.searchsorted(end_B)]
    last_W = np.minimum(last_W, next_B.searchsorted(length_W + shift_W))
    if objective.horizon is None:
        return last_W > first_W
    num_near = np.concatenate([[0], np.cumsum(next_B - end_B < objective.horizon)])
    return num_near[np.maximum(last_W, first_W)] > num_near[first_W]


def cut_points(window: Timeline, objective: ObjectiveSettings, seed: int, step: int) -> list[int]:
    """Draw up to `objective.cuts` distinct cuts among the allowed ones, ascending."""
    allowed_C = allowed_cuts(window, objective)
    if not len(allowed_C):
        return []
    identity = (seed, "cut", step, window.subject, window.start)
    if objective.cuts == 1:
        return [int(allowed_C[below(len(allowed_C), *identity)])]
    return sorted(generator(*identity).permutation(allowed_C)[: objective.cuts].tolist())


def future_end(window: Timeline, cut: int, objective: ObjectiveSettings) -> int:
    """Return the token after the future of a cut, which ends at the window's end or horizon."""
    return min(len(window), cut + (objective.horizon or len(window)))


def masked_tokens(
    window: Timeline, cut: int, objective: ObjectiveSettings, seed: int, step: int, k: int
) -> np.ndarray:
    """Draw the masked tokens of the k-th cut, as ascending positions in the window: int64 [M].

    Only tokens of lines are eligible: no headers, tags or demographics. Of n eligible tokens,
    exactly max(1, round(ratio * n)) are masked. Units (tokens, spans or lines) are drawn without
    replacement until that count is reached, and the last unit is cut short.
    """
    start_E, length_E = _events(window, cut, future_end(window, cut, objective))
    eligible = _tokens(start_E, length_E)
    count = _share(objective, len(eligible))
    if count == len(eligible):
        return eligible
    random = generator(seed, "mask", step, k, window.subject, window.start)
    if objective.mask_unit == "token":
        random.shuffle(eligible)
        return np.sort(eligible[:count])
    first, length = np.cumsum(length_E) - length_E, length_E  # of each line among the eligible
    if objective.mask_unit == "span":
        edges = np.flatnonzero(random.random(len(eligible) - 1) < 1 / objective.span) + 1
        first = np.concatenate([[0], edges])
        length = np.diff(first, append=len(eligible))
    order = random.permutation(len(first))
    return np.sort(eligible[_tokens(first[order], length[order])[:count]])


def num_masked(window: Timeline, cut: int, objective: ObjectiveSettings) -> int:
    """Return how many tokens `masked_tokens` draws."""
    return _share(objective, int(_events(window, cut, future_end(window, cut, objective))[1].sum()))


def _share(objective: ObjectiveSettings, num_eligible: int) -> int:
    return max(1, round(objective.mask_ratio * num_eligible))


def replaced_tokens(
    window: Timeline, cut: int, objective: ObjectiveSettings, masked_M: np.ndarray
) -> np.ndarray:
    """Return the tokens of a future that the mask vector replaces, ascending: int64 [R].

    These are the masked ones and, with `objective.skeleton=hidden`, all that are not eligible, so
    that only the eligible tokens which are not masked are read.
    """
    if objective.skeleton == "visible":
        return masked_M
    end = future_end(window, cut, objective)
    replaced = np.ones(end - cut, bool)
    replaced[_tokens(*_events(window, cut, end)) - cut] = False
    replaced[masked_M - cut] = True
    return np.flatnonzero(replaced) + cut


def _events(window: Timeline, cut: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first token and number of tokens of each line that can be masked, int64 [E]."""
    a, b = window.line_start_L.searchsorted((cut, end)).tolist()
    keep_L = window.line_section_L[a:b] != _NEVER_MASKED
    start_E = window.line_start_L[a:b][keep_L].astype(np.int64)
    return start_E, np.minimum(window.line_end_L[a:b][keep_L], end) - start_E


def _tokens(start_E: np.ndarray, length_E: np.ndarray) -> np.ndarray:
    """Return the ranges from `start_E` on, one behind the other."""
    stop_E = length_E.cumsum()
    if stop_E[-1] == len(start_E):  # one token each
        return start_E
    return np.arange(stop_E[-1]) + np.repeat(start_E - (stop_E - length_E), length_E)
