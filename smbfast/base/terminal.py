"""What commands say beside their results, on stderr: the first line, warnings, and level words.

Only a terminal gets colours, and only the word that says how bad it is; a log file gets none.
"""

import os
import sys
from typing import TextIO

RED, YELLOW = 31, 33  # of the sixteen colours that a terminal's own theme decides on


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def coloured(word: str, colour: int, stream: TextIO | None = None) -> str:
    """Return a word in a colour where the stream, by default stderr, shows colours."""
    stream = sys.stderr if stream is None else stream
    return f"\033[1;{colour}m{word}\033[0m" if has_colours(stream) else word


def warn(text: str) -> None:
    """Print a warning."""
    print(f"{coloured('warning:', YELLOW)} {text}", file=sys.stderr, flush=True)


def failed(prog: str, text: object) -> str:
    """Return the line with which a command ends that has failed."""
    return f"{coloured(f'{prog}:', RED)} {text}"


def say_first(prog: str, then: str = "loading PyTorch takes a few seconds") -> None:
    """Say that a command has begun, before what takes seconds; once for all ranks.

    Args:
        then: what follows.
    """
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{prog}: the settings are fine; {then}",
            file=sys.stderr,
            flush=True,
        )
