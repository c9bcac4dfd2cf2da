"""Shows one simulated patient as the model sees it, for the report; never a real patient.

In the text formats a line is a line of text. In the format codes it is an event, or the tokens of
gap and age before it.
"""

import itertools

import numpy as np

from smbfast.batch import Timeline
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.loader import FIXED
from smbfast.data.masking import cut_points, masked_tokens, replaced_tokens
from smbfast.data.prepared import Prepared
from smbfast.settings import TrainSettings

HIDDEN = "▒"


def sample_of(prepared: Prepared, settings: TrainSettings) -> dict:
    """Return a tuning window with a cut: its lines, what is masked, context and future."""
    objective, seed = settings.objective, settings.run.seed
    windows = prepared.windows("tuning", settings.data.window, objective)
    if not windows.num_with_cut:
        return {"lines": [], "note": "no tuning window is long enough for a cut"}
    window = windows[int(windows.with_cut_C.min())]
    cut = cut_points(window, objective, seed, FIXED)[0]
    masked = np.zeros(len(window), bool)
    masked_M = masked_tokens(window, cut, objective, seed, FIXED, 0)
    masked[masked_M] = True
    hidden = np.zeros(len(window), bool)
    hidden[replaced_tokens(window, cut, objective, masked_M)] = True
    codes = isinstance(prepared.encoding, CodeVocabulary)
    days = np.searchsorted(window.bucket_end_B, np.arange(len(window)), side="right")
    lines = []
    for start, end in _spans(window):
        ids = window.ids_T[start:end]
        names = _names(prepared, ids)
        hide = hidden[start:end]
        text = (_as_codes if codes else _as_text)(names, hide)
        in_line = bool(np.isin(start, window.line_start_L))
        kind = "line" if in_line else "header" if codes or text.startswith(("[", "+")) else "tag"
        kind = "demographics" if start < window.header else kind
        day = window.bucket_time_B[min(days[start], len(window.bucket_time_B) - 1)]
        lines.append(
            {
                "text": text,
                "kind": kind,
                "time": str(np.datetime64(int(day), "us").astype("datetime64[D]")),
                "masked": bool(masked[start:end].any()),
                "truth": "  ".join(names) if codes and hide.any() else "",
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
        "note": _note(settings, codes=codes),
    }


def _note(settings: TrainSettings, *, codes: bool) -> str:
    objective = settings.objective
    text = f"Masked tokens are shown as {HIDDEN * 3}; unit: {objective.mask_unit}."
    if codes:
        text += (
            " A line is an event, one token; a line in bold is the time since the moment before, "
            "and the age after a birthday. What a hidden token stands for is beside it in pale."
        )
    if objective.skeleton == "hidden":
        text += " The skeleton of the future is hidden as well, and is not to be predicted."
    return text


def _names(prepared: Prepared, ids: np.ndarray) -> list[str]:
    """Return tokens as text: names of the vocabulary of codes, or what the tokenizer decodes."""
    encoding = prepared.encoding
    if isinstance(encoding, CodeVocabulary):
        return [encoding.tokens[i - encoding.first_id].name for i in ids.tolist()]
    return [str(prepared.tokenizer.decode([i])) for i in ids.tolist()]


def _as_codes(names: list[str], hide: np.ndarray) -> str:
    pairs = zip(names, hide, strict=True)
    return "  ".join(HIDDEN * 3 if hidden else name for name, hidden in pairs)


def _as_text(words: list[str], hide: np.ndarray) -> str:
    shown = [
        HIDDEN * max(len(word.strip()), 1) + " " * word.endswith(" ") if hidden else word
        for word, hidden in zip(words, hide, strict=True)
    ]
    return "".join(shown).replace("\n", " ").strip()


def _spans(window: Timeline) -> list[tuple[int, int]]:
    """Return lines, and the stretches of header and tags between them, as (start, end) tokens."""
    edges = {0, len(window), window.header, *window.bucket_end_B.tolist()}
    edges |= set(window.line_start_L.tolist()) | set(window.line_end_L.tolist())
    ordered = sorted(edges)
    return list(itertools.pairwise(ordered))
