"""What of the data never reaches the model, and which setting would let it.

What is lost is the largest of four shares (`Losses`), of what never reaches the model:

- *header*: tokens of demographics cut from windows, whose header is a quarter of them at most, over
  all tokens of the train split.
- *bucket*: tokens that no embedding at the end of their bucket sees, since the bucket (a moment in
  codes) is longer than a window behind its header. They are trained on, as training windows follow
  each other. Measured on `SAMPLE` records of the train split, spread evenly.
- *values*: numbers that are not finite; in codes, numbers without a bin and text values without a
  token that have no number beside them; in text, values beyond `data.values_per_line` and texts cut
  at `data.text_chars`. Over all events with a number or a text.
- *events*, in codes: events that have only the token of their family or section, over all events.

Legend: B buckets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from smbfast.base.counts import share
from smbfast.batch import Timeline
from smbfast.data.codes.vocabulary import NUMBERS_WITHOUT_BIN, TEXTS_WITHOUT_TOKEN
from smbfast.data.prepared import Prepared
from smbfast.data.shards import FIELDS
from smbfast.data.timelines import Preamble
from smbfast.data.windows import WindowSet

LOST, MOST_LOST = 0.05, 0.5  # shares above which a run warns or is refused: our choice
SAMPLE = 2000  # records
_LARGEST = 1 << 20  # tokens: no longer window is proposed


@dataclass(frozen=True)
class Losses:
    """What does not reach the model; see the beginning of the file."""

    header: float
    bucket: float
    values: float
    events: float
    window: int | None  # the window that would lose less than LOST of headers and buckets
    causes: list[tuple[int, str]]  # values lost by cause: how many; which, and what to do
    # of the tokens of all records of the sample, what an embedding at a record's end sees at most
    seen: float
    half: int | None  # the window with which that is a half, if there is one
    num_whole: int  # records of the sample that it sees whole
    num_records: int  # of the sample

    @property
    def num_values(self) -> int:
        """Values lost."""
        return sum(num for num, _ in self.causes)

    @property
    def most(self) -> float:
        """The largest of the shares."""
        return max(self.header, self.bucket, self.values, self.events)


def losses_of(prepared: Prepared, windows: WindowSet) -> Losses:
    """Measure what is lost, from the counts of preparing and a sample of the records."""
    counts, codes = prepared.counts, prepared.record["data_format"] == "codes"
    sample = _sample(windows.shards)
    length = np.array([len(timeline) for timeline in sample], np.int64)
    causes = [(counts["nonfinite_values"], "mend numeric_value, which is NaN or infinite in them")]
    if codes:
        finer = (
            "fewer than ten training subjects have the number's code or the text; take "
            "--data.format=text, which writes them, or more training subjects"
        )
        without_bin = counts[NUMBERS_WITHOUT_BIN] + counts[TEXTS_WITHOUT_TOKEN]
        causes.append((without_bin, finer))
    else:
        limit = prepared.options["text_chars"]
        none_left_out = "set --data.values_per_line=none, which leaves out none"
        causes.append((counts["values_left_out"], none_left_out))
        causes.append((counts["texts_cut"], f"raise data.text_chars above {limit}"))
    # an event may lose both its number and its text
    valued = counts["valued"] + counts["nonfinite_values"]
    header = windows.num_lost / max(prepared.record["counts"]["train"]["tokens"], 1)
    bucket = _unseen(sample, windows.window, windows.preamble)
    window = None
    if max(header, bucket) > LOST:
        window = _window_without_loss(sample, windows.window, windows.preamble)
    return Losses(
        header,
        bucket,
        min(sum(num for num, _ in causes) / valued, 1.0) if counts["valued"] else 0.0,
        prepared.share_coarse,
        window,
        sorted(causes, reverse=True),
        _seen(length, windows.window),
        next((w for w in _longer(windows.window) if _seen(length, w) >= 0.5), None),
        num_whole=int((length <= windows.window).sum()),
        num_records=len(length),
    )


def _seen(length: np.ndarray, window: int) -> float:
    """Return the share of tokens that records of these lengths have within a window."""
    return float(np.minimum(length, window).sum() / max(int(length.sum()), 1))


def _longer(window: int) -> Iterator[int]:
    """Yield the powers of two above a window."""
    longer = 1 << window.bit_length()
    while longer <= _LARGEST:
        yield longer
        longer *= 2


def _sample(shards: Sequence) -> list[Timeline]:
    """Return up to `SAMPLE` records, spread evenly over all shards: their buckets alone.

    They hold no map, as each of these has a file descriptor, and a system may allow 256.
    """
    ends = np.cumsum([0, *(len(shard) for shard in shards)])
    places = np.linspace(0, ends[-1] - 1, min(SAMPLE, int(ends[-1]))).astype(np.int64)
    shard_of = np.searchsorted(ends, places, side="right") - 1
    return [
        _buckets(shards[s][p - int(ends[s])])
        for s, p in zip(shard_of.tolist(), places.tolist(), strict=True)
    ]


def _buckets(timeline: Timeline) -> Timeline:
    """Return a copy whose ids are zeros that take no memory, and which has no lines."""
    arrays = {name: getattr(timeline, name) for name in FIELDS if name != "ids_T"}
    copies = {n: a[: 0 if n.endswith("_L") else None].copy() for n, a in arrays.items()}
    return replace(timeline, ids_T=np.broadcast_to(np.int32(0), len(timeline)), **copies)


def _unseen(sample: list[Timeline], window: int, preamble: Preamble) -> float:
    """Return the share of tokens that no embedding at the end of their bucket sees."""
    unseen = total = 0
    for timeline in sample:
        total += len(timeline)
        if not len(timeline.bucket_end_B):
            continue
        room = window - preamble.header_length(timeline, int(timeline.bucket_time_B[0]), window)
        length_B = np.diff(timeline.bucket_end_B.astype(np.int64), prepend=timeline.header)
        unseen += int(np.maximum(length_B - room, 0).sum())
    return unseen / max(total, 1)


def _cut_headers(sample: list[Timeline], window: int, preamble: Preamble) -> float:
    """Return the share of tokens that the headers of windows lose, as training counts them."""
    lost = sum(
        max(t.header + (preamble.begin is not None) - preamble.lead_length(t, t.header, window), 0)
        for t in sample
        if len(t.bucket_end_B)
    )
    return lost / max(sum(len(t) for t in sample), 1)


def _window_without_loss(sample: list[Timeline], window: int, preamble: Preamble) -> int | None:
    """Return the smallest power of two above `window` with which less than `LOST` is lost."""
    for longer in _longer(window):
        lost = (measure(sample, longer, preamble) for measure in (_unseen, _cut_headers))
        if max(lost) < LOST:
            return longer
    return None


def sentences(prepared: Prepared, windows: WindowSet, losses: Losses) -> list[tuple[float, str]]:
    """Return each share that is lost with a sentence about it, which ends with what to do."""
    longer = "raise data.window"
    if losses.window:
        longer = f"--data.window={losses.window} would lose less than {LOST:.0%}"
    finer = "" if prepared.record["data_format"] == "codes" else ", and so may a finer data.bucket"
    train, counts = prepared.record["counts"]["train"]["tokens"], prepared.counts
    num_values = counts["valued"] + counts["nonfinite_values"]
    lost_values = min(losses.num_values, num_values)
    coarse = counts["family"] + counts["section"]
    return [
        (
            losses.header,
            f"{windows.num_lost / max(train, 1):.1%} of the tokens are lost, since the "
            f"demographics of records are longer than a quarter of data.window={windows.window}: "
            f"{longer}",
        ),
        (
            losses.bucket,
            f"{losses.bucket:.1%} of the tokens are lost to embeddings, since their "
            f"{bucket_name(prepared)} is longer than data.window={windows.window}: {longer}{finer}",
        ),
        (
            losses.events,
            f"{share(coarse, counts['events'])} of the events have only the token of their family "
            "or section, because the vocabulary does not know their codes: it comes from the data "
            "that a model was first trained on, and needs ten training subjects for each code; "
            "raise data.max_codes if that is what leaves codes out, or take --data.format=text",
        ),
        (
            losses.values,
            f"{share(lost_values, num_values)} of the values are lost on the way to the model: "
            f"{losses.causes[0][1]}",
        ),
    ]


def bucket_name(prepared: Prepared) -> str:
    """Return what a bucket is: a day, an hour or a moment."""
    return str(prepared.options.get("bucket") or "moment")
