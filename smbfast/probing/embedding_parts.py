"""Embeddings in committed parts, which any number of processes on a shared folder fill together.

A part has the embeddings of the nodes of one `NodePart`, one file that appears whole or not at all.
A process claims parts that nobody else has claimed; that saves work and decides nothing: what is
done is what is there. After a kill the parts that are there stand. Beside them lies what they are
of, the key, so that parts of another model, other nodes or data that have changed are never mixed.

The folder goes away when all parts are in one parquet file, which one of the processes writes.

Legend: K nodes, M nodes of a part, D width, F free parts.
"""

import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event
from typing import Protocol
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import torch

from smbfast.base.claims import CLAIMS, claimed, clear_claims
from smbfast.base.entry import RunFailed
from smbfast.base.files import committed_file, digest_of, read_json, write_text
from smbfast.base.locks import holder
from smbfast.base.progress import SECONDS, Progress
from smbfast.base.staging import staged
from smbfast.data.node_parts import NodePart
from smbfast.data.nodes import Nodes, NodeText
from smbfast.data.source_index import map_arrow, put_arrow
from smbfast.probing.embedding import Model, Task, embed_tasks
from smbfast.probing.embedding_file import (
    EmbeddingFile,
    EmbeddingRows,
    embedding_file,
    read_request,
)
from smbfast.settings import Pool

KEY = "key.json"
_FORMAT = 1
_NAME = re.compile(r"\d{6,}\.arrow")
_HERE, _FIRST, _LAST = "at work ", "begin", "write"  # claims that are of no part
_POLL = 0.2  # seconds between two looks at parts that others have claimed
Models = Mapping[str, tuple[Model, Sequence[Pool]]]


class Source(Protocol):
    """Nodes in parts, and their texts: `smbfast.data.node_parts.NodeSource`."""

    @property
    def nodes(self) -> Nodes: ...
    @property
    def parts(self) -> list[NodePart]: ...
    def state(self) -> str: ...
    def counted(self, parts: Iterable[Mapping[str, int]], /) -> dict[str, int]: ...
    def texts(self, part: NodePart, counts: dict[str, int], /) -> Iterator[NodeText]: ...


def embed_nodes(
    out: Path,
    model: Model,
    source: Source,
    device: torch.device,
    *,
    tokens: int,
    pool: Pool,
    key: str,
    origin: dict | None = None,
) -> dict[str, int] | None:
    """Write the embeddings of all nodes as parquet, with rows in the order of (subject, time).

    Other processes that do the same at the same time share the work. Parts lie in the folder
    `out`.parts until the file is there.

    Args:
        tokens: see `embed_tasks`.
        key: a digest of the model, the nodes and all else that the bytes depend on but the data.
        origin: what stands in the metadata of the file.

    Returns:
        The counts of nodes and of what was lost; None where the same embeddings were there, or
        another process has written them.

    Raises:
        ValueError: there is no node, a model gives states that are not finite, another process
            embeds something else to the same file, or the data have changed since they were opened.
            No file is written then.
        RunFailed: somebody has removed the parts.
    """
    request = {"key": key, "data": source.state()}
    with ExitStack() as stack:
        file = stack.enter_context(embedding_file(out, source.nodes))
        folder = stack.enter_context(part_folder(parts_of(out), request, len(source.parts)))
        if read_request(out) == request:
            folder.is_over = True
            return None
        embed_parts(folder, source, {"": (model, [pool])}, device, tokens=tokens)
        with folder.finishing() as mine:
            if not mine:  # the parts have gone: into the file, or because they were removed
                _require_written(out, request)
                return None
            counts = source.counted(folder.counts())
            try:
                folder.fill({("", pool): file})
                file.write(origin, request)
            except ValueError:  # nothing can be embedded
                folder.remove()
                raise
            folder.remove()
            return counts


