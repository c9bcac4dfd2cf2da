"""Turns a MEDS folder into memory-mapped token shards.

One MEDS file becomes one shard, a file that is there once it is whole. So a run that was stopped
goes on with the remaining files, and processes that run at once divide them. Memory is bounded by
the rows decoded at once, not by the subjects.
"""

import json
import shutil
import sys
import threading
from collections import Counter
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Literal

from smbfast.base.claims import clear_claims
from smbfast.base.dividing import Piece, divide, in_turn
from smbfast.base.files import digest_of, write_text
from smbfast.base.ours import prepared_entries, require_prepared_folder
from smbfast.base.progress import Progress
from smbfast.base.staging import clear_left
from smbfast.base.together import Together, together
from smbfast.base.workers import Workers, num_cores
from smbfast.data.code_classes import CodeClasses, SubjectCounts
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.fitting import (
    COUNTS,
    PROG,
    TOKENIZER,
    count_codes,
    counts_codes,
    decided_options,
    fit_encoding,
    opened,
    stamped,
    worth_processes,
)
from smbfast.data.formats import (
    VERSIONS,
    PatientEncoding,
    PatientSerializer,
    make_serializer,
    options_of,
    read_encoding,
    sections_of,
)
from smbfast.data.meds import MedsDataset
from smbfast.data.prepare_record import read_record
from smbfast.data.prepared import CLASSES, Prepared, ShardRecord, require_current
from smbfast.data.quality import count_quality
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import Serializer
from smbfast.data.shards import LAYOUT, SUFFIX, Shard, ShardWriter
from smbfast.data.source_index import FOLDER, Stamp
from smbfast.data.splits import SPLITS
from smbfast.data.tokens import load_tokenizer
from smbfast.data.unmapped import Unmapped
from smbfast.data.verified import note_verified
from smbfast.settings import DataSettings


def prepare(
    data: DataSettings,
    out: Path,
    tokenizer: str | None,
    splits: tuple[str, ...],
    verify: Literal["once", "all"] = "once",
    on: str | None = None,
) -> Prepared:
    """Prepare `splits` of `data.path` under `out`, or open what is already there.

    Any number of processes may do this at the same time; they divide the work.

    Args:
        verify: of shards that are already there; see `Prepared.open`.
        on: a cluster that does the work of this process (`smbfast.base.workers.engine_of`).

    Raises:
        ValueError: the data is bad (see `MedsDataset.open`), or `out` was made from other data or
            settings.
    """
    out = Path(out)
    require_prepared_folder(out)

    def there() -> list[str] | None:
        """What there is of an unprepared folder: the index of the data, if labels were read."""
        if any((out / name).is_file() for name in ("plan.json", "prepare.json")):
            return None
        return [entry.name for entry in prepared_entries(out)]

    with together(out, there) as group:
        try:
            with Workers(data.workers or num_cores(), on) as workers:
                made = data.decided(tokenizer)
                return _prepare(made, out, tokenizer, splits, verify, group, workers)
        except ValueError:
            # once the data is mended its digest is another: nothing of this could be gone on with.
            # Workers of this machine have ended, so none makes another shard behind this; those of
            # a cluster may still be writing
            if group.all_failed() and group.noted is not None and on is None:
                _remove_prepared(out, group.noted)
            raise


def _remove_prepared(out: Path, before: list[str]) -> None:
    """Remove what was just made, and nothing that was there before."""
    for entry in (e for e in prepared_entries(out) if e.name not in before):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with suppress(OSError):
                entry.unlink()


