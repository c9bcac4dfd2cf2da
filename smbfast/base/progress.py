"""Progress lines on stderr: how much of a total is done, how fast, and the time left."""

import sys
import time

SECONDS = 5.0  # between two lines


class Ahead:
    """What a command has before it behind the stage that it is in: predicted seconds by stage.

    As a context it is that of one command, which neither finds nor leaves anything.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self.before = ""

    def __enter__(self) -> None:
        self.expect({})

    def __exit__(self, *_error: object) -> None:
        self.expect({})

    def expect(self, seconds: dict[str, float], before: str = "") -> None:
        """Take the stages to come, in order, in place of all that were known.

        Args:
            before: what follows of which nobody can say yet how long it takes.
        """
        self._seconds, self.before = dict(seconds), before

    def begin(self, stage: str) -> None:
        """Go on to a stage: it and those before it are to come no more."""
        names = list(self._seconds)
        for name in names[: names.index(stage) + 1] if stage in names else ():
            del self._seconds[name]

    @property
    def seconds(self) -> float:
        """The predicted seconds of all stages to come, 0 where nothing is predicted."""
        return sum(self._seconds.values())


AHEAD = Ahead()  # of this process, which runs one command at a time


class Progress:
    """Prints a line on stderr every few seconds; work that ends before the first one prints none.

    Lines have no control characters, so they read the same in a log file and in a terminal.
    """

    def __init__(self, prog: str, total: int, unit: str) -> None:
        """Start at 0 of `total` things named `unit`; lines begin with the command's name `prog`."""
        self.prog, self.done, self._total, self._unit = prog, 0, total, unit
        self._start = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count `count` more as done."""
        self.done += count
        now = time.monotonic()
        if not self.done or now - self._last < SECONDS:
            return
        self._last = now
        rate = self.done / (now - self._start)
        left = (self._total - self.done) / rate
        print(
            f"{self.prog}: {self.done:,} of {self._total:,} {self._unit}, {rate:,.0f} a second, "
            f"{time_left(left)}",
            file=sys.stderr,
            flush=True,
        )


def time_left(seconds: float) -> str:
    """Return the time left of a stage with all that is predicted to follow it, or until when."""
    if AHEAD.before:
        return f"{duration(seconds)} left of this, before {AHEAD.before}"
    if not AHEAD.seconds:
        return f"{duration(seconds)} left"
    return f"about {duration(seconds + AHEAD.seconds)} left in all"


def duration(seconds: float) -> str:
    """Return a duration as `12 s`, `3m05` or `2h14`."""
    seconds = max(int(seconds), 0)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}"
