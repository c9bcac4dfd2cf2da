"""One name per operation: the decorated body is the reference, backends are found beside it.

    masked_jepa_mse(...)                 the choice for these tensors: see `op`
    masked_jepa_mse.reference(...)       the body
    masked_jepa_mse.on("triton")         that implementation, or a ValueError that says why not
    with use("torch"): ...               every operation on its reference
    with use(timeline_attention="sdpa"): ...

A backend is a module that holds a function of the operation's name and signature, and
`missing(device: str) -> str | None`: why it cannot run on that kind of device here, or None.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

REFERENCE = "torch"
AUTO = "auto"
log = logging.getLogger("smbkernels")


def _any_call(*_args: Any, **_kwargs: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """An implementation of an operation beside its reference."""

    name: str
    module: str  # under `smbkernels`
    devices: tuple[str, ...]  # kinds of device on which it is chosen without being asked for
    fits: Callable[..., str | None] = _any_call  # why it cannot take these arguments, or None


@dataclass
class Op:
    """What the registry knows of one operation."""

    name: str
    reference: Callable
    backends: tuple[Backend, ...]
    flops: Callable[..., int]  # of a forward call, from its own arguments
    chosen: dict[str, tuple[tuple[Callable, Callable], ...]] = field(default_factory=dict)
    explicit: dict[str, Callable] = field(default_factory=dict)

    def missing(self, backend: Backend, device: str) -> str | None:
        """Why a backend cannot run on this kind of device here, or None."""
        try:
            module = import_module(f"smbkernels.{backend.module}")
        except ImportError as error:
            return f"cannot be imported: {error}"
        return module.missing(device)

    def status(self, device: str) -> dict[str, str]:
        """For each backend, and the reference last: "ok", or the reason why not."""
        found = {b.name: self.missing(b, device) or "ok" for b in self.backends}
        return {**found, REFERENCE: "ok"}

    def load(self, device: str) -> list[str]:
        """Import what this kind of device chooses from; the reasons of what it cannot run."""
        ready, reasons = [], []
        for backend in self.backends:
            if device not in backend.devices:
                continue
            reason = self.missing(backend, device)
            if reason is None:
                module = import_module(f"smbkernels.{backend.module}")
                ready.append((backend.fits, getattr(module, self.name)))
            else:
                reasons.append(f"{self.name}: {backend.name} is not used on {device}: {reason}")
        self.chosen[device] = tuple(ready)
        return reasons

    def on(self, name: str) -> Callable:
        """The implementation of that name, with a check of what it can take at each call.

        Raises:
            ValueError: the operation has no such backend; when called, the backend cannot run on
                the device of its arguments, or cannot take them.
        """
        if name == REFERENCE:
            return self.reference
        if name not in self.explicit:
            known = {b.name: b for b in self.backends}
            if name not in known:
                names = ", ".join([*known, REFERENCE])
                raise ValueError(f"backend of {self.name} must be one of {names}, got {name!r}")
            self.explicit[name] = self._checked(known[name])
        return self.explicit[name]

    def _checked(self, backend: Backend) -> Callable:
        try:
            module = import_module(f"smbkernels.{backend.module}")
        except ImportError as error:
            raise ValueError(
                f"{self.name} cannot run on {backend.name}: cannot be imported: {error}"
            ) from None
        function = getattr(module, self.name)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            reason = module.missing(device_of(args, kwargs)) or backend.fits(*args, **kwargs)
            if reason:
                raise ValueError(f"{self.name} cannot run on {backend.name}: {reason}")
            return function(*args, **kwargs)

        return checked


OPS: dict[str, Op] = {}
_forced: dict[str, str] = {}
_said: set[str] = set()


def op(*backends: Backend, flops: Callable[..., int]) -> Callable[[Callable], Callable]:
    """Register the decorated function as the reference of an operation.

    A call takes the first backend, in the order given, that lists the device of its first tensor,
    can run here and fits the arguments; the reference otherwise. A backend that cannot run is
    reported once by the logger `smbkernels`.
    """

    def register(body: Callable) -> Callable:
        entry = Op(body.__name__, body, backends, flops)
        OPS[entry.name] = entry

        @functools.wraps(body)
        def call(*args: Any, **kwargs: Any) -> Any:
            return _choice(entry, args, kwargs)(*args, **kwargs)

        call.reference = body
        call.on = entry.on
        call.flops = flops
        call.__signature__ = inspect.signature(body)
        return call

    return register


def _choice(entry: Op, args: tuple, kwargs: dict) -> Callable:
    forced = _forced.get(entry.name, _forced.get("*", AUTO))
    if forced != AUTO:
        return entry.on(forced)
    device = device_of(args, kwargs)
    if device not in entry.chosen:
        _report(entry.load(device))
    for fits, function in entry.chosen[device]:
        if fits(*args, **kwargs) is None:
            return function
    return entry.reference


def device_of(args: tuple, kwargs: dict) -> str:
    """The kind of device of the first tensor, which may stand in a list."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    return "cpu"


@contextmanager
def use(backend: str | None = None, /, **by_op: str) -> Iterator[None]:
    """Force a backend for all operations, or by name for some; never falls back.

    `auto` gives the choice back to the registry.

    Raises:
        ValueError: no such operation, or one that is meant has no such backend.
    """
    wanted = {**({"*": backend} if backend else {}), **by_op}
    for name in by_op:
        if name not in OPS:
            raise ValueError(f"operation must be one of {', '.join(sorted(OPS))}, got {name!r}")
    # implementations are imported here, because a compiled call cannot import
    for name in OPS if backend else by_op:
        choice = by_op.get(name, backend)
        if choice != AUTO:
            OPS[name].on(choice)
    before = dict(_forced)
    if backend is not None:
        _forced.clear()
    _forced.update(wanted)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def everywhere() -> str:
    """The backend that is forced for all operations but those named, or "auto"."""
    return _forced.get("*", AUTO)


def load(device: str | None = None) -> list[str]:
    """Import every implementation that a kind of device chooses from, before compilation.

    Args:
        device: cpu or cuda; default: cuda where there is one.

    Returns:
        Lines "operation: backend, then torch", for a log. What cannot run is logged once.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    lines = []
    for name, entry in OPS.items():
        _report(entry.load(device))
        ready = [b.name for b in entry.backends if device in b.devices]
        ready = [b for b in ready if entry.status(device)[b] == "ok"]
        forced = _forced.get(name, _forced.get("*", AUTO))
        found = ", then ".join([*ready, REFERENCE]) if forced == AUTO else forced
        lines.append(f"{name}: {found}")
    return lines


def table(device: str) -> list[list[str]]:
    """Operations × backends, a header first: "ok", the reason why not, or "-" for none."""
    names = list(dict.fromkeys(b.name for o in OPS.values() for b in o.backends))
    rows = [["operation", *names, REFERENCE]]
    for name, entry in sorted(OPS.items()):
        status = entry.status(device)
        rows.append([name, *(status.get(n, "-") for n in names), status[REFERENCE]])
    return rows


def _report(reasons: list[str]) -> None:
    for reason in reasons:
        if reason not in _said:
            _said.add(reason)
            log.warning(reason)
