"""Pieces of work that the processes of a folder divide among them, each done by one of them.

A piece is done when its file is there. Whoever finds a piece neither done nor claimed does it; at
the end everybody waits for what others have claimed, and takes it over if they end before.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smbfast.base.claims import claimed
from smbfast.base.progress import Progress
from smbfast.base.workers import Workers


@dataclass(frozen=True)
class Piece:
    """Work that makes the first of `files`."""

    files: tuple[str, ...]  # names in the folder; it is done when one is there, looked for in order
    size: int  # in the unit of the progress
    args: tuple[Any, ...]  # of the function that does it
    anyway: bool = False  # whether to do it although it is done


def divide(
    folder: Path,
    pieces: Sequence[Piece],
    do: Callable[..., object],
    workers: Workers | None,
    progress: Progress,
) -> None:
    """Do the pieces, with all processes that divide the same ones; each is done when this returns.

    Args:
        folder: that all of them share.
        do: called with the `args` of a piece; a module's function if there are workers.
        workers: processes that do the pieces for this one; None does them here, in order.
        progress: counts the pieces that are done, whoever does them.
    """
    left = [piece for piece in pieces if piece.anyway or not is_done(folder, piece)]
    for wait in (False, True):
        if wait and left:
            where = f"{progress.prog}: waiting for {len(left)} pieces of work"
            print(f"{where} that other processes have begun", file=sys.stderr)
        left = list(_attempted(folder, left, do, workers, progress, wait))


def is_done(folder: Path, piece: Piece) -> bool:
    """Whether one of a piece's files is there."""
    return any((folder / name).exists() for name in piece.files)


@contextmanager
def in_turn(folder: Path, name: str, prog: str) -> Iterator[None]:
    """Run the block when no other process of the folder runs the one of this name."""
    with claimed(folder, name) as mine:
        if mine:
            yield
            return
    print(f"{prog}: waiting for another process, which makes the {name}", file=sys.stderr)
    with claimed(folder, name, wait=True):
        yield


def _attempted(
    folder: Path,
    pieces: Iterable[Piece],
    do: Callable[..., object],
    workers: Workers | None,
    progress: Progress,
    wait: bool,
) -> Iterator[Piece]:
    """Do pieces, and yield those that are left because others have claimed them."""
    where = folder.absolute()
    if workers is None:
        for piece in pieces:
            before = progress.done
            if attempt(where, piece, do, wait):
                progress.add(before + piece.size - progress.done)  # what `do` has not yet counted
            else:
                yield piece
        return
    pool = workers.pool()
    running = {pool.submit(attempt, where, piece, do, wait): piece for piece in pieces}
    for done in as_completed(running):
        if done.result():
            progress.add(running[done].size)
        else:
            yield running[done]


def attempt(folder: Path, piece: Piece, do: Callable[..., object], wait: bool) -> bool:
    """Do a piece unless it is done or claimed, and return whether it is done."""
    if not piece.anyway and is_done(folder, piece):
        return True
    with claimed(folder, piece.files[0], wait=wait) as mine:
        if not mine:
            return False
        if piece.anyway or not is_done(folder, piece):  # another may just have finished it
            do(*piece.args)
    return True
