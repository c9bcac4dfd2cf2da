"""Turns events into tagged text and token ids, a batch of subjects at a time.

The text of a subject begins with `<demographics>` (static events and birth). Then each bucket has a
`[date]` header and its sections in a fixed order, with one line per code: `description: v1, v2`. A
code without a value shows how often it occurred (` x3`). The format follows the public tools of the
paper's authors; `%.4g` instead of `%.2f` and the count are our choice.

The token ids are those of the whole text: a line is cut into pieces only where the tokenizer
provably does not merge across the cut (`TextEncoder.piecewise`).

Legend: N events, C codes.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smbfast.base.files import digest_of
from smbfast.batch import Timeline
from smbfast.data.clean import clean, line_head, without_tags
from smbfast.data.layout import SPAN, Layout
from smbfast.data.meds import BIRTH, EventBatch
from smbfast.data.sections import SectionMap
from smbfast.data.timelines import Preamble
from smbfast.data.tokens import TextEncoder

Bucket = Literal["day", "hour", "moment"]
VERSION = 1  # of the text format: part of every fingerprint


@dataclass(frozen=True)
class SerializerOptions:
    """Which parts of an event become text, and how they are grouped in time."""

    bucket: Bucket = "day"
    values_per_line: int = 5  # the latest values of a code in a bucket; the rest is counted
    text_chars: int = 64  # a text value's length; longer ones are cut and counted


class Serializer:
    """Turns event batches into `Timeline`s, and counts what is left out in `counts`."""

    def __init__(
        self,
        encoder: TextEncoder,
        sections: SectionMap,
        descriptions: dict[str, str],
        parents: dict[str, list[str]] | None = None,
        options: SerializerOptions | None = None,
    ) -> None:
        self.encoder = encoder
        self.options = options or SerializerOptions()
        self.counts: Counter[str] = Counter()
        self.unmapped: Counter[str] = Counter()  # events by family of code, fallback rule alone
        self.preamble = text_preamble(encoder)
        self._sections = sections
        self._descriptions = descriptions
        self._parents = parents or {}
        self._known: dict[str, tuple[int, bool, str]] = {}

    def fingerprint(self) -> str:
        """Return a digest that changes when the same events would give other tokens."""
        return digest_of(
            VERSION,
            self.encoder.fingerprint(),
            self._sections.fingerprint(),
            self._descriptions,
            self._parents,
            vars(self.options),
        )

    def timelines(self, batch: EventBatch) -> list[Timeline]:
        """Return one Timeline per subject of the batch, in order."""
        return Layout(self, batch).timelines()

    def texts(self, batch: EventBatch) -> list[str]:
        """Return the text of each subject, whose token ids `timelines` returns."""
        return Layout(self, batch).texts()

    def bucket_key(self, time_N: np.ndarray) -> np.ndarray:
        """Return the beginning of the bucket of each time, int64 [N] microseconds since 1970."""
        span = SPAN[self.options.bucket]
        return np.floor_divide(time_N, span) * span

    def code_table(self, codes: list[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return the section of each code (int64 [C]), whether a rule decided it (bool [C]), and
        the beginning of its line."""
        for code in codes:
            if code not in self._known:
                section, ruled = self._sections(code, self._parents.get(code))
                head = clean(self._descriptions.get(code) or code, 200)
                head = self._escaped("Birth" if code == BIRTH else head)
                self._known[code] = (section, ruled, head)
        known = [self._known[c] for c in codes]
        return (
            np.array([k[0] for k in known], np.int64),
            np.array([k[1] for k in known], bool),
            [k[2] for k in known],
        )

    def text_value(self, text: str) -> str:
        """Return a text value in the form in which it may stand in a line."""
        text = clean(text)
        if len(text) > self.options.text_chars:
            self.counts["texts_cut"] += 1
            text = text[: self.options.text_chars].rstrip()
        return without_tags(text) if self.encoder.delimiters == "text" else text

    def _escaped(self, head: str) -> str:
        head = line_head(head)
        return without_tags(head) if self.encoder.delimiters == "text" else head


def text_preamble(encoder: TextEncoder) -> Preamble:
    """Return what every window of text begins with."""
    return Preamble(encoder.begin, section_ids=tuple(encoder.open_ids))
