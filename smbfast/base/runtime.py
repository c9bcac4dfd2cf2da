"""The machine a run is on: device, versions, memory, signals."""

import importlib.metadata
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from smbkernels.matmul.products import missing
from smbkernels.matmul.products import times as times_by_onednn
from torch import Tensor

from smbfast.base.counts import few as few
from smbfast.base.devices import known_device
from smbfast.base.entry import SIGNALS, Requests
from smbfast.base.helpers import helper

GIB = 1 << 30
# the first is today's name, the second that of earlier versions of torch, which is read too
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
EXPANDABLE = "expandable_segments:True"
_GIT_PATIENCE = 3  # seconds
_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "numpy", "pyarrow", "meds")


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the GPU if there is one, which is set up.

    Of several processes that torchrun starts on a machine, each has the GPU of its number there.

    Raises:
        ValueError: if the name is not valid, there is no such device, or it is one GPU for all of
            these processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"run.device must be auto, cuda or cpu under torchrun, got {name}: each process has a "
            "GPU of its own; CUDA_VISIBLE_DEVICES says of which"
        )
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(known_device(name))
    except ValueError as error:
        raise ValueError(f"run.device {error}, got `{name}`") from None
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise ValueError(f"run.device={name} must exist; torch finds {count} CUDA GPUs")
        _set_up_cuda()
        torch.cuda.set_device(device)  # some kernels run on the current device
    return device


def _set_up_cuda() -> None:
    """Choose the allocator's segments and the sums of bf16 products; call it before CUDA starts.

    The tokens of micro-batches differ, so that blocks of other sizes are asked for in each: with
    expandable segments the holes between them are not lost. A setting in the environment is left as
    it is. Long sums of bf16 products, such as the gradients of factors of low rank, are taken in
    parts, and the parts are added in fp32, not rounded to bf16 first.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if any(name in os.environ for name in ALLOCATOR_VARIABLES):
        return
    os.environ[ALLOCATOR_VARIABLES[0]] = EXPANDABLE
    # a version of torch that reads the variable when it is imported has done so
    set_now = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_now is not None:
        set_now(EXPANDABLE)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    version_of = {"python": platform.python_version()}
    for name in ("smbfast", *_PACKAGES):
        try:
            version_of[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        version_of["gpu"] = torch.cuda.get_device_name()
    return version_of


@cache
def git_state() -> str:
    """Return the commit of this checkout, with "+changes" if there are any; "" outside one.

    If git fails or does not answer, that is said and the answer is "".
    """
    root = Path(__file__).resolve().parents[2]

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *args],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_PATIENCE,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    with helper("git", "the run's record has no commit"):
        commit = git("rev-parse", "--short", "HEAD") if (root / ".git").exists() else ""
        return commit + ("+changes" if commit and git("status", "--porcelain") else "")
    return ""


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory in GiB, of the GPU's allocator or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def reset_peak_memory(device: torch.device) -> bool:
    """Restart the peak of `held_memory`; return False where a process cannot do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def held_memory(device: torch.device, *, peak: bool = False) -> int:
    """Return the bytes allocated on a GPU or resident on a CPU, or their peak; 0 if unknown."""
    if device.type == "cuda":
        read = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return read(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    status = dict(line.split(":", 1) for line in lines)
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) << 10


@dataclass(frozen=True)
class MatmulRate:
    """The ceiling of a step."""

    flops: float  # a second
    library: str  # that reached it


def matmul_rate(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 0.2,
    now: Callable[[], float] | None = None,
) -> MatmulRate:
    """Return the FLOP/s of a large matrix product on this device, by the fastest library there is.

    It is the best of several products after a warm-up, of matrices of 8192 x 8192 on a GPU and
    1024 x 1024 on a CPU, where fp32 products of torch's own choice and of oneDNN take turns.

    Args:
        seconds: of measuring.
        now: the clock, in seconds; None is wall time.
    """
    now = now or time.perf_counter
    n = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    products: dict[str, Callable[[], Tensor]] = {library(device, dtype): lambda: left @ right}
    if device.type == "cpu" and dtype == torch.float32 and missing("cpu") is None:
        products["oneDNN"] = lambda: times_by_onednn(left, right)
    times: dict[str, list[float]] = {name: [] for name in products}
    for product in products.values():
        product()
    while not all(times.values()) or sum(map(sum, times.values())) < seconds:
        for name, product in products.items():
            wait()
            start = now()
            product()
            wait()
            times[name].append(now() - start)
    best = min(times, key=lambda name: min(times[name]))
    return MatmulRate(2 * n**3 / min(times[best]), best)


def library(device: torch.device, dtype: torch.dtype) -> str:
    """Return the library that torch itself multiplies matrices with."""
    if device.type == "cuda":
        return "cuBLAS"
    if dtype == torch.float32 and torch.backends.mkl.is_available():
        return "MKL"
    return "torch"


class StopFlag:
    """Is set by the first SIGTERM, SIGINT or SIGUSR1; a later one interrupts the step or the save.

    Signals within 5 seconds of the first are the first: srun and torchrun both hand it on.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._requests = Requests()

    def __bool__(self) -> bool:
        return self.name is not None

    def _handle(self, number: int, frame: object) -> None:
        if not self._requests.add():
            return
        if self:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Yield a flag that signals set while the block runs; outside the main thread it stays off."""
    flag = StopFlag()
    try:
        before = {n: signal.signal(n, flag._handle) for n in SIGNALS}
    except ValueError:  # not the main thread
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
