"""The classes of what is to come: the tokens or codes that ten training subjects have.

They are found when data are prepared. The names are private, as are the shards that they are of;
what a log or a report may show is their number.

Legend: K classes, or ids of `line_code_L`; L lines, C ids of a shard's lines.
"""

import json
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from smbfast.base.files import committed_file, digest_of, read_json
from smbfast.batch import Timeline
from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.shards import MOST_MAPS, Shard

_EVENTS = ("code", "bin", "value")  # kinds of tokens; the others say nothing of what happened


class SubjectCounts:
    """Counts in how many timelines each id of `line_code_L` occurs."""

    def __init__(self) -> None:
        self._num_K = np.zeros(0, np.int64)

    def add(self, codes: Sequence[np.ndarray]) -> None:
        """Count the lines of more timelines, int32 from 0, each timeline's in an array."""
        if not codes:
            return
        owner_L = np.repeat(np.arange(len(codes)), [len(code_L) for code_L in codes])
        key_L = np.sort((owner_L << 32) | np.concatenate(codes))
        new_L = np.ones(len(key_L), bool)
        new_L[1:] = key_L[1:] != key_L[:-1]
        num_K = np.bincount(key_L[new_L] & 0xFFFFFFFF, minlength=len(self._num_K))
        num_K[: len(self._num_K)] += self._num_K
        self._num_K = num_K

    def result(self) -> np.ndarray:
        """Return the ids that occur, ascending, each with its number of timelines, int64 [K, 2]."""
        id_K = np.flatnonzero(self._num_K)
        return np.stack([id_K, self._num_K[id_K]], 1)


class CodeClasses:
    """The classes, those of most subjects first, and the way from a line to its class."""

    def __init__(self, names: Iterable[str], ids: np.ndarray | None = None) -> None:
        """Number the classes from 0 in the order in which they are given.

        Args:
            names: of the tokens or codes.
            ids: what stands in `line_code_L` for each, int [K]; None where that is a place among
                the codes of the shard, or of `names` for timelines in memory.
        """
        self.names = tuple(names)
        self._ids = None if ids is None else np.asarray(ids, np.int64)
        self._class_of = {name: k for k, name in enumerate(self.names)}
        self._tables: OrderedDict[Path | None, np.ndarray] = OrderedDict()  # by shard
        self._lock = Lock()

    @classmethod
    def of_counts(
        cls, names: Sequence[str], subjects_K: np.ndarray, most: int, ids: np.ndarray | None = None
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

    @classmethod
    def of_shards(
        cls, shards: Iterable[Shard], vocabulary: CodeVocabulary | None, most: int
    ) -> "CodeClasses":
        """Choose the classes by the counts in shards of the train split.

        Args:
            vocabulary: of the format codes, whose events' tokens are the classes; None for text,
                whose codes are.
            most: the largest number of classes (`data.max_codes`).
        """
        total: Counter[str | int] = Counter()
        for shard in shards:
            id_K, subjects_K = shard.subjects_of_codes().T.tolist()
            codes = shard.codes() if vocabulary is None else []
            for own, num in zip(id_K, subjects_K, strict=True):
                total[codes[own] if vocabulary is None else own] += num
        if vocabulary is None:
            names = [str(code) for code in total]
            return cls.of_counts(names, np.array([*total.values()], np.int64), most)
        first, tokens = vocabulary.first_id, vocabulary.tokens
        ids = [int(own) for own in sorted(total) if tokens[int(own) - first].kind in _EVENTS]
        names, subjects = [tokens[own - first].name for own in ids], [total[own] for own in ids]
        return cls.of_counts(names, np.array(subjects, np.int64), most, np.array(ids, np.int64))

    @classmethod
    def read(cls, file: Path, digest: str) -> "CodeClasses":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or damaged, or holds other classes than those expected.
        """
        content = read_json(file)
        try:
            ids = content["ids"]
            classes = cls(content["names"], None if ids is None else np.array(ids, np.int64))
        except (KeyError, TypeError, ValueError, OverflowError):
            classes = None
        if classes is None or classes.digest != digest:
            raise ValueError(
                f"{file} must hold the classes that belong to these shards; it is damaged or "
                "of other shards. Prepare the data again, into another folder"
            )
        return classes

    def save(self, file: Path) -> None:
        """Write the classes as JSON, atomically, in a file that is 0600."""
        ids = None if self._ids is None else self._ids.tolist()
        with committed_file(file, private=True) as staging:
            staging.write_text(json.dumps({"names": self.names, "ids": ids}), encoding="utf-8")

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
        key = shard.path if self._ids is None and isinstance(shard, Shard) else None
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
        if self._ids is None and isinstance(shard, Shard):
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
