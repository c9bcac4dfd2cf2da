"""Turns text into token ids, such that text from data can never become structure.

Data is encoded by a copy of the tokenizer whose added tokens are removed (`split_special_tokens`
alone misses added tokens that are not marked special). Delimiters are single added tokens
("special") or plain text ("text").
"""

import copy
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smbfast.base import hub_names
from smbfast.base.files import digest_of
from smbfast.base.plain_tokenizer import without_added_tokens
from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.sections import SECTIONS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process per file uses the cores

OPEN = tuple(f"<{s}>" for s in SECTIONS)
CLOSE = tuple(f"</{s}>" for s in SECTIONS)
Delimiters = Literal["special", "text"]
_KNOWN_LINES = 1 << 16
_WORDS_AT_ONCE = 1 << 12
_NOTE = 32  # characters from which a text is encoded word by word
_WORD = re.compile(r" ?[^ ]+| ")

# lines as the serializer composes them, to find out whether a tokenizer lets us encode piece by
# piece: every kind of boundary (colon, comma, bracket, sign, space, newline) stands in here
_PROBES = (
    ("[2150-01-31]\n", "Glucose [Blood, Chem] (mg/dL):", " 101,", " 4.2e+05 abnormal,", " -3.5\n"),
    ("[2150-01-31 07:00]\n", "Death\n", "Cefazolin (IV) x2:", " 5 mg (PO),", " <1.0%\n"),
    ("Heart rate:", " 80,", " 81\n", "SARS-CoV-2 RNA:", ' "neg",', " n/a.\n", "Übelkeit x3\n"),
    ("Age 63\n", "+3 07\n", "Glucose", " 101", " 4.2e9 abnormal", " -3.5", " 0.05\n", "+12\n"),
    ("@07:10\n", "Vitamin B12:", " 88", " 90,", " held\n", ":40\n", "Cefazolin (IV)", " 5 mg\n"),
    (
        ":05:01.25\n",
        "Culture:",
        " no growth,",
        " E. coli",
        " 1\n",
        "Smoker x3\n",
        "+0\n",
        "pH",
        " 7\n",
    ),
)


def load_tokenizer(path: str, delimiters: Delimiters) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Load the tokenizer of a backbone, and add the delimiters as tokens in mode "special".

    Returns it with the ids of the delimiters that it did not know.

    Raises:
        ValueError: there is no tokenizer, or not a fast one (only those can be copied safely).
    """
    options = hub_names.options_of(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:  # tokenizers raises plain Exception; a user can mend the path
        raise ValueError(
            f"`model.path` {path} must hold a tokenizer, tokenizer.json; none could be read "
            f"({type(error).__name__})"
        ) from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"the tokenizer of {path} must be a fast one (tokenizer.json)")
    if delimiters == "text":
        return tokenizer, []
    known = tokenizer.get_vocab()
    new = [t for t in (*OPEN, *CLOSE) if t not in known]
    tokenizer.add_tokens(new, special_tokens=True)
    ids: Any = tokenizer.convert_tokens_to_ids(new)  # a list for a list
    return tokenizer, ids


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`, with begin, pad and delimiter tokens.

    It is trained on the words (pre-tokens: a word, number or sign with the space before it) that
    stand in ten of the texts, so every merge and every token but the 256 bytes lies within such a
    word: nothing of fewer people is in what is saved. A word counts once for each distinct line of
    a text: what one patient repeats is not frequent. Other words are spelled in shorter tokens,
    which costs 0.4 % more of them on eICU's demo (1,076 subjects are read, 4,096 tokens) and 2.5 %
    on MIMIC-IV's, whose training split has 70 subjects.

    Memory grows with the characters of the texts (`first_texts` bounds them).

    Args:
        texts: the text of one subject each.
        vocab_size: the largest number of tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    special = ["<|pad|>", "<|begin|>", *OPEN, *CLOSE]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # words as `_words` writes them
    tokenizer.train_from_iterator(_repeated(_common_words(texts)), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        extra_special_tokens=[*OPEN, *CLOSE],
    )


def _common_words(texts: Iterable[str]) -> dict[str, int]:
    """Return how often the words stand that ten texts have, in the order of the words."""
    num_texts: Counter[str] = Counter()
    uses: Counter[str] = Counter()
    known: dict[str, list[str]] = {}  # the words of a line
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    for text in texts:
        own: Counter[str] = Counter()
        for line in _lines(text):
            if line not in known:
                if len(known) >= _KNOWN_LINES:
                    known.clear()
                known[line] = [word for word, _ in split(line)]
            own.update(known[line])
        uses.update(own)
        num_texts.update(own.keys())
    return {word: uses[word] for word in sorted(uses) if num_texts[word] >= MIN_SUBJECTS}


def _repeated(uses: dict[str, int]) -> Iterator[str]:
    """Yield each word so often; as bytes are written, no word has a space in it."""
    for word, num in uses.items():
        for done in range(0, num, _WORDS_AT_ONCE):
            yield f"{word} " * min(num - done, _WORDS_AT_ONCE)


def first_texts(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield texts to train a tokenizer on, until their distinct lines have `characters`."""
    for text in texts:
        yield text
        characters -= sum(map(len, _lines(text)))
        if characters < 0:
            return


