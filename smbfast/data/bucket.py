"""Chooses the span of time whose events are written together: day, hour or moment.

JEPA divides a window into context and future between two buckets. With long buckets many windows
have no place for that, with short ones a record needs more tokens. The rule, the share and the
number of subjects are our choice.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from smbfast.data.masking import allowed_cuts
from smbfast.data.meds import EventBatch, MedsDataset
from smbfast.data.serialize import Bucket, Serializer
from smbfast.data.timelines import training_spans, window_of
from smbfast.data.tokens import TextEncoder, first_texts, train_tokenizer
from smbfast.settings import ObjectiveSettings

BUCKETS: tuple[Bucket, ...] = ("day", "hour", "moment")  # the coarsest first
ENOUGH = 0.9  # of the tokens must lie in windows with a cut
FILES = 32  # are read at most, however many there are
SUBJECTS = 1000
CHARACTERS = 8_000_000  # of text that a candidate's tokenizer is trained on


def choose_bucket(
    dataset: MedsDataset,
    make_serializer: Callable[[Bucket], Serializer],
    window: int,
    stride: int | None = None,
    objective: ObjectiveSettings | None = None,
    *,
    vocab_size: int | None = None,
) -> tuple[Bucket, dict[Bucket, float]]:
    """Return the coarsest bucket with which enough tokens lie in windows with a cut.

    If there is none, it is the finest. Returns also the share of the tokens of each bucket that was
    tried, from 0 to 1. The same data and settings always give the same answer.

    Args:
        make_serializer: makes a serializer with that bucket.
        window, stride: of training windows, in tokens; a stride of None is the window.
        objective: says where a window may be cut; None is the default.
        vocab_size: None counts the tokens of the serializer's tokenizer. A number counts those of a
            BPE of that many tokens, trained on the same subjects with the same bucket; it is for
            models from scratch, whose tokenizer depends on the bucket.

    Raises:
        ValueError: the training split has no event with a time.
    """
    subjects = sampled_subjects(dataset)
    shares: dict[Bucket, float] = {}
    for bucket in BUCKETS:
        serializer = make_serializer(bucket)
        if vocab_size is not None:
            batches = dataset.batches("train", subjects, text_chars=serializer.text_chars)
            tokenizer = tokenizer_of(serializer, batches, vocab_size)
            delimiters = serializer.encoder.delimiters
            serializer = serializer.with_encoder(TextEncoder(tokenizer, delimiters))
        batches = dataset.batches("train", subjects, text_chars=serializer.text_chars)
        shares[bucket] = share_with_cut(serializer, batches, window, stride, objective)
        if shares[bucket] >= ENOUGH:
            break
    return bucket, shares


def why(bucket: Bucket, shares: dict[Bucket, float]) -> str:
    """Return a sentence that says what was chosen and from which shares."""
    tried = ", ".join(f"{b} {share:.1%}" for b, share in shares.items())
    what = "the longest" if shares[bucket] >= ENOUGH else f"the shortest; none reaches {ENOUGH:.0%}"
    return f"data.bucket=auto is `{bucket}`, {what}: tokens in windows that can be cut: {tried}"


def files_to_fit(dataset: MedsDataset) -> list[Path]:
    """Return the files of the train split that a bucket or a tokenizer is fitted on.

    They are all of them, or of more than `FILES` so many, evenly spaced in the order of their
    names: file i * num // FILES for i from 0.
    """
    files = sorted(dataset.splits["train"])
    num = min(FILES, len(files))
    return [files[i * len(files) // num] for i in range(num)]


def sampled_subjects(dataset: MedsDataset) -> np.ndarray:
    """Return up to `SUBJECTS` training subjects, evenly spaced over `files_to_fit`: int64 ids."""
    everyone = dataset.subjects("train", files_to_fit(dataset))
    num = min(SUBJECTS, len(everyone))
    return everyone[np.arange(num) * len(everyone) // max(num, 1)]


def tokenizer_of(
    serializer: Serializer, batches: Iterator[EventBatch], vocab_size: int
) -> PreTrainedTokenizerBase:
    """Train a BPE on the text that `serializer` makes of `batches`, as preparing a dataset does."""
    texts = (text for batch in batches for text in serializer.texts(batch))
    return train_tokenizer(first_texts(texts, CHARACTERS), vocab_size)


def share_with_cut(
    serializer: Serializer,
    batches: Iterator[EventBatch],
    window: int,
    stride: int | None = None,
    objective: ObjectiveSettings | None = None,
) -> float:
    """Return which share of the tokens of all training windows lies in windows with a cut.

    The arguments are those of `choose_bucket`.

    Raises:
        ValueError: no subject has an event with a time.
    """
    objective, preamble = objective or ObjectiveSettings(), serializer.preamble
    num_cut = num_tokens = 0
    for batch in batches:
        for timeline in serializer.timelines(batch):
            for span in training_spans(timeline, window, stride or window, preamble):
                cut, _ = window_of(timeline, *span, window, preamble)
                num_tokens += len(cut)
                num_cut += len(cut) if len(allowed_cuts(cut, objective)) else 0
    if not num_tokens:
        raise ValueError("a training subject must have an event with a time; none of them has one")
    return num_cut / num_tokens
