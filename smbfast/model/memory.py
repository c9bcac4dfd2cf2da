"""Predicts the peak memory of a training step without running it.

It traces the step itself: forward and backward of a copy of the encoder whose tensors have shapes
and devices but no storage (`FakeTensorMode`), so that every kernel is chosen as in the run. A
storage counts from the operation that creates it until nothing refers to it, in blocks of 512 bytes
as CUDA's allocator rounds them. The trace cannot see temporary memory inside our own operations.
The estimate for it is the size of what the operation returns, and for the cross-entropy one chunk
of logits.

On a CPU, glibc keeps blocks below 32 MiB in one heap, where blocks of different sizes leave holes
that stay resident. When every block had its own mapping (MALLOC_MMAP_THRESHOLD_=65536), resident
memory was within 4 % of the trace, and steps were slower. With glibc's defaults it was larger by 12
to 28 times the largest frequent block below 32 MiB (widths 256 and 512, 1024 to 4096 tokens).

Of a CPU, `smbfast.run.startup` adds the copy that checkpoints are written from; of a GPU, that is
memory of the host.

The prediction leaves out the CUDA context, libraries and their workspaces.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from smbkernels import use
from smbkernels.cross_entropy import chunk_rows
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smbfast.batch import PackedBatch, WindowPairs, pack_segments
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetEncoder, TargetForm, state_bytes
from smbfast.settings import ObjectiveSettings

BLOCK = 512  # bytes
HEAP = 32 << 20  # bytes: a block of this size or more has its own mapping in glibc
HOLES = 18  # heap holes, in units of the largest frequent block below HEAP (measured, see above)
FREQUENT = 8  # blocks of one size in a step: layers make so many, the gradient of a table does not
SHARE = 0.9  # share of free memory that a step may use: our choice
STEP = 1024  # tokens: the size of a micro-batch is a multiple of this
CODES_AHEAD = 64  # that a pair of a position and a horizon has in the prediction: our choice
MOST = 32768  # tokens: larger micro-batches are not faster on a GPU
Run = Callable[[PatientEncoder, TargetEncoder | None, PackedBatch], tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    weights: int  # parameters and buffers
    gradients: int
    moments: int  # both of AdamW
    target: int  # averages of the target encoder
    activations: int  # the rest of the peak
    holes: int  # unused gaps in a CPU's heap

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return sum(vars(self).values())


def predict_peak(
    encoder: PatientEncoder,
    batch: PackedBatch,
    run: Run,
    *,
    target: TargetForm | None = None,
    accumulates: bool = True,
    device: torch.device | None = None,
) -> Memory:
    """Predict the peak of a step whose heaviest micro-batch is `batch`, moments included.

    Args:
        encoder: its weights, of which shapes and dtypes are read; they may be on `meta`.
        run: (encoder, target, batch) -> losses, each None where there is nothing to predict.
        target: the form of the target encoder; None if there is none.
        accumulates: whether gradients of an earlier micro-batch exist (gradient accumulation).
        device: that the step is traced on; None is that of the encoder.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # segment tables stay real, on the CPU
    device = device or encoder.mask_vector.device
    encoder = _faked(encoder, mode, device)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    with mode:
        held = None
        if target is not None:
            with use(ema_update_="torch"):
                held = TargetEncoder(encoder, target)
        live = _LiveBytes()
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
    static = weights + averages + gradients  # a fused AdamW needs only the moments beside this
    peak = max(live.peak, static)
    frequent = [n for n, times in live.made.items() if n < HEAP and times >= FREQUENT]
    holes = HOLES * max(frequent, default=0) if device.type == "cpu" else 0
    return Memory(weights, gradients, 2 * gradients, averages, peak - static, holes)


def full_batch(
    tokens: int,
    window: int,
    objective: ObjectiveSettings,
    *,
    sft: bool,
    jepa: bool,
    num_horizons: int = 0,
) -> PackedBatch:
    """Build a micro-batch of `tokens` online tokens with the largest windows, futures and masks.

    Positions of a window are as many as a step draws, each with all of `num_horizons`, which reach
    to the end of the window.
    """
    branches = jepa and objective.jepa == "mask"
    share = 1 - objective.context[0] if branches else 0.0
    pairs: list[WindowPairs] = []
    trunks, futures, next_tokens, masked, replaced = [], [], [], [], []
    left, visible = tokens, objective.skeleton == "visible"
    while left > 0:
        length = min(window, max(1, int(left / (1 + share * objective.cuts))))
        future = min(int(share * length), objective.horizon or length, length - 1)
        num_cuts = objective.cuts if branches and future else 0
        if num_horizons:
            pairs.append(full_pairs(length, min(objective.positions, length), num_horizons))
        # the mask is at the end, so that the target encoder reads whole trunks
        mask = np.arange(future - max(1, round(objective.mask_ratio * future)), future)
        trunks.append(np.zeros(length, np.int64))
        futures.append([(length - future, np.zeros(future, np.int64))] * num_cuts)
        next_tokens.append(np.full(length, 0 if sft else -100))
        masked.append([mask] * num_cuts)
        replaced.append([mask if visible else np.arange(future)] * num_cuts)
        left -= length + num_cuts * future
    return pack_segments(
        trunks,
        futures,
        next_tokens=next_tokens,
        masked=masked,
        replaced=replaced,
        pairs=pairs or None,
        num_horizons=num_horizons if jepa and not branches else 0,
    )


