"""Builds what lets autograd run on CUDA tensors that have no memory, and starts processes with it.

The library is loaded by LD_PRELOAD, before torch is, and so only a new process can have it. It is
built once by a C++ compiler (seconds) into the folder that holds the project's C++ kernels.
"""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch
from smbkernels import cpp_build
from smbkernels.cpp_build import CannotBuild
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STARTED = "SMB_PRETENDED_GPU"  # in the environment of a process that was started with the shim


@cache
def environment() -> dict[str, str]:
    """The variables with which a process must be started; builds the shim if need be.

    Raises:
        CannotBuild: there is no C++ compiler, or it fails.
    """
    # what is measured is compiled code, never Triton's interpreter
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env |= {STARTED: "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
    if torch.version.cuda is None:
        library = Path(torch.__path__[0]) / "lib"
        flags = ("-std=c++20", "-O1", "-fPIC", *(f"-isystem{p}" for p in include_paths()))
        link = (f"-L{library}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{library}")
        preloaded = _built("cpu_build.cpp", "guard.so", flags, link)
    else:
        preloaded = _built("cuda_build.cpp", "guard.so", ("-std=c++20", "-O1", "-fPIC"), ())
        driver = _built("driver.cpp", "libcuda.so.1", ("-O1", "-fPIC"), ())
        before = os.environ.get("LD_LIBRARY_PATH", "")
        env["LD_LIBRARY_PATH"] = os.pathsep.join(p for p in (str(driver.parent), before) if p)
    return env | {"LD_PRELOAD": str(preloaded)}


def is_started() -> bool:
    """Whether this process was started with the shim."""
    return STARTED in os.environ


def restart(arguments: list[str]) -> None:
    """Replace this process by `python -m <arguments>` with the shim; does not return.

    Raises:
        SystemExit: the shim cannot be built; the message says why.
    """
    try:
        env = environment()
    except CannotBuild as error:
        raise SystemExit(f"a pretended GPU needs a C++ compiler: {error}") from None
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", *arguments], env)


def run(arguments: list[str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m <arguments>` with the shim, in the root of the project, and wait.

    Raises:
        CannotBuild: the shim cannot be built.
    """
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _built(source: str, name: str, flags: tuple[str, ...], link: tuple[str, ...]) -> Path:
    compiler, file = cpp_build.find_compiler(), HERE / source
    folder = cpp_build._cache() / f"pretended-{cpp_build.key(compiler, [file], (*flags, *link))}"
    library = folder / name
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with cpp_build._locked(folder / "lock"):
            if not library.exists():
                part = folder / f"{name}.part"
                command = [*compiler.command, *flags, "-shared", str(file), "-o", str(part), *link]
                cpp_build._run_all([command])
                part.replace(library)  # whole or not at all
    except OSError as error:
        raise CannotBuild(f"cannot write {folder}: {error.strerror or error}") from None
    return library
