"""Rows about a run that lives: signals at every stage, what fails beside it, the loader."""

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work

LOOP = "smbfast/run/loop.py"
AHEAD = "smbfast/base/ahead.py"
ENTRY = "smbfast/base/entry.py"


def signals(work: Work) -> Proof:
    """Signals in every stage of a run and of commands."""
    from tests.reliability import signalled

    return signalled.prove(work)


def helpers(work: Work) -> Proof:
    """What fails beside a run."""
    from tests.reliability import failing

    return failing.prove(work)


def loader(work: Work) -> Proof:
    """Steps made ahead, and workers."""
    from tests.reliability import loading

    return loading.prove(work)


SIGNAL_MISTAKES = (
    mutant(
        "usr1-in-the-loop-alone",
        "outside of the loop SIGUSR1 kills",
        ENTRY,
        "signal.signal(number, signals.handle) for number in SIGNALS}",
        "signal.signal(number, signals.handle) for number in SIGNALS[:2]}",
    ),
    mutant(
        "stops-at-lines-of-the-log",
        "a signal is heard only where a line is logged",
        "smbfast/run/optim.py",
        "        save=done % run.save_every == 0 or last or stop,\n        stop=stop,",
        "        save=done % run.save_every == 0 or last or stop,\n"
        "        stop=stop and (done % run.log_every == 0 or last),",
    ),
    mutant(
        "second-signal-ignored",
        "a second signal does not interrupt the step",
        "smbfast/base/runtime.py",
        "            raise KeyboardInterrupt\n        self.name",
        "            return\n        self.name",
    ),
    mutant(
        "dropped-interrupts-are-lost",
        "an interrupt in the callback of a weak reference is not repeated",
        ENTRY,
        "signal.setitimer(signal.ITIMER_REAL, _SOON)",
        "pass",
    ),
    mutant(
        "a-signal-kills-while-python-ends",
        "signals have their default again before the process has ended",
        ENTRY,
        "signal.signal(number, signal.SIG_IGN)",
        "signal.signal(number, signal.SIG_DFL)",
    ),
)
HELPER_MISTAKES = (
    mutant(
        "the-report-is-no-helper",
        "a report that fails ends the run",
        LOOP,
        '    with helper("the report"):',
        "    if True:",
    ),
    mutant(
        "events-by-a-thread",
        "TensorBoard's events go through a thread, whose queue is full once a write has failed",
        "smbfast/run/board.py",
        'self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")',
        'self._writer = __import__("tensorboardX").event_file_writer.EventFileWriter('
        "str(folder), 2)\n            self._writer.write_event = self._writer.add_event",
    ),
    mutant(
        "trackers-are-waited-for",
        "a tracker that hangs holds the run at its end",
        "smbfast/run/trackers.py",
        "self._thread.join(max(0.0, until - time.monotonic()))",
        "self._thread.join()",
    ),
    mutant(
        "git-is-waited-for",
        "git that hangs holds the run",
        "smbfast/base/runtime.py",
        "            timeout=_GIT_PATIENCE,\n",
        "",
    ),
    mutant(
        "a-dead-writer-is-waited-for",
        "a thread that ends inside a checkpoint leaves the run waiting",
        "smbfast/run/background.py",
        "not self._thread.is_alive()",
        "False",
    ),
)
LOADER_MISTAKES = (
    mutant(
        "by-arrival",
        "the loader gives a step that is ready before the one that is due",
        AHEAD,
        "_taken(ready.popleft(), team, what, stop)",
        "_taken(ready.pop() if ready[-1].is_done.is_set() else ready.popleft(), team, what, stop)",
    ),
    mutant(
        "a-dead-thread-is-waited-for",
        "a thread of the loader that dies leaves the run waiting",
        AHEAD,
        "if not all(thread.is_alive() for thread in team)",
        "if not any(thread.is_alive() for thread in team)",
    ),
    mutant(
        "a-hung-thread-holds-the-end",
        "the process does not end before a hung thread of the loader",
        AHEAD,
        "name=what, daemon=True)",
        "name=what)",
    ),
)
ROWS = (
    Row(
        "R6",
        "INT, TERM and USR1, once and in storms, end every stage of a run and of commands with 75 "
        "within a step, with its status right; the same command goes on to the same bits.",
        {"push": 12, "nightly": 60, "recorded": 200},
        signals,
        SIGNAL_MISTAKES,
    ),
    Row(
        "L1",
        "What fails beside a run never holds it: it goes on with a line that names it, or ends "
        "with one where the work depends on it, and SIGTERM still leads to 75.",
        {"push": 12, "recorded": 30},
        helpers,
        HELPER_MISTAKES,
    ),
    Row(
        "D6",
        "Steps come by their number, whichever thread is done first and however many are made "
        "ahead; a thread or a worker that dies ends the work with words.",
        {"push": 20, "recorded": 200},
        loader,
        LOADER_MISTAKES,
    ),
)
