"""Where each event of a batch stands in the text, as arrays, without a loop over events.

What an event says is decided by `smbfast.data.serialize`, which hands itself in.

Legend: N events, E the same in the order of the text, L lines, V values shown, P pieces (a tag, a
header, a line's head, a value), C codes, U distinct keys, T tokens, S subjects, B buckets, K
headers.
"""

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from smbfast.batch import UNKNOWN, Timeline
from smbfast.data.births import births, without_late_births
from smbfast.data.endings import endings
from smbfast.data.meds import STATIC, EventBatch
from smbfast.data.sections import SECTIONS
from smbfast.data.style import SPAN, age_at, dates, number, times_since
from smbfast.data.tokens import CLOSE, OPEN

if TYPE_CHECKING:
    from smbfast.data.serialize import Serializer

_DEMOGRAPHICS = SECTIONS.index("demographics")


class Layout:
    r"""The text of a batch as two tables: its lines, and the pieces that stand in the text.

    Example: a woman (row 0 of the batch), sodium 140 at 08:00 (row 1), potassium 4.5 at 09:00
    (row 2), sodium 141 at 16:00 (row 3); the next day influenza at 09:00 (row 4).

        L  event_E  line_E  code_L     slot_L = 8 * bucket + section  time_L: of the latest event
        0  0        0       sex         0  demographics               STATIC
        1  1, 3     1, 1    sodium     11  measurements               day 1, 16:00
        2  2        2       potassium  11  measurements               day 1, 09:00
        3  4        3       influenza  17  conditions                 day 2, 09:00

        P      the pieces, each with its line (`line_P`) in brackets where that is not -1
        0-3    ""  <demographics>  "sex\n" (0)  </demographics>
        4-11   "[day 1]\n"  <measurements>  "sodium:" (1)  " 140," (1)  " 141\n" (1)
               "potassium:" (2)  " 4.5\n" (2)  </measurements>
        12-15  "[day 2]\n"  <conditions>  "influenza\n" (3)  </conditions>

    Buckets begin at the lines `lead_L` = 0, 1, 3 and the pieces `lead_at` = 0, 4, 12.

    In the style of the format `text` the same patient has no closing tags, the values are `" 140"`
    and `" 141\n"` behind `"sodium"`, and the headers are `"+0\n"` and `"+1\n"`. The age, which
    stands before the first of them, is no piece.

    Args:
        before_S: the time of the last event before those of each subject, int64 microseconds since
            1970, UNKNOWN where there is none. With None, the events begin with the first.
    """

    # set by _order_lines
    event_E: np.ndarray  # int64: rows of the batch in the order of the text
    line_E: np.ndarray  # int64: the line of each event
    subject_L: np.ndarray  # int64: place of the subject in the batch
    slot_L: np.ndarray  # int64: number of the bucket * len(SECTIONS) + section
    bucket_time_L: np.ndarray  # int64: microseconds since 1970, STATIC for demographics
    code_L: np.ndarray  # int64: index into `heads`
    time_L: np.ndarray  # int64: of the latest event, STATIC in demographics
    heads: list[str]  # the beginning of a line of each code
    # set by _place_pieces
    piece_P: np.ndarray  # int64: index into `strings`
    line_P: np.ndarray  # int64: the line of each piece, -1 for tags and headers
    lead_L: np.ndarray  # int64: the first line of each bucket
    lead_at: np.ndarray  # int64: the first piece of each bucket, its header

    def __init__(
        self, serializer: "Serializer", batch: EventBatch, before_S: np.ndarray | None = None
    ) -> None:
        self.serializer = serializer
        self.encoder, self.style = serializer.encoder, serializer.style
        serializer.counts["nonfinite_values"] += batch.nonfinite
        self.batch, self.birth_N = without_late_births(batch, serializer.counts)
        serializer.counts["events"] += len(self.batch.time_N)
        self.num_subjects = len(batch.offset_S1) - 1
        self.subject_S = batch.subject_N[batch.offset_S1[:-1]]
        self.birth_S = births(self.batch, self.birth_N)
        self.last_S, self.terminal_S = endings(self.batch, serializer.options.terminal)
        if self.style.age:  # tells more than a date of birth
            self.batch, self.birth_N = _without(self.batch, self.birth_N, self.birth_N)
        if before_S is None:
            before_S = np.full(self.num_subjects, UNKNOWN)
        before_bucket_S = serializer.bucket_key(np.maximum(before_S, STATIC + 1))
        self.before_S = np.where(before_S == UNKNOWN, UNKNOWN, before_bucket_S)
        self.strings: list[str] = []  # of the piece table
        self._index: dict[str, int] = {}
        self._order_lines()
        self._place_pieces()

    def _order_lines(self) -> None:
        """Group events into lines and put the lines in the order of the text."""
        batch, serializer = self.batch, self.serializer
        section_C, ruled_C, self.heads = serializer.code_table(batch.codes)
        time_N, code_N = batch.time_N, batch.code_N.astype(np.int64)
        subject_N = np.repeat(np.arange(self.num_subjects), np.diff(batch.offset_S1))
        header_N = (time_N == STATIC) | self.birth_N
        section_N = np.where(header_N, _DEMOGRAPHICS, section_C[code_N])
        key_N = np.where(header_N, STATIC, serializer.bucket_key(np.maximum(time_N, STATIC + 1)))
        # birth stands among timed events: a stable sort brings each subject's header to the front
        order_N = np.lexsort((key_N, subject_N))
        subject_O, key_O = subject_N[order_N], key_N[order_N]
        new_O = np.ones(len(order_N), bool)
        new_O[1:] = (subject_O[1:] != subject_O[:-1]) | (key_O[1:] != key_O[:-1])
        slot_O = (np.cumsum(new_O) - 1) * len(SECTIONS) + section_N[order_N]
        by_code = np.lexsort((code_N[order_N], slot_O))
        slot, code = slot_O[by_code], code_N[order_N][by_code]
        new_line = np.ones(len(by_code), bool)
        new_line[1:] = (slot[1:] != slot[:-1]) | (code[1:] != code[:-1])
        line_first = by_code[new_line]  # stable sorts: the earliest event of a line comes first
        rank_L = np.empty(len(line_first), np.int64)
        place_L = np.lexsort((line_first, slot[new_line]))
        rank_L[place_L] = np.arange(len(place_L))
        rank_N = rank_L[np.cumsum(new_line) - 1]
        within = np.argsort(rank_N, kind="stable")
        self.event_E = order_N[by_code][within]  # rows of the batch, in the order of the text
        self.line_E = rank_N[within]
        first_L = by_code[new_line][place_L]
        self.subject_L = subject_O[first_L]
        self.slot_L = slot[new_line][place_L]
        self.bucket_time_L = key_O[first_L]
        self.code_L = code[new_line][place_L]
        self.time_L = np.full(len(first_L), STATIC, np.int64)
        np.maximum.at(self.time_L, self.line_E, np.where(header_N, STATIC, time_N)[self.event_E])
        serializer.unmapped.add(batch, ruled_C)

    def _items(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
        """Return whether each event has a value and whether that is a number (both bool [E]), the
        place of its value (int64 [E]) among the distinct ones, and these as text."""
        batch, event_E = self.batch, self.event_E
        value_E = batch.value_N[event_E]
        text_E = batch.text_N[event_E].astype(np.int64)
        birth = self.birth_N[event_E]
        birth &= batch.time_N[event_E] != STATIC
        number_E = ~np.isnan(value_E) & ~birth
        bits_E = np.where(number_E, value_E, np.float32(0)).view(np.uint32).astype(np.int64)
        day_E = np.floor_divide(batch.time_N[event_E], SPAN["day"])
        # one integer per distinct value: a date of birth, a number, a text, or both of these
        key_E = np.where(birth, -2 - (day_E - day_E.min(initial=0)), -1)
        valued = (number_E | (text_E >= 0)) & ~birth
        key_E = np.where(
            valued, ((text_E + 1) << 33) + (number_E.astype(np.int64) << 32) + bits_E, key_E
        )
        unique_U, item_E = np.unique(key_E, return_inverse=True)
        first_U = np.full(len(unique_U), len(key_E), np.int64)
        np.minimum.at(first_U, item_E, np.arange(len(key_E)))
        texts: dict[int, tuple[str, bool]] = {}
        strings = []
        for key, row in zip(unique_U.tolist(), first_U.tolist(), strict=True):
            parts = []
            if key < -1:
                if batch.time_N[event_E[row]] != STATIC:
                    parts.append(str(np.datetime64(int(day_E[row]), "D")))
            elif key >= 0:
                if number_E[row]:
                    parts.append(number(float(value_E[row]), self.style))
                text = int(text_E[row])
                if text >= 0:
                    if text not in texts:
                        texts[text] = self.serializer.text_value(batch.texts[text])
                    parts.append(texts[text][0])
            strings.append(" ".join(p for p in parts if p))
        cut = [text for text, (_, longer) in texts.items() if longer]
        self.serializer.counts["texts_cut"] += int(np.isin(text_E[valued], cut).sum())
        has_U = np.array([bool(s) for s in strings], bool)
        return has_U[item_E], number_E, item_E, strings

    def _place_pieces(self) -> None:
        """Put tags, headers, heads and values in their places: `piece_P`, `line_P`, `lead_at`."""
        num_lines = len(self.code_L)
        has_E, number_E, item_E, items = self._items()
        valued_L = np.bincount(self.line_E[has_E], minlength=num_lines)
        bare_L = np.bincount(self.line_E[~has_E], minlength=num_lines)
        shown = self.serializer.options.values_per_line or len(has_E)
        place_V = np.flatnonzero(has_E)
        line_V = self.line_E[place_V]
        start_L = np.concatenate([[0], np.cumsum(valued_L)[:-1]]) if num_lines else valued_L
        behind_V = valued_L[line_V] - 1 - (np.arange(len(place_V)) - start_L[line_V])
        self.serializer.counts["values_left_out"] += int((behind_V >= shown).sum())
        place_V, line_V, behind_V = (a[behind_V < shown] for a in (place_V, line_V, behind_V))
        values_L = np.minimum(valued_L, shown)

        new_slot, new_bucket = np.ones(num_lines, bool), np.ones(num_lines, bool)
        bucket_L = self.slot_L // len(SECTIONS)
        new_slot[1:] = self.slot_L[1:] != self.slot_L[:-1]
        new_bucket[1:] = bucket_L[1:] != bucket_L[:-1]
        opened_L, closing = np.cumsum(new_slot), int(self.style.closing)
        # before a line stand: earlier lines, all tags opened so far, all closed, all headers
        before_L = np.concatenate([[0], np.cumsum(1 + values_L)[:-1]]) if num_lines else values_L
        head_L = before_L + opened_L + closing * (opened_L - 1) + np.cumsum(new_bucket)
        num_pieces = int((1 + values_L).sum() + (1 + closing) * new_slot.sum() + new_bucket.sum())
        self.piece_P = np.empty(num_pieces, np.int64)
        self.line_P = np.full(num_pieces, -1, np.int64)
        words_V = ~number_E[place_V]
        words_L = np.zeros(num_lines, bool)
        words_L[line_V[words_V & (behind_V == values_L[line_V] - 1)]] = True
        self.piece_P[head_L] = self._head_pieces(values_L, bare_L, words_L)
        self.line_P[head_L] = np.arange(num_lines)
        value_at = head_L[line_V] + values_L[line_V] - behind_V
        comma_V = np.append(words_V[1:], False)[: len(words_V)] | self.style.commas
        self.piece_P[value_at] = self._value_pieces(items, item_E[place_V], behind_V == 0, comma_V)
        self.line_P[value_at] = line_V
        first = np.flatnonzero(new_slot)
        section = self.slot_L[first] % len(SECTIONS)
        self.piece_P[head_L[first] - 1] = self._tags(OPEN)[section]
        if closing:
            last = np.append(first[1:], num_lines)[: len(first)] - 1
            self.piece_P[head_L[last] + values_L[last] + 1] = self._tags(CLOSE)[section]
        lead = np.flatnonzero(new_bucket)
        self.lead_L, self.lead_at = lead, head_L[lead] - 2
        self.piece_P[self.lead_at] = self._header_pieces()

    def _piece(self, text: str) -> int:
        index = self._index.get(text)
        if index is None:
            index = self._index[text] = len(self.strings)
            self.strings.append(text)
        return index

    def _head_pieces(
        self, values_L: np.ndarray, bare_L: np.ndarray, words_L: np.ndarray
    ) -> np.ndarray:
        """Return the piece with which each line begins.

        Without commas, a colon stands only where a name and the value behind it would read as one:
        the value begins with words (bool `words_L`), or the name ends in a digit.
        """
        bare_L = np.where((bare_L == 1) & (values_L == 0), 0, bare_L)
        wide = int(bare_L.max(initial=0)) + 1
        shown_L = np.where(values_L == 0, 0, 1 + (words_L | self.style.commas))
        key_L = (self.code_L * wide + bare_L) * 3 + shown_L
        unique_U, inverse = np.unique(key_L, return_inverse=True)
        pieces = []
        for key in unique_U.tolist():
            (code, bare), shown = divmod(key // 3, wide), key % 3
            text = self.heads[code] + (f" x{bare}" if bare else "")
            colon = shown == 2 or text[-1].isdigit()
            pieces.append(self._piece(text + ((":" if colon else "") if shown else "\n")))
        return np.array(pieces, np.int64)[inverse] if pieces else key_L

    def _value_pieces(
        self, items: list[str], item_V: np.ndarray, last_V: np.ndarray, comma_V: np.ndarray
    ) -> np.ndarray:
        """Return the piece of each value.

        Without commas, one stands only before a value of words, which would read as a part of the
        value before it.
        """
        key_V = item_V * 3 + np.where(last_V, 2, comma_V)
        unique_U, inverse = np.unique(key_V, return_inverse=True)
        ends = ("", ",", "\n")
        pieces = [self._piece(f" {items[k // 3]}{ends[k % 3]}") for k in unique_U.tolist()]
        return np.array(pieces, np.int64)[inverse] if pieces else item_V

    def _tags(self, tags: tuple[str, ...]) -> np.ndarray:
        # a tag's key in the piece table starts with a NUL, which no text from data can hold
        return np.array([self._piece("\0" + self.encoder.tag_text(t)) for t in tags], np.int64)

    def _header_pieces(self) -> np.ndarray:
        """Return the header of each bucket; demographics have an empty one."""
        time_K = self.bucket_time_L[self.lead_L]
        subject_K = self.subject_L[self.lead_L]
        piece_K = np.full(len(time_K), self._piece(""))
        timed = np.flatnonzero(time_K != STATIC)
        bucket = self.serializer.options.bucket
        if self.style.relative:
            before_K = np.concatenate([[UNKNOWN], time_K[:-1]])[: len(time_K)]
            # the first bucket of a subject stands behind its demographics or another subject
            first_K = (before_K == STATIC) | (np.diff(subject_K, prepend=-1) != 0)
            before_K = np.where(first_K, self.before_S[subject_K], before_K)
            headers, which = times_since(time_K[timed], before_K[timed], bucket)
        else:
            headers, which = dates(time_K[timed], bucket)
        pieces = np.array([self._piece(header) for header in headers], np.int64)
        piece_K[timed] = pieces[which]
        return piece_K

    def texts(self) -> list[str]:
        """Return the text of each subject."""
        plain = [s.removeprefix("\0") for s in self.strings]
        lead_at = np.append(self.lead_at, len(self.piece_P))
        texts = []
        for s, (a, first, b) in enumerate(self._subject_leads()):
            pieces = [plain[p] for p in self.piece_P[lead_at[a] : lead_at[b]].tolist()]
            num_demographics = int(lead_at[first] - lead_at[a])
            age = self._age(s, first, b)
            texts.append("".join([*pieces[:num_demographics], age, *pieces[num_demographics:]]))
        return texts

    def _subject_leads(self) -> list[tuple[int, int, int]]:
        """Return the first of all buckets of each subject, the first behind the demographics, and
        the one after the last."""
        at = np.searchsorted(self.subject_L[self.lead_L], np.arange(self.num_subjects + 1))
        static = np.append(self.bucket_time_L[self.lead_L] == STATIC, False)
        return [(a, a + int(b > a and static[a]), b) for a, b in pairwise(at.tolist())]

    def _age(self, subject: int, first: int, last: int) -> str:
        """Return the line of the age at the first bucket, which ends the header of a timeline."""
        if not self.style.age or first == last:
            return ""
        return age_at(int(self.birth_S[subject]), int(self.bucket_time_L[self.lead_L[first]]))

    def timelines(self) -> list[Timeline]:
        """Return the tokens of each subject."""
        if not self.encoder.piecewise:
            self._join_lines()
        table = self._table_ids()
        length_P = np.array([len(t) for t in table], np.int64)[self.piece_P]
        end_P = np.cumsum(length_P)
        start_P = end_P - length_P
        flat = np.concatenate(table) if table else np.empty(0, np.int32)
        base = np.concatenate([[0], np.cumsum([len(t) for t in table])]).astype(np.int64)
        total = int(end_P[-1]) if len(end_P) else 0
        ids_T = flat[np.repeat(base[self.piece_P] - start_P, length_P) + np.arange(total)]
        return self._cut_subjects(ids_T, start_P, end_P)

    def _table_ids(self) -> list[np.ndarray]:
        tags = dict(zip(OPEN, self.encoder.open_ids, strict=True))
        tags |= dict(zip(CLOSE, self.encoder.close_ids, strict=True))
        plain = self.encoder.encode([s for s in self.strings if s and s[0] != "\0"])
        encoded = iter(plain)
        empty = np.empty(0, np.int32)
        return [
            empty if not s else tags[s[1:].rstrip("\n")] if s[0] == "\0" else next(encoded)
            for s in self.strings
        ]

    def _join_lines(self) -> None:
        """Make one piece of each line, for tokenizers that merge across pieces."""
        new = np.ones(len(self.piece_P), bool)
        new[1:] = (self.line_P[1:] != self.line_P[:-1]) | (self.line_P[1:] < 0)
        start = np.append(np.flatnonzero(new), len(self.piece_P))
        where = np.cumsum(new) - 1
        joined = [
            self._piece("".join(self.strings[p] for p in self.piece_P[a:b]))
            for a, b in pairwise(start.tolist())
        ]
        self.piece_P = np.array(joined, np.int64)
        self.line_P = self.line_P[start[:-1]]
        self.lead_at = where[self.lead_at]

    def _cut_subjects(
        self, ids_T: np.ndarray, start_P: np.ndarray, end_P: np.ndarray
    ) -> list[Timeline]:
        num_lines, total = len(self.code_L), len(ids_T)
        in_line = self.line_P >= 0
        line_start_L = np.full(num_lines, total, np.int64)
        line_end_L = np.zeros(num_lines, np.int64)
        np.minimum.at(line_start_L, self.line_P[in_line], start_P[in_line])
        np.maximum.at(line_end_L, self.line_P[in_line], end_P[in_line])
        lead_time = self.bucket_time_L[self.lead_L]
        lead_start = np.append(start_P[self.lead_at], total)
        lead_line = np.append(self.lead_L, num_lines)
        head = end_P[self.lead_at] - lead_start[:-1]
        section_L = (self.slot_L % len(SECTIONS)).astype(np.uint8)
        place_L = self.serializer.code_places(self.batch.codes, self.code_L)
        timelines = []
        for s, (a, first, b) in enumerate(self._subject_leads()):
            start, behind, end = (int(lead_start[i]) for i in (a, first, b))
            age = self.encoder.encode([self._age(s, first, b)])[0]
            shift = len(age) - start
            la, lb = lead_line[first], lead_line[b]
            timelines.append(
                Timeline(
                    subject=int(self.subject_S[s]),
                    ids_T=np.concatenate([ids_T[start:behind], age, ids_T[behind:end]]),
                    header=behind + shift,
                    bucket_end_B=(lead_start[first + 1 : b + 1] + shift).astype(np.int32),
                    bucket_time_B=lead_time[first:b],
                    bucket_head_B=head[first:b].astype(np.uint16),
                    line_start_L=(line_start_L[la:lb] + shift).astype(np.int32),
                    line_end_L=(line_end_L[la:lb] + shift).astype(np.int32),
                    line_time_L=self.time_L[la:lb],
                    line_section_L=section_L[la:lb],
                    line_code_L=place_L[la:lb],
                    birth=int(self.birth_S[s]),
                    last=int(self.last_S[s]),
                    terminal=int(self.terminal_S[s]),
                )
            )
        return timelines


def _without(
    batch: EventBatch, gone_N: np.ndarray, birth_N: np.ndarray
) -> tuple[EventBatch, np.ndarray]:
    """Leave out events; return also which of the rest are births."""
    num_before_N1 = np.concatenate([[0], np.cumsum(~gone_N)])
    row_K = np.flatnonzero(~gone_N)
    return batch.rows(row_K, num_before_N1[batch.offset_S1]), birth_N[row_K]