def full_pairs(length: int, positions: int, num_horizons: int) -> WindowPairs:
    """Pair evenly spread positions of a window with all horizons; each has a few codes to come."""
    token_N = np.linspace(0, length - 1, positions).astype(np.int64)
    pairs = np.arange(positions * num_horizons)
    position_P, horizon_P = np.divmod(pairs, num_horizons)
    pair_Z = np.repeat(pairs, CODES_AHEAD)
    return WindowPairs(
        token_N, position_P, horizon_P, np.full(len(pairs), length), pair_Z, np.zeros_like(pair_Z)
    )


def choose_micro_tokens(
    needs: Callable[[int], int], free: int, *, least: int, most: int = MOST
) -> int:
    """Return the most tokens of a micro-batch whose step fits: a multiple of 1024, or `least`.

    Memory grows almost linearly with tokens, so two predictions give the size and a third one
    verifies it.

    Args:
        needs: maps tokens to the bytes that a step takes in addition to those already allocated.
        free: free bytes.
        least: tokens of the largest window with its branches.
        most: tokens that no micro-batch exceeds, but for a single window.

    Raises:
        ValueError: if not even one window fits.
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
    while tokens > least and needs(tokens) > budget:  # each try is a trace, so steps double
        tokens, step = tokens - step, 2 * step
    return max(tokens, least)


def checkpoint_bytes(encoder: PatientEncoder, form: TargetForm | None) -> int:
    """Return the most bytes of a checkpoint: what is trained, both moments, and averages.

    The host holds a copy of that from the first step to the last.

    Args:
        form: of the target encoder; None if there is none.
    """
    trained = sum(p.nbytes for p in encoder.parameters() if p.requires_grad)
    return 3 * trained + (state_bytes(encoder, form) if form else 0)


def free_memory(device: torch.device) -> int:
    """Return the bytes still free: on the GPU, or in the machine or its container for a CPU."""
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
            # cached file pages count as used, but the kernel frees them on demand
            free = min(free, int(numbers[0]) - int(numbers[1]) + int(stat.get(cache, 0)))
    return max(free, 0)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from their first appearance until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.made: Counter[int] = Counter()  # blocks by size
        self._sizes: dict[int, int] = {}

    def hold(self, values: Any) -> int:
        """Count the storages in `values` that are new, and return their bytes."""
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

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        added = self.hold(out)
        if func.namespace == "smb":
            head = "cross_entropy" in func.name()
            copied = "chunked" in func.name()
            inside = _logits(*args[:2], copied=copied) if head else added
            self.peak = max(self.peak, self.now + inside)
        return out

    def _drop(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _faked(encoder: PatientEncoder, mode: FakeTensorMode, device: torch.device) -> PatientEncoder:
    """Copy an encoder without its storage; tensors that are shared stay shared."""
    memo: dict[int, Any] = {id(encoder._packed_decoder): None, id(encoder._tokens): {}}
    for tensor in (*encoder.parameters(), *encoder.buffers()):
        memo[id(tensor)] = _moved(tensor, mode, device)
    return copy.deepcopy(encoder, memo)


def _moved(tensor: Tensor, mode: FakeTensorMode, device: torch.device) -> Tensor:
    """Return a tensor without storage on a device."""
    if tensor.device == device:
        return mode.from_tensor(tensor)
    with mode:
        moved = torch.empty_like(tensor, device=device)
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved


def _logits(hidden_ND: Tensor, weight_VD: Tensor, *, copied: bool) -> int:
    """Return the bytes of a chunk of logits, and of its fp32 copy where it has one."""
    (n, d), size, width = hidden_ND.shape, len(weight_VD), hidden_ND.element_size()
    rows = chunk_rows(n, d, size, hidden_ND.device.type)
    return rows * size * (width + (4 if copied and width < 4 else 0))


def _rounded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
