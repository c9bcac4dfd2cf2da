"""Finds out which files and subjects of a MEDS folder belong to which split.

There are two layouts: a folder per split, or files of all splits beside the table
`metadata/subject_splits.parquet`; where there are both they must agree. A dataset without either
can be divided by a hash of the subject. MEDS allows further splits than its three; training does
not read their subjects.

Legend: S subjects of a dataset, T rows of the table of splits.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import meds
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from smbfast.data.columns import subject_column
from smbfast.data.parquet import TEXT, open_parquet, read_columns, strings

SPLITS: tuple[str, ...] = (meds.train_split, meds.tuning_split, meds.held_out_split)
UNKNOWN = ""  # the split of subjects that are in none of the three
Fractions = tuple[float, float, float]
_NAMES = {
    **{split: split for split in SPLITS},
    **dict.fromkeys(("val", "valid", "validation", "dev"), meds.tuning_split),
    "test": meds.held_out_split,
}  # what tools other than those of MEDS call the splits
_IDS = tuple(t for t in (pa.int64(), pa.int32(), pa.uint32(), pa.int16(), pa.uint16()))
_KEY = 0x5D588B656C078965  # our choice; other fractions of a dataset move as few subjects as can be


@dataclass(frozen=True)
class Layout:
    """The files of each split; `table`, `fractions` or neither say more of their subjects.

    With `by_folder` a file has subjects of one split; without it, each split has all files.
    `num_unread` is the number of files that lie in the folder of no split and are not read.
    """

    files: dict[str, list[Path]]
    by_folder: bool
    table: Path | None = None
    fractions: Fractions | None = None
    num_unread: int = 0


def find_files(
    path: Path, fractions: Fractions | None = None, *, need_train: bool = True
) -> Layout:
    """Return the files of a dataset and what says the splits of its subjects.

    Args:
        fractions: of train, tuning and held_out, for a dataset without splits.
        need_train: whether there must be splits. Without it, files may lie in `path` itself, and
            those of no known split are in the split "".

    Raises:
        ValueError: there is no parquet file, nothing says the splits, two folders are one split, or
            fractions are given for a dataset that has splits.
    """
    folder = path / "data"
    beside = not need_train and not folder.is_dir()  # files in `path`, beside other folders
    folder = path if beside else folder
    everything = _parquets(folder, "*.parquet" if beside else "**/*.parquet")
    if not everything:
        raise ValueError(
            f"{folder} must hold {{train,tuning,held_out}}/*.parquet; it has no parquet"
            + _other_files(folder)
        )
    table = path / "metadata" / "subject_splits.parquet"
    in_folder = _by_folder(folder, everything)
    has_table, has_folders = table.is_file(), any(in_folder[s] for s in SPLITS)
    if fractions and (has_table or has_folders):
        where = table if has_table else f"the folders of {folder}"
        raise ValueError(
            f"data.split must be left out: {path} has splits of its own, in {where}, which are "
            "never divided anew"
        )
    if has_folders:
        num_unread = len(in_folder.pop(UNKNOWN)) if need_train else 0
        return Layout(in_folder, True, table if has_table else None, num_unread=num_unread)
    if not (has_table or fractions) and not need_train:
        return Layout({UNKNOWN: everything}, True)
    if not (has_table or fractions):
        raise ValueError(
            f"{path} must say the splits of its subjects: there is neither a folder for each "
            f"({', '.join(SPLITS)}) in {folder} nor the table {table}. To divide the subjects by a "
            "hash of their ids, give --data.split=0.8,0.1,0.1 (prepare and probe: --split)"
        )
    names = SPLITS if need_train else (*SPLITS, UNKNOWN)
    return Layout(dict.fromkeys(names, everything), False, table if has_table else None, fractions)


def splits_of(layout: Layout, subject_S: np.ndarray) -> np.ndarray | None:
    """Return the split of each subject as its place in (*SPLITS, UNKNOWN), int8 [S].

    None where files say it (`by_folder`).

    Raises:
        ValueError: the table of splits is bad.
    """
    if layout.by_folder:
        return None
    if layout.table is None:
        assert layout.fractions is not None
        return divided(subject_S, layout.fractions)
    split_S, known_S = _looked_up(layout.table, subject_S)
    return np.where(known_S, split_S, len(SPLITS)).astype(np.int8)


def refuse_contradiction(
    layout: Layout, spans: Mapping[str, Sequence[slice]], subject_S: np.ndarray
) -> None:
    """Refuse folders that say another split of a subject than the table of splits.

    Args:
        spans: where the subjects of each split's files are in `subject_S`.

    Raises:
        ValueError: they contradict each other, or the table is bad.
    """
    if not layout.by_folder or layout.table is None:
        return
    split_S, known_S = _looked_up(layout.table, subject_S)
    names, shown, total = (*SPLITS, "of another name"), [], 0
    for place, split in enumerate(SPLITS):
        mine = [np.bincount(split_S[s][known_S[s]], minlength=4) for s in spans.get(split, ())]
        count = np.sum(mine, axis=0) if mine else np.zeros(4, np.int64)
        total += int(count.sum()) - int(count[place])
        shown += [
            f"{_few(int(n))} of {split} are {name} there"
            for name, n, other in zip(names, count, range(4), strict=True)
            if n and other != place
        ]
    if total:
        raise ValueError(
            f"{layout.table} must say the splits that the folders of the data say; "
            f"{_few(total)} subjects differ: {', '.join(shown)}. Correct or remove one of the two"
        )


def hashed(subject_S: np.ndarray) -> np.ndarray:
    """Return a keyed hash of each subject's id, float64 [S] from 0 up to 1.

    It is the finalizer of SplitMix64 (Steele, Lea and Flood, 2014).
    """
    word_S = subject_S.astype(np.int64).view(np.uint64) ^ np.uint64(_KEY)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word_S = (word_S ^ (word_S >> np.uint64(shift))) * np.uint64(factor)
    word_S ^= word_S >> np.uint64(31)
    return (word_S >> np.uint64(11)).astype(np.float64) * 2.0**-53


def divided(subject_S: np.ndarray, fractions: Fractions) -> np.ndarray:
    """Return the split of each subject by a keyed hash of its id alone, int8 [S].

    A subject of hash h, a fraction of 2^64, is in the first split whose fractions add up to more
    than h.
    """
    fraction_S = hashed(subject_S)
    edges = np.cumsum(fractions)[:-1]
    last = max(place for place, fraction in enumerate(fractions) if fraction)
    return np.minimum(np.searchsorted(edges, fraction_S, side="right"), last).astype(np.int8)


def _looked_up(table: Path, subject_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the split of each subject in a table, its place in (*SPLITS, others), and whether it
    is there at all."""
    id_T, split_T = _read_table(table)
    order_T = np.argsort(id_T, kind="stable")
    id_T, split_T = id_T[order_T], split_T[order_T]
    same_T = id_T[1:] == id_T[:-1]
    if same_T.any():
        row = int(order_T[1:][same_T].min())
        raise ValueError(f"{table} must name each subject once; row {row} names one again")
    if not len(id_T):
        return np.full(len(subject_S), len(SPLITS), np.int8), np.zeros(len(subject_S), bool)
    at_S = np.minimum(np.searchsorted(id_T, subject_S), len(id_T) - 1)
    return split_T[at_S], id_T[at_S] == subject_S


