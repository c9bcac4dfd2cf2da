"""How the user has typed a command: as a module, `python -m smbfast.train`, or `smbfast train`.

Help and errors repeat it, so that what they show can be typed again. What a run records is always
the module, which also works where no script is installed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_MODULE = re.compile(r"python -m smbfast\.([a-z]+)")
_SCRIPT: ContextVar[str] = ContextVar("script", default="")


@contextmanager
def typed_as(script: str) -> Iterator[None]:
    """Let `as_typed` write commands as words of `script` in the block, such as `smbfast`."""
    token = _SCRIPT.set(script)
    try:
        yield
    finally:
        _SCRIPT.reset(token)


def as_typed(text: str) -> str:
    """Return a text with its commands, `python -m smbfast.NAME`, as the user has typed this one."""
    script = _SCRIPT.get()
    return _MODULE.sub(rf"{script} \1", text) if script else text


def prog_as_typed(prog: str) -> str:
    """Return the name that begins a line of a command: `smbfast.NAME`, or `smbfast NAME`."""
    return prog.replace("smbfast.", "smbfast ", 1) if _SCRIPT.get() else prog
