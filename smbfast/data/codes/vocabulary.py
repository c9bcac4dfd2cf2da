"""The vocabulary of the format `codes`: one token an event.

A JSON file holds what was fitted (see `fitting`); the fixed alphabet, names and ids follow from it.
Nothing in it is said of fewer than ten training subjects, so the parents of rare codes are not in
it either: they come with the data that is encoded (`parents`, from its codes.parquet).

Legend: N events, C codes of a batch, T texts of a batch.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smbfast.base.files import digest_of, read_regular, write_text
from smbfast.data.codes.alphabet import (
    BEGIN,
    FIRST_AGE,
    FIRST_GAP,
    FIRST_SECTION,
    GAP_EDGES,
    MAX_AGE,
    PAD,
)
from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.codes.fitting import MAX_CODES, fit_tables
from smbfast.data.codes.ladder import OWN, RUNGS, SECTION, steps
from smbfast.data.codes.statistics import CodeStatistics, cut_text
from smbfast.data.codes.tables import TokenTables
from smbfast.data.meds import BIRTH, EventBatch
from smbfast.data.sections import SECTIONS, SectionMap

VERSION = 1  # of the JSON and of the rules by which events become tokens
_CACHE = 1 << 18  # codes and texts whose tokens are remembered
NUMBERS_WITHOUT_BIN = "numbers_without_bin"
TEXTS_WITHOUT_TOKEN = "texts_without_token"
TEXTS_DROPPED = "texts_dropped_for_number"


@dataclass(frozen=True)
class EncodedEvents:
    """Events of a batch as tokens."""

    token_N: np.ndarray  # int32, `first_id` included; -1 for births, which get none
    section_N: np.ndarray  # uint8, of the event's own code, index into SECTIONS
    counts: Counter[str]  # RUNGS: events without births; what of values is in no token


class CodeVocabulary:
    """Tokens, and the way from an event to one of them."""

    def __init__(
        self, content: dict[str, Any], parents: Mapping[str, list[str]] | None = None
    ) -> None:
        """Take tables as `fit` makes them; `read` is for files.

        Raises:
            KeyError, TypeError, ValueError: the tables are not complete.
        """
        self.content = content
        self.parents = parents or {}
        self.first_id = int(content["first_id"])
        self.text_chars = int(content["text_chars"])
        self.sections = SectionMap(**content["sections"])
        self._tables = TokenTables(content["codes"], content["shared"])
        self.tokens = self._tables.tokens
        self.pad, self.begin = self.first_id + PAD, self.first_id + BEGIN
        self.gap_ids = _ids(self.first_id + FIRST_GAP, len(GAP_EDGES))
        self.age_ids = _ids(self.first_id + FIRST_AGE, MAX_AGE + 1)
        self.section_ids = _ids(self.first_id + FIRST_SECTION, len(SECTIONS))
        self._code_cache: dict[str, tuple[int, int, int, int]] = {}
        self._text_cache: dict[str, int] = {}

    @classmethod
    def fit(
        cls,
        statistics: CodeStatistics,
        sections: SectionMap,
        descriptions: Mapping[str, str],
        parents: Mapping[str, list[str]],
        *,
        max_codes: int = MAX_CODES,
        text_chars: int | None = None,
        first_id: int = 0,
    ) -> "CodeVocabulary":
        """Choose tokens for what ten training subjects have.

        Args:
            descriptions, parents: by code, as in `MedsDataset`.
            max_codes: codes with a token of their own at most; those of most subjects are kept.
            text_chars: the limit by which `statistics` cut texts, if given.
            first_id: the id of the first token; the size of a pretrained tokenizer.

        Raises:
            ValueError: `text_chars` is not that of the statistics.
        """
        if text_chars not in (None, statistics.text_chars):
            raise ValueError(
                f"`text_chars` must be {statistics.text_chars}, by which the statistics cut texts; "
                f"got {text_chars}"
            )
        content = {
            "version": VERSION,
            "min_subjects": MIN_SUBJECTS,
            "first_id": first_id,
            "text_chars": statistics.text_chars,
            "sections": sections.record(),
            **fit_tables(statistics, sections, descriptions, parents, max_codes),
        }
        return cls(content, parents)

    @classmethod
    def read(cls, file: Path, parents: Mapping[str, list[str]] | None = None) -> "CodeVocabulary":
        """Read what `save` wrote.

        Args:
            parents: of the codes that will be encoded. Without them rare codes skip the rung of
                ancestors, and do not get the tokens they had in the fit.

        Raises:
            ValueError: the file is missing, damaged or of another version.
        """
        try:
            record = json.loads(read_regular(Path(file)))
            content = record["vocabulary"]
            whole = record["digest"] == digest_of(content)
            version = content["version"]
            if whole and version == VERSION:
                return cls(content, parents)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            whole, version = False, VERSION
        except OverflowError:  # a number that no array holds
            whole, version = False, VERSION
        if not whole:
            raise ValueError(f"{file} must hold a vocabulary of codes; it is missing or damaged")
        raise ValueError(f"{file} must be a vocabulary of version {VERSION}; got {version!r}")

    def save(self, file: Path) -> None:
        """Write the vocabulary as JSON with its digest, atomically."""
        record = {"digest": self.fingerprint(), "vocabulary": self.content}
        write_text(Path(file), json.dumps(record, indent=1, ensure_ascii=True) + "\n")

    def fingerprint(self) -> str:
        """Return a digest that changes when a token, an id or a rule does, not for `parents`."""
        return digest_of(self.content)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, batch: EventBatch) -> EncodedEvents:
        """Return the token and the section of each event, and counts of what was left out."""
        known_C4 = self._known_codes(batch.codes)
        token_C, section_C, rung_C, own_C = known_C4.T
        code_N, text_N = batch.code_N, batch.text_N
        token_N = token_C.astype(np.int32)[code_N]
        own_N = own_C[code_N]
        number_N = ~np.isnan(batch.value_N)
        binned_N = number_N & self._tables.binned[own_N]
        at = np.flatnonzero(binned_N)
        token_N[at] = self._tables.bins(own_N[at], batch.value_N[at])
        has_text_N = text_N >= 0
        at = np.flatnonzero(has_text_N & ~binned_N & self._tables.has_values[own_N])
        if len(at):
            value_Q = self._value_tokens(own_N[at], text_N[at], batch.texts)
            token_N[at[value_Q >= 0]] = value_Q[value_Q >= 0]
            in_token = int((value_Q >= 0).sum())
        else:
            in_token = 0
        born_N = rung_C[code_N] < 0
        counts: Counter[str] = Counter()
        for rung, num in zip(RUNGS, np.bincount(rung_C[code_N] + 1, minlength=6)[1:], strict=True):
            counts[rung] = int(num)
        dropped = int((binned_N & has_text_N).sum())
        texts = int((has_text_N & ~born_N).sum())
        counts[NUMBERS_WITHOUT_BIN] = int((number_N & ~binned_N & ~born_N).sum())
        counts[TEXTS_WITHOUT_TOKEN] = texts - dropped - in_token
        counts[TEXTS_DROPPED] = dropped
        token_N[~born_N] += np.int32(self.first_id)
        return EncodedEvents(token_N, section_C.astype(np.uint8)[code_N], counts)

    def code_place(self, code: str) -> tuple[int, int, int]:
        """Return (place in `tokens`, section, rung) of a code; (-1, section, -1) of a birth."""
        parents = self.parents.get(code)
        section = self.sections(code, parents)[0]
        if code == BIRTH:
            return -1, section, -1
        if code in self._tables.own:
            return self._tables.place[code], section, OWN
        for rung, name in steps(code, self.parents):
            place = self._tables.place.get(name)
            if place is not None:
                return place, section, rung
        return FIRST_SECTION + section, section, SECTION

    def own_tokens(self, code: str) -> tuple[range, int]:
        """Return the places of a code's own tokens (itself, bins, values) and how many are bins."""
        own = self._tables.own.get(code)
        if own is None:
            return range(0), 0
        entry = self.content["codes"][own]
        bins = len(entry["edges"]) + 1 if "edges" in entry else 0
        first = self._tables.place[code]
        return range(first, first + 1 + bins + len(entry.get("values", ()))), bins

    def _known_codes(self, codes: list[str]) -> np.ndarray:
        """Return place, section, rung and own row (-1: none) of each code, int64 [C, 4]."""
        cache = self._code_cache
        if len(cache) + len(codes) > _CACHE:
            cache.clear()
        for code in codes:
            if code not in cache:
                cache[code] = (*self.code_place(code), self._tables.own.get(code, -1))
        return np.array([cache[c] for c in codes], np.int64).reshape(-1, 4)

    def _value_tokens(self, own_N: np.ndarray, text_N: np.ndarray, texts: list[str]) -> np.ndarray:
        """Return the places of code x value tokens, -1 where there is none."""
        used, local_N = np.unique(text_N, return_inverse=True)
        cache = self._text_cache
        if len(cache) + len(used) > _CACHE:
            cache.clear()
        text_T = np.empty(len(used), np.int64)
        for i, t in enumerate(used.tolist()):
            text = texts[t]
            known = cache.get(text)
            if known is None:
                known = self._tables.text_ids.get(cut_text(text, self.text_chars), -1)
                if len(text) <= 4 * self.text_chars:  # a note is not worth remembering
                    cache[text] = known
            text_T[i] = known
        return self._tables.values(own_N, text_T[local_N])


def _ids(first: int, num: int) -> np.ndarray:
    return np.arange(first, first + num, dtype=np.int32)
