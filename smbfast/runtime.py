"""Device, versions, memory, signals: what a run knows of the machine it is on."""

import importlib.metadata
import platform
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

GIB = 1 << 30
_PACKAGES = ("torch", "triton", "transformers", "peft", "liger-kernel", "numpy", "pyarrow", "meds")


def choose_device(name: str) -> torch.device:
    """The device a run asked for; "auto" is the GPU if there is one.

    Raises:
        ValueError: it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"run.device must be auto, cpu or cuda[:n], got `{name}`") from None
    if device.type == "cuda":
        if (device.index or 0) >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ValueError(f"run.device={name} needs that CUDA GPU; torch sees {found}")
        torch.cuda.set_device(device)  # some kernels are launched on the current one
    return device


def versions() -> dict[str, str]:
    """Versions of Python and of the packages a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("smbfast", *_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_state() -> str:
    """Commit of this checkout with "+changes" if it has any; "" outside one."""
    root = Path(__file__).resolve().parents[1]

    def git(*args: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short", "HEAD") if (root / ".git").exists() else ""
        return commit + ("+changes" if commit and git("status", "--porcelain") else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


class StopFlag:
    """Set by the first SIGTERM, SIGINT or SIGUSR1; the second signal leaves at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def _handle(self, number: int, frame: object) -> None:
        if self:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def terminate_as_interrupt() -> None:
    """Let SIGTERM end work outside the training loop as Ctrl-C does (in the main thread)."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that signals set while the block runs (in the main thread; elsewhere it stays off)."""
    flag = StopFlag()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    try:
        before = {n: signal.signal(n, flag._handle) for n in numbers}
    except ValueError:  # not the main thread
        yield flag
        return
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def few(count: int) -> str:
    """A count of people or of their events for a log: 1 to 10 are not told apart."""
    return "<=10" if 0 < count <= 10 else f"{count:,}"
