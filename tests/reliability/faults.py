"""Faults at single calls of the C library below a folder, and what a power cut leaves of it.

`faults.c` numbers the calls that touch files below a watched folder, and at one of them kills the
process or fails once. It writes a journal of what was done, from which `Journal` makes what a power
cut may leave. Three such remains are made:

"synced"    only what a fsync vouches for: of each file the content of its last fsync, of each
            folder the names up to its last fsync. A rename between two folders is in both or in
            neither, and whatever was done before in a folder that was synced is there too.
"names"     all names, and of each file the content of its last fsync: a file system that writes
            names before content.
"all but"   everything, but for one call that no fsync vouches for: calls out of their order.

File systems leave something between the first and a kill, which leaves all. Not modelled: sectors
that are torn or lie, and a disk that says it has synced and has not.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EDQUOT, EIO, ENOSPC, EROFS
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
ERRORS = {"ENOSPC": ENOSPC, "EIO": EIO, "EROFS": EROFS, "EDQUOT": EDQUOT}
KILLED = 99  # exit status of a process that a fault has killed
_COUNT, _KILL, _FAIL, _FAIL_ON, _GONE = range(5)


class Faults:
    """The shim, loaded into this process and into those that it forks."""

    def __init__(self, folder: Path) -> None:
        """Compile and load it; RuntimeError where there is no compiler for it."""
        library = folder / "faults.so"
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise RuntimeError("a C compiler must be there for faults at single calls; none is")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        self._library, self._folder = ctypes.CDLL(str(library)), folder
        self._library.faults_disarm.restype = ctypes.c_long
        if self._library.faults_install():
            raise RuntimeError("renames must be seen in the kernel (seccomp); they cannot be")
        self.journal, self.store = folder / "journal", folder / "synced"
        self.exchanges = True  # whether the file system exchanges two names at once

    @contextmanager
    def at(
        self,
        watched: Path,
        number: int = 0,
        error: int | None = None,
        *,
        goes_on: bool = False,
    ) -> Iterator[list[int]]:
        """Count calls below `watched` in the block; the list has their number after it.

        Args:
            number: of the call that fails with `error`, or kills where that is None.
            goes_on: whether later calls fail too; without an error, the folder is gone then.
        """
        shutil.rmtree(self.store, ignore_errors=True)
        self.store.mkdir()
        how = (_GONE if goes_on else _KILL) if error is None else (_FAIL_ON if goes_on else _FAIL)
        how = how if number > 0 else _COUNT
        paths = [os.fsencode(p) for p in (watched, self.journal, self.store)]
        counted: list[int] = []
        self._library.faults_arm(*paths, ctypes.c_long(number), how, error or 0, self.exchanges)
        try:
            yield counted
        finally:
            counted.append(self._library.faults_disarm())

    def killed(self, watched: Path, number: int, work: Callable[[], object]) -> bool:
        """Do `work` in a forked process that is killed at a call; whether it was."""
        pid = os.fork()
        if not pid:
            status = 70
            try:
                with self.at(watched, number):
                    work()
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status not in (0, KILLED):
            raise RuntimeError(f"the process that was to be killed at call {number} ended {status}")
        return status == KILLED


@dataclass(eq=False)
class Node:
    """A file or folder, whatever its names are."""

    kind: str  # "file", "folder", or where a link leads
    synced: Path | None = None  # content that a power cut leaves; None: empty
    names: dict[str, "Node"] = field(default_factory=dict)  # of a folder, all calls done
    live: Path | None = None  # content now


@dataclass(eq=False)
class _Change:
    """A call that has put names into folders, or taken them out."""

    call: int
    names: list[tuple[Node, str, Node | None]]


class Journal:
    """What calls have done below a folder since it was a copy of `before`."""

    def __init__(self, faults: Faults, before: Path, now: Path) -> None:
        self._store, self._now = faults.store, now
        self._root = _tree(before)
        self._first = {node: dict(node.names) for node in _folders(self._root)}
        self._changes: list[_Change] = []
        self._vouched: set[_Change] = set()
        self._unsynced: dict[int, Node] = {}  # by call: files with content that was not synced
        self.calls, self.failed = 0, False
        self.renames: list[int] = []
        for line in faults.journal.read_text().splitlines():
            call, op, one, other = line.split("\t")
            self.calls, self.failed = int(call), self.failed or op == "failed"
            self._replay(int(call), op, one, other)

    def _replay(self, call: int, op: str, one: str, other: str) -> None:
        if op in ("failed", "mode") or "(deleted)" in one or "/#" in one:
            return
        folder, name = self._place(one)
        node = folder.names.get(name) if name else self._root
        names: list[tuple[Node, str, Node | None]] = []
        if op in ("create", "mkdir", "symlink"):
            new = Node({"create": "file", "mkdir": "folder", "symlink": "nowhere"}[op])
            self._first.setdefault(new, {})
            names = [(folder, name, new)]
        elif op == "unlink":
            names = [(folder, name, None)]
        elif op in ("rename", "exchange", "link"):
            to, as_ = self._place(other)
            back = to.names.get(as_) if op == "exchange" else None
            names = [(to, as_, node)]
            names += [] if op == "link" else [(folder, name, back)]
        elif op == "sync" and node is not None:
            node.synced = self._store / str(call)
            self._unsynced = {c: n for c, n in self._unsynced.items() if n is not node}
        elif op == "sync-folder" and node is not None:
            self._vouch(node)
        elif op == "write" and node is not None:
            self._unsynced[call] = node
        if op in ("rename", "exchange"):
            self.renames.append(call)
        if names:
            self._changes.append(_Change(call, names))
            _apply(names)

    def _place(self, path: str) -> tuple[Node, str]:
        relative = Path(path).relative_to(self._now)
        node = self._root
        for part in relative.parts[:-1]:
            node = node.names[part]
        return node, relative.name

    def _vouch(self, folder: Node) -> None:
        """All changes of a folder are on the disk, and what came before them where they reach."""
        waiting = [(folder, len(self._changes))]
        while waiting:
            node, end = waiting.pop()
            for place, change in enumerate(self._changes[:end]):
                if change in self._vouched or not any(f is node for f, _, _ in change.names):
                    continue
                self._vouched.add(change)
                waiting += [(f, place) for f, _, _ in change.names if f is not node]

    def explains(self) -> list[str]:
        """Names in which the folder differs from what the journal makes of it."""
        made, there = set(_paths(self._root, {})), set(_paths(_tree(self._now), {}))
        return sorted(made ^ there)

    def unvouched(self) -> list[int]:
        """Calls that a power cut after the last one may undo while it keeps the others."""
        calls = {c.call for c in self._changes if c not in self._vouched}
        return sorted(calls | set(self._unsynced))

    def remains(self, out: Path, kind: str, but: int = 0) -> Path:
        """Make what a power cut leaves; see the top of this file.

        Args:
            but: the call that "all but" leaves out.
        """
        kept = [
            change
            for change in self._changes
            if (kind != "synced" or change in self._vouched) and change.call != but
        ]
        names = {node: dict(first) for node, first in self._first.items()}
        for change in kept:
            _apply(change.names, names)
        _find_live(self._root, self._now)
        torn = {self._unsynced[but]} if but in self._unsynced else set()
        _make(self._root, out, names, torn if kind == "all but" else None)
        return out


def _tree(folder: Path) -> Node:
    root = Node("folder")
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if entry.is_symlink():
            root.names[entry.name] = Node(os.readlink(path))
        elif entry.is_dir():
            root.names[entry.name] = _tree(path)
        else:
            root.names[entry.name] = Node("file", path)
    return root


def _folders(root: Node) -> Iterator[Node]:
    yield root
    for node in root.names.values():
        if node.kind == "folder":
            yield from _folders(node)


def _paths(root: Node, names: dict[Node, dict[str, Node]], prefix: str = "") -> Iterator[str]:
    for name, node in names.get(root, root.names).items():
        yield prefix + name
        if node.kind == "folder":
            yield from _paths(node, names, f"{prefix}{name}/")


def _apply(
    changed: list[tuple[Node, str, Node | None]], names: dict[Node, dict[str, Node]] | None = None
) -> None:
    for folder, name, node in changed:
        own = folder.names if names is None else names[folder]
        if node is None:
            own.pop(name, None)
        else:
            own[name] = node


def _find_live(root: Node, folder: Path) -> None:
    for name, node in root.names.items():
        node.live = folder / name
        if node.kind == "folder":
            _find_live(node, folder / name)


def _make(
    root: Node, out: Path, names: dict[Node, dict[str, Node]], torn: set[Node] | None
) -> None:
    """Write a tree; content is what was synced, or where `torn` is given what is there now.

    Args:
        torn: files that have lost the second half of it.
    """
    out.mkdir()
    for name, node in names[root].items():
        path = out / name
        if node.kind == "folder":
            _make(node, path, names, torn)
        elif node.kind != "file":
            path.symlink_to(node.kind)
        else:
            live = node.live if torn is not None and node.live and node.live.is_file() else None
            content = live or node.synced
            data = content.read_bytes() if content and content.is_file() else b""
            path.write_bytes(data[: len(data) // 2] if torn and node in torn else data)
