"""What a GPU would be given to do: kernels, bytes, products, memory, copies and waits.

A `Ledger` sees every ATen operation on the pretended GPU, inside the bodies of our own operations
too, and every launch of a Triton kernel. Counted for a row (a part of the step, the operation of
ours that it is inside of, what runs, its dtype and its sizes if it is a product):

- kernels: one for each operation that computes, but for those of `_kernels`;
- bytes: operands that are read and results that are written, each once; of a Triton kernel every
  tensor that it is given, once, although one that it changes in place passes twice;
- FLOPs of products of matrices. `work` holds what the formula of an operation of ours says, which
  for attention is that of visible pairs.
"""

import math
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench.fakegpu.device import Memory, Reports, is_pinned

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS = "smb"  # the namespace of operations whose bodies are looked into
BLOCK = 512  # bytes: CUDA's allocator rounds up to a multiple of it
PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}
# the host waits for the result of these, or looks at an error code
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "bincount",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
}
ALLOCATES = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "lift_fresh",
    "detach",
    "set_",
    "record_stream",
    "_linalg_check_errors",
}
READS_ROWS = {"embedding", "index_select", "gather", "index"}  # as much as they return
WRITES_ROWS = {"scatter_", "scatter_add_", "index_copy_", "index_put_", "index_add_"}
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_"}
FILLS_AND_COPIES = {"select_backward", "slice_backward"}
# of torch's multi_tensor_apply: tensors of a launch, by the number of lists; blocks of a launch
TENSORS_OF_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
BLOCKS_OF_LAUNCH, ELEMENTS_OF_BLOCK = 320, 65536


class Key(NamedTuple):
    """What is counted together."""

    part: str
    inside: str  # our operation, or ""
    op: str
    dtype: str
    sizes: tuple[int, ...]  # batch, m, n, k of a product; batch, n of a solver; else empty


class Row(NamedTuple):
    """Sums over calls."""

    kernels: float = 0
    nbytes: float = 0
    flops: float = 0

    def plus(self, other: "Row", factor: float = 1.0) -> "Row":
        """This row and `factor` times another."""
        return Row(*(a + factor * b for a, b in zip(self, other, strict=True)))