def _prepare(
    data: DataSettings,
    out: Path,
    tokenizer: str | None,
    splits: tuple[str, ...],
    verify: Literal["once", "all"],
    group: Together,
    workers: Workers,
) -> Prepared:
    begun = (out / "plan.json").is_file()  # by a process that has indexed and hashed the data
    with nullcontext() if begun else in_turn(out, "plan", PROG):
        dataset = _dataset(data, out)
        source = _source(data, dataset, tokenizer, splits)
        before = _checked(out, source)
        if (out / "prepare.json").is_file():
            _clear(out)
            return Prepared.open(out, verify)
        unread = {"subjects": dataset.without_split(), "files": dataset.num_unread}
        _say_unread(unread)
        sections = sections_of(data)
        options = before.get("options") or decided_options(data, dataset, tokenizer, sections)
        source |= {"options": options, "section_rules": sections.record()}
        if not before:
            write_text(out / "plan.json", json.dumps(source, indent=1))
    parts: list[Path] = []
    if not (out / TOKENIZER).is_dir() and counts_codes(data, tokenizer):
        parts = count_codes(data, dataset, out, workers)
    with in_turn(out, "tokenizer", PROG):
        fit = data, dataset, out / TOKENIZER, tokenizer, sections, options, parts
        new_tokens = fit_encoding(*fit)
    _make_shards(dataset, out, source, splits, workers, again=group.first)
    with in_turn(out, "record", PROG):
        if not (out / "prepare.json").is_file():
            more = {"meds_version": dataset.version, "unread": unread}
            _finish(out, source, _names(dataset, splits), new_tokens, data.max_codes, more)
    _clear(out)
    return Prepared.open(out)


def _clear(out: Path) -> None:
    """Clear what processes that were killed have left of finished work."""
    clear_claims(out)
    own = (entry for entry in (*prepared_entries(out), *out.glob("windows/*")) if entry.is_dir())
    for folder in (out, *own):
        clear_left(folder)


def _checked(out: Path, source: dict) -> dict:
    """Return what is recorded of a folder that was begun, which `source` must agree with."""
    plan, finished = out / "plan.json", out / "prepare.json"
    if not (plan.is_file() or finished.is_file()):
        return {}
    before = read_record(plan if plan.is_file() else finished)
    require_current(out, before)
    changed = ", ".join(k for k in source if not _same(source[k], before.get(k)))
    if changed:
        raise ValueError(
            f"{out} was prepared from other settings ({changed} differ); name another folder "
            "or remove it"
        )
    return before


def _finish(
    out: Path,
    source: dict,
    names: dict[str, list[tuple[str, Path]]],
    new_tokens: list[dict],
    max_codes: int,
    more: dict,
) -> None:
    """Write what shards say together, and prepare.json last.

    Args:
        source: what the shards were made of.
        names: of shards, see `_names`.
        more: that is recorded as it is.
    """
    encoding = _encoding(out, source)
    shards, counts, unmapped = _recorded_shards(out, names)
    record = {
        **source,
        "encoder": encoding.fingerprint(),
        "classes": _find_classes(out, shards, encoding, max_codes),
        "new_tokens": new_tokens,
        "shards": shards,
        "counts": {s: dict(c) for s, c in counts.items()},
        "unmapped": unmapped.shown(),
        **more,
    }
    shutil.rmtree(out / COUNTS, ignore_errors=True)  # the tokenizer is there
    write_text(out / "prepare.json", json.dumps(record, indent=1))


def _say_unread(unread: dict[str, int]) -> None:
    for what, num in unread.items():
        if num:
            shown = "up to 10" if what == "subjects" and num <= 10 else f"{num:,}"
            where = f"{shown} {what} are in none of the splits {', '.join(SPLITS)}"
            print(f"{PROG}: {where} and are not read", file=sys.stderr)


def _dataset(data: DataSettings, out: Path) -> MedsDataset:
    return MedsDataset.open(data.folder, index=out / FOLDER, split=data.split)


