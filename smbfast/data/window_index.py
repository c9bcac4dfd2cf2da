"""The table of windows on disk: made once for each way to cut timelines into windows, then mapped.

Making it takes memory for a block of timelines, whatever their number. Of the processes that need
the same table at the same time one writes it, the others wait for it.

Legend: W windows, C windows with a cut, N lengths.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from smbfast.base.dividing import in_turn
from smbfast.base.files import committed_file, digest_of, read_json
from smbfast.base.progress import Progress
from smbfast.data.array_file import ArrayFile, ArrayWriter, damaged, make_private
from smbfast.data.code_classes import CodeClasses
from smbfast.data.horizon_counts import counted_pairs
from smbfast.data.horizons import Horizons, PairCounts
from smbfast.data.shards import Shard
from smbfast.data.timelines import Preamble
from smbfast.data.verified import verify_files
from smbfast.data.windows import COLUMNS, ORDERS, Sums, WindowSet, window_columns
from smbfast.settings import ObjectiveSettings

VERSION = 2  # of what a table holds
_SORTED = 1 << 20  # windows whose place in the order of lengths is found together: our choice


def cut_settings(objective: ObjectiveSettings) -> dict:
    """Return the settings of an objective that decide which windows have a cut."""
    return objective.model_dump(mode="json", include={"context", "min_future", "horizon"})


def stored_windows(
    folders: Sequence[Path],
    name: str,
    shards: Sequence[Shard],
    window: int,
    preamble: Preamble,
    objective: ObjectiveSettings,
    stride: int | None,
    horizons: Horizons | None = None,
    classes: CodeClasses | None = None,
) -> WindowSet:
    """Return the table of windows that one of the folders has, or make it in the first that can.

    It is made in memory where none of them can be written. A damaged one is made again.

    Args:
        name: of the file in a folder; everything that the table follows from is in it.
        shards: with the arguments behind them those of `WindowSet.of`.
    """

    def mapped(file: ArrayFile) -> WindowSet:
        arrays: dict[str, Any] = {**file.mapped()}
        arrays["place_W5"] = arrays["place_W5"].reshape(-1, 5)
        arrays |= {"sums": Sums(**file.index), "horizons": horizons, "classes": classes}
        return WindowSet(shards, preamble, window, **arrays)

    cut = window, preamble, objective, stride
    for folder in folders:
        if file := _finished(folder, name):
            return mapped(file)
    for folder in folders:
        try:
            with in_turn(folder, name, "smbfast"):
                if file := _finished(folder, name):  # another process has just written it
                    return mapped(file)
                _write(folder / name, shards, *cut, horizons)
        except OSError:
            continue
        if file := _finished(folder, name):
            return mapped(file)
    return WindowSet.of(shards, *cut, horizons=horizons, classes=classes)


def stored_pairs(
    folders: Sequence[Path], name: str, shards: Sequence[Shard], horizons: Horizons
) -> PairCounts:
    """Return the counts of pairs that one of the folders has, or count them and record them.

    Where none of the folders can be written, the next start counts again. Damaged ones are counted
    again.

    Args:
        name: of the file in a folder; everything that the counts follow from is in it.
    """
    for folder in folders:
        with suppress(ValueError, KeyError, TypeError):
            stored = read_json(folder / name)
            counts = PairCounts.of_record(stored["counts"])
            if stored["digest"] == digest_of(counts.record()):
                return counts
    counts = counted_pairs(_counted(shards, "timelines looked ahead"), horizons)
    record = {"digest": digest_of(counts.record()), "counts": counts.record()}
    for folder in folders:
        with suppress(OSError):
            make_private((folder / name).parent)
            with committed_file(folder / name, private=True) as staging:
                staging.write_text(json.dumps(record), encoding="utf-8")
            break
    return counts


def _finished(folder: Path, name: str) -> ArrayFile | None:
    try:
        file = ArrayFile.open(folder / name)
        verify_files(folder, {name: file.sha256}, [folder])
        _require_table(file)
    except ValueError:
        return None
    return file


def _require_table(file: ArrayFile) -> None:
    """Raise a ValueError unless a file has the columns of a table of windows, and its sums."""
    dtypes = {name: np.dtype(d) for name, d in (COLUMNS | dict.fromkeys(ORDERS, np.int32)).items()}
    num = file.places["length_W"].num if "length_W" in file.places else 0
    sizes = {name: 5 * num if name == "place_W5" else num for name in COLUMNS}
    whole = {name: place.dtype for name, place in file.places.items()} == dtypes
    whole = whole and all(file.places[name].num == size for name, size in sizes.items())
    sums = file.index
    whole = whole and sums.keys() == vars(Sums()).keys()
    if not (whole and all(isinstance(value, int) for value in sums.values())):
        raise damaged(file.path)


def _write(
    path: Path,
    shards: Sequence[Shard],
    window: int,
    preamble: Preamble,
    objective: ObjectiveSettings,
    stride: int | None,
    horizons: Horizons | None,
) -> None:
    sums, cut = Sums(), (window, preamble, objective, stride)
    num_of = {name: np.zeros(0, np.int64) for name in ORDERS}  # windows of each length
    with ArrayWriter(path, COLUMNS | dict.fromkeys(ORDERS, np.int32)) as writer:
        timelines = _counted(shards, "timelines cut into windows")
        for columns in window_columns(timelines, *cut, sums, horizons):
            for name, part in columns.items():
                writer.append(name, part)
            for name, flag in ORDERS.items():
                num_N = num_of[name]
                own_N = np.bincount(columns["length_W"][columns[flag]], minlength=len(num_N))
                own_N[: len(num_N)] += num_N
                num_of[name] = own_N
        for name, num_N in num_of.items():
            _sort_by_length(writer, name, num_N)
        writer.index |= vars(sums)


def _counted(shards: Sequence[Shard], unit: str) -> Iterator[Shard]:
    progress = Progress("smbfast", sum(map(len, shards)), unit)
    for shard in shards:
        yield shard
        progress.add(len(shard))


def _sort_by_length(writer: ArrayWriter, name: str, num_N: np.ndarray) -> None:
    """Write the windows with a flag in the order of their lengths: a counting sort in parts."""
    length_W, flag_W = writer.so_far("length_W"), writer.so_far(ORDERS[name])
    order_C = writer.extend(name, int(num_N.sum()))
    next_N = num_N.cumsum() - num_N  # the place of the next window of each length
    for first in range(0, len(length_W), _SORTED):
        own = first + np.flatnonzero(flag_W[first : first + _SORTED])
        own = own[np.argsort(length_W[own], kind="stable")]
        length = length_W[own]
        own_N = np.bincount(length, minlength=len(num_N))
        rank = np.arange(len(own)) - (own_N.cumsum() - own_N)[length]
        order_C[next_N[length] + rank] = own
        next_N += own_N
