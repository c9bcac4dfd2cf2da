"""The classes of what is to come: the tokens or codes that ten training subjects have.

Legend: K classes, L lines, C ids of a shard's lines.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import numpy as np

from smbfast.base.files import digest_of
from smbfast.batch import Timeline
from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.shards import MOST_MAPS, Shard

Names = Sequence[str]


class CodeClasses:
    """The classes, those of most subjects first, and the way from a line to its class."""

    def __init__(self, names: Iterable[str], ids: np.ndarray | None = None) -> None:
        """Number the classes from 0 in the order in which they are given.

        Args:
            names: of the tokens or codes.
            ids: what stands in `line_code_L` for each, int [K]; None where that is a place in the
                list of codes of the shard.
        """
        self.names = tuple(names)
        self._ids = None if ids is None else np.asarray(ids, np.int64)
        self._class_of = {name: k for k, name in enumerate(self.names)}
        self._tables: OrderedDict[Any, np.ndarray] = OrderedDict()
        self._lock = Lock()

    @classmethod
    def of_counts(
        cls, names: Names, subjects_K: np.ndarray, most: int, ids: np.ndarray | None = None
    ) -> "CodeClasses":
        """Choose the classes: what ten subjects have, most subjects first, ties by name.

        Args:
            names: of tokens or codes.
            subjects_K: the number of training subjects that have each, int.
            most: the largest number of classes.
            ids: as in `__init__`.
        """
        enough = [k for k, num in enumerate(subjects_K.tolist()) if num >= MIN_SUBJECTS]
        enough.sort(key=lambda k: (-int(subjects_K[k]), names[k]))
        chosen = enough[:most]
        return cls([names[k] for k in chosen], None if ids is None else ids[chosen])

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    @property
    def digest(self) -> str:
        """A digest that changes when a class or its number does."""
        return digest_of(list(self.names), None if self._ids is None else self._ids.tolist())

    def of_lines(self, shard: Shard | list[Timeline], code_L: np.ndarray) -> np.ndarray:
        """Return the class of each line, int32 [L], -1 for lines without one.

        Args:
            shard: that the lines are of.
            code_L: `line_code_L` of some of its lines.
        """
        table_C = self._table(shard)
        known_L = (code_L >= 0) & (code_L < len(table_C))
        return np.where(known_L, table_C[np.where(known_L, code_L, 0)], np.int32(-1))

    def _table(self, shard: Shard | list[Timeline]) -> np.ndarray:
        """Return the class of each id that a shard's lines may have, int32 [C], C at least 1."""
        by_name = self._ids is None and isinstance(shard, Shard)
        key = shard.path if by_name and isinstance(shard, Shard) else None
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        if by_name and isinstance(shard, Shard):
            table_C = np.array([*(self._class_of.get(c, -1) for c in shard.codes()), -1], np.int32)
        else:
            ids = np.arange(self.num_classes) if self._ids is None else self._ids
            table_C = np.full(int(ids.max(initial=-1)) + 2, -1, np.int32)
            table_C[ids] = np.arange(self.num_classes)
        with self._lock:
            self._tables[key] = table_C
            while len(self._tables) > MOST_MAPS:
                self._tables.popitem(last=False)
        return table_C