def _source(
    data: DataSettings, dataset: MedsDataset, tokenizer: str | None, splits: tuple[str, ...]
) -> dict:
    """Return what shards are made of; a difference in any of it makes other shards."""
    assert data.format is not None
    made = f"bpe of {data.vocab_size}" if data.format != "codes" else "codes"
    return {
        "data": dataset.digest(splits),
        "split": list(data.split) if data.split else None,
        "layout": LAYOUT,
        "data_format": data.format,
        "format": VERSIONS[data.format],
        "options": options_of(data),
        "delimiters": data.delimiters if data.format != "codes" else "text",  # codes have no tags
        "sections": sections_of(data).fingerprint(),
        "tokenizer": tokenizer or made,
        "splits": list(splits),
        "max_codes": data.max_codes,
    }


def _same(wanted: object, recorded: object) -> bool:
    """Whether shards were made as it is wanted now; `bucket=auto` takes the bucket they have."""
    if not (isinstance(wanted, dict) and isinstance(recorded, dict)):
        return wanted == recorded
    open_choice = wanted.get("bucket") == "auto"
    return (wanted | {"bucket": recorded.get("bucket")} if open_choice else wanted) == recorded


def check_prepared(prepared: Prepared, data: DataSettings, backbone: str | None) -> None:
    """Refuse shards that were made of other data, for another tokenizer or with other options.

    Args:
        data: with its format decided.

    Raises:
        ValueError: there is a difference, which is named.
    """
    record = prepared.record
    dataset = _dataset(data, prepared.folder)
    wanted = _source(data, dataset, backbone, tuple(record["splits"]))
    if backbone is None:
        wanted["tokenizer"] = record["tokenizer"]
    changed = ", ".join(k for k, value in wanted.items() if not _same(value, record.get(k)))
    if changed:
        raise ValueError(
            f"data.prepared {prepared.folder} was made from other settings ({changed} differ); "
            "prepare it again or take them back"
        )


def _names(dataset: MedsDataset, splits: tuple[str, ...]) -> dict[str, list[tuple[str, Path]]]:
    """Return the name of the shard of each file of each split."""
    return {
        split: [(f"{split}/{i}{SUFFIX}", file) for i, file in enumerate(dataset.splits[split])]
        for split in splits
    }


def _make_shards(
    dataset: MedsDataset,
    out: Path,
    plan: dict,
    splits: tuple[str, ...],
    workers: Workers,
    *,
    again: bool,
) -> None:
    """Make the shards that are missing, with all processes of the folder.

    Args:
        again: whether to verify those that are there: a process that was stopped has left them.
    """
    pieces, files = [], []
    for split, own in _names(dataset, splits).items():
        for name, file in own:
            there = (out / name).exists()
            if there and not again:
                continue
            files.append(file)
            ((place, stamp),) = stamped(dataset, [file])
            args = dataset.where, (place, stamp), out.absolute(), digest_of(plan), split, name
            pieces.append(Piece((name,), dataset.num_rows(file), args, anyway=there))
    progress = Progress(PROG, sum(piece.size for piece in pieces), "events")
    many = workers.many and len(pieces) > 1 and worth_processes(dataset, files)
    if many or (workers.remote and pieces):
        divide(out, pieces, make_shard, workers, progress)
    elif pieces:
        made = dataset, _serializer(dataset, out), progress
        divide(out, pieces, partial(make_shard, made=made), None, progress)


def _recorded_shards(
    out: Path, names: dict[str, list[tuple[str, Path]]]
) -> tuple[dict[str, list[ShardRecord]], dict[str, Counter[str]], Unmapped]:
    """Return what the headers of verified shards say, and record that they were verified.

    Each was verified by whoever made it, or by the first process of this group that saw it.
    """
    shards: dict[str, list[ShardRecord]] = {s: [] for s in names}
    counts: dict[str, Counter[str]] = {s: Counter() for s in names}
    unmapped = Unmapped()
    for split, name in ((split, name) for split, own in names.items() for name, _ in own):
        shard = Shard(out / name)
        index = shard.index
        timelines, tokens = index["timelines"], index["tokens"]
        shards[split].append(
            ShardRecord(file=name, sha256=shard.sha256, timelines=timelines, tokens=tokens)
        )
        counts[split].update(index["counts"])
        counts[split].update(subjects=timelines, tokens=tokens)
        unmapped.update(index["unmapped"])
    files = {shard["file"]: shard["sha256"] for of_split in shards.values() for shard in of_split}
    note_verified(out, files, [out])
    return shards, counts, unmapped