def _lines(text: str) -> dict[str, None]:
    """Return the distinct lines of a text in order."""
    return dict.fromkeys(text.splitlines(keepends=True))


def refuse_lossy(tokenizer: PreTrainedTokenizerBase, plain: Tokenizer | None = None) -> None:
    """Refuse a tokenizer that does not give back the lines of a serializer that it has encoded.

    The lines are in ASCII; an `<unk>` for a rarer letter is no reason. Nor are spaces: some models
    drop the first one or write a newline as one.

    Args:
        plain: the tokenizer without its added tokens, if it is there.

    Raises:
        ValueError: it makes nothing or something else of a line, such as lower case.
    """
    plain = plain or without_added_tokens(tokenizer)
    decoder = plain.decoder or token_decoders.ByteLevel()  # tokenizers made by hand may have none
    for line in ("".join(pieces) for pieces in _PROBES):
        if not line.isascii():
            continue
        try:
            back = decoder.decode(plain.encode(line, add_special_tokens=False).tokens)
        except Exception:  # tokenizers raises plain Exception where a word has no token
            raise ValueError(
                "the tokenizer must encode any text, and this one knows whole names alone; a model "
                "that was trained on codes needs its codes.json beside its tokenizer"
            ) from None
        if unicodedata.normalize("NFKC", back).split() != line.split():
            made = "other words" if back.strip() else "nothing"
            raise ValueError(
                f"the tokenizer of `model.path` {tokenizer.name_or_path} must give back any text "
                f"that it encodes; of plain words it gave back {made}. Its tokenizer.json must be "
                "there and belong to the model"
            )


