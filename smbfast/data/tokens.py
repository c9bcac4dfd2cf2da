"""Turns text into token ids, such that text from data can never become structure.

Data is encoded by a copy of the tokenizer whose added tokens are removed (`split_special_tokens`
alone misses added tokens that are not marked special). Delimiters are single added tokens
("special") or plain text ("text").
"""

import copy
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers import decoders as token_decoders
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from smbfast.base.files import digest_of
from smbfast.base.plain_tokenizer import without_added_tokens
from smbfast.data.sections import SECTIONS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one process per file uses the cores

OPEN = tuple(f"<{s}>" for s in SECTIONS)
CLOSE = tuple(f"</{s}>" for s in SECTIONS)
Delimiters = Literal["special", "text"]

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
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=False, local_files_only=Path(path).is_dir()
        )
    except Exception:  # tokenizers raises plain Exception; what a user can mend is the path
        raise ValueError(
            f"`model.path` {path} must be a folder or hub name with a tokenizer; none could be read"
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
    """Train a byte-level BPE on `texts`, with begin, pad and delimiter tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = token_decoders.ByteLevel()
    special = ["<|pad|>", "<|begin|>", *OPEN, *CLOSE]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=10,  # keeps most rare strings out of a readable vocabulary
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        extra_special_tokens=[*OPEN, *CLOSE],
    )


def lines_of(texts: Iterable[str], characters: int) -> Iterator[str]:
    """Yield the lines of texts to train a tokenizer on, until `characters` have been read.

    A line comes once per text: what one patient repeats is not frequent.
    """
    for text in texts:
        yield from dict.fromkeys(text.splitlines(keepends=True))
        characters -= len(text)
        if characters < 0:
            return


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
        cache: int = 1 << 19,
    ) -> None:
        self.tokenizer = tokenizer
        self.delimiters = delimiters
        self._plain = without_added_tokens(tokenizer)
        self._reserved = frozenset(tokenizer.all_special_ids) | frozenset(
            tokenizer.added_tokens_decoder
        )
        self._cache: dict[str, np.ndarray] = {}
        self._limit = cache
        self.begin: int | None = tokenizer.bos_token_id
        self.open_ids = [self._tag(t) for t in OPEN]
        self.close_ids = [self._tag(t) for t in CLOSE]
        self._refuse_wordless()
        self.piecewise = all(
            np.array_equal(np.concatenate(self.encode(list(p))), self.encode(["".join(p)])[0])
            for p in _PROBES
        )

    def _refuse_wordless(self) -> None:
        try:
            self._plain.encode(_PROBES[0][0], add_special_tokens=False)
        except Exception:  # tokenizers raises plain Exception where a word has no token
            raise ValueError(
                "the tokenizer must encode any text, and this one knows whole names alone; a model "
                "that was trained on codes needs its codes.json beside its tokenizer"
            ) from None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, int32; a special or added token is never among them."""
        cache = self._cache
        missing = [t for t in dict.fromkeys(texts) if t not in cache]
        if missing:
            if len(cache) + len(missing) > self._limit:
                cache = self._cache = {}
                missing = list(dict.fromkeys(texts))
            encoded = self._plain.encode_batch_fast(missing, add_special_tokens=False)
            for text, encoding in zip(missing, encoded, strict=True):
                ids = encoding.ids
                if not self._reserved.isdisjoint(ids):
                    ids = self._defused(text)
                cache[text] = np.array(ids, np.int32)
        return [cache[t] for t in texts]

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
