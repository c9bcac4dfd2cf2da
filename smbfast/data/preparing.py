"""Turns a MEDS folder into memory-mapped token shards.

One MEDS file becomes one shard, a file that is there once it is whole. So a run that was stopped
goes on with the remaining files. Memory is bounded by the rows decoded at once, not by the
subjects.
"""

import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import as_completed
from contextlib import suppress
from pathlib import Path
from typing import Literal

from smbfast.base.files import write_text
from smbfast.base.locks import locked
from smbfast.base.ours import prepared_entries, require_prepared_folder
from smbfast.base.progress import Progress
from smbfast.base.workers import worker_pool
from smbfast.data.code_classes import CodeClasses, SubjectCounts
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.fitting import decided_options, fit_encoding, worth_processes
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
) -> Prepared:
    """Prepare `splits` of `data.path` under `out`, or open what is already there.

    Args:
        verify: of shards that are already there; see `Prepared.open`.

    Raises:
        ValueError: the data is bad (see `MedsDataset.open`), or `out` was made from other data or
            settings.
    """
    out = Path(out)
    require_prepared_folder(out)
    with locked(out, "smbfast.prepare"):
        before = prepared_entries(out)  # the index of the data, where labels were read first
        fresh = not any((out / name).is_file() for name in ("plan.json", "prepare.json"))
        try:
            return _prepare(data.decided(tokenizer), out, tokenizer, splits, verify)
        except ValueError:
            # once the data is mended its digest is another: nothing of this could be gone on with
            if fresh:
                _remove_prepared(out, before)
            raise


def _remove_prepared(out: Path, before: list[Path]) -> None:
    """Remove what was just made, and nothing that was there before."""
    for entry in (e for e in prepared_entries(out) if e not in before):
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
) -> Prepared:
    dataset = _dataset(data, out)
    source = _source(data, dataset, tokenizer, splits)
    plan, finished = out / "plan.json", out / "prepare.json"
    before: dict = {}
    if plan.is_file() or finished.is_file():
        before = _recorded(plan if plan.is_file() else finished)
        require_current(out, before)
        changed = ", ".join(k for k in source if not _same(source[k], before.get(k)))
        if changed:
            raise ValueError(
                f"{out} was prepared from other settings ({changed} differ); name another folder "
                "or remove it"
            )
    if finished.is_file():
        return Prepared.open(out, verify)
    unread = {"subjects": dataset.without_split(), "files": dataset.num_unread}
    _say_unread(unread)
    out.mkdir(parents=True, exist_ok=True, mode=0o700)
    sections = sections_of(data)
    options = before.get("options") or decided_options(data, dataset, tokenizer, sections)
    source |= {"options": options, "section_rules": sections.record()}
    write_text(plan, json.dumps(source, indent=1))
    new_tokens = fit_encoding(data, dataset, out / "tokenizer", tokenizer, sections, options)
    encoding = _encoding(out, source)
    shards, counts, unmapped = _make_shards(data, dataset, out, splits)
    record = {
        **source,
        "encoder": encoding.fingerprint(),
        "classes": _find_classes(out, shards, encoding, data.max_codes),
        "new_tokens": new_tokens,
        "meds_version": dataset.version,
        "shards": shards,
        "counts": {s: dict(c) for s, c in counts.items()},
        "unmapped": unmapped.shown(),
        "unread": unread,
    }
    write_text(out / "prepare.json", json.dumps(record, indent=1))
    return Prepared.open(out)


def _say_unread(unread: dict[str, int]) -> None:
    for what, num in unread.items():
        if num:
            shown = "up to 10" if what == "subjects" and num <= 10 else f"{num:,}"
            where = f"{shown} {what} are in none of the splits {', '.join(SPLITS)}"
            print(f"smbfast.prepare: {where} and are not read", file=sys.stderr)


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


def _recorded(file: Path) -> dict:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must say what was prepared, as JSON; remove its folder")
    return content


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


def _make_shards(
    data: DataSettings, dataset: MedsDataset, out: Path, splits: tuple[str, ...]
) -> tuple[dict[str, list[ShardRecord]], dict[str, Counter[str]], Unmapped]:
    jobs = [
        (split, f"{split}/{index}{SUFFIX}", file)
        for split in splits
        for index, file in enumerate(dataset.splits[split])
    ]
    rows = {file: dataset.num_rows(file) for _, _, file in jobs}
    todo = [job for job in jobs if not _finished(out / job[1])]
    progress = Progress("smbfast.prepare", sum(rows[f] for _, _, f in todo), "events")
    workers = min(data.workers or os.cpu_count() or 1, len(todo))
    if workers > 1 and worth_processes(dataset, [file for _, _, file in todo]):
        with worker_pool(workers) as pool:
            running = {
                pool.submit(
                    _work, dataset.where, dataset.stamp(file), str(out), split, name, str(file)
                ): file
                for split, name, file in todo
            }
            for done in as_completed(running):
                done.result()
                progress.add(rows[running[done]])
    else:
        serializer = _serializer(dataset, out)
        for split, name, file in todo:
            _make_shard(dataset, serializer, split, file, out / name, progress)
    return _recorded_shards(out, [(split, name) for split, name, _ in jobs], splits)


def _recorded_shards(
    out: Path, jobs: list[tuple[str, str]], splits: tuple[str, ...]
) -> tuple[dict[str, list[ShardRecord]], dict[str, Counter[str]], Unmapped]:
    """Return what the headers of verified shards say, and record that they were verified."""
    shards: dict[str, list[ShardRecord]] = {s: [] for s in splits}
    counts: dict[str, Counter[str]] = {s: Counter() for s in splits}
    unmapped = Unmapped()
    for split, name in jobs:
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


def _finished(file: Path) -> bool:
    if not file.exists():
        return False
    Shard(file).verify()
    return True


def _serializer(dataset: MedsDataset, out: Path) -> PatientSerializer:
    """Return the serializer of the plan; its tokenizer or vocabulary must be there."""
    plan = json.loads((out / "plan.json").read_text())
    sections = SectionMap(**plan["section_rules"])
    return make_serializer(dataset, _encoding(out, plan), sections, plan["options"])


def _encoding(out: Path, plan: dict) -> PatientEncoding:
    tokenizer, _ = load_tokenizer(str(out / "tokenizer"), plan["delimiters"])
    return read_encoding(out / "tokenizer", tokenizer, plan)


_STATE: dict[str, tuple[MedsDataset, PatientSerializer]] = {}  # of a worker process: opened once


def _work(where: tuple, stamp: Stamp, out: str, split: str, name: str, file: str) -> None:
    if out not in _STATE:
        dataset = MedsDataset.again(where)
        _STATE[out] = (dataset, _serializer(dataset, Path(out)))
    dataset, serializer = _STATE[out]
    if dataset.stamp(Path(file)) != stamp:  # this process opened the dataset later
        raise ValueError(f"{file} must not change while it is read; it has changed")
    _make_shard(dataset, serializer, split, Path(file), Path(out) / name, None)


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
