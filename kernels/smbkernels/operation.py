"""What an operation is: a body that is its reference, and the backends found beside it.

    masked_jepa_mse(...)                 the choice for these tensors: see `op`
    masked_jepa_mse.reference(...)       the body
    masked_jepa_mse.on("triton")         that implementation, or a ValueError that says why not

A backend is a module that holds a function of the operation's name and signature, and
`missing(device: str) -> str | None`: why it cannot run on that kind of device here, or None.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, ParamSpec, TypeVar, cast

from torch import Tensor

from smbkernels.catalog import AUTO, REFERENCE, check_backend

P = ParamSpec("P")
R = TypeVar("R")
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


class Op(Generic[P, R]):
    """An operation: called, it takes the first backend that can run and fits, see `op`.

    Attributes:
        reference: the body.
        backends: in the order in which they are tried.
        flops: of a forward call, from the operation's own arguments.
    """

    def __init__(
        self, body: Callable[P, R], backends: tuple[Backend, ...], flops: Callable[..., int]
    ) -> None:
        functools.update_wrapper(self, body)  # name, docstring and signature are the body's
        self.name = body.__name__
        self.reference = body
        self.backends = backends
        self.flops = flops
        # by kind of device, what a call without an explicit choice takes the first fitting one of
        self._chosen: dict[str, tuple[tuple[Callable[..., str | None], Callable[P, R]], ...]] = {}
        self._explicit: dict[str, Callable[P, R]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the operation on the backend that is forced, else on the first that fits."""
        forced = FORCED.get(self.name, FORCED.get("*", AUTO))
        if forced != AUTO:
            return self.on(forced)(*args, **kwargs)
        device = device_of(args, kwargs)
        if device not in self._chosen:
            report(self.load(device))
        for fits, function in self._chosen[device]:
            if fits(*args, **kwargs) is None:
                return function(*args, **kwargs)
        return self.reference(*args, **kwargs)

    def missing(self, backend: Backend, device: str) -> str | None:
        """Why a backend cannot run on this kind of device here, or None."""
        try:
            module = import_module(f"smbkernels.{backend.module}")
        except ImportError as error:
            return f"cannot be imported: {error}"
        return module.missing(device)

    def status(self, device: str) -> dict[str, str]:
        """For each backend, and the reference last: "ok", or the reason why not."""
        reasons = {b.name: self.missing(b, device) or "ok" for b in self.backends}
        return {**reasons, REFERENCE: "ok"}

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
        self._chosen[device] = tuple(ready)
        return reasons

    def on(self, name: str) -> Callable[P, R]:
        """The implementation of that name, with a check of what it can take at each call.

        Raises:
            ValueError: the operation has no such backend; when called, the backend cannot run on
                the device of its arguments, or cannot take them.
        """
        if name == REFERENCE:
            return self.reference
        if name not in self._explicit:
            check_backend(self.name, tuple(b.name for b in self.backends), name)
            self._explicit[name] = self._checked(next(b for b in self.backends if b.name == name))
        return self._explicit[name]

    def _checked(self, backend: Backend) -> Callable[P, R]:
        try:
            module = import_module(f"smbkernels.{backend.module}")
        except ImportError as error:
            raise ValueError(
                f"{self.name} cannot run on {backend.name}: cannot be imported: {error}"
            ) from None
        function = cast(Callable[P, R], getattr(module, self.name))

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            reason = module.missing(device_of(args, kwargs)) or backend.fits(*args, **kwargs)
            if reason:
                raise ValueError(f"{self.name} cannot run on {backend.name}: {reason}")
            return function(*args, **kwargs)

        return checked


# backends that `use` forces: by operation, and under "*" for all others
FORCED: dict[str, str] = {}
_reported: set[str] = set()


def op(*backends: Backend, flops: Callable[..., int]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Make the decorated function the reference of an operation.

    A call takes the first backend, in the order given, that lists the device of its first tensor,
    can run here and fits the arguments; the reference otherwise. A backend that cannot run is
    reported once by the logger `smbkernels`.
    """

    def make(body: Callable[P, R]) -> Op[P, R]:
        return Op(body, backends, flops)

    return make


def device_of(args: tuple, kwargs: dict[str, Any]) -> str:
    """The kind of device of the first tensor, which may stand in a list."""
    for value in (*args, *kwargs.values()):
        first = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(first, Tensor):
            return first.device.type
    return "cpu"


def report(reasons: list[str]) -> None:
    """Log each reason why a backend is not used, once in the life of the process."""
    for reason in reasons:
        if reason not in _reported:
            _reported.add(reason)
            log.warning(reason)
