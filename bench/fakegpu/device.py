"""A CUDA device of which only shapes exist: torch believes in one "pretended H200".

Tensors on it are fake (`FakeTensorMode`): shape, dtype, strides, no memory, no values. Tensors on
the CPU stay real, so that plans and tables are made as ever. What is read back from the device, by
a copy to the CPU or `.item()`, is True, 1 or 1e-6, by its dtype; but integers that were made of
what the CPU gave, such as indices and masks, are read as they are. Triton kernels are not launched,
see `bench.fakegpu.launches`.

It patches private names of torch, whose versions are limited in pyproject.toml.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from ctypes import CDLL
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock
from weakref import finalize

import torch
import torch._subclasses.fake_tensor as fake
import torch.nn.functional as F
from smbkernels.registry import OPS
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

NAME = "pretended H200"
CAPABILITY = (9, 0)
MULTIPROCESSORS = 132
CUDNN = 91900  # the version in a CUDA build of torch 2.11
MEMORY = 141 << 30  # bytes
LARGEST = 1 << 28  # bytes of a copy to the CPU that gets memory; larger ones stay without
TINY = 1e-6  # what a floating-point number reads as: an error that any tolerance allows
_real_tensor = torch.tensor
_real_sdpa = F.scaled_dot_product_attention
_pinned: set[int] = set()  # storages


def is_pinned(tensor: Tensor) -> bool:
    """Whether the memory of a CPU tensor was pinned, so that a copy of it need not wait."""
    return tensor.untyped_storage()._cdata in _pinned


def touches_gpu(args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call has a tensor without memory among its arguments, or makes one on the GPU."""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(
        isinstance(value, Tensor) and (value.is_cuda or isinstance(value, fake.FakeTensor))
        for value in tree_iter((args, kwargs))
    )


def _always(value: Any) -> Callable:
    return lambda *_args, **_kwargs: value


class HostIsReal(TorchDispatchMode):
    """Stands on `FakeTensorMode`: computes what is on the CPU, and reads constants from the GPU.

    Tensors of integers and truth values on the GPU are computed on the CPU as well, as long as all
    that they are made of is known: indices, lengths and masks are then read as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakTensorKeyDictionary()  # the same on the CPU

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not touches_gpu(args, kwargs):
            with fake.unset_fake_temporarily():
                return func(*args, **kwargs)
        name = func._schema.name
        if name in ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"):
            known = [self.known.get(x) for x in args]
            if any(x is None for x in known):
                return _read(args[0].dtype if name == "aten::_local_scalar_dense" else torch.bool)
            return self._on_cpu(func, known, {})
        if name == "aten::nonzero":
            known = self.known.get(args[0])
            at = None if known is None else self._on_cpu(func, (known,), {})
            rows = args[0].numel() if at is None else len(at)
            return self._know(args[0].new_empty((rows, args[0].dim()), dtype=torch.int64), at)
        if name == "aten::copy_" and not touches_gpu(args[:1], {}):
            known = self.known.get(args[1])
            return self._on_cpu(func, (args[0], _constant(args[1]) if known is None else known), {})
        out = func(*args, **kwargs)
        if name == "aten::_to_copy" and not out.is_cuda and out.nbytes <= LARGEST:
            known = self.known.get(args[0])
            with fake.unset_fake_temporarily():
                return _constant(out) if known is None else known.to(out.dtype, copy=True)
        self._mirror(func, args, kwargs, out)
        return out

    def _mirror(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        """Compute integers on the CPU as well, if all that goes in is known there."""
        outs = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        if not outs or any(x.is_floating_point() or x.nbytes > LARGEST for x in outs):
            return
        if func._schema.name.startswith("aten::empty") or func._schema.name == "aten::new_empty":
            return
        ins = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, fake.FakeTensor) and x not in self.known for x in ins):
            for x in outs:
                self.known.pop(x, None)
            return
        moved = tree_map_only(Tensor, lambda x: self.known.get(x, x), (args, kwargs))
        there = {k: torch.device("cpu") if k == "device" else v for k, v in moved[1].items()}
        result = self._on_cpu(func, moved[0], there)
        values = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        for x, value in zip(outs, values, strict=True):
            self._know(x, value)

    def _know(self, x: Tensor, value: Tensor | None) -> Tensor:
        if value is not None:
            self.known[x] = value
        return x

    @staticmethod
    def _on_cpu(func: Any, args: Any, kwargs: dict) -> Any:
        with fake.unset_fake_temporarily():
            return func(*args, **kwargs)


def _constant(x: Tensor) -> Tensor:
    with fake.unset_fake_temporarily():
        return torch.full(x.shape, _read(x.dtype), dtype=x.dtype)


def _read(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return TINY if dtype.is_floating_point else 1


class Event:
    """A CUDA event: all are a millisecond from each other."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record(self, *_args: Any) -> None:
        """Do nothing."""

    wait = record

    def synchronize(self) -> None:
        """The host waits."""
        Reports.wait("synchronize")

    def query(self) -> bool:
        """Everything is done at once."""
        return True

    def elapsed_time(self, _other: "Event") -> float:
        """A millisecond."""
        return 1.0


