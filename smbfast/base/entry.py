"""How every command ends: one line for an error that a user can correct, a traceback for a bug.

It imports only the standard library and files of this folder, so that `--help` is quick.
"""

import atexit
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

from smbfast.base.disk import cannot_write, system_error
from smbfast.base.progress import AHEAD
from smbfast.base.terminal import failed
from smbfast.base.typed import prog_as_typed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOPPED = 75  # exit status after a signal, EX_TEMPFAIL: run it again
_PATIENCE = 2  # signals that ask; the next one ends the process
_AGAIN = 10.0  # seconds after which an interrupt that nobody has answered is repeated: our choice
_SOON = 0.05  # seconds after which one is that was raised where Python drops it
MOMENT = 5.0  # seconds in which signals are one, which srun and torchrun hand on: our choice

_UMASK: list[int] = []  # of the user, while a command works
_NO_MEMORY = "DefaultCPUAllocator: "  # what PyTorch says where it can allocate nothing
_NO_THREAD = "can't start new thread"  # what Python says where the system refuses one


class RunFailed(RuntimeError):
    """The work failed although the program is right; the message says where."""


@contextmanager
def entry(
    prog: str,
    *,
    stopped: str = "nothing was written",
    status: int = STOPPED,
    on_end: Callable[[str], None] | None = None,
    private: bool = True,
) -> Iterator["Signals"]:
    """Run the work of command `prog`; if it fails, end the process with one line on stderr.

    The exit status after an error is 1, after a signal 75; an error that is not listed below is a
    bug with a traceback. SIGTERM and SIGUSR1 stop the work as Ctrl-C does. A second signal stops
    what the first began, a third the process; those within 5 seconds of one that counts are it.

    Args:
        prog: the beginning of the line, such as `smbfast.embed`.
        stopped: what the user must know after an interrupt, such as "the same command goes on".
        status: the exit status after an interrupt.
        on_end: called before the exit with "failed", or with "preempted" after an interrupt, so a
            run can write its status. A `SystemExit` inside the block does not call it.
        private: whether only the user may read the files that are written: they are about patients.

    Raises:
        SystemExit: for `ValueError`, `RunFailed`, `OSError`, `BrokenProcessPool` and
            `KeyboardInterrupt`, and for a full disk in the words of any library.
    """
    on_end = on_end or _nothing
    module, prog = prog, prog_as_typed(prog)
    with AHEAD, _modes(private), _signals(module, status) as signals:
        try:
            yield signals
            signals.end()  # here, where one that came just before is still answered
        except SystemExit:
            raise
        except (ValueError, RunFailed) as error:
            signals.ignore()
            on_end("failed")
            raise SystemExit(failed(prog, error)) from None
        except BrokenPipeError:  # the reader of the output, such as `head`, has closed it
            signals.ignore()
            on_end("failed")
            # so that the flush at exit works
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            signals.ignore()
            on_end("preempted")
            print(f"\n{prog}: stopped; {stopped}", file=sys.stderr)  # the terminal has printed ^C
            # an interrupt that came through source text, which libraries run while they are
            # imported, would make Python end itself by SIGINT; other text makes it forget
            exec("")
            raise SystemExit(status) from None
        except BaseException as error:
            signals.ignore()
            on_end("failed")
            words = _in_words(error)
            if words is None:
                raise
            raise SystemExit(failed(prog, words)) from None


def _in_words(error: BaseException) -> str | None:
    """Return what a user can mend about an error of the system; None for a bug."""
    if isinstance(error, BrokenProcessPool):
        return (
            "a worker process was killed, perhaps because memory ran out; the same command goes "
            "on, with fewer `workers` if you set them"
        )
    if isinstance(error, MemoryError) or _NO_MEMORY in str(error):
        return "memory ran out; give the process more, or use fewer `workers` or a smaller file"
    if str(error) == _NO_THREAD:
        return (
            "the system starts no more threads; raise its limit (`ulimit -u`) and run the same "
            "command"
        )
    known = system_error(error)
    return None if known is None else cannot_write(known)


class Requests:
    """Counts requests to stop: a signal that reaches a process on several ways is one."""

    def __init__(self) -> None:
        self.count, self._since = 0, 0.0

    def add(self) -> bool:
        """Take a signal; whether it is a request, not one within a moment of the last request."""
        now = monotonic()
        if self.count and now - self._since < MOMENT:
            return False
        self.count, self._since = self.count + 1, now
        return True