def _find_classes(
    out: Path, shards: dict[str, list[ShardRecord]], encoding: PatientEncoding, most: int
) -> str:
    """Write the classes of codes to come, and return their digest."""
    train = (Shard(out / record["file"]) for record in shards.get("train", []))
    vocabulary = encoding if isinstance(encoding, CodeVocabulary) else None
    classes = CodeClasses.of_shards(train, vocabulary, most)
    classes.save(out / CLASSES)
    return classes.digest


def _serializer(dataset: MedsDataset, out: Path) -> PatientSerializer:
    """Return the serializer of the plan; its tokenizer or vocabulary must be there."""
    plan = read_record(out / "plan.json")
    sections = SectionMap(**plan["section_rules"])
    return make_serializer(dataset, _encoding(out, plan), sections, plan["options"])


def _encoding(out: Path, plan: dict) -> PatientEncoding:
    tokenizer, _ = load_tokenizer(str(out / "tokenizer"), plan["delimiters"])
    return read_encoding(out / "tokenizer", tokenizer, plan)


class _Made(threading.local):
    plan: tuple | None = None
    dataset: MedsDataset | None = None
    serializer: PatientSerializer | None = None


_MADE = _Made()  # of a worker, whose threads have one each


def make_shard(
    where: tuple,
    file: tuple[Path, Stamp],
    out: Path,
    plan: str,
    split: str,
    name: str,
    *,
    made: tuple[MedsDataset, PatientSerializer, Progress] | None = None,
) -> None:
    """Make a shard, or verify the one that is there.

    Args:
        where: see `smbfast.data.fitting.opened`.
        file: the place of the file in the dataset, and its stamp.
        plan: the digest of the plan, as `out` may have had another before.
        made: if this process has them.
    """
    if (out / name).exists():
        Shard(out / name).verify()
        return
    if made is not None:
        dataset, serializer, progress = made
        _make_shard(dataset, serializer, split, dataset.path / file[0], out / name, progress)
        return
    dataset = opened(where, [file])
    if _MADE.serializer is None or _MADE.plan != (out, plan) or _MADE.dataset is not dataset:
        _MADE.plan, _MADE.dataset = (out, plan), dataset
        _MADE.serializer = _serializer(dataset, out)
    _make_shard(dataset, _MADE.serializer, split, dataset.path / file[0], out / name, None)


def _make_shard(
    dataset: MedsDataset,
    serializer: PatientSerializer,
    split: str,
    file: Path,
    path: Path,
    progress: Progress | None,
) -> None:
    serializer.counts.clear()
    serializer.unmapped.clear()
    if isinstance(serializer, Serializer):
        serializer.codes.clear()
    subjects = SubjectCounts()
    with ShardWriter(path) as writer:
        for batch in dataset.file_batches(file, split, text_chars=serializer.text_chars):
            serializer.counts.update(count_quality(batch, dataset))
            timelines = serializer.timelines(batch)
            filled = [t for t in timelines if len(t.bucket_end_B)]
            if len(filled) < len(timelines):
                serializer.counts["subjects_without_events"] += len(timelines) - len(filled)
            writer.add(*filled)
            if split == "train":
                subjects.add([t.line_code_L for t in filled])
            if progress:
                progress.add(len(batch.time_N))
        if isinstance(serializer, Serializer):
            writer.add_codes(list(serializer.codes))
        writer.add_subjects(subjects.result())
        writer.index |= {
            "split": split,
            "counts": dict(serializer.counts),
            "unmapped": serializer.unmapped.record(),
        }
    Shard(path).verify()
