"""Writes embeddings that come in any order as parquet in the order of their nodes.

Each embedding goes to its place in an unnamed file, which the system removes however the process
ends. At the end that file is copied to parquet a part at a time. So memory does not grow with the
number of nodes, and the parquet file appears whole or not at all.

Legend: K nodes, M nodes of a call, N label rows, D width.
"""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.counts import few
from smbfast.base.files import committed_file
from smbfast.base.ours import require_embeddings
from smbfast.base.replace import make_folder
from smbfast.data.nodes import SPLIT_NAMES, Nodes
from smbfast.probing.features import Features, Rows, join

METADATA = b"smbfast"  # the key of the file's metadata under which its origin stands, as JSON
REQUEST = b"smbfast_request"  # and that under which stands what it was asked for by
_PART = 1 << 24  # bytes of embeddings that are copied at once: a row group


def read_origin(path: Path) -> dict[str, Any] | None:
    """Return what the embeddings of a file come from, or None where the file does not say."""
    written = (pq.read_schema(path).metadata or {}).get(METADATA)
    return None if written is None else json.loads(written)


def read_request(path: Path) -> dict[str, str] | None:
    """Return by which request a file was written, or None where there is none that says so."""
    if not Path(path).is_file():
        return None
    written = (pq.read_schema(path).metadata or {}).get(REQUEST)
    return None if written is None else json.loads(written)


class EmbeddingRows:
    """Embeddings of the nodes `index_M`, int64 ascending, in memory."""

    def __init__(self, index_M: np.ndarray) -> None:
        self._index_M = index_M
        self._written_M = np.zeros(len(index_M), bool)
        self._value_MD = np.empty((0, 0), np.float32)

    def put(self, index_M: list[int], values_MD: np.ndarray) -> None:
        """Store the embeddings of the nodes `index_M`, which are among these.

        Raises:
            ValueError: if one is not finite.
        """
        rows_MD = _checked(values_MD)
        if not self._value_MD.size:
            self._value_MD = np.empty((len(self._written_M), rows_MD.shape[1]), np.float32)
        at_M = np.searchsorted(self._index_M, index_M)
        self._value_MD[at_M] = rows_MD
        self._written_M[at_M] = True

    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the nodes that have an embedding, int64 [M], and those, float32 [M, D]."""
        at_M = np.flatnonzero(self._written_M)
        return self._index_M[at_M], self._value_MD[at_M] if len(at_M) else self._value_MD


class EmbeddingTable(EmbeddingRows):
    """Embeddings in memory, for as many nodes as fit there."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(np.arange(len(nodes.subject_K)))
        self._nodes = nodes

    def table(self, origin: dict | None = None) -> pa.Table:
        """Return what a file of the same embeddings would hold.

        Raises:
            ValueError: if no node has an embedding.
        """
        index_M, value_MD = self.written()
        _require_one(index_M, len(self._nodes.subject_K))
        columns = _columns(self._nodes, index_M, value_MD)
        return pa.table(columns, _schema(value_MD.shape[1], origin))


