"""The peak memory of a training step, predicted without running it.

The step itself is traced: forward and backward of a copy of the encoder whose tensors have shapes
and devices but no storage (`FakeTensorMode`), so that every kernel is chosen as in the run. A
storage counts from the operation that made it until nothing holds it, in blocks of 512 bytes as
CUDA's allocator rounds them. What one of our operations uses inside and gives back is not seen: it
is taken to be as much again as it returns, and for the cross-entropy a chunk of logits.

On a CPU, glibc keeps blocks below 32 MiB in one heap, where blocks of unlike size leave holes that
stay resident. With every block mapped on its own (MALLOC_MMAP_THRESHOLD_=65536) resident memory was
within 4 % of what is traced, and steps were slower; as glibc comes, it was more by 12 to 28 times
the largest frequent block below 32 MiB (widths 256 and 512, 1024 to 4096 tokens).

Not counted: the CUDA context, libraries and their workspaces.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from smbkernels import use
from smbkernels.cross_entropy import chunk_rows
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smbfast.batch import PackedBatch, pack_segments
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.settings import ObjectiveSettings

BLOCK = 512  # bytes
HEAP = 32 << 20  # bytes: from here glibc maps a block on its own
HOLES = 18  # times the largest block below that is frequent: what was measured
FREQUENT = 8  # blocks of one size in a step: those of layers, not the gradient of a large table
SHARE = 0.9  # of free memory that a step may need
STEP = 1024  # micro-batches are chosen in multiples of this
MOST = 32768  # tokens: beyond, a GPU gains nothing
Run = Callable[[PatientEncoder, TargetEncoder | None, PackedBatch], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int  # parameters and buffers
    gradients: int
    moments: int  # AdamW's two
    target: int
    activations: int  # what is left of the peak, wherever it lies
    holes: int  # what a CPU's heap loses between blocks

    @property
    def total(self) -> int:
        """The peak."""
        return sum(vars(self).values())


def predict_peak(
    encoder: PatientEncoder,
    batch: PackedBatch,
    run: Run,
    *,
    target: TargetForm | None = None,
    accumulates: bool = True,
) -> Memory:
    """The peak of a step whose heaviest micro-batch is `batch`; the optimizer has its moments.

    Args:
        run: (encoder, target, batch) -> losses, None where there is nothing to predict.
        target: form of the target encoder that is held; None: none is.
        accumulates: gradients of an earlier micro-batch are there already.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # tables of segments stay on the CPU
    device = encoder.mask_vector.device
    encoder = _faked(encoder, mode)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    with mode, _no_launch(device):
        held = None
        if target is not None:
            with use(ema_update_="torch"):
                held = TargetEncoder(encoder, target)
        live = _Live()
        weights = live.hold([*encoder.parameters(), *encoder.buffers()])
        averages = live.hold(held.state()) if held else 0
        if accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
                live.hold(parameter.grad)
        live.made.clear()
        with live:
            losses = [loss for loss in run(encoder, held, batch.to(device)) if loss is not None]
            torch.autograd.backward(losses)
    gradients = sum(_rounded(p.numel() * p.element_size()) for p in trained)
    static = weights + averages + gradients  # with the moments, all that a fused AdamW needs
    peak = max(live.peak, static)
    often = [n for n, times in live.made.items() if n < HEAP and times >= FREQUENT]
    holes = HOLES * max(often, default=0) if device.type == "cpu" else 0
    return Memory(weights, gradients, 2 * gradients, averages, peak - static, holes)


def full_batch(
    tokens: int, window: int, objective: ObjectiveSettings, *, sft: bool, jepa: bool
) -> PackedBatch:
    """A row of that many online tokens: as heavy as windows can fill it."""
    share = 1 - objective.context[0] if jepa else 0.0
    trunks, branches, next_tokens, masked = [], [], [], []
    left = tokens
    while left > 0:
        length = min(window, max(1, int(left / (1 + share * objective.cuts))))
        future = min(int(share * length), objective.horizon or length, length - 1)
        num_cuts = objective.cuts if jepa and future else 0
        # the last tokens are masked, so that the target encoder reads whole trunks
        mask = np.arange(future - max(1, round(objective.mask_ratio * future)), future)
        trunks.append(np.zeros(length, np.int64))
        branches.append([(length - future, np.zeros(future, np.int64))] * num_cuts)
        next_tokens.append(np.full(length, 0 if sft else -100))
        masked.append([mask] * num_cuts)
        left -= length + num_cuts * future
    return pack_segments(trunks, branches, next_tokens=next_tokens, masked=masked)


