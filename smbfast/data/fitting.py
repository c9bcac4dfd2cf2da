"""Makes what knows the ids, on the train split: a tokenizer for text, a vocabulary for codes.

It is one committed folder, which `AutoTokenizer` reads; for codes it holds the vocabulary too.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from smbfast.base.files import committed_folder, verify_folder
from smbfast.base.progress import Progress
from smbfast.base.workers import worker_pool
from smbfast.batch import NewToken
from smbfast.data.bucket import choose_bucket, files_to_fit, why
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.codes.summary import summary
from smbfast.data.codes.tokenizer import code_tokenizer, with_codes
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.formats import VOCABULARY, make_serializer, options_of
from smbfast.data.meds import MedsDataset
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import Bucket, Serializer
from smbfast.data.tokens import (
    TextEncoder,
    first_texts,
    load_tokenizer,
    refuse_lossy,
    save_tokenizer,
    train_tokenizer,
)
from smbfast.settings import DataSettings

BPE_CHARACTERS = 8_000_000  # text that a tokenizer is trained on: our choice
# below these, starting processes costs more than they save
PARALLEL_ROWS = 2_000_000
PARALLEL_BYTES = 256 << 20  # of files, which hold long texts if they have few rows
SUMMARY = "summary.json"  # how codes became tokens, for `prepare --explain`


def decided_options(
    data: DataSettings, dataset: MedsDataset, backbone: str | None, sections: SectionMap
) -> dict:
    """Return the options of the format, with the bucket that `bucket=auto` chooses.

    The arguments are those of `fit_encoding`.
    """
    options = options_of(data)
    if options.get("bucket") != "auto":
        return options
    tokenizer = load_tokenizer(backbone, data.delimiters)[0] if backbone else None

    def candidate(bucket: Bucket) -> Serializer:
        return text_composer(data, dataset, sections, options_of(data, bucket), tokenizer)

    vocab_size = None if backbone else data.vocab_size
    bucket, shares = choose_bucket(
        dataset, candidate, data.window, data.stride, vocab_size=vocab_size
    )
    print(f"smbfast.prepare: {why(bucket, shares)}", file=sys.stderr)
    return options_of(data, bucket)


def fit_encoding(
    data: DataSettings,
    dataset: MedsDataset,
    folder: Path,
    backbone: str | None,
    sections: SectionMap,
    options: dict,
) -> list[dict]:
    """Write the folder unless it is there.

    Args:
        data: with its format decided.
        backbone: the tokenizer that the tokens are added to; None makes one of its own.
        options: those of `smbfast.data.formats.options_of`.

    Returns:
        The records of the tokens that are new to a backbone (`smbfast.batch.NewToken`).

    Raises:
        ValueError: the settings name other section rules than those of a backbone's vocabulary.
    """
    if not folder.is_dir():
        with committed_folder(folder, private=True) as staging:
            if data.format == "codes":
                new = _fit_codes(data, dataset, staging, backbone, sections)
            else:
                new = _fit_text(data, dataset, staging, backbone, sections, options)
            records = [token.to_record() for token in new]
            (staging / "new_tokens.json").write_text(json.dumps(records))
    verify_folder(folder)
    return json.loads((folder / "new_tokens.json").read_text())


def _fit_codes(
    data: DataSettings,
    dataset: MedsDataset,
    staging: Path,
    backbone: str | None,
    sections: SectionMap,
) -> list[NewToken]:
    tokenizer = load_tokenizer(backbone, "text")[0] if backbone else None
    known = Path(backbone) / VOCABULARY if backbone else None
    if tokenizer is not None and known is not None and known.is_file():
        # the backbone was trained on codes: its own vocabulary goes on, and nothing is new
        vocabulary = CodeVocabulary.read(known)
        if data.sections and vocabulary.sections.fingerprint() != sections.fingerprint():
            raise ValueError(
                f"data.sections must be the rules by which the vocabulary of {backbone} was made; "
                f"{data.sections} holds others. Leave it out to go on with that vocabulary"
            )
        vocabulary.save(staging / VOCABULARY)
        save_tokenizer(tokenizer, staging)
        return []
    if tokenizer is not None:
        refuse_lossy(tokenizer)  # new rows start from the words of descriptions
    statistics = code_statistics(data, dataset)
    vocabulary = CodeVocabulary.fit(
        statistics,
        sections,
        dataset.descriptions,
        dataset.parents,
        max_codes=data.max_codes,
        text_chars=data.text_chars,
        first_id=0 if tokenizer is None else len(tokenizer),
    )
    vocabulary.save(staging / VOCABULARY)
    rows = [asdict(row) for row in summary(vocabulary, statistics)]
    (staging / SUMMARY).write_text(json.dumps(rows, indent=1))
    if tokenizer is None:
        save_tokenizer(code_tokenizer(vocabulary), staging)
        return []
    with_codes(tokenizer, vocabulary)
    save_tokenizer(tokenizer, staging)
    first = vocabulary.first_id
    return [
        NewToken(first + i, t.text, bin=t.bin, num_bins=t.num_bins)
        for i, t in enumerate(vocabulary.tokens)
    ]


def code_statistics(data: DataSettings, dataset: MedsDataset) -> CodeStatistics:
    """Count the codes and values of the train split, with a process per file if it is large."""
    files = dataset.splits["train"]
    rows = {file: dataset.num_rows(file) for file in files}
    progress = Progress("smbfast.prepare, vocabulary", sum(rows.values()), "events")
    workers = min(data.workers or os.cpu_count() or 1, len(files))
    total = CodeStatistics(text_chars=data.text_chars)
    if workers > 1 and worth_processes(dataset, files):
        with worker_pool(workers) as pool:
            # merged in the order of the files, so the result does not depend on the processes
            jobs = [dataset.where] * len(files), [str(file) for file in files]
            counted = pool.map(_count, [data] * len(files), *jobs)
            for file, statistics in zip(files, counted, strict=True):
                total.merge(statistics)
                progress.add(rows[file])
        dataset.require_unchanged(files)  # the processes opened the dataset later
    else:
        for file in files:
            _add_file(total, dataset, file)
            progress.add(rows[file])
    return total


def worth_processes(dataset: MedsDataset, files: Sequence[Path]) -> bool:
    """Whether files are large enough, together, to be read by several processes."""
    rows = sum(dataset.num_rows(file) for file in files)
    return rows > PARALLEL_ROWS or sum(f.stat().st_size for f in files) > PARALLEL_BYTES


def _count(data: DataSettings, where: tuple, file: str) -> CodeStatistics:
    statistics = CodeStatistics(text_chars=data.text_chars)
    _add_file(statistics, _opened(where), Path(file))
    return statistics


@cache
def _opened(where: tuple) -> MedsDataset:
    """Open a dataset once in a worker process: without an index it reads every file's subjects."""
    return MedsDataset.again(where)


