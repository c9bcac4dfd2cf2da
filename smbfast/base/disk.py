"""Errors of the operating system, in the words that libraries wrap them in."""

import os
import re
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EROFS

_NUMBER = re.compile(r"(?:os error|\[?errno)[ :=]+(\d+)", re.IGNORECASE)
_OF_DISKS = (ENOSPC, EDQUOT, EFBIG, EIO, EROFS)


def system_error(error: BaseException) -> OSError | None:
    """Return the error of the system that `error` is or stands for, or None.

    Parquet, safetensors and tokenizers have errors of their own for a disk that is full; only their
    text has the number.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error
    text = str(error)
    if number := _NUMBER.search(text):
        code = int(number[1])
        return OSError(code, os.strerror(code))
    for code in _OF_DISKS:
        if os.strerror(code).lower() in text.lower():
            return OSError(code, os.strerror(code))
    return error if isinstance(error, OSError) else None


def cannot_write(error: OSError) -> str:
    """Return the reason and the file of an operating system's error, for a message."""
    known = system_error(error) or error
    reason = known.strerror or type(error).__name__
    return f"{reason}: {error.filename or known.filename or 'a file'}"