class Ledger(TorchDispatchMode):
    """Counts while it is entered, within `bench.fakegpu.device.pretended_gpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[Key, Row] = {}
        self.work: Counter[tuple[str, str]] = Counter()  # FLOPs by part and operation of ours
        self.waits: Counter[tuple[str, str, str]] = Counter()  # part, what, file:line
        self.copies: Counter[tuple[str, str, str]] = Counter()  # from the host, likewise
        self.now = "outside"
        self.inside = ""
        self._held: dict[int, int] = {}
        Memory.begin(self)
        Reports.waited = self.waited
        Reports.launched = self.launched

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs within it for a part of the step."""
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before

    def forget(self) -> None:
        """Begin anew; what is allocated stays counted."""
        self.rows = {}
        self.work, self.waits, self.copies = Counter(), Counter(), Counter()
        Memory.reset_peak()

    def launch(self, name: str, tensors: list[Tensor]) -> None:
        """A Triton kernel."""
        self.launched(f"triton::{name}", tensors)

    def launched(self, name: str, tensors: list[Tensor]) -> None:
        """A kernel that is no operation of ATen."""
        floating = [x for x in tensors if x.is_floating_point()]
        dtype = _name(floating[0].dtype) if floating else ""
        self._add(name, dtype, Row(1, sum(map(_nbytes, _distinct(tensors)))))

    def waited(self, what: str) -> None:
        """The host stands still until the GPU has done all that it was given."""
        self.waits[self.now, what, where()] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == OURS:
            return self._body(func, args, kwargs)
        if func.namespace != "prim" and func._can_decompose():
            # inside a body, below autograd, which else takes such ops apart
            with self:
                return func.decompose(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        ins = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in WAITING and any(x.is_cuda for x in ins):
            Reports.wait(name)
        out = func(*args, **kwargs)
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.namespace == "prim" or not any(x.is_cuda for x in (*ins, *outs)):
            return out
        if name in ("_to_copy", "copy_"):
            source, result = (ins[1], ins[0]) if name == "copy_" else (ins[0], outs[0])
            if source.is_cuda != result.is_cuda:
                self._transfer(source, result, name, (args, kwargs))
                self._hold(outs)
                return out
        self._hold(outs)
        if not _is_view(func, outs, ins) and name not in ALLOCATES:
            self._count(func, name, args, kwargs, ins, outs)
        return out

    def _body(self, func: Any, args: tuple, kwargs: dict) -> Any:
        body = OPDEFS[func._schema.name]._init_fn
        before, self.inside = self.inside, func._schema.name.partition("::")[2]
        try:
            with self:
                out = body(*args, **kwargs)
            packet = func._overloadpacket
            if packet in flop_registry:
                flops = flop_registry[packet](*args, **kwargs, out_val=out)
                self.work[self.now, self.inside] += flops
        finally:
            self.inside = before
        return out

    def _transfer(self, source: Tensor, result: Tensor, name: str, call: tuple) -> None:
        """A copy between host and device: does the host wait for it?"""
        args, kwargs = call
        asked = kwargs.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
        if source.is_cuda:
            if not (asked and name == "copy_" and is_pinned(result)):
                Reports.wait("copy to the host")
            return
        # from memory that is not pinned the driver copies at once, whatever was asked for
        how = "asynchronous" if asked and is_pinned(source) else "blocking"
        self.copies[self.now, how, where()] += 1

    def _count(self, func: Any, name: str, args: tuple, kwargs: dict, ins: list, outs: list):
        if func.namespace != "aten":
            name = func._schema.name
            name += " deterministic" if torch.are_deterministic_algorithms_enabled() else ""
        floating = [x for x in (*ins, *outs) if x.is_floating_point()]
        dtype = _name(floating[0].dtype) if floating else ""
        sizes: tuple[int, ...] = ()
        flops = 0.0
        if name in PRODUCTS:
            sizes = _product(name, args)
            flops = 2.0 * math.prod(sizes)
            dtype = "tf32" if dtype == "float32" and _tf32() else dtype
        elif name in ("_linalg_eigh", "_linalg_svd"):
            n = ins[0].shape[-1]
            sizes = (ins[0].numel() // (n * ins[0].shape[-2]), n)
        nbytes = _moved(func, name, args, kwargs, ins, outs)
        self._add(name, dtype, Row(_kernels(name, args, ins), nbytes, flops), sizes)

    def _add(self, op: str, dtype: str, row: Row, sizes: tuple[int, ...] = ()) -> None:
        key = Key(self.now, self.inside, op, dtype, sizes)
        self.rows[key] = self.rows.get(key, Row()).plus(row)

    def _hold(self, outs: list[Tensor]) -> None:
        for x in outs:
            if not x.is_cuda:
                continue
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self._held:
                self._held[key] = -(-storage.nbytes() // BLOCK) * BLOCK
                Memory.count(self._held[key])
                finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        size = self._held.pop(key)
        if Memory.owner is self:
            Memory.count(-size)


def where() -> str:
    """The innermost line of the project that led here."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(HERE):
            return f"{file.relative_to(ROOT)}:{frame.lineno}"
    return "torch alone, such as its autograd"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nbytes(x: Tensor) -> int:
    """Of the elements that are there: those of an expanded axis are one."""
    there = (n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0)
    return math.prod(there) * x.element_size()


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    seen = {(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)): x for x in tensors}
    return list(seen.values())


def _is_view(func: Any, outs: list[Tensor], ins: list[Tensor]) -> bool:
    if func.is_view:
        return True
    storages = {x.untyped_storage()._cdata for x in ins}
    shares = any(x.untyped_storage()._cdata in storages for x in outs)
    return shares and not func._schema.is_mutable


def _tf32() -> bool:
    return torch.get_float32_matmul_precision() != "highest"


def _product(name: str, args: tuple) -> tuple[int, int, int, int]:
    """Batch, m, n, k."""
    a, b = args[:2] if name in ("mm", "bmm") else args[1:3]
    return math.prod(a.shape[:-2]), a.shape[-2], b.shape[-1], a.shape[-1]


def _moved(func: Any, name: str, args: tuple, kwargs: dict, ins: list, outs: list) -> int:
    """Bytes read and written."""
    if name in READS_ROWS:
        return 2 * sum(map(_nbytes, outs))
    if name in WRITES_ROWS:
        return 2 * sum(map(_nbytes, ins[1:]))
    if not func._schema.is_mutable:
        return sum(map(_nbytes, (*_distinct(ins), *outs)))
    values = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    total = 0
    for argument in func._schema.arguments:
        tensors = [x for x in tree_leaves(values.get(argument.name)) if isinstance(x, Tensor)]
        written = argument.alias_info is not None and argument.alias_info.is_write
        # a result alone, or a product that is not added to what was there
        alone = argument.is_out or name in OVERWRITES or not values.get("beta", 1)
        total += sum(map(_nbytes, tensors)) * (2 if written and not alone else 1)
    return total


def _kernels(name: str, args: tuple, ins: list[Tensor]) -> int:
    if name in FILLS_AND_COPIES:
        return 2
    if name in ("_linalg_eigh", "_linalg_svd"):  # one matrix after another
        return ins[0].numel() // (ins[0].shape[-1] * ins[0].shape[-2])
    if name.startswith(("_foreach", "_fused")):
        lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], Tensor)]
        at_a_time = TENSORS_OF_LAUNCH[min(max(len(lists), 1), 5)]
        tensors = lists[0] if lists else []
        blocks = sum(-(-x.numel() // ELEMENTS_OF_BLOCK) for x in tensors)
        return max(-(-len(tensors) // at_a_time), -(-blocks // BLOCKS_OF_LAUNCH))
    return 1
