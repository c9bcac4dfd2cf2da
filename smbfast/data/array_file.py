"""Arrays in one file: appended in any number of pieces, committed whole, and memory-mapped later.

byte 0    a mark
     8    length of the header, little-endian
    16    SHA-256 of all that follows
    48    header: JSON with dtype, place and number of every array, and what the writer adds
          the arrays, each from a multiple of 64 bytes on
"""

import hashlib
import json
import mmap
import os
import re
import struct
import tempfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from smbfast.base.files import committed_file
from smbfast.base.replace import make_folder

_MARK = b"smbarray"
_PREFIX = len(_MARK) + 8 + 32
_ALIGN = 64  # bytes: a cache line
_CHUNK = 1 << 20  # bytes read at once
_NUMBER = re.compile(r"[<|][biuf][1248]")  # dtypes of which any bytes are some


class ArrayWriter:
    """Appends to named arrays. Leaving its `with` block writes them; after an error, nothing is.

    Until then each array is in a file without a name, so that a process that is killed leaves
    nothing behind.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, Any]) -> None:
        """Begin a file that will be 0600, in a folder that is made if it is not there."""
        self.index: dict[str, Any] = {}  # goes into the header, as JSON
        self._path, self._dtypes = path, {n: np.dtype(d) for n, d in dtypes.items()}
        make_private(path.parent)
        self._pieces = {n: tempfile.TemporaryFile(dir=path.parent) for n in dtypes}  # noqa: SIM115

    def append(self, name: str, array: np.ndarray) -> None:
        """Append to one of the arrays, in its dtype."""
        try:
            self._pieces[name].write(np.ascontiguousarray(array, self._dtypes[name]).data)
        except OSError as error:
            error.filename = str(self._path)  # a file without a name has none
            raise

    def so_far(self, name: str) -> np.ndarray:
        """Return what was appended to an array, as a map that may be written to."""
        pieces = self._pieces[name]
        pieces.flush()
        if not pieces.tell():
            return np.empty(0, self._dtypes[name])
        return np.frombuffer(mmap.mmap(pieces.fileno(), 0), self._dtypes[name])

    def extend(self, name: str, num: int) -> np.ndarray:
        """Append `num` zeros to an empty array and return it as `so_far` does."""
        self._pieces[name].truncate(num * self._dtypes[name].itemsize)
        self._pieces[name].seek(0, os.SEEK_END)
        return self.so_far(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as error:
            error.filename = error.filename or str(self._path)
            raise
        finally:
            for pieces in self._pieces.values():
                with suppress(OSError):  # what a full disk did not take is thrown away
                    pieces.close()

    def _commit(self) -> None:
        arrays, at = {}, 0
        for name, pieces in self._pieces.items():
            dtype, size = self._dtypes[name], pieces.seek(0, os.SEEK_END)
            arrays[name] = (dtype.str, at, size // dtype.itemsize)
            at += size + -size % _ALIGN
        header = json.dumps({"arrays": arrays, "index": self.index}).encode()
        header += b" " * (-(_PREFIX + len(header)) % _ALIGN)
        digest = hashlib.sha256(header)
        with committed_file(self._path, private=True) as staging, open(staging, "wb") as file:
            file.write(_MARK + struct.pack("<Q", len(header)) + bytes(32) + header)
            for pieces in self._pieces.values():
                size = pieces.tell()
                pieces.seek(0)
                while chunk := pieces.read(_CHUNK):
                    digest.update(chunk)
                    file.write(chunk)
                digest.update(bytes(-size % _ALIGN))
                file.write(bytes(-size % _ALIGN))
            file.seek(len(_MARK) + 8)
            file.write(digest.digest())


class Place(NamedTuple):
    """Where an array is in its file."""

    dtype: np.dtype
    first: int  # byte
    num: int  # of its elements


def _place(first: int, dtype: object, at: object, num: object) -> Place:
    """Return the place of an array that a header describes; a ValueError if there can be none."""
    if not (isinstance(dtype, str) and isinstance(at, int) and isinstance(num, int)):
        raise ValueError(dtype, at, num)
    if min(at, num) < 0 or not _NUMBER.fullmatch(dtype):
        raise ValueError(dtype, at, num)
    return Place(np.dtype(dtype), first + at, num)


@dataclass(frozen=True)
class ArrayFile:
    """A finished file of arrays. It holds neither a map nor a file descriptor."""

    path: Path
    stamp: tuple[int, int]  # bytes, and time of the last change in nanoseconds
    sha256: str
    places: dict[str, Place]

    @classmethod
    def open(cls, path: Path) -> "ArrayFile":
        """Read the header.

        Raises:
            ValueError: the file is missing, was not finished, or has another length than its
                header says.
        """
        header, first, sha256, stamp = _read_header(path)
        try:
            places = {name: _place(first, *entry) for name, entry in header["arrays"].items()}
        except (TypeError, ValueError, AttributeError, SyntaxError):
            raise damaged(path) from None
        ends = [p.first + p.num * p.dtype.itemsize for p in places.values()]
        size = first + max((end - first + -(end - first) % _ALIGN for end in ends), default=0)
        if stamp[0] != size:
            raise ValueError(f"{path} must hold {size} bytes as its header says; it does not")
        return cls(path, stamp, sha256, places)

    @property
    def index(self) -> dict[str, Any]:
        """What the writer added, read anew."""
        return _read_header(self.path)[0]["index"]

    def verify(self) -> None:
        """Read every byte.

        Raises:
            ValueError: the bytes are not those that were written.
        """
        with open(self.path, "rb") as file:
            file.seek(_PREFIX)
            if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                raise damaged(self.path)

    def mapped(self) -> dict[str, np.ndarray]:
        """Map every array; the map, and its file descriptor, live as long as one of them is used.

        Raises:
            ValueError: the file was changed after this object was made.
        """
        with open(self.path, "rb") as file:
            self._require_unchanged(file.fileno())
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):  # else every window would read what lies around it, too
            whole.madvise(mmap.MADV_RANDOM)
        return {n: np.frombuffer(whole, p.dtype, p.num, p.first) for n, p in self.places.items()}

    def read(self, spans: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Read the elements `[first, end)` of arrays into memory.

        Raises:
            ValueError: the file was changed after this object was made.
        """
        arrays = {}
        with open(self.path, "rb", buffering=0) as file:
            self._require_unchanged(file.fileno())
            for name, (first, end) in spans.items():
                place = self.places[name]
                arrays[name] = np.empty(end - first, place.dtype)
                file.seek(place.first + first * place.dtype.itemsize)
                into = arrays[name].view(np.uint8).data
                while len(into) and (num := file.readinto(into)):
                    into = into[num:]
        return arrays

    def _require_unchanged(self, handle: int) -> None:
        if _stamp(os.fstat(handle)) != self.stamp:
            raise ValueError(f"{self.path} must not change while it is used; it did. Start again")


