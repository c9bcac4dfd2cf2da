"""Names the parts of a step for a profile (`smbfast.run.profile`).

While no profile is taken a name does nothing: no event, no wait, no memory.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

PREFIX = "part: "
P = ParamSpec("P")
R = TypeVar("R")
_named = False


def part(name: str) -> AbstractContextManager:
    """Return a context whose operations belong to a part of the step, if a profile is taken."""
    return record_function(PREFIX + name) if _named else nullcontext()


def is_part(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function all of whose operations belong to a part of the step."""

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def named(*args: P.args, **kwargs: P.kwargs) -> R:
            with part(name):
                return function(*args, **kwargs)

        return named

    return decorated


@contextmanager
def naming() -> Iterator[None]:
    """While it lasts, parts are named in the profile that is taken."""
    global _named
    _named = True
    try:
        yield
    finally:
        _named = False
