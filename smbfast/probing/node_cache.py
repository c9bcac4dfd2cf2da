"""Embeddings of decision nodes that are asked for again and again, each made once.

They lie in memory, and also in a file where processes share them: it is written whole each time
that nodes are added, by whoever has the claim (`smbfast.base.claims`), and is for the user alone.

Legend: K nodes, M nodes that are added, N rows that are looked up, D width.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smbfast.base.files import committed_file
from smbfast.base.ours import require_embeddings
from smbfast.data.source_index import Stamp, stamp
from smbfast.probing.features import join


class NodeCache:
    """The embeddings of nodes by one model and pool, on one dataset.

    A node that cannot be embedded has a row of NaN: that too is not asked for twice.
    """

    def __init__(self, width: int, file: Path | None = None) -> None:
        """Begin without nodes.

        Args:
            file: where they lie beside memory, and are read from by `refresh`.
        """
        self._subject_K, self._time_K = np.empty(0, np.int64), np.empty(0, np.int64)
        self._value_KD = np.empty((0, width), np.float32)
        self._file = file
        self._seen: Stamp | None = None

    @property
    def nbytes(self) -> int:
        """The bytes of its embeddings in memory."""
        return self._value_KD.nbytes

    def lacks(self, subject_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
        """Return which nodes are not among those of the cache, bool [N]."""
        return join(subject_N, time_N, self._subject_K, self._time_K) < 0

    def rows(self, subject_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
        """Return the embeddings of nodes that it does not lack, float32 [N, D]."""
        return self._value_KD[join(subject_N, time_N, self._subject_K, self._time_K)]

    def add(self, subject_M: np.ndarray, time_M: np.ndarray, value_MD: np.ndarray) -> None:
        """Add nodes, of which those that are there stay as they are, and write the file.

        Args:
            subject_M, time_M: int64, microseconds since 1970; no pair twice.
            value_MD: float32 [M, D], NaN for nodes that cannot be embedded.

        Raises:
            ValueError: a file of others has the name of the cache's.
            OSError: the file cannot be written.
        """
        if self._join(subject_M, time_M, value_MD) and self._file is not None:
            self._write(self._file)

    def refresh(self) -> None:
        """Take in what other processes have written.

        Raises:
            ValueError: the file is damaged or not one of embeddings of this width.
        """
        if self._file is None or not self._file.is_file() or stamp(self._file) == self._seen:
            return
        self._seen = stamp(self._file)
        try:
            table = pq.read_table(self._file, page_checksum_verification=True)
            vector_MD = table["embedding"].combine_chunks().flatten().to_numpy()
            vector_MD = vector_MD.reshape(len(table), self._value_KD.shape[1])
            subject_M = table["subject_id"].to_numpy()
            time_M = table["prediction_time"].cast(pa.int64()).to_numpy()
        except (pa.ArrowException, OSError, KeyError, ValueError, AttributeError):
            raise ValueError(
                f"{self._file} must hold the embeddings that were cached there; it cannot be read "
                "as such. Remove it, and they are made again"
            ) from None
        mine = self._subject_K, self._time_K, self._value_KD
        self._subject_K, self._time_K, self._value_KD = subject_M, time_M, vector_MD
        self._join(*mine)

    def _join(self, subject_M: np.ndarray, time_M: np.ndarray, value_MD: np.ndarray) -> bool:
        """Add the nodes that it lacks; return whether there are such."""
        new_M = self.lacks(subject_M, time_M)
        self._subject_K = np.concatenate([self._subject_K, subject_M[new_M]])
        self._time_K = np.concatenate([self._time_K, time_M[new_M]])
        self._value_KD = np.concatenate([self._value_KD, value_MD[new_M]])
        return bool(new_M.any())

    def _write(self, file: Path) -> None:
        require_embeddings(file)
        width = self._value_KD.shape[1]
        columns = {
            "subject_id": pa.array(self._subject_K),
            "prediction_time": pa.array(self._time_K).cast(pa.timestamp("us")),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(self._value_KD.ravel()), width),
        }
        with committed_file(file, private=True) as staging:
            pq.write_table(pa.table(columns), staging, write_page_checksum=True)
        self._seen = stamp(file)