def choose_micro_tokens(
    needs: Callable[[int], int], free: int, *, least: int, most: int = MOST
) -> int:
    """The most tokens of a micro-batch whose step fits: a multiple of 1024, or `least`.

    Memory grows with tokens nearly in a line: two predictions and one that verifies.

    Args:
        needs: bytes that a step takes beyond what is held, by tokens.
        free: bytes.
        least: tokens of the largest window with its branches.

    Raises:
        ValueError: not even one window fits.
    """
    budget = int(SHARE * free)
    low = needs(least)
    if low > budget:
        raise ValueError(
            f"a step on {least} tokens, the largest window with its branches, needs "
            f"{low / 2**30:.2f} GiB and {budget / 2**30:.2f} GiB may be used: lower data.window, "
            "set model.recompute=full, or name optim.micro_tokens"
        )
    most -= most % STEP
    if most <= least:
        return least
    high = needs(most)
    if high <= budget:
        return most
    tokens = least + (most - least) * (budget - low) // (high - low)
    tokens -= tokens % STEP
    step = STEP
    while tokens > least and needs(tokens) > budget:  # a trace each: longer steps, fewer of them
        tokens, step = tokens - step, 2 * step
    return max(tokens, least)


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take: of the GPU; of the machine or the container."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    info = dict(line.split(":") for line in _read("/proc/meminfo").splitlines())
    free = int(info["MemAvailable"].split()[0]) << 10 if "MemAvailable" in info else 1 << 62
    for folder, limit, used, cache in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        numbers = [_read(f"{folder}/{name}").strip() for name in (limit, used)]
        if all(n.isdigit() for n in numbers):  # "max" is no limit
            stat = dict(line.split() for line in _read(f"{folder}/memory.stat").splitlines())
            # what was read from files counts as used and is given back on demand
            free = min(free, int(numbers[0]) - int(numbers[1]) + int(stat.get(cache, 0)))
    return max(free, 0)


class _Live(TorchDispatchMode):
    """Counts the bytes of storages from their first appearance until they go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.made: Counter[int] = Counter()  # blocks by size
        self._sizes: dict[int, int] = {}

    def hold(self, values: Any) -> int:
        """Count the storages in `values` that are new; returns their bytes."""
        added = 0
        for value in tree_leaves(values):
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage._cdata not in self._sizes:
                size = _rounded(storage.nbytes())
                self._sizes[storage._cdata] = size
                weakref.finalize(storage, self._drop, storage._cdata)
                added += size
                self.made[size] += 1
        self.now += added
        self.peak = max(self.peak, self.now)
        return added

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        added = self.hold(out)
        if func.namespace == "smb":
            inside = _logits(*args[:2]) if "cross_entropy" in func.name() else added
            self.peak = max(self.peak, self.now + inside)
        return out

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _faked(encoder: PatientEncoder, mode: FakeTensorMode) -> PatientEncoder:
    """A copy without storage; tensors that are shared stay shared."""
    memo: dict[int, Any] = {id(encoder._packed_decoder): None, id(encoder._tokens): {}}
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        memo[id(tensor)] = mode.from_tensor(tensor)
    return copy.deepcopy(encoder, memo)


@contextmanager
def _no_launch(device: torch.device) -> Iterator[None]:
    """Triton kernels that are called directly, such as Liger's, only have their outputs made."""
    if device.type != "cuda":
        yield
        return
    from triton.runtime.jit import JITFunction  # not on every machine without a GPU

    with mock.patch.object(JITFunction, "run", lambda *_args, **_kwargs: None):
        yield


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> int:
    """Bytes of a chunk, in its dtype and in fp32 where that is another."""
    size, width = len(weight_VD), hidden_ND.element_size()
    return chunk_rows(*hidden_ND.shape, size) * size * (width + (4 if width < 4 else 0))


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