class TextEncoder:
    """Turns pieces of text into ids through a bounded cache; knows tags and the begin token by id.

    `piecewise` says whether encoding a line piece by piece equals encoding it whole. It does with
    byte-level BPE with a pre-tokenizer (Qwen, Llama 3, GPT-2, ours). Where it is not, lines are
    encoded whole, which is slower.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        delimiters: Delimiters = "special",
        cache: int = 1 << 17,
    ) -> None:
        self.tokenizer = tokenizer
        self.delimiters = delimiters
        self._plain = without_added_tokens(tokenizer)
        self._reserved = frozenset(tokenizer.all_special_ids) | frozenset(
            tokenizer.added_tokens_decoder
        )
        self._cache: dict[str, np.ndarray] = {}
        self._words: dict[str, np.ndarray] = {}  # of long texts
        self._limit = cache
        self._wordwise = False  # whether a text may be encoded word by word
        self.begin: int | None = tokenizer.bos_token_id
        self.open_ids = [self._tag(t) for t in OPEN]
        self.close_ids = [self._tag(t) for t in CLOSE]
        refuse_lossy(tokenizer, self._plain)
        self.piecewise = self._same_as_whole(_PROBES)
        self._wordwise = self.piecewise and self._same_as_whole(
            _WORD.findall("".join(p)) for p in _PROBES
        )

    def _same_as_whole(self, lines: Iterable[Sequence[str]]) -> bool:
        """Whether encoding the pieces of lines is encoding the lines."""
        return all(
            np.array_equal(np.concatenate(self.encode(list(p))), self.encode(["".join(p)])[0])
            for p in lines
        )

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32; a special or added token is never among them."""
        cache = self._cache
        missing = [t for t in dict.fromkeys(texts) if t not in cache]
        if missing:
            if len(cache) + len(missing) > self._limit:
                cache = self._cache = {}
                missing = list(dict.fromkeys(texts))
            if self._wordwise:
                missing = self._without_notes(missing)
            encoded = self._plain.encode_batch_fast(missing, add_special_tokens=False)
            for text, encoding in zip(missing, encoded, strict=True):
                ids = encoding.ids
                if not self._reserved.isdisjoint(ids):
                    ids = self._defused(text)
                cache[text] = np.array(ids, np.int32)
        return [cache[t] for t in texts]

    def _without_notes(self, texts: list[str]) -> list[str]:
        """Put long texts of plain words into the cache, word by word; return the others.

        Notes differ, and their words do not: so a word is encoded once, not a note.
        """
        cache, known, rest = self._cache, self._words, []
        notes = {}
        for text in texts:
            if len(text) < _NOTE or "  " in text:
                rest.append(text)
            else:
                notes[text] = _WORD.findall(text)
        if len(known) > self._limit:
            known.clear()
        words = [w for w in dict.fromkeys(chain.from_iterable(notes.values())) if w not in known]
        encoded = self._plain.encode_batch_fast(words, add_special_tokens=False)
        known |= {w: np.array(e.ids, np.int32) for w, e in zip(words, encoded, strict=True)}
        # what holds the name of a control token is taken apart as a whole
        odd = {w for w in words if not self._reserved.isdisjoint(known[w].tolist())}
        for word in odd:
            del known[word]
        if odd:
            rest += [text for text, parts in notes.items() if not odd.isdisjoint(parts)]
            notes = {text: parts for text, parts in notes.items() if odd.isdisjoint(parts)}
        if notes:
            # joined at once: an array is cut faster than many small ones are joined for each note
            ids_W = [known[w] for w in chain.from_iterable(notes.values())]
            size_W = np.fromiter(map(len, ids_W), np.int64, len(ids_W))
            ends = size_W.cumsum()[np.cumsum([len(parts) for parts in notes.values()]) - 1]
            cache |= zip(notes, np.split(np.concatenate(ids_W), ends[:-1]), strict=True)
        return rest

    def fingerprint(self) -> str:
        """Return a digest that changes when the same text would get other ids."""
        return digest_of(self._plain.to_str(), self.delimiters, self.begin, self.open_ids)

    def tag_text(self, tag: str) -> str:
        """Return a tag as it stands in the text: followed by a newline unless it is one token."""
        return tag if self.delimiters == "special" else tag + "\n"

    def _tag(self, tag: str) -> np.ndarray:
        if self.delimiters == "text":
            return self.encode([tag + "\n"])[0]
        return np.array([self.tokenizer.convert_tokens_to_ids(tag)], np.int32)

    def _defused(self, text: str) -> list[int]:
        """Break up control tokens, which some models (Unigram) hold in the vocabulary itself."""
        for sign in "<|[":
            text = text.replace(sign, " ")
        ids = self._plain.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self._reserved]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer as `AutoTokenizer` reads it."""
    copy.copy(tokenizer).save_pretrained(folder)
