"""Reads what a probe needs: embeddings and oracle scores, joined to labels by subject and time.

Shape suffixes: N label rows, M embedding rows, K rows to join with, D embedding width, S distinct
subjects, T distinct times.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from smbfast.data.labels import Labels, integer_column, key_table, time_column
from smbfast.data.splits import SPLITS


@dataclass(frozen=True)
class Embeddings:
    """One row per decision node: subject_M int64, time_M int64 microseconds, split_M str,
    embedding_MD float32, all finite; no node twice."""

    path: Path
    subject_M: np.ndarray
    time_M: np.ndarray
    split_M: np.ndarray
    embedding_MD: np.ndarray


def read_embeddings(path: Path) -> Embeddings:
    """Read the parquet file that `smbfast.embed` writes.

    Raises ValueError, naming file and row but no value, for: an unreadable file, a missing or
    mistyped column, a null, NaN or infinite number, an unknown split, a node given twice, no row.
    """
    path = Path(path)
    table = key_table(path, ["split", "embedding"])
    if len(table) == 0:
        raise ValueError(f"{path} must hold embeddings; it has no row")
    subject_M = integer_column(table, "subject_id", path)
    time_M = time_column(table, "prediction_time", path)
    split_M = np.array(table.column("split").to_pylist(), dtype=object)
    bad_M = ~np.isin(split_M, list(SPLITS))
    if bad_M.any():
        raise ValueError(
            f"column `split` of {path} must be one of {', '.join(SPLITS)}; "
            f"row {int(np.argmax(bad_M))} is not"
        )
    _refuse_repeats(subject_M, time_M, path)
    embedding_MD = _vectors(table.column("embedding"), path)
    return Embeddings(path, subject_M, time_M, split_M.astype("<U16"), embedding_MD)


def matched(labels: Labels, embeddings: Embeddings) -> np.ndarray:
    """Return the embedding row of each label row, int64 [N]; -1 where there is none.

    Raises:
        ValueError: no label row has an embedding, or the two disagree on the split of a row.
    """
    row_N = join(labels.subject_N, labels.time_N, embeddings.subject_M, embeddings.time_M)
    matched_N = row_N >= 0
    if not matched_N.any():
        raise ValueError(
            f"{embeddings.path} must hold embeddings of the {len(labels)} label rows of "
            f"{labels.task}; it has none of them"
        )
    wrong = int(np.sum(embeddings.split_M[row_N[matched_N]] != labels.split_N[matched_N]))
    if wrong:
        raise ValueError(
            f"{embeddings.path} must have the splits of the labels of {labels.task}; "
            f"{wrong} rows have another"
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
            f"{int(np.sum(row_N < 0))} of {len(labels)} are missing"
        )
    scores = {}
    for name in names:
        column = table.column(name)
        if column.null_count or not pa.types.is_floating(column.type):
            raise ValueError(
                f"column `{name}` of {path} must be double without nulls, is {column.type} "
                f"with {column.null_count}"
            )
        score_N = column.to_numpy().astype(np.float64)[row_N]
        bad_N = ~np.isfinite(score_N)
        if labels.kind == "binary":
            bad_N |= (score_N < 0) | (score_N > 1)
        if bad_N.any():
            expected = "probabilities" if labels.kind == "binary" else "finite"
            raise ValueError(
                f"column `{name}` of {path} must hold {expected}; {int(bad_N.sum())} rows do not"
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
            f"{path} must hold each subject and prediction time once; {repeats} rows repeat"
        )


def _vectors(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    kind = column.type
    if not (pa.types.is_fixed_size_list(kind) and pa.types.is_floating(kind.value_type)):
        raise ValueError(
            f"column `embedding` of {path} must be fixed_size_list<float32>, is {kind}"
        )
    if column.null_count:
        raise ValueError(
            f"column `embedding` of {path} must have no nulls; {column.null_count} rows are null"
        )
    chunks = [chunk.flatten() for chunk in column.chunks]
    if any(chunk.null_count for chunk in chunks):
        raise ValueError(f"column `embedding` of {path} must hold no null inside a vector")
    flat = np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks])
    embedding_MD = flat.reshape(len(column), kind.list_size).astype(np.float32)
    finite_M = np.isfinite(embedding_MD).all(1)
    if not finite_M.all():
        raise ValueError(
            f"column `embedding` of {path} must be finite; row {int(np.argmin(finite_M))} is not "
            f"({int(np.sum(~finite_M))} rows in all)"
        )
    return embedding_MD