class Stream(Event):
    """A CUDA stream on which nothing runs."""

    wait_event = wait_stream = Event.record
    record_event = Event


class Graph:
    """A CUDA graph: what is captured ran as it was written."""

    def replay(self) -> None:
        """Do nothing."""

    reset = replay


class Reports:
    """Who hears of waits and of kernels that no operation shows; a ledger sets both."""

    waited: Callable[[str], None] = staticmethod(_always(None))
    launched: Callable[[str, list[Tensor]], None] = staticmethod(_always(None))
    mode: int = 0  # of torch.cuda.set_sync_debug_mode: 2 makes a wait an error

    @classmethod
    def wait(cls, what: str) -> None:
        """The host waits for the GPU.

        Raises:
            RuntimeError: `torch.cuda.set_sync_debug_mode("error")` is on.
        """
        cls.waited(what)
        if cls.mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    @classmethod
    def set_mode(cls, mode: int | str) -> None:
        """As torch's."""
        cls.mode = {"default": 0, "warn": 1, "error": 2}.get(str(mode), 0)


class Attention(torch.autograd.Function):
    """What a fused kernel of `scaled_dot_product_attention` allocates and stores."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        Reports.launched("sdpa", [query, key, value, out, lse])
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, ...]:
        inputs = ctx.saved_tensors[:3]
        grads = tuple(torch.empty_like(x) for x in inputs)
        Reports.launched("sdpa_backward", [grad_out, *ctx.saved_tensors, *grads])
        return grads


class Memory:
    """What the allocator's functions say; a ledger sets it."""

    live = peak = highest = 0  # `reset_peak` leaves `highest`
    owner: object = None  # a ledger: what an earlier one held may be freed later

    @classmethod
    def begin(cls, owner: object) -> None:
        """Begin at nothing."""
        cls.live = cls.peak = cls.highest = 0
        cls.owner = owner

    @classmethod
    def count(cls, change: int) -> None:
        """Add bytes to those that are allocated."""
        cls.live += change
        cls.peak = max(cls.peak, cls.live)
        cls.highest = max(cls.highest, cls.live)

    @classmethod
    def reset_peak(cls, _device: Any = None) -> None:
        """Begin a new peak."""
        cls.peak = cls.live


PROPERTIES = SimpleNamespace(
    name=NAME,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    multi_processor_count=MULTIPROCESSORS,
    L2_cache_size=60 << 20,
    total_memory=MEMORY,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=227 << 10,
)
CUDA: dict[str, Any] = {
    "is_available": _always(True),
    "is_initialized": _always(False),  # so that seeds wait for a start that never comes
    "device_count": _always(1),
    "current_device": _always(0),
    "set_device": _always(None),
    "get_device_capability": _always(CAPABILITY),
    "get_device_name": _always(NAME),
    "get_device_properties": _always(PROPERTIES),
    "is_bf16_supported": _always(True),
    "device": _always(nullcontext()),
    "device_of": _always(nullcontext()),
    "synchronize": lambda *_: Reports.wait("synchronize"),
    "empty_cache": _always(None),
    "set_sync_debug_mode": Reports.set_mode,
    "get_sync_debug_mode": lambda: Reports.mode,
    "is_current_stream_capturing": _always(False),
    "current_stream": lambda *_: Stream(),
    "stream": _always(nullcontext()),
    "graph": _always(nullcontext()),
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": Graph,
    "memory_allocated": lambda *_: Memory.live,
    "memory_reserved": lambda *_: Memory.live,
    "max_memory_allocated": lambda *_: Memory.peak,
    "max_memory_reserved": lambda *_: Memory.peak,
    "mem_get_info": lambda *_: (MEMORY - Memory.live, MEMORY),
    "reset_peak_memory_stats": Memory.reset_peak,
}


