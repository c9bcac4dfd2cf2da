"""What the vocabulary is fitted on: who has which code, number and text value.

A subject stands in one batch, so distinct subjects are counted a batch and summed. Memory grows
with the distinct codes, numbers (of 3 digits) and texts up to a limit, not with events or subjects.

Legend: N events (of a kind), S subjects and C codes of a batch, T texts, R rows (subject, code or
number or text), Q rows (subject, code), K keys, M columns.
"""

import json
from pathlib import Path

import numpy as np

from smbfast.data.array_file import ArrayFile, ArrayWriter
from smbfast.data.clean import clean
from smbfast.data.codes.bins import KEY_BITS, KEY_OFFSET, decimal_keys
from smbfast.data.codes.counts import SubjectCounts, runs_of, sums_of
from smbfast.data.meds import BIRTH, EventBatch

TEXT_CHARS = 64  # the length to which a text value is cut
MAX_TEXTS = 1 << 16  # pairs of a code and a text that are counted: about 50 MB
WEIGHT = 1 << 30  # the weight of a subject for a code: sums of 10^8 subjects fit int64
_TEXT_BITS = 32
# of a file of counts
_NUMBERS = ("text_chars", "max_texts", "num_subjects", "num_events", "_longest")
_NAMES = ("code_ids", "text_ids")  # in the order of their ids
_ARRAYS = [
    f"{table}.{field}"
    for table in ("codes", "numbers", "texts")
    for field in ("key_K", "sum_KM", "few_key_P", "few_subject_P")
]


