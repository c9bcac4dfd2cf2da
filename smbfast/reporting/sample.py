"""Shows one simulated patient as the model sees it, for the report; never a real patient."""

import itertools

import numpy as np

from smbfast.batch import Timeline
from smbfast.data.loader import FIXED
from smbfast.data.masking import cut_points, masked_tokens
from smbfast.data.prepared import Prepared
from smbfast.data.windows import WindowSet
from smbfast.settings import TrainSettings

HIDDEN = "▒"


def sample_of(prepared: Prepared, settings: TrainSettings) -> dict:
    """Return a tuning window with a cut: its lines, what is masked, context and future."""
    objective, seed = settings.objective, settings.run.seed
    windows = WindowSet.of(
        prepared.shards("tuning"), settings.data.window, prepared.preamble, objective
    )
    if not windows.num_with_cut:
        return {"lines": [], "note": "no tuning window is long enough for a cut"}
    window = windows[int(windows.with_cut_C.min())]
    cut = cut_points(window, objective, seed, FIXED)[0]
    masked = np.zeros(len(window), bool)
    masked[masked_tokens(window, cut, objective, seed, FIXED, 0)] = True
    days = np.searchsorted(window.bucket_end_B, np.arange(len(window)), side="right")
    lines = []
    for start, end in _spans(window):
        ids = window.ids_T[start:end]
        words = [
            HIDDEN * max(len(t.strip()), 1) + " " * t.endswith(" ") if hide else t
            for t, hide in zip(_texts(prepared, ids), masked[start:end], strict=True)
        ]
        text = "".join(words).replace("\n", "").strip()
        in_line = bool(np.isin(start, window.line_start_L))
        kind = "line" if in_line else "header" if text.startswith("[") else "tag"
        kind = "demographics" if start < window.header else kind
        day = window.bucket_time_B[min(days[start], len(window.bucket_time_B) - 1)]
        lines.append(
            {
                "text": text,
                "kind": kind,
                "time": str(np.datetime64(int(day), "us").astype("datetime64[D]")),
                "masked": bool(masked[start:end].any()),
                "part": "context" if start < cut else "future",
            }
        )
    return {
        "subject_id": window.subject,
        "lines": lines,
        "cut_token": cut,
        "tokens": len(window),
        "window": settings.data.window,
        "mask_ratio": objective.mask_ratio,
        "note": f"Masked tokens are shown as {HIDDEN * 3}; unit: {objective.mask_unit}.",
    }


def _texts(prepared: Prepared, ids: np.ndarray) -> list[str]:
    return [str(prepared.tokenizer.decode([int(i)])) for i in ids]


def _spans(window: Timeline) -> list[tuple[int, int]]:
    """Return lines, and the stretches of header and tags between them, as (start, end) tokens."""
    edges = {0, len(window), window.header, *window.bucket_end_B.tolist()}
    edges |= set(window.line_start_L.tolist()) | set(window.line_end_L.tolist())
    ordered = sorted(edges)
    return list(itertools.pairwise(ordered))
