"""Reads what a probe needs: embeddings and oracle scores, joined to labels by subject and time.

Shape suffixes: N label rows, M embedding rows, K rows to join with, D embedding width, S distinct
subjects, T distinct times, C rows of a chunk.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy.sparse import csr_matrix

from smbfast.base.counts import few, of_whole
from smbfast.data.labels import Labels, integer_column, key_table, time_column
from smbfast.data.nodes import SPLIT_NAMES, Nodes
from smbfast.data.parquet import column_names, is_text, open_parquet
from smbfast.data.splits import SPLITS

_HELD = 1 << 28  # bytes of embeddings in memory; more of them lie in a file: our choice
_CHUNK = 1 << 26  # bytes of embeddings that are read at once
_CACHED = 1 << 22  # bytes of a chunk that two products pass over: a third of the time of 64 MiB


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that lies in a file, which a fit reads in chunks.

    matrix_MD: float32, memory-mapped; row_N: int64, the rows of it that these are.
    """

    matrix_MD: np.ndarray
    row_N: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and of columns."""
        return len(self.row_N), self.matrix_MD.shape[1]

    @property
    def size(self) -> int:
        """The number of elements."""
        return len(self.row_N) * self.matrix_MD.shape[1]

    def __getitem__(self, chosen_N: np.ndarray) -> "Rows":
        """Return the chosen rows (indices or a mask); nothing is read."""
        return Rows(self.matrix_MD, self.row_N[chosen_N])

    def at_hand(self) -> "np.ndarray | Rows":
        """Return the rows in memory, float64 [N, D], or these where they would take too much."""
        if 4 * self.size > _HELD:
            return self
        return self.matrix_MD[self.row_N].astype(np.float64)

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield which rows of these, and their values in float64 [C, D]."""
        for part in parts(self.shape, _CACHED):
            row_C = self.row_N[part]
            first, last = int(row_C[0]), int(row_C[-1]) + 1
            # rows that follow one another need no copy before they are made float64
            run = last - first == len(row_C) and bool((np.diff(row_C) == 1).all())
            own_CD = self.matrix_MD[first:last] if run else self.matrix_MD[row_C]
            yield part, own_CD.astype(np.float64)


@dataclass(frozen=True)
class Gapped:
    """Sparse features of two kinds: what is absent is 0 in the first columns and unknown, nan, in
    the others.

    count_NF, value_NG: csr float64, without a pair of row and column twice; values may be 0.
    """

    count_NF: csr_matrix
    value_NG: csr_matrix

    @property
    def shape(self) -> tuple[int, int]:
        """The number of rows and of columns."""
        return self.count_NF.shape[0], self.count_NF.shape[1] + self.value_NG.shape[1]

    @property
    def size(self) -> int:
        """The number of elements, those that are absent with them."""
        return self.shape[0] * self.shape[1]

    def __getitem__(self, chosen_N: np.ndarray) -> "Gapped":
        """Return the chosen rows (indices or a mask)."""
        return Gapped(self.count_NF[chosen_N], self.value_NG[chosen_N])

    def toarray(self) -> np.ndarray:
        """Return float64 [N, F + G], nan where a value is absent."""
        num_rows, num_values = self.value_NG.shape
        value_NG = np.full((num_rows, num_values), np.nan)
        row_E = np.repeat(np.arange(num_rows), np.diff(self.value_NG.indptr))
        value_NG[row_E, self.value_NG.indices] = self.value_NG.data
        return np.hstack([self.count_NF.toarray(), value_NG])

    def commonest(self, row_R: np.ndarray, most: int) -> "Gapped":
        """Return the `most` columns that are not absent in most of the given rows, in their order;
        of equal ones the first."""
        size_F, size_G = (
            np.bincount(own[row_R].indices, minlength=own.shape[1])
            for own in (self.count_NF, self.value_NG)
        )
        chosen = np.sort(np.argsort(-np.concatenate([size_F, size_G]), kind="stable")[:most])
        of_counts = chosen < len(size_F)
        value_G = chosen[~of_counts] - len(size_F)
        return Gapped(self.count_NF[:, chosen[of_counts]], self.value_NG[:, value_G])


Features: TypeAlias = np.ndarray | csr_matrix | Rows | Gapped