def _add_file(statistics: CodeStatistics, dataset: MedsDataset, file: Path) -> None:
    for batch in dataset.file_batches(file, "train", text_chars=statistics.text_chars):
        statistics.add(batch)


def _fit_text(
    data: DataSettings,
    dataset: MedsDataset,
    staging: Path,
    backbone: str | None,
    sections: SectionMap,
    options: dict,
) -> list[NewToken]:
    if backbone:
        tokenizer, ids = load_tokenizer(backbone, data.delimiters)
    else:
        tokenizer, ids = (
            train_tokenizer(
                training_texts(dataset, text_composer(data, dataset, sections, options)),
                data.vocab_size,
            ),
            [],
        )
    save_tokenizer(tokenizer, staging)
    return [_delimiter(tokenizer, i) for i in ids]


def _delimiter(tokenizer: PreTrainedTokenizerBase, token: int) -> NewToken:
    """A new delimiter: opening and closing ones start from one word, as its two bins."""
    tag = str(tokenizer.convert_ids_to_tokens(token))
    return NewToken(token, tag.strip("</>"), bin=int(tag.startswith("</")), num_bins=2)


def text_composer(
    data: DataSettings,
    dataset: MedsDataset,
    sections: SectionMap,
    options: dict,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Serializer:
    """Return a serializer of text; without a tokenizer its texts are right, its ids are not."""
    encoder = TextEncoder(tokenizer or train_tokenizer([], 300), data.delimiters)
    composer = make_serializer(dataset, encoder, sections, options)
    assert isinstance(composer, Serializer)
    return composer


def training_texts(dataset: MedsDataset, serializer: Serializer) -> Iterator[str]:
    """Yield texts of training subjects, the same number of characters of each file."""
    files = files_to_fit(dataset)
    for file in files:
        batches = dataset.file_batches(file, "train", text_chars=serializer.text_chars)
        texts = (text for batch in batches for text in serializer.texts(batch))
        yield from first_texts(texts, BPE_CHARACTERS // len(files))
