"""Builds the C++ kernels of `csrc` once for this machine, and loads them.

The library lies in a folder named by a hash of all that went into it, so that a stale one is never
loaded:

    $XDG_CACHE_HOME or ~/.cache
      smbfast/csrc-<hash>/kernels.so      moved there whole, after fsync
                          kernels.json    its size and SHA-256; written last
                          lock            held by the process that builds, freed when it dies
"""

import fcntl
import functools
import hashlib
import json
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SECONDS = 20  # of a build on two cores, as it is announced
LIMIT = 600  # seconds after which a compiler is given up
CAPABILITIES = {
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
}
# no fused multiply-add that the source does not ask for; hidden symbols, so that torch's own copies
# of the vector functions, compiled with other flags, are not taken in their place
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
)
log = logging.getLogger("smbkernels")


class CannotBuild(Exception):
    """Why there is no library, in one line."""


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler as it is called, and what it says of itself."""

    command: tuple[str, ...]
    version: str


@torch.compiler.assume_constant_result
def missing(device: str) -> str | None:
    """Why the C++ kernels cannot run on this kind of device, or None; builds them if need be."""
    return _load() if device == "cpu" else f"tensors are on {device}"


@functools.cache
def _load() -> str | None:
    try:
        library = build(_cache(), find_compiler(), _sources(), flags())
        torch.ops.load_library(library)
    except CannotBuild as error:
        return str(error)
    except OSError as error:
        log.debug("C++ kernels", exc_info=error)
        return f"the built library cannot be loaded: {_first_line(str(error.__cause__ or error))}"
    return None


def find_compiler() -> Compiler:
    """$CXX, else the first of c++, g++ and clang++ that is on PATH.

    Raises:
        CannotBuild: there is none, or it does not run.
    """
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise CannotBuild(f"CXX must be a command, got {os.environ['CXX']!r}: {error}") from None
    names = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    commands = [(path, *name[1:]) for name in names if (path := shutil.which(name[0]))]
    if not commands:
        raise CannotBuild(f"no C++ compiler: {', '.join(n[0] for n in names)} not found")
    return Compiler(commands[0], _run([*commands[0], "--version"]))


def flags() -> tuple[str, ...]:
    """Flags of every compilation: the vector instructions of this machine, as torch found them."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in CAPABILITIES:
        capability = "DEFAULT"
    include = Path(torch.__path__[0]) / "include"
    return (
        *FLAGS,
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        *CAPABILITIES.get(capability, ()),
        f"-isystem{include}",
        f"-isystem{include / 'torch/csrc/api/include'}",
    )


def build(cache: Path, compiler: Compiler, sources: list[Path], flags: tuple[str, ...]) -> Path:
    """The library of these sources, built unless it is there and whole.

    Two processes that need the same library build it once; a process that dies while building
    leaves nothing that is taken for a library, and nothing that another would wait for.

    Args:
        cache: the folder that holds a folder for each library.
        sources: C++ files, and the headers that they include by name.

    Raises:
        CannotBuild: the compiler fails, or the folder cannot be written.
    """
    folder = cache / f"csrc-{key(compiler, sources, flags)}"
    library = folder / "kernels.so"
    if _whole(library):
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not _whole(library):
                _build(folder, library, compiler, sources, flags)
    except OSError as error:
        raise CannotBuild(f"cannot write {folder}: {error.strerror or error}") from None
    return library


def key(compiler: Compiler, sources: list[Path], flags: tuple[str, ...]) -> str:
    """A short hash of all that the library depends on."""
    parts = [torch.__version__, compiler.version, *compiler.command, *flags, *_link(compiler)]
    parts += [part for s in sorted(sources) for part in (s.name, s.read_text())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _build(folder, library, compiler, sources, flags) -> None:
    for old in folder.glob("build-*"):  # of processes that were killed
        shutil.rmtree(old, ignore_errors=True)
    log.warning("building the CPU kernels once, about %d s", SECONDS)
    began = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="build-", dir=folder))
    try:
        built = work / library.name
        files = [s for s in sources if s.suffix == ".cpp"]
        objects = [work / f"{s.stem}.o" for s in files]
        _run_all(
            [
                [*compiler.command, *flags, "-c", str(s), "-o", str(o)]
                for s, o in zip(files, objects, strict=True)
            ]
        )
        names = [str(o) for o in objects]
        _run_all([[*compiler.command, "-shared", *names, *_link(compiler), "-o", str(built)]])
        record = work / "kernels.json"
        record.write_text(json.dumps(_record(built)))
        for file in (built, record):
            _sync(file)
            os.replace(file, folder / file.name)
        _sync(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.debug("built %s in %.1f s", library, time.monotonic() - began)


def _link(compiler: Compiler) -> list[str]:
    lib = Path(torch.__path__[0]) / "lib"
    # the OpenMP runtime that torch loads, under the very name it has there: with a second one, the
    # number of threads set in torch would not hold in the kernels
    bundled = [] if "clang" in compiler.version else sorted(map(str, lib.glob("libgomp*.so*")))
    return [*(bundled[:1] or ["-fopenmp"]), f"-L{lib}", "-ltorch_cpu", "-lc10"]


def _whole(library: Path) -> bool:
    try:
        return json.loads(library.with_suffix(".json").read_text()) == _record(library)
    except (OSError, ValueError):
        return False


def _record(library: Path) -> dict[str, int | str]:
    data = library.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the system frees it when its holder dies
        yield


def _run(command: list[str]) -> str:
    return _run_all([command])[0]


def _run_all(commands: list[list[str]]) -> list[str]:
    """Run commands side by side; their outputs."""
    running = []
    try:
        for command in commands:
            running.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            )
        outputs = [process.communicate(timeout=LIMIT)[0] for process in running]
    except OSError as error:
        raise CannotBuild(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise CannotBuild(f"{commands[0][0]} took more than {LIMIT} s") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            log.debug("%s\n%s", shlex.join(command), output)
            raise CannotBuild(
                f"{command[0]} failed with status {process.returncode} "
                "(its output is logged at level debug)"
            )
    return outputs


def _cache() -> Path:
    chosen = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(chosen) if chosen else Path.home() / ".cache") / "smbfast"
    except RuntimeError:
        raise CannotBuild(
            "no folder for the built library: neither XDG_CACHE_HOME nor HOME"
        ) from None


def _sources() -> list[Path]:
    # beside the package when it is installed, at the top of the repository otherwise
    here = Path(__file__).resolve()
    for folder in (here.parents[0] / "csrc", here.parents[2] / "csrc"):
        files = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
        if files:
            return files
    raise CannotBuild("the C++ sources are not installed")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
