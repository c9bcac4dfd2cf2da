"""Saves while steps go on: a copy of the state in a buffer, and a thread that writes it.

The loop stops for the copy alone, of each tensor once, into memory that is taken before the first
step and used by every save. What is slow is the thread's: the check that all is finite, the file,
fsync, checksums, rename, and the removal of old checkpoints. It holds Python's lock for moments
only, and never works on two copies: a save waits for the one before it.

Everything that a rank saves is whole on it, also where ranks share a backbone out
(`smbfast.model.sharding`), so nothing is gathered for a copy.
"""

import json
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType

import torch
from torch import Tensor

from smbfast.base.entry import RunFailed
from smbfast.base.helpers import reason, warn_failed

PATIENCE = 10.0  # seconds that a second signal leaves to a write: our choice
_LOOK = 1.0  # seconds after which a wait looks whether the thread lives
# elements that torch reduces in the thread that asks: another pool of threads would be in the way
_SERIAL = (1 << 15) - 1
# as safetensors names and orders them: the widest first, and by name among those of a type
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
}
_ORDER = list(_DTYPES)
_PORTABLE = 1  # cudaHostRegisterPortable, as torch has it in torch/cuda/_pin_memory_utils.py


class Buffer:
    """Memory of the host for a copy of tensors, which lie in it as in a safetensors file.

    For tensors of a GPU the memory is pinned, so that they are copied while the host goes on.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        """Take the memory, all of it at once, and not page by page in the first copy.

        Args:
            size: bytes; a copy that needs more takes new memory.
            device: of the tensors.
        """
        self._is_pinned, self._on_gpu = False, device.type == "cuda"
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._form: dict[str, tuple[torch.dtype, torch.Size]] = {}
        self._views: dict[str, Tensor] = {}
        self._header, self._used = b"", 0
        self._copied: torch.cuda.Event | None = None
        self._take(size)

    def copy(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors. A GPU is not waited for: what it is given from now on runs after the copy.

        Raises:
            KeyError: if a tensor has a dtype that no checkpoint holds.
        """
        form = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        if form != self._form:
            self._lay_out(form)
        with torch.no_grad():
            torch._foreach_copy_(
                list(self._views.values()), list(tensors.values()), non_blocking=True
            )
        if self._on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def require_finite(self) -> None:
        """Raise a ValueError that names the first tensor which is not finite, if there is one."""
        self._arrive()
        for name, view in self._views.items():
            if view.is_floating_point() and not _is_finite(view):
                raise ValueError(
                    f"{name} must be finite to be saved; it is not, so nothing was written"
                )

    def write(self, file: Path) -> None:
        """Write the copy as the safetensors file that `safetensors.torch.save_file` would write.

        That holds Python's lock while it writes in earlier versions, and copies all tensors first.
        """
        self._arrive()
        with open(file, "wb") as out:
            out.write(self._header)
            out.write(self._bytes[: self._used].numpy().data)

    def close(self) -> None:
        """Give the memory back."""
        self._arrive()
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())
            self._is_pinned = False
        self._views, self._form = {}, {}
        self._bytes = torch.empty(0, dtype=torch.uint8)

    @property
    def address(self) -> int:
        """Where the memory begins."""
        return self._bytes.data_ptr()

    def _arrive(self) -> None:
        """Wait until the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()

    def _take(self, size: int) -> None:
        self._bytes = torch.empty(size, dtype=torch.uint8).fill_(0)
        if self._on_gpu and size:
            # torch's own pinned memory would be the next power of two
            code = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, _PORTABLE)
            self._is_pinned = int(code) == 0
            if not self._is_pinned:  # then a copy is waited for
                with suppress(RuntimeError):  # the next operation would fail of this error
                    torch.zeros((), device="cuda")

    def _lay_out(self, form: dict[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Give each tensor its place, as the format orders them, and make the file's header."""
        header: dict[str, dict[str, str | list[int]]] = {}
        places, start = {}, 0
        for name in sorted(form, key=lambda name: (_ORDER.index(form[name][0]), name)):
            dtype, shape = form[name]
            end = start + dtype.itemsize * math.prod(shape)
            header[name] = {
                "dtype": _DTYPES[dtype],
                "shape": [*shape],
                "data_offsets": [start, end],
            }
            places[name], start = slice(start, end), end
        if start > len(self._bytes):
            self.close()
            self._take(start)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._header, self._used = len(text).to_bytes(8, "little") + text, start
        self._views = {
            name: self._bytes[places[name]].view(dtype).view(shape)
            for name, (dtype, shape) in form.items()
        }
        self._form = form


class Writer:
    """Runs one write after another in a thread of its own, which lasts as long as the context.

    The thread does not keep the process alive: one that hangs ends with it, as by a kill.
    """

    def __init__(self, buffer: Buffer) -> None:
        """Write nothing yet.

        Args:
            buffer: that is written; it is given back at the end of the context.
        """
        self.buffer = buffer
        self._idle = threading.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._error: BaseException | None = None
        self._writes: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    @property
    def has_failed(self) -> bool:
        """Whether a write has failed and nobody has asked for it yet."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the write under way, if there is one.

        Raises:
            BaseException: what it failed with.
            RunFailed: if its thread has ended in the middle of it.
        """
        self._comes_to_rest()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def begin(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread, once the write before it is done.

        Raises:
            BaseException: what the one before failed with; then `write` is not called.
        """
        self.wait()
        self._idle.clear()
        self._writes.put(write)

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the write under way; after an interrupt for `PATIENCE` seconds at most."""
        self._writes.put(None)
        if self._comes_to_rest(PATIENCE if isinstance(error, KeyboardInterrupt) else math.inf):
            self.buffer.close()
        if error is None:
            self.wait()
        elif self._error is not None:
            warn_failed("the checkpoint", self._error, "the one before it stays")

    def _comes_to_rest(self, patience: float = math.inf) -> bool:
        """Wait until nothing is written, for seconds at most; a thread that ended has failed."""
        until = time.monotonic() + patience
        while not self._idle.wait(max(0.0, min(_LOOK, until - time.monotonic()))):
            if not self._thread.is_alive() and not self._idle.is_set():
                self._error = RunFailed("the thread that writes a checkpoint has ended before it")
                self._idle.set()
            elif time.monotonic() >= until:
                return False
        return True

    def _run(self) -> None:
        while (write := self._writes.get()) is not None:
            try:
                write()
            except Exception as error:
                self._error = error
            except BaseException as error:  # it would end the process without a word
                self._error = RunFailed(f"the thread of checkpoints ended: {reason(error)}")
            self._idle.set()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite, without memory for an answer to each of them."""
    for part in tensor.flatten().split(_SERIAL):
        if part.numel() and not torch.stack(torch.aminmax(part)).isfinite().all():
            return False
    return True