class Signals:
    """Turns signals into KeyboardInterrupt, and ends the process if they are not heard.

    Python drops an exception that is raised where nobody could catch it, as in the callback of a
    weak reference. Such an interrupt is repeated by a timer, until the way out has begun.
    """

    def __init__(self, status: int) -> None:
        self._requests, self._status, self._ignored = Requests(), status, False
        self._hook = sys.unraisablehook
        self.parent = os.getppid()  # which may die in the seconds that imports take
        self.is_last = False  # whether the process ends with what they stop

    def handle(self, number: int, frame: object) -> None:
        if not self._requests.add():
            return
        if self._requests.count > _PATIENCE:
            os._exit(self._status)  # what is on the disk is whole at any moment
        self.interrupt()

    def interrupt(self, *_signal: object) -> None:
        """Raise KeyboardInterrupt, now and again."""
        if not self._ignored:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN)
            raise KeyboardInterrupt

    def dropped(self, what: "sys.UnraisableHookArgs") -> None:
        """Hear of an exception that Python has dropped."""
        if issubclass(what.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _SOON)
        else:
            self._hook(what)

    def end(self) -> None:
        """Hear nothing more if the process has done all that it was started for."""
        if self.is_last:
            self.ignore()

    def ignore(self) -> None:
        """Let the way out be interrupted no more: torchrun ends a rank when another has failed."""
        self._ignored = True


@contextmanager
def _signals(prog: str, status: int) -> Iterator[Signals]:
    """Handle signals in the block, if this is the main thread."""
    signals = Signals(status)
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, signals.handle) for number in SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, signals.interrupt)
    sys.unraisablehook, hook = signals.dropped, sys.unraisablehook
    is_inner = _is_ours(before[signal.SIGTERM])
    signals.is_last = not is_inner and _is_the_program(prog)
    ends = not is_inner
    try:
        yield signals
    except SystemExit:
        ends = True
        raise
    except BaseException:
        ends = False  # a bug, whose traceback follows
        raise
    finally:
        if not is_inner or ends:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if ends and _is_the_program(prog):
            signals.ignore()  # until the process has ended, its status and words stay what they are
        else:
            sys.unraisablehook = hook
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


@atexit.register
def _end_unheard() -> None:
    """Let no signal kill a process whose command has ended.

    Python gives signals that it handles their default back before it ends, which takes a tenth of a
    second where torch was imported. Those that the system ignores stay as they are.
    """
    if _is_ours(signal.getsignal(signal.SIGTERM)):
        for number in (*SIGNALS, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)


def _is_ours(handler: object) -> bool:
    return isinstance(getattr(handler, "__self__", None), Signals)


def _is_the_program(prog: str) -> bool:
    """Whether this process was started for the command, and not a test or another program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None:  # the script that an installation makes
        return os.path.basename(sys.argv[0]) == "smbfast"
    return spec.name in (prog, "smbfast.__main__")


@contextmanager
def _modes(private: bool) -> Iterator[None]:
    """Let new files be 0600 and new folders 0700 in the block if `private`, else as the user's
    umask has them, also within a block that is private."""
    before = os.umask(0o077)
    is_first = not _UMASK
    if is_first:
        _UMASK.append(before)
    if not private:
        os.umask(_UMASK[0])
    try:
        yield
    finally:
        os.umask(before)
        if is_first:
            _UMASK.clear()


def own_folder(folder: Path, *, shared: bool = False, entries: Sequence[str] = ()) -> None:
    """Let a folder that holds our files alone be 0700, or as the user's umask has it if `shared`.

    It may have been made before, by anybody; what is of another user stays as it is.

    Args:
        entries: names of files and folders in it, no links, that become as the umask has them too.
    """
    mask = _UMASK[0] if shared and _UMASK else 0o077
    for path in (folder, *(folder / name for name in entries if shared)):
        with suppress(OSError):
            about = path.stat(follow_symlinks=path == folder)  # a run may lie on another disk
            if about.st_uid == os.geteuid() and not stat.S_ISLNK(about.st_mode):
                path.chmod((0o777 if stat.S_ISDIR(about.st_mode) else 0o666) & ~mask)


def _nothing(state: str) -> None:
    """Do nothing, for a command that has no status to write."""