def _read_table(file: Path) -> tuple[np.ndarray, np.ndarray]:
    name = subject_column(open_parquet(file).schema_arrow)
    rows = read_columns(file, {name: _IDS, "split": TEXT})
    for column in rows.column_names:
        if rows[column].null_count:
            row = int(np.argmax(rows[column].is_null().to_numpy()))
            raise ValueError(f"{file}: row {row} must have a `{column}`, it is null")
    encoded = pc.dictionary_encode(rows["split"].cast(pa.large_string())).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.unify_dictionaries().chunk(0)
    names = [str(n) for n in strings(file, encoded.dictionary)]
    _refuse_two_names(file, names)
    known = dict(zip(SPLITS, range(len(SPLITS)), strict=True))
    place = np.array([known.get(_NAMES.get(n, n), len(SPLITS)) for n in names] or [0], np.int8)
    return rows[name].to_numpy().astype(np.int64), place[encoded.indices.to_numpy()]


def folders_of_no_split(path: Path) -> list[str]:
    """Return the names of the folders in `path`/data that are of no split, in their order."""
    folder = path / "data"
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [e.name for e in entries if e.is_dir() and e.name not in _NAMES]


def _other_files(folder: Path) -> str:
    """Return which other files of tables there are, for a message."""
    there = {"".join(p.suffixes[-2:]) for p in folder.rglob("*") if p.is_file()}
    tables = sorted(s for s in there if re.fullmatch(r"(\.csv|\.tsv|\.parquet)(\.\w+)?", s))
    return f" but files of {', '.join(tables)}" if tables else ""


def _by_folder(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Return the files of each split by the folder, or the file itself, that is named after it."""
    files_of: dict[str, list[Path]] = {split: [] for split in (*SPLITS, UNKNOWN)}
    names: list[str] = []
    stems = [file.stem for file in files if file.parent == folder]
    named = all(stem in _NAMES for stem in stems)  # train.parquet beside 0.parquet is no split
    for file in files:
        parts = file.relative_to(folder).parts
        name = parts[0] if len(parts) > 1 else file.stem if named else UNKNOWN
        split = _NAMES.get(name, UNKNOWN)
        files_of[split].append(file)
        if split and name not in names:
            names.append(name)
    _refuse_two_names(folder, names)
    return files_of


def _refuse_two_names(where: Path, names: list[str]) -> None:
    """Two names of one split could be two splits, and which is which cannot be known."""
    for split in SPLITS:
        same = sorted(n for n in names if _NAMES.get(n) == split)
        if len(same) > 1:
            raise ValueError(
                f"{where} must have one name for the split {split}; it has {' and '.join(same)}"
            )


def _few(count: int) -> str:
    return f"{count:,}" if count > 10 else "up to 10"


def _parquets(folder: Path, pattern: str) -> list[Path]:
    """Return the parquet files under a folder in natural order, without hidden ones (`._0.parquet`
    is what macOS writes beside a file)."""

    def natural(file: Path) -> list:
        parts = re.split(r"(\d+)", str(file.relative_to(folder)))
        return [(int(p), "") if p.isdigit() else (-1, p) for p in parts]

    files = [
        file
        for file in folder.glob(pattern)
        if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    return sorted(files, key=natural)