def parts(shape: tuple[int, int], most: int = _CHUNK) -> Iterator[slice]:
    """Yield successive rows of a matrix of this shape, of which `most` bytes are held at once in
    float64."""
    size = max(most // (8 * max(shape[1], 1)), 1)
    for first in range(0, shape[0], size):
        yield slice(first, min(first + size, shape[0]))


def dense(feature_NF: Features, row_C: np.ndarray) -> np.ndarray:
    """Return rows of features of any kind in memory, float64 [C, F]; nan = unknown."""
    if isinstance(feature_NF, Rows):
        return feature_NF.matrix_MD[feature_NF.row_N[row_C]].astype(np.float64)
    chosen = feature_NF[row_C]
    return np.asarray(chosen if isinstance(chosen, np.ndarray) else chosen.toarray(), np.float64)


@dataclass(frozen=True)
class Embeddings:
    """One row per decision node: subject_M int64, time_M int64 microseconds, split_M str ("" where
    it is unknown), embedding_MD float32, all finite; no node twice. Where embedding_MD would take
    more than `_HELD` bytes it is a memory map."""

    path: Path
    subject_M: np.ndarray
    time_M: np.ndarray
    split_M: np.ndarray
    embedding_MD: np.ndarray

    def features(self, row_N: np.ndarray) -> np.ndarray | Rows:
        """Return the embeddings of rows, float64 [N, D], or `Rows` where they lie in a file."""
        if isinstance(self.embedding_MD, np.memmap):
            return Rows(self.embedding_MD, row_N)
        return self.embedding_MD[row_N].astype(np.float64)


def read_embeddings(path: Path, nodes: Nodes | None = None) -> Embeddings:
    """Read the parquet file that `smbfast.embed` writes, or of it the rows of `nodes` alone.

    More than 256 MiB of embeddings go into an unnamed file in the same folder, which the system
    removes when the process ends: memory then holds the keys, not the embeddings.

    Raises ValueError, naming file and row but no value, for: an unreadable file, a missing or
    mistyped column, a null, NaN or infinite number, an unknown split, a node given twice, no row.
    """
    path = Path(path)
    table = key_table(path, ["split"])
    if len(table) == 0:
        raise ValueError(f"{path} must hold embeddings; it has no row")
    subject_M = integer_column(table, "subject_id", path)
    time_M = time_column(table, "prediction_time", path)
    split_M = _split_names(table.column("split"), path)
    _refuse_repeats(subject_M, time_M, path)
    if nodes is None:
        wanted_M = np.ones(len(table), bool)
    else:
        wanted_M = join(subject_M, time_M, nodes.subject_K, nodes.time_K) >= 0
    embedding_MD = _vectors(path, wanted_M)
    return Embeddings(path, subject_M[wanted_M], time_M[wanted_M], split_M[wanted_M], embedding_MD)


def matched(labels: Labels, embeddings: Embeddings) -> np.ndarray:
    """Return the embedding row of each label row, int64 [N]; -1 where there is none.

    Raises:
        ValueError: no label row has an embedding, or the two disagree on the split of a row.
    """
    row_N = join(labels.subject_N, labels.time_N, embeddings.subject_M, embeddings.time_M)
    matched_N = row_N >= 0
    if not matched_N.any():
        raise ValueError(
            f"{embeddings.path} must hold embeddings of the {few(len(labels))} label rows of "
            f"{labels.task}; it has none of them"
        )
    split_N = embeddings.split_M[row_N[matched_N]]
    wrong = int(np.sum((split_N != labels.split_N[matched_N]) & (split_N != "")))
    if wrong:
        raise ValueError(
            f"{embeddings.path} must have the splits of the labels of {labels.task}; "
            f"{of_whole(wrong, int(matched_N.sum()))} rows have another"
        )
    return row_N


def read_oracle(path: Path, labels: Labels) -> dict[str, np.ndarray]:
    """Read the scores of the two oracles of a simulated task, `bayes_filter` and `latent`, for each
    label row: float64 [N] each, probabilities for a binary task, higher = riskier otherwise.

    Raises:
        ValueError: the file is unreadable, a column is missing, a score is null, not finite or,
            for a binary task, outside 0..1, or a label row has no score.
    """
    names = ["bayes_filter", "latent"]
    table = key_table(path, names)
    subject_K = integer_column(table, "subject_id", path)
    time_K = time_column(table, "prediction_time", path)
    _refuse_repeats(subject_K, time_K, path)
    row_N = join(labels.subject_N, labels.time_N, subject_K, time_K)
    if (row_N < 0).any():
        raise ValueError(
            f"{path} must score every label row of {labels.task}; "
            f"{of_whole(int(np.sum(row_N < 0)), len(labels))} of {few(len(labels))} are missing"
        )
    scores = {}
    for name in names:
        column = table.column(name)
        if column.null_count or not pa.types.is_floating(column.type):
            raise ValueError(
                f"column `{name}` of {path} must be double without nulls, is {column.type} "
                f"with {few(column.null_count)}"
            )
        score_N = column.to_numpy().astype(np.float64)[row_N]
        bad_N = ~np.isfinite(score_N)
        if labels.kind == "binary":
            bad_N |= (score_N < 0) | (score_N > 1)
        if bad_N.any():
            expected = "probabilities" if labels.kind == "binary" else "finite"
            raise ValueError(
                f"column `{name}` of {path} must hold {expected}; "
                f"{of_whole(int(bad_N.sum()), len(bad_N))} rows do not"
            )
        scores[name] = score_N
    return scores


def join(
    subject_N: np.ndarray, time_N: np.ndarray, subject_K: np.ndarray, time_K: np.ndarray
) -> np.ndarray:
    """Return the row in K (no pair twice) of each pair in N, int64 [N]; -1 where it is absent."""
    if len(subject_K) == 0:
        return np.full(len(subject_N), -1, np.int64)
    subject_S, time_T = np.unique(subject_K), np.unique(time_K)
    known_N, pair_N = _pairs(subject_N, time_N, subject_S, time_T)
    _, pair_K = _pairs(subject_K, time_K, subject_S, time_T)
    order_K = np.argsort(pair_K)
    at_N = np.minimum(np.searchsorted(pair_K, pair_N, sorter=order_K), len(pair_K) - 1)
    row_N = order_K[at_N]
    return np.where(known_N & (pair_K[row_N] == pair_N), row_N, -1)


def _pairs(
    subject_N: np.ndarray, time_N: np.ndarray, subject_S: np.ndarray, time_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return whether subject and time are both listed, and one int64 that stands for the two."""
    subject_at_N = np.minimum(np.searchsorted(subject_S, subject_N), len(subject_S) - 1)
    time_at_N = np.minimum(np.searchsorted(time_T, time_N), len(time_T) - 1)
    known_N = (subject_S[subject_at_N] == subject_N) & (time_T[time_at_N] == time_N)
    return known_N, subject_at_N * len(time_T) + time_at_N


def _refuse_repeats(subject_N: np.ndarray, time_N: np.ndarray, path: Path) -> None:
    if len(subject_N) == 0:
        return
    _, pair_N = _pairs(subject_N, time_N, np.unique(subject_N), np.unique(time_N))
    repeats = len(pair_N) - len(np.unique(pair_N))
    if repeats:
        raise ValueError(
            f"{path} must hold each subject and prediction time once; {few(repeats)} rows repeat"
        )


def _split_names(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    if not is_text(column.type):
        raise ValueError(f"column `split` of {path} must be string, is {column.type}")
    names = pa.array(SPLIT_NAMES)
    place_M = pc.index_in(column.cast(pa.string()), names).fill_null(-1).to_numpy()
    if (place_M < 0).any():
        raise ValueError(
            f"column `split` of {path} must be one of {', '.join(SPLITS)}, or empty; "
            f"row {int(np.argmax(place_M < 0))} is not"
        )
    return np.array(SPLIT_NAMES)[place_M]


def _vectors(path: Path, wanted_M: np.ndarray) -> np.ndarray:
    """Return the wanted rows of the column `embedding`, float32; row groups without any of them are
    not read."""
    parquet = open_parquet(path)
    schema = parquet.schema_arrow
    if schema.names.count("embedding") != 1:
        raise ValueError(f"{path} must have one column `embedding`; it has {column_names(schema)}")
    kind = schema.field("embedding").type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)):
        raise ValueError(
            f"column `embedding` of {path} must be fixed_size_list<float32>, is {kind}"
        )
    embedding_MD = _empty(path, int(wanted_M.sum()), kind.list_size)
    size = max(_CHUNK // (4 * kind.list_size), 1)
    row = done = 0
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if wanted_M[row : row + rows].any():
            for values_CD in _group(parquet, path, group, row, size):
                part_C = np.flatnonzero(wanted_M[row : row + len(values_CD)])
                embedding_MD[done : done + len(part_C)] = values_CD[part_C]
                row, done = row + len(values_CD), done + len(part_C)
        else:
            row += rows
    return embedding_MD


def _empty(path: Path, rows: int, width: int) -> np.ndarray:
    if 4 * rows * width <= _HELD:
        return np.empty((rows, width), np.float32)
    folder = path.parent if os.access(path.parent, os.W_OK) else None  # of the embeddings, or tmp
    with tempfile.TemporaryFile(dir=folder) as unnamed:  # the map stays when the file is closed
        return np.memmap(unnamed, np.float32, "w+", shape=(rows, width))


def _group(
    parquet: pq.ParquetFile, path: Path, group: int, row: int, size: int
) -> Iterator[np.ndarray]:
    """Yield the embeddings of a row group, which begins at `row`, in chunks of `size` rows."""
    try:
        for batch in parquet.iter_batches(size, row_groups=[group], columns=["embedding"]):
            yield _checked(batch.column(0), path, row)
            row += len(batch)
    except (pa.ArrowException, OSError):
        raise ValueError(f"{path} is damaged: its pages cannot be read") from None


def _checked(column: pa.FixedSizeListArray, path: Path, row: int) -> np.ndarray:
    name = f"column `embedding` of {path}"
    if column.null_count:
        null = row + int(np.argmax(column.is_null().to_numpy(False)))
        raise ValueError(f"{name} must have no nulls; row {null} is null")
    flat = column.flatten()
    if flat.null_count:
        raise ValueError(f"{name} must hold no null inside a vector")
    values_CD = flat.to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    finite_C = np.isfinite(values_CD).all(1)
    if not finite_C.all():
        raise ValueError(f"{name} must be finite; row {row + int(np.argmin(finite_C))} is not")
    return values_CD