def embed_parts(
    folder: "PartFolder",
    source: Source,
    models: Models,
    device: torch.device,
    *,
    tokens: int,
    numbers: Sequence[int] | None = None,
    commits: bool = True,
) -> None:
    """Embed parts that nobody else embeds, and return when all are there.

    Args:
        models: by a name of their own, each with its pools.
        tokens: see `embed_tasks`.
        numbers: the parts to embed, in this order and whoever else does it, of processes that hold
            a model together and so must run the same forwards. None claims them.
        commits: whether this process writes what it has embedded.
    """
    work = _Work(folder, source, models, numbers, commits=commits)
    try:
        embed_tasks(
            work.tasks(), device, tokens=tokens, stopped=work.stopped, progress=work.progress
        )
    finally:
        work.close()


def parts_of(out: Path) -> Path:
    """Return the folder of the parts of a file."""
    out = Path(out)
    return out.with_name(f"{out.name}.parts")


class PartFolder:
    """The parts that are there; see `part_folder`."""

    def __init__(self, path: Path, num_parts: int, of: str = "") -> None:
        self.path, self.num_parts = path, num_parts
        self._of = of  # a digest of the request: where there are no locks, nobody refuses another
        self.is_over = False  # whether the parts are needed no more

    def has(self, number: int) -> bool:
        """Whether a part is there."""
        return self._file(number).exists()

    def done(self) -> set[int]:
        """Return the numbers of all parts that are there."""
        with suppress(FileNotFoundError):  # the folder goes away when all is done
            names = [e.name for e in os.scandir(self.path)]
            return {int(n.partition(".")[0]) for n in names if _NAME.fullmatch(n)}
        return set()

    def is_open(self) -> bool:
        """Whether the parts are still to become a file."""
        return (self.path / KEY).exists()

    def write(
        self, number: int, rows: Mapping[tuple[str, Pool], EmbeddingRows], counts: dict[str, int]
    ) -> None:
        """Commit a part: its embeddings by name of the model and pool, and what was counted."""
        columns: dict[str, pa.Array] = {}
        for (name, pool), own in rows.items():
            index_M, value_MD = own.written()
            columns["node"] = pa.array(index_M)
            if len(index_M):
                flat = pa.array(value_MD.ravel())
                vectors = pa.FixedSizeListArray.from_arrays(flat, value_MD.shape[1])
                columns[f"{name}/{pool}"] = vectors
        table = pa.table(columns).replace_schema_metadata(
            {"counts": json.dumps(counts), "of": self._of}
        )
        with committed_file(self._file(number), private=True) as staging:
            put_arrow(staging, table)

    def counts(self) -> list[dict[str, int]]:
        """Return what was counted in each part, whoever embedded it."""
        tables = (self._read(number) for number in range(self.num_parts))
        return [json.loads(table.schema.metadata[b"counts"]) for table in tables]

    def fill(
        self, files: Mapping[tuple[str, Pool], EmbeddingFile], place_K: np.ndarray | None = None
    ) -> None:
        """Put the embeddings of all parts into files, by name of the model and pool.

        Args:
            place_K: int64, where the nodes of the parts are among those of the files, if these have
                others too.
        """
        for number in range(self.num_parts):
            table = self._read(number)
            index_M = table["node"].to_numpy()
            if not len(index_M):
                continue
            if place_K is not None:
                index_M = place_K[index_M]
            for (name, pool), file in files.items():
                column = table[f"{name}/{pool}"].combine_chunks()
                file.put(index_M.tolist(), column.values.to_numpy().reshape(len(index_M), -1))

    @contextmanager
    def finishing(self) -> Iterator[bool]:
        """Yield whether this process is to make the file; others wait until it is there."""
        with claimed(self.path, _LAST) as mine:
            if mine:
                yield self.is_open()
                return
        _say(f"all parts are there; another process writes the file of {self.path}")
        with claimed(self.path, _LAST, wait=True):
            yield self.is_open()  # if that process was killed

    def remove(self) -> None:
        """Remove all parts. The folder itself goes when the last process leaves it."""
        with claimed(self.path, _FIRST, wait=True):
            _remove(self.path)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:06d}.arrow"

    def _read(self, number: int) -> pa.Table:
        table = map_arrow(self._file(number), _is_part)
        is_ours = table is not None and table.schema.metadata[b"of"] == self._of.encode()
        if table is None or not is_ours or not table.num_columns:
            self._file(number).unlink(missing_ok=True)
            what = "was damaged" if table is None else "is of another model or other nodes"
            raise ValueError(
                f"{self._file(number)} must hold embeddings; it {what} and is removed. The same "
                "command makes it again"
            )
        return table