class OpenMaps:
    """Maps of the files that were used last, for all threads of the process."""

    def __init__(self, most: int) -> None:
        """Hold up to `most` maps, each of which has a file descriptor."""
        self._most, self._lock = most, Lock()
        self._maps: OrderedDict[tuple, dict[str, np.ndarray]] = OrderedDict()

    def of(self, file: ArrayFile) -> dict[str, np.ndarray]:
        """Return the arrays of a file. They stay valid after another file took their place here."""
        key = (file.path, file.stamp)
        with self._lock:
            if key in self._maps:
                self._maps.move_to_end(key)
                return self._maps[key]
        arrays = file.mapped()
        with self._lock:
            self._maps[key] = arrays
            while len(self._maps) > self._most:
                self._maps.popitem(last=False)
        return arrays


def make_private(folder: Path) -> None:
    """Make a folder and what is missing above it, each 0700."""
    make_folder(folder, 0o700)


def _read_header(path: Path) -> tuple[dict[str, Any], int, str, tuple[int, int]]:
    """Return the header, the byte behind it, the SHA-256 of the file, and its stamp."""
    try:
        with open(path, "rb", buffering=0) as file:
            stamp = _stamp(os.fstat(file.fileno()))
            prefix = file.read(_PREFIX)
            size = struct.unpack("<Q", prefix[len(_MARK) : len(_MARK) + 8])[0]
            raw = file.read(size) if size <= stamp[0] else b""
    except (OSError, struct.error):
        raise ValueError(f"{path} must be a finished file of arrays; it is not") from None
    if not prefix.startswith(_MARK) or len(prefix) < _PREFIX:
        raise ValueError(f"{path} must be a finished file of arrays; it is not")
    try:
        header = json.loads(raw)
        whole = isinstance(header["index"], dict) and isinstance(header["arrays"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise damaged(path)
    return header, _PREFIX + size, prefix[-32:].hex(), stamp


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def damaged(path: Path) -> ValueError:
    """Return the error of a file whose bytes are not those that were written."""
    return ValueError(f"{path} does not match its SHA-256: it is damaged")
