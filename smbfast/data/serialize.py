"""Turns events into tagged text and token ids, a batch of subjects at a time.

The text of a subject begins with `<demographics>` (static events). Then each bucket has a header
and its sections in a fixed order, with one line per code: its name and its values. A code without a
value shows how often it occurred (` x3`).

`text-paper` follows the public tools of the paper's authors: `[date]` headers, the date of birth,
closing tags, `name: v1, v2`. `%.4g` instead of `%.2f` and the count are our choice, as is all in
which `text` differs (`smbfast.data.style`): the time since the bucket before, the age, no closing
tags, `name v1 v2` with short names.

The token ids are those of the whole text: a line is cut into pieces only where the tokenizer
provably does not merge across the cut (`TextEncoder.piecewise`).

Legend: N events, C codes, L lines.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smbfast.base.files import digest_of
from smbfast.batch import Timeline
from smbfast.data.clean import clean, lean_head, line_head, shortened, without_tags
from smbfast.data.layout import Layout
from smbfast.data.meds import BIRTH, EventBatch
from smbfast.data.sections import SectionMap
from smbfast.data.style import SPAN, STYLES, Format, Style, age_line, short_names
from smbfast.data.timelines import MOST_YEARS, Preamble
from smbfast.data.tokens import TextEncoder
from smbfast.data.unmapped import Unmapped

Bucket = Literal["day", "hour", "moment"]
VERSION = 1  # of the text format: part of every fingerprint


@dataclass(frozen=True)
class SerializerOptions:
    """Which parts of an event become text, and how they are grouped in time."""

    bucket: Bucket = "day"
    values_per_line: int | None = None  # so many latest values; the rest is counted. None: all
    text_chars: int = 64  # a text value's length; longer ones are cut and counted
    format: Format = "text-paper"
    terminal: Sequence[str] = ()  # codes after which nothing is to come


class Serializer:
    """Turns event batches into `Timeline`s, and counts what is left out in `counts`."""

    def __init__(
        self,
        encoder: TextEncoder,
        sections: SectionMap,
        descriptions: Mapping[str, str],
        parents: Mapping[str, list[str]] | None = None,
        options: SerializerOptions | None = None,
        style: Style | None = None,
    ) -> None:
        """Make a serializer; `style` replaces that of the format, to measure a single element."""
        self.encoder = encoder
        self.options = options or SerializerOptions()
        self.style = style or STYLES[self.options.format]
        self.counts: Counter[str] = Counter()
        self.unmapped = Unmapped()  # events of codes that only the fallback rule maps
        self.codes: dict[str, int] = {}  # of lines, each with its place, in `line_code_L`
        self.preamble = _preamble(encoder, self.style)
        self._sections = sections
        self._descriptions = descriptions
        self._parents = parents or {}
        self._known: dict[str, tuple[int, bool, str]] = {}
        self._short = self._short_names() if self.style.short_names else {}

    def with_encoder(self, encoder: TextEncoder) -> "Serializer":
        """Return a serializer of the same text for another tokenizer, with counts of its own."""
        names = self._sections, self._descriptions, self._parents
        return Serializer(encoder, *names, self.options, self.style)

    def fingerprint(self) -> str:
        """Return a digest that changes when the same events would give other tokens."""
        return digest_of(
            VERSION,
            self.encoder.fingerprint(),
            self._sections.fingerprint(),
            dict(self._descriptions),
            dict(self._parents),
            vars(self.options),
            vars(self.style),
        )

    def timelines(self, batch: EventBatch, before_S: np.ndarray | None = None) -> list[Timeline]:
        """Return one Timeline per subject of the batch, in order.

        Args:
            before_S: where the events are the end of a record, the time of the last event before
                them, int64 microseconds since 1970; UNKNOWN where there is none.
        """
        return Layout(self, batch, before_S).timelines()

    def texts(self, batch: EventBatch) -> list[str]:
        """Return the text of each subject, whose token ids `timelines` returns."""
        return Layout(self, batch).texts()

    @property
    def text_chars(self) -> int:
        """The length to which a text value is cut."""
        return self.options.text_chars

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
                name = "Birth" if code == BIRTH else self._name(code)
                head = self._escaped(self._short.get((section, name), name))
                self._known[code] = (section, ruled, head)
        known = [self._known[c] for c in codes]
        return (
            np.array([k[0] for k in known], np.int64),
            np.array([k[1] for k in known], bool),
            [k[2] for k in known],
        )

    def code_places(self, codes: list[str], code_L: np.ndarray) -> np.ndarray:
        """Return the place in `self.codes` of each line's code, int32 [L]; new ones are added."""
        place_C = np.full(len(codes), -1, np.int32)
        for c in np.flatnonzero(np.bincount(code_L, minlength=len(codes))).tolist():
            place_C[c] = self.codes.setdefault(codes[c], len(self.codes))
        return place_C[code_L]

    def text_value(self, text: str) -> tuple[str, bool]:
        """Return a text value in the form in which it may stand in a line, and whether it is cut.

        What stands behind the part that is written makes no difference.
        """
        text, cut = shortened(text, self.options.text_chars)
        return without_tags(text) if self.encoder.delimiters == "text" else text, cut

    def _name(self, code: str) -> str:
        return clean(self._descriptions.get(code) or code, 200)

    def _short_names(self) -> dict[tuple[int, str], str]:
        """Return the short form of each described name, by its section."""
        names: dict[int, set[str]] = {}
        for code in self._descriptions:
            section, _ = self._sections(code, self._parents.get(code))
            names.setdefault(section, set()).add(self._name(code))
        return {
            (section, name): short
            for section, own in names.items()
            for name, short in short_names(own).items()
        }

    def _escaped(self, head: str) -> str:
        head = lean_head(head) if self.style.relative or self.style.age else line_head(head)
        return without_tags(head) if self.encoder.delimiters == "text" else head


def text_preamble(encoder: TextEncoder, format: Format) -> Preamble:
    """Return what every window of text begins with."""
    return _preamble(encoder, STYLES[format])


def _preamble(encoder: TextEncoder, style: Style) -> Preamble:
    ages = encoder.encode([age_line(years) for years in range(MOST_YEARS + 1)]) if style.age else ()
    return Preamble(encoder.begin, age_ids=tuple(ages), section_ids=tuple(encoder.open_ids))