def _is_part(schema: pa.Schema) -> bool:
    """Return whether a file has the columns of `PartFolder.write`, none if it has no model."""
    kinds = {field.name: field.type for field in schema}
    vectors = [kind for name, kind in kinds.items() if name != "node"]
    return (
        (schema.metadata or {}).keys() >= {b"counts", b"of"}
        and len(kinds) == len(schema)
        and (not kinds or kinds.get("node") == pa.int64())
        and all(
            pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
            for kind in vectors
        )
    )


@contextmanager
def part_folder(path: Path, request: dict[str, str], num_parts: int) -> Iterator[PartFolder]:
    """Open the folder of parts of a request, together with other processes of the same one.

    Parts of another request are removed, if no process is at work on them. A folder in which no
    part was done is removed at the end.

    Args:
        request: `key`, a digest of all that the parts depend on but the data, and `data`.

    Raises:
        ValueError: another process is at work there with another request, or with the same on other
            data.
    """
    path, record = Path(path), {"format": _FORMAT, "parts": num_parts, **request}
    folder = PartFolder(path, num_parts, digest_of(record))
    me = f"{_HERE}{holder()['host']} {os.getpid()} {secrets.token_hex(4)}"
    try:
        with ExitStack() as stack:
            with claimed(path, _FIRST, wait=True):
                _begin(folder, record)
                stack.enter_context(claimed(path, me))
            yield folder
    finally:
        with claimed(path, _FIRST, wait=True):
            if (folder.is_over or not folder.done()) and not _others(path):
                _remove(path)
        with suppress(OSError):
            path.rmdir()


def _begin(folder: PartFolder, record: dict) -> None:
    written = read_json(folder.path / KEY) if folder.is_open() else None
    if written == record:
        if done := len(folder.done()):
            _say(f"{done:,} of {folder.num_parts:,} parts are there already")
        return
    if written is not None:
        same = {**written, "data": None} == {**record, "data": None}
        if _others(folder.path):
            what = (
                "was begun from data that have changed since; stop it, so that all parts are of "
                "the same data"
                if same
                else "embeds something else to the same file; wait for it, stop it, or name "
                "another file"
            )
            raise ValueError(f"{folder.path} is in use: another process {what}")
        why = "the data have changed since" if same else "they are of another model or other nodes"
        _say(f"{folder.path}: its parts are removed, {why}")
    _remove(folder.path)
    write_text(folder.path / KEY, json.dumps(record))


def _others(path: Path) -> bool:
    """Whether any process is at work in a folder."""
    for file in (path / CLAIMS).glob("*.lock"):
        name = unquote(file.stem)
        if name.startswith(_HERE):
            with claimed(path, name) as free:
                if not free:
                    return True
    return False


def _remove(path: Path) -> None:
    """Remove the key, all parts, and what killed processes have left."""
    with suppress(FileNotFoundError):
        (path / KEY).unlink()
    with staged(path / KEY):  # it clears what others have left half-written
        pass
    for entry in list(os.scandir(path)):
        if _NAME.fullmatch(entry.name):
            os.unlink(entry.path)
    clear_claims(path)


def _require_written(out: Path, request: dict[str, str]) -> None:
    if read_request(out) != request:
        raise RunFailed(
            f"{parts_of(out)} was removed before {out} was written: by hand, or by another process "
            "that could not write it; the same command begins again"
        )


def _say(words: str) -> None:
    print(f"smbfast.embed: {words}", file=sys.stderr, flush=True)