@contextmanager
def pretended_gpu() -> Iterator[fake.FakeTensorMode]:
    """Within it, "cuda" is a device without memory; everything is put back afterwards.

    Raises:
        RuntimeError: the process was not started with the shim.
    """
    library = CDLL(None)  # what was loaded before
    if not hasattr(library, "smb_pretend"):
        raise RuntimeError("a pretended GPU needs a process that bench.fakegpu.shim started")
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
    library.smb_pretend()
    foreach = [torch.Tensor, fake.FakeTensor, torch.nn.Parameter]
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.multiple(torch.cuda, **CUDA))
        enter(mock.patch.object(fake, "init_gpu_context", _always(None)))
        enter(mock.patch.object(fake.FakeTensorMode, "avoid_device_init", property(_always(True))))
        enter(mock.patch.object(fake.FakeTensor, "data_ptr", _address))
        enter(mock.patch.object(torch.Tensor, "pin_memory", _pin))
        enter(mock.patch.object(torch.Tensor, "is_pinned", lambda x, *_: is_pinned(x)))
        enter(mock.patch.object(_foreach_utils, "_foreach_supported_types", foreach))
        enter(mock.patch.object(F, "scaled_dot_product_attention", _sdpa))
        enter(mock.patch.object(torch.backends.cudnn, "version", _always(CUDNN)))
        enter(mock.patch.object(torch, "tensor", _tensor))
        enter(mock.patch.object(torch.utils, "swap_tensors", _swap))
        enter(mock.patch.object(torch, "compile", lambda f=None, **_: f or (lambda g: g)))
        enter(mock.patch.object(torch.nn.Module, "compile", _always(None)))
        mode = enter(fake.FakeTensorMode(allow_non_fake_inputs=True))
        enter(HostIsReal())
        yield mode


@contextmanager
def untraced() -> Iterator[None]:
    """Our operations ask whether they are traced, and are one call if so; here they run inside."""
    modules = []
    for operation in OPS.values():
        names = [f"{operation.reference.__module__}"]
        names += [f"smbkernels.{backend.module}" for backend in operation.backends]
        for name in names:
            try:
                modules.append(import_module(name))
            except ImportError:  # a backend of a library that is not installed
                continue
    with ExitStack() as stack:
        for module in {m.__name__: m for m in modules}.values():
            if hasattr(module, "is_in_torch_dispatch_mode"):
                stack.enter_context(
                    mock.patch.object(module, "is_in_torch_dispatch_mode", _always(False))
                )
        yield


def _tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """On a thread of autograd, torch itself would copy to the device before any mode sees it."""
    if device is None or torch.device(device).type != "cuda":
        return _real_tensor(data, device=device, **kwargs)
    needs = kwargs.pop("requires_grad", False)
    return _real_tensor(data, device="cpu", **kwargs).to(device).requires_grad_(needs)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not query.is_cuda:
        return _real_sdpa(query, key, value, *args, **kwargs)
    return Attention.apply(query, key, value)


def _swap(before: Tensor, after: Tensor) -> None:
    """As a module is moved or cast; torch cannot swap tensors that its fake mode refers to."""
    if (before.device, before.dtype) != (after.device, after.dtype):
        before.data = after


def _address(tensor: Tensor) -> int:
    """Of a tensor without memory: a storage begins at a multiple of 512, as an allocator's does."""
    offset = tensor.storage_offset() * tensor.element_size()
    return (tensor.untyped_storage()._cdata << 9) + offset


@functools.wraps(torch.Tensor.pin_memory)
def _pin(tensor: Tensor, *_args: Any) -> Tensor:
    copied = tensor.clone()
    storage = copied.untyped_storage()
    _pinned.add(storage._cdata)
    finalize(storage, _pinned.discard, storage._cdata)
    return copied
