"""Until a command has begun, which takes some tenths of a second, a signal ends it with a line.

Python itself would end it by a traceback or without a word. Nothing is written by then.
"""

import os
import signal
import sys
from itertools import pairwise
from types import FrameType

_STOPPED = 75  # as `smbfast.base.entry.STOPPED`, whose imports come later


def watch() -> None:
    """Answer signals if this process is to be a command; other programs that import smbfast go on.

    While Python looks for the module behind `-m`, that is the first word.
    """
    program, words = sys.argv[0] if sys.argv else "", sys.orig_argv
    ours = any(a == "-m" and b.partition(".")[0] == "smbfast" for a, b in pairwise(words))
    if (program == "-m" and ours) or os.path.basename(program) == "smbfast":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"\nsmbfast: stopped before it began\n")
    os._exit(_STOPPED)