class CodeStatistics:
    """Counts of codes, numbers and text values over whole training subjects.

    Of more than `max_texts` pairs of a code and a text the first in the order (length, text, code)
    are counted: what ten patients share is short, free text is long. A pair that is counted at the
    end was never dropped before, in whatever order files came, because its place can only go up.

    Columns: `codes` (subjects, events, subjects with a number, numbers); `numbers` (subjects,
    values, weight); `texts` (subjects, events, subjects without a number, events without one).
    """

    def __init__(self, text_chars: int = TEXT_CHARS, max_texts: int = MAX_TEXTS) -> None:
        self.text_chars = text_chars
        self.max_texts = max_texts
        self.num_subjects = 0
        self.num_events = 0  # without births
        self.code_ids: dict[str, int] = {}
        self.text_ids: dict[str, int] = {}
        self.codes = SubjectCounts(4)
        self.numbers = SubjectCounts(3, KEY_BITS)  # low: key of the number, made positive
        self.texts = SubjectCounts(4, _TEXT_BITS, with_few=False)  # low: text id
        self._longest = text_chars  # longer texts are after the last that is counted

    def add(self, batch: EventBatch) -> None:
        """Count the events of whole subjects that were not added before; births are left out."""
        num_subjects = len(batch.offset_S1) - 1
        subject_S = batch.subject_N[batch.offset_S1[:-1]]
        row_N = np.repeat(np.arange(num_subjects), np.diff(batch.offset_S1))
        self.num_subjects += num_subjects
        id_C = np.array([-1 if c == BIRTH else self._code_id(c) for c in batch.codes], np.int64)
        used, local_C = np.unique(id_C, return_inverse=True)
        keep_N = id_C[batch.code_N] >= 0
        self.num_events += int(keep_N.sum())
        row_N, value_N = row_N[keep_N], batch.value_N[keep_N]
        text_N, code_N = batch.text_N[keep_N], local_C[batch.code_N[keep_N]]
        pair_N = row_N * len(used) + code_N
        has_N = ~np.isnan(value_N)
        number_R, numbers_R = self._add_numbers(pair_N[has_N], value_N[has_N], used, subject_S)
        pair_R, events_R = runs_of(np.sort(pair_N))
        sum_RM = np.zeros((len(pair_R), 4), np.int64)
        sum_RM[:, 0], sum_RM[:, 1] = 1, events_R
        at = np.searchsorted(pair_R, number_R)
        sum_RM[at, 2], sum_RM[at, 3] = 1, numbers_R
        self.codes.add(used[pair_R % len(used)], subject_S[pair_R // len(used)], sum_RM)
        has_N = text_N >= 0
        if has_N.any():
            number_N = ~np.isnan(value_N[has_N])
            ids = used[code_N[has_N]]
            self._add_texts(row_N[has_N], ids, text_N[has_N], number_N, batch.texts, subject_S)

    def merge(self, other: "CodeStatistics") -> None:
        """Add what another process counted over other subjects.

        Raises:
            ValueError: texts were cut or counted by other limits.
        """
        if (self.text_chars, self.max_texts) != (other.text_chars, other.max_texts):
            raise ValueError(
                "statistics of codes must have the same limits of texts (characters, pairs): "
                f"expected {(self.text_chars, self.max_texts)}, "
                f"got {(other.text_chars, other.max_texts)}"
            )
        self.num_subjects += other.num_subjects
        self.num_events += other.num_events
        id_C = np.array([self._code_id(c) for c in other.code_ids], np.int64)
        id_T = np.array([self._text_id(t) for t in other.text_ids], np.int64)
        mine, its = (
            (self.codes, self.numbers, self.texts),
            (other.codes, other.numbers, other.texts),
        )
        for to, table in zip(mine, its, strict=True):
            table.settle()
            if len(table.key_K) == 0:
                continue
            low_K = id_T[table.low()] if table is other.texts else table.low()
            to.merge(table, id_C[table.key_K >> table.low_bits] << table.low_bits | low_K)
        self._longest = min(self._longest, other._longest)
        self._bound_texts()

    def settle(self) -> None:
        """Sort in what was added; needed before the tables are read."""
        for table in (self.codes, self.numbers, self.texts):
            table.settle()
        self._bound_texts()

    def save(self, file: Path) -> None:
        """Write the counts; they are those of patients, so the file is private."""
        self.settle()
        named = {n: list(getattr(self, n)) for n in _NAMES}
        with ArrayWriter(file, dict.fromkeys(_ARRAYS, np.int64) | {"names": np.uint8}) as writer:
            writer.append("names", np.frombuffer(json.dumps(named).encode(), np.uint8))
            for name in _ARRAYS:
                table, _, field = name.partition(".")
                writer.append(name, getattr(getattr(self, table), field))
            writer.index |= {name: getattr(self, name) for name in _NUMBERS}

    @classmethod
    def read(cls, file: Path) -> "CodeStatistics":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        opened = ArrayFile.open(file)
        opened.verify()
        arrays, numbers = opened.mapped(), opened.index
        counts = cls()
        for name in _NUMBERS:
            setattr(counts, name, numbers[name])
        for name, own in json.loads(arrays["names"].tobytes()).items():
            setattr(counts, name, {text: number for number, text in enumerate(own)})
        for name in _ARRAYS:
            table, _, field = name.partition(".")
            to = getattr(counts, table)
            shape = (-1, to.sum_KM.shape[1]) if field == "sum_KM" else (-1,)
            setattr(to, field, arrays[name].reshape(shape))
        return counts

    def _code_id(self, code: str) -> int:
        return self.code_ids.setdefault(code, len(self.code_ids))

    def _text_id(self, text: str) -> int:
        return self.text_ids.setdefault(text, len(self.text_ids))

    def _add_numbers(
        self, pair_N: np.ndarray, value_N: np.ndarray, used: np.ndarray, subject_S: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count numbers; return the distinct pairs (subject, code) that have one, and how many."""
        key_N = (pair_N << KEY_BITS) | (decimal_keys(value_N) + KEY_OFFSET)
        key_R, count_R = runs_of(np.sort(key_N))
        pair_R = key_R >> KEY_BITS
        pair_Q, rows_Q = runs_of(pair_R)
        numbers_Q = np.add.reduceat(count_R, np.cumsum(rows_Q) - rows_Q) if len(rows_Q) else rows_Q
        weight_R = np.rint(count_R * (WEIGHT / np.repeat(numbers_Q, rows_Q))).astype(np.int64)
        code_R, low_R = used[pair_R % len(used)], key_R & ((1 << KEY_BITS) - 1)
        sum_RM = np.stack([np.ones_like(count_R), count_R, weight_R], axis=1)
        subject_R = subject_S[pair_R // len(used)]
        self.numbers.add((code_R << KEY_BITS) | low_R, subject_R, sum_RM)
        return pair_Q, numbers_Q

    def _add_texts(
        self,
        row_N: np.ndarray,
        id_N: np.ndarray,
        text_N: np.ndarray,
        number_N: np.ndarray,
        texts: list[str],
        subject_S: np.ndarray,
    ) -> None:
        used, local_N = np.unique(text_N, return_inverse=True)
        names = [cut_text(texts[t], self.text_chars) for t in used]
        keep = [0 < len(n) <= self._longest for n in names]
        text_T = np.array(
            [self._text_id(n) if k else -1 for n, k in zip(names, keep, strict=True)], np.int64
        )
        keep_N = text_T[local_N] >= 0
        key_N = ((id_N << _TEXT_BITS) | text_T[local_N])[keep_N]
        key_K, at_N = np.unique(key_N, return_inverse=True)
        pair_N = (row_N[keep_N] * len(key_K) + at_N) * 2 + number_N[keep_N]
        part_R, count_R = runs_of(np.sort(pair_N))  # (subject, code, text), then with a number
        pair_R, half_R, bare_R = part_R >> 1, np.ones_like(part_R), 1 - (part_R & 1)
        pair_Q, sum_QM = sums_of(
            pair_R, np.stack([half_R, count_R, bare_R, bare_R * count_R], axis=1)
        )
        sum_QM[:, 0] = 1
        if len(pair_Q):
            num = len(key_K)
            self.texts.add(key_K[pair_Q % num], subject_S[pair_Q // num], sum_QM)
        if self.texts.num_rows > 2 * self.max_texts:
            self._bound_texts()

    def _bound_texts(self) -> None:
        """Keep the first `max_texts` pairs."""
        table = self.texts
        table.settle()
        if len(table.key_K) <= self.max_texts:
            return
        texts, codes = list(self.text_ids), list(self.code_ids)
        ids = zip((table.key_K >> _TEXT_BITS).tolist(), table.low().tolist(), strict=True)
        places = [(len(texts[t]), texts[t], codes[c]) for c, t in ids]
        last = sorted(places)[self.max_texts - 1]
        self._longest = last[0]
        keep_K = np.fromiter((p <= last for p in places), bool, len(places))
        key_K, table.sum_KM = table.key_K[keep_K], table.sum_KM[keep_K]
        used, low_K = np.unique(key_K & ((1 << _TEXT_BITS) - 1), return_inverse=True)
        table.key_K = key_K >> _TEXT_BITS << _TEXT_BITS | low_K  # ids keep their order: sorted
        self.text_ids = {texts[t]: i for i, t in enumerate(used.tolist())}


def cut_text(text: str, text_chars: int) -> str:
    """Return a text value as it is counted and looked up: cleaned, at most `text_chars` long.

    Of a long text only the beginning is cleaned, so a note costs no more than a word.
    """
    return clean(text[: 4 * text_chars], text_chars)
