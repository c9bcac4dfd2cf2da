"""How every command ends: one line for an error that a user can correct, a traceback for a bug.

It imports only the standard library and `files`, so that `--help` is quick.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from smbfast.base.files import cannot_write


class RunFailed(RuntimeError):
    """The work failed although the program is right; the message says where."""


@contextmanager
def entry(
    prog: str,
    *,
    stopped: str = "nothing was written",
    status: int = 1,
    on_end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Run the work of command `prog`; if it fails, end the process with one line on stderr.

    The exit status after an error is 1. An error that is not listed below is a bug and keeps its
    traceback. SIGTERM stops the work as Ctrl-C does.

    Args:
        prog: the beginning of the line, such as `smbfast.embed`.
        stopped: what the user must know after an interrupt, such as "the same command goes on".
        status: the exit status after an interrupt.
        on_end: called before the exit with "failed", or with "preempted" after an interrupt, so a
            run can write its status. A `SystemExit` inside the block does not call it.

    Raises:
        SystemExit: for `ValueError`, `RunFailed`, `OSError`, `BrokenProcessPool` and
            `KeyboardInterrupt`.
    """
    on_end = on_end or _nothing
    try:
        with _terminate_as_interrupt():
            yield
    except SystemExit:
        raise
    except (ValueError, RunFailed) as error:
        on_end("failed")
        raise SystemExit(f"{prog}: {error}") from None
    except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
        on_end("failed")
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # so that the flush at exit works
        raise SystemExit(1) from None
    except OSError as error:
        on_end("failed")
        raise SystemExit(f"{prog}: {cannot_write(error)}") from None
    except BrokenProcessPool:
        on_end("failed")
        raise SystemExit(
            f"{prog}: a worker process was killed, perhaps because memory ran out; the same "
            "command goes on, with fewer `workers` if you set them"
        ) from None
    except KeyboardInterrupt:
        on_end("preempted")
        print(f"\n{prog}: stopped; {stopped}", file=sys.stderr)  # the terminal has printed ^C
        raise SystemExit(status) from None
    except BaseException:
        on_end("failed")
        raise


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the block, if this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _nothing(state: str) -> None:
    """Do nothing, for a command that has no status to write."""
