"""What a run can do without: if it fails, that is said and the run goes on."""

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from smbfast.base.disk import cannot_write, system_error
from smbfast.base.terminal import warn


@contextmanager
def helper(what: str, otherwise: str = "the run goes on") -> Iterator[None]:
    """Run a block that the work does not depend on; say on stderr if it fails.

    Args:
        what: the beginning of the sentence, such as "the report".
        otherwise: its end.
    """
    try:
        yield
    except Exception as error:
        warn_failed(what, error, otherwise)


def warn_failed(what: str, error: BaseException, otherwise: str) -> None:
    """Say on stderr that `what` failed; never with a value of the data."""
    warn(f"{what} failed ({reason(error)}); {otherwise}")


def reason(error: BaseException) -> str:
    """Return why something failed: an error of the system in words, any other by its place."""
    known = system_error(error)
    if known is not None:
        return cannot_write(known)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