class EmbeddingFile:
    """Embeddings on their way into a parquet file."""

    def __init__(self, path: Path, nodes: Nodes, unnamed: BinaryIO) -> None:
        self.path, self._nodes, self._unnamed = path, nodes, unnamed
        self._written_K = np.zeros(len(nodes.subject_K), bool)
        self._width = 0

    def put(self, index_M: list[int], values_MD: np.ndarray) -> None:
        """Store the embeddings of the nodes `index_M`.

        Raises:
            ValueError: if one is not finite.
        """
        rows_MD = _checked(values_MD)
        self._width = rows_MD.shape[1]
        for index, row_D in zip(index_M, rows_MD, strict=True):
            done = os.pwrite(self._unnamed.fileno(), row_D.data, index * row_D.nbytes)
            if done != row_D.nbytes:  # a full disk takes a part of a row without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._written_K[index_M] = True

    def write(self, origin: dict | None = None, request: dict[str, str] | None = None) -> None:
        """Write all nodes that have an embedding, with page checksums and private to the user.

        Args:
            origin: what the embeddings come from, as JSON values: it becomes metadata of the file.
            request: what tells the same request again, see `read_request`.

        Raises:
            ValueError: if no node has one.
        """
        _require_one(np.flatnonzero(self._written_K), len(self._written_K))
        with committed_file(self.path, private=True) as staging:
            schema = _schema(self._width, origin, request)
            with pq.ParquetWriter(staging, schema, write_page_checksum=True) as writer:
                for columns_M in self._parts():
                    writer.write_table(pa.table(columns_M, schema))

    def features(self, subject_N: np.ndarray, time_N: np.ndarray) -> tuple[np.ndarray, Features]:
        """Return which label rows have an embedding so far, bool [N], and the embeddings of these.

        They are float64 [N, D], or `Rows` of the unnamed file where they would take too much.

        Raises:
            ValueError: if no node has one.
        """
        _require_one(np.flatnonzero(self._written_K), len(self._written_K))
        nodes = self._nodes
        node_N = join(subject_N, time_N, nodes.subject_K, nodes.time_K)
        has_N = (node_N >= 0) & self._written_K[node_N]
        shape_KD = len(nodes.subject_K), self._width
        os.ftruncate(self._unnamed.fileno(), 4 * shape_KD[0] * shape_KD[1])  # to its whole length
        rows = Rows(np.memmap(self._unnamed, np.float32, "r", shape=shape_KD), node_N[has_N])
        return has_N, rows.at_hand()

    def _parts(self) -> Iterator[list[pa.Array]]:
        """Yield the columns of successive nodes that have an embedding."""
        nodes, nbytes = self._nodes, 4 * self._width
        size = max(_PART // nbytes, 1)
        for first in range(0, len(self._written_K), size):
            index_M = first + np.flatnonzero(self._written_K[first : first + size])
            if not len(index_M):
                continue
            held = os.pread(self._unnamed.fileno(), size * nbytes, first * nbytes)
            values_MD = np.frombuffer(held, np.float32).reshape(-1, self._width)[index_M - first]
            yield _columns(nodes, index_M, values_MD)


def _checked(values_MD: np.ndarray) -> np.ndarray:
    if not np.isfinite(values_MD).all():
        raise ValueError("embeddings must be finite; this model gives NaN or infinite states")
    return np.ascontiguousarray(values_MD, np.float32)


def _require_one(index_M: np.ndarray, num_asked: int) -> None:
    if not len(index_M):
        raise ValueError(
            "no decision node can be embedded: its subject must be in the data and have an event "
            f"by its time; {few(num_asked)} asked for, none with both"
        )


def _schema(width: int, origin: dict | None, request: dict[str, str] | None = None) -> pa.Schema:
    columns = {"subject_id": pa.int64(), "prediction_time": pa.timestamp("us")}
    vector = pa.list_(pa.float32(), width)
    schema = pa.schema({**columns, "split": pa.string(), "embedding": vector})
    said = {METADATA: origin, REQUEST: request}
    metadata = {key: json.dumps(value) for key, value in said.items() if value is not None}
    return schema.with_metadata(metadata) if metadata else schema


def _columns(nodes: Nodes, index_M: np.ndarray, values_MD: np.ndarray) -> list[pa.Array]:
    split_M = pa.DictionaryArray.from_arrays(nodes.split_K[index_M], list(SPLIT_NAMES))
    return [
        pa.array(nodes.subject_K[index_M]),
        pa.array(nodes.time_K[index_M].astype("datetime64[us]")),
        split_M.cast(pa.string()),
        pa.FixedSizeListArray.from_arrays(pa.array(values_MD.ravel()), values_MD.shape[1]),
    ]


@contextmanager
def embedding_file(path: Path, nodes: Nodes) -> Iterator[EmbeddingFile]:
    """Yield a file to fill with embeddings of `nodes`, which are in order; `write` ends it.

    Raises:
        OSError: if the folder of `path` cannot be written, before anything is computed for it.
        ValueError: if there is a file of others at `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    require_embeddings(path)
    make_folder(path.parent)
    with tempfile.TemporaryFile(dir=path.parent) as unnamed:
        yield EmbeddingFile(path, nodes, unnamed)
