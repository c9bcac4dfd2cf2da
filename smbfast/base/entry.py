"""How every command ends: one line for what a user can mend, and a traceback for a mistake of ours.

Imports nothing but the standard library and `files`, so that `--help` is quick.
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
    """The work itself broke, by no mistake of the program; the message says where."""


@contextmanager
def entry(
    prog: str,
    *,
    stopped: str = "nothing was written",
    status: int = 1,
    on_end: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Run the work of command `prog`; end the process with one line on stderr if it cannot go on.

    The exit status is 1 after an error. An error that is not listed below is a bug: it goes on as
    it is, with its traceback. SIGTERM stops the work as Ctrl-C does.

    Args:
        prog: what the line begins with, such as `smbfast.embed`.
        stopped: what the user needs to know after an interrupt, such as "the same command goes on".
        status: the exit status after an interrupt.
        on_end: called before any of these exits with "failed", or with "preempted" after an
            interrupt: a run writes its status there. Not called for a `SystemExit` from within.

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
    except BrokenPipeError:  # whoever read the output, such as `head`, has seen enough
        on_end("failed")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush
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
        print(f"\n{prog}: stopped; {stopped}", file=sys.stderr)  # behind the terminal's ^C
        raise SystemExit(status) from None
    except BaseException:
        on_end("failed")
        raise


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does (in the main thread; elsewhere nothing changes)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _nothing(state: str) -> None:
    """For a command that has no status to write."""