class _Work:
    """The parts that this process claims, one after the other."""

    def __init__(
        self,
        folder: PartFolder,
        source: Source,
        models: Models,
        numbers: Sequence[int] | None,
        *,
        commits: bool,
    ) -> None:
        self.stopped = Event()
        self._given, self._commits = numbers, commits
        self._folder, self._source, self._models = folder, source, models
        self._claims: dict[int, ExitStack] = {}
        self._own: set[int] = set()
        self._seen = folder.done()
        left = sum(len(p.index_M) for n, p in enumerate(source.parts) if n not in self._seen)
        self._progress = Progress("smbfast.embed", left * len(models), "embeddings")
        self._looked = time.monotonic()

    def tasks(self) -> Iterator[Task]:
        """Yield the parts, each when it is claimed."""
        for number in self._numbers() if self._given is None else self._given:
            part, counts = self._source.parts[number], dict[str, int]()
            rows = {
                (name, pool): EmbeddingRows(part.index_M)
                for name, (_, pools) in self._models.items()
                for pool in pools
            }
            sinks = [
                ({pool: rows[name, pool] for pool in pools}, model)
                for name, (model, pools) in self._models.items()
            ]
            done = partial(self._commit, number, rows, counts)
            yield Task(sinks, self._source.texts(part, counts), done)

    def progress(self, count: int) -> None:
        """Count embeddings as done, now and then also those of other processes."""
        if time.monotonic() - self._looked > SECONDS:
            self._looked = time.monotonic()
            new = self._folder.done() - self._seen - self._own
            self._seen |= new
            count += sum(len(self._source.parts[n].index_M) for n in new) * len(self._models)
        self._progress.add(count)

    def close(self) -> None:
        """Let all claims go."""
        self.stopped.set()
        for claim in self._claims.values():
            claim.close()

    def _commit(
        self,
        number: int,
        rows: Mapping[tuple[str, Pool], EmbeddingRows],
        counts: dict[str, int],
    ) -> None:
        if self._commits:
            self._folder.write(number, rows, counts)
        if number in self._claims:
            self._claims.pop(number).close()

    def _numbers(self) -> Iterator[int]:
        """Yield parts that are claimed, until all are there or claimed by this process.

        A process goes on with the part that follows in the data; where that is taken, it begins
        again in the middle of the longest stretch that is free. So each reads files of its own.
        """
        taken, last, waits, free = set[int](), -1, False, self._left()
        while not self.stopped.is_set():
            if free:
                number = _next(free, last, shared=bool(taken) or waits)
                free.discard(number)
                if self._claim(number):
                    last = number
                    yield number
                    continue
                taken.add(number)
                last, free = -1, self._left() - taken
            elif taken:
                taken, free = set(), self._left()
                if free and not waits:
                    _say(f"other processes have the last {len(free):,} parts; waiting for them")
                    waits = True
                self.stopped.wait(_POLL)
            elif not (free := self._left()):
                return

    def _left(self) -> set[int]:
        """Return parts that are neither there nor claimed by this process."""
        done = self._folder.done()
        if not self._folder.is_open():  # another process has made the file of them
            return set()
        return set(range(self._folder.num_parts)) - done - self._own

    def _claim(self, number: int) -> bool:
        claim = ExitStack()
        mine = claim.enter_context(claimed(self._folder.path, str(number)))
        if not mine or self._folder.has(number) or not self._folder.is_open():
            claim.close()
            return False
        self._claims[number] = claim
        self._own.add(number)
        return True


def _next(free: set[int], last: int, *, shared: bool) -> int:
    """Return the part behind the last one; where that is not free, one of the longest stretch.

    Args:
        shared: whether others are at work: they come from the left, so it is the one in the middle.
    """
    if last + 1 in free and last >= 0:
        return last + 1
    ordered_F = np.sort(np.fromiter(free, np.int64, len(free)))
    stretches = np.split(ordered_F, np.flatnonzero(np.diff(ordered_F) > 1) + 1)
    longest = max(stretches, key=len)
    return int(longest[len(longest) // 2 if shared else 0])
