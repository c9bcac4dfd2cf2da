"""Makes what knows the ids, on the train split: a tokenizer for text, a vocabulary for codes.

It is one committed folder, which `AutoTokenizer` reads; for codes it holds the vocabulary too.
"""

import json
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from smbfast.base.dividing import Piece, divide
from smbfast.base.files import committed_folder, verify_folder
from smbfast.base.progress import Progress
from smbfast.base.workers import Workers
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
from smbfast.data.source_index import Stamp
from smbfast.data.tokens import (
    TextEncoder,
    first_texts,
    load_tokenizer,
    refuse_lossy,
    save_tokenizer,
    train_tokenizer,
)
from smbfast.settings import DataSettings

PROG = "smbfast.prepare"
TOKENIZER = "tokenizer"  # the folder, among the shards
COUNTS = "counts"  # of codes in parts, there while a vocabulary is fitted
PART_ROWS = 500_000  # of small files that are counted together: our choice
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
    parts: Sequence[Path] = (),
) -> list[dict]:
    """Write the folder unless it is there.

    Args:
        data: with its format decided.
        backbone: the tokenizer that the tokens are added to; None makes one of its own.
        options: those of `smbfast.data.formats.options_of`.
        parts: of `count_codes`, where `counts_codes`.

    Returns:
        The records of the tokens that are new to a backbone (`smbfast.batch.NewToken`).

    Raises:
        ValueError: the settings name other section rules than those of a backbone's vocabulary.
    """
    if not folder.is_dir():
        with committed_folder(folder, private=True) as staging:
            if data.format == "codes":
                new = _fit_codes(data, dataset, staging, backbone, sections, parts)
            else:
                new = _fit_text(data, dataset, staging, backbone, sections, options)
            records = [token.to_record() for token in new]
            (staging / "new_tokens.json").write_text(json.dumps(records))
    verify_folder(folder)
    return json.loads((folder / "new_tokens.json").read_text())


def counts_codes(data: DataSettings, backbone: str | None) -> bool:
    """Whether a vocabulary of codes is fitted on the train split.

    Raises:
        ValueError: it cannot be added to the tokenizer of the backbone.
    """
    if data.format != "codes" or (backbone and (Path(backbone) / VOCABULARY).is_file()):
        return False
    if backbone:
        tokenizer = load_tokenizer(backbone, "text")[0]
        refuse_lossy(tokenizer)  # new rows start from the words of descriptions
    return True


def _fit_codes(
    data: DataSettings,
    dataset: MedsDataset,
    staging: Path,
    backbone: str | None,
    sections: SectionMap,
    parts: Sequence[Path],
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
    statistics = code_statistics(data, dataset, parts)
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


def count_codes(
    data: DataSettings, dataset: MedsDataset, folder: Path, workers: Workers
) -> list[Path]:
    """Count the codes and values of the train split in parts, with all processes of the folder.

    Returns:
        The files of the parts, in the order of the files of the dataset; none where one process
        counts as fast. The parts of a folder are not made again once it has a tokenizer.
    """
    files = dataset.splits["train"]
    if not worth_processes(dataset, files) and not workers.remote:
        return []
    pieces = []
    for number, own in enumerate(_parts(dataset, files)):
        name = f"{COUNTS}/{number}.counts"
        args = (data, dataset.where, stamped(dataset, own), folder.absolute() / name)
        # the tokenizer is there before parts are removed, so it is looked for after the part
        pieces.append(Piece((name, TOKENIZER), sum(map(dataset.num_rows, own)), args))
    progress = Progress(f"{PROG}, vocabulary", sum(piece.size for piece in pieces), "events")
    if workers.many:
        divide(folder, pieces, count_part, workers, progress)
    else:
        divide(folder, pieces, partial(count_part, dataset=dataset), None, progress)
    return [folder / piece.files[0] for piece in pieces]


def _parts(dataset: MedsDataset, files: Sequence[Path]) -> Iterator[list[Path]]:
    """Yield files that are counted together: several small ones, or one that is large."""
    own: list[Path] = []
    rows = 0
    for file in files:
        own.append(file)
        rows += dataset.num_rows(file)
        if rows >= PART_ROWS:
            yield own
            own, rows = [], 0
    if own:
        yield own


def count_part(
    data: DataSettings,
    where: tuple,
    files: list[tuple[Path, Stamp]],
    path: Path,
    *,
    dataset: MedsDataset | None = None,
) -> None:
    """Make a part of `count_codes`.

    Args:
        where, files: of `opened`.
        dataset: if this process has it.
    """
    dataset = dataset or opened(where, files)
    part = CodeStatistics(text_chars=data.text_chars)
    for file, _ in files:
        _add_file(part, dataset, dataset.path / file)
    part.save(path)


def stamped(dataset: MedsDataset, files: Iterable[Path]) -> list[tuple[Path, Stamp]]:
    """Return files by their place in the dataset, with size and times as they were opened."""
    return [(file.relative_to(dataset.path), dataset.stamp(file)) for file in files]


class _Opened(threading.local):
    where: tuple | None = None
    dataset: MedsDataset | None = None


_OPENED = _Opened()  # of a worker, whose threads have one each: decoding is not shared


def opened(where: tuple, files: Iterable[tuple[Path, Stamp]]) -> MedsDataset:
    """Open a dataset once in a worker: without an index it reads every file's subjects.

    Args:
        where: `MedsDataset.where` of the process that has opened it before.
        files: those that will be read, of `stamped` there.

    Raises:
        ValueError: a file has changed since.
    """
    for again in (False, True):  # a worker of a cluster may know the data of an earlier command
        if again or _OPENED.dataset is None or _OPENED.where != where:
            _OPENED.where, _OPENED.dataset = where, MedsDataset.again(where)
        dataset = _OPENED.dataset
        changed = [f for f, stamp in files if dataset.stamp(dataset.path / f) != stamp]
        if not changed:
            return dataset
    raise ValueError(
        f"{dataset.path / changed[0]} must not change while it is read; it has changed"
    )


def code_statistics(
    data: DataSettings, dataset: MedsDataset, parts: Sequence[Path] = ()
) -> CodeStatistics:
    """Return the counts of `count_codes`, or count where there are no parts."""
    total = CodeStatistics(text_chars=data.text_chars)
    for part in parts:  # in the order of the files, so that it does not matter who counted
        total.merge(CodeStatistics.read(part))
    if parts:
        return total
    files = dataset.splits["train"]
    progress = Progress(f"{PROG}, vocabulary", sum(map(dataset.num_rows, files)), "events")
    for file in files:
        _add_file(total, dataset, file)
        progress.add(dataset.num_rows(file))
    return total


def worth_processes(dataset: MedsDataset, files: Sequence[Path]) -> bool:
    """Whether files are large enough, together, to be read by several processes."""
    rows = sum(dataset.num_rows(file) for file in files)
    return rows > PARALLEL_ROWS or sum(f.stat().st_size for f in files) > PARALLEL_BYTES


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
