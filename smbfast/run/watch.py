"""Ends a rank for which nobody is left: torchrun is gone, or another rank has fallen silent.

A message between ranks waits as long as it takes, and while it waits Python hears no signal. A rank
that is stopped, or whose machine has vanished, breaks no connection, and one whose launcher was
killed has nobody to end it. So a thread of every rank looks each second whether torchrun still
runs, and leaves a number in the store; it hears those of the next rank, the last rank's is rank 0.

At the very end rank 0 works alone, on probes and the report, and nobody hears it: the others have
left, and would keep their GPUs only to hear. torchrun sees it die; one that is stopped there has
saved its model, and is done once it goes on.
"""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

TICK = 1.0  # seconds
SILENCE = 120  # ticks without a number of the next rank until it counts as lost: our choice
GRACE = 30  # ticks that a rank has once it is asked, as torchrun gives
ELASTIC = "TORCHELASTIC_RUN_ID"  # which torchrun sets for those that it starts
_LEFT = b"left"
_WHY = "it was stopped, or its machine is lost. The same command goes on from the last checkpoint"


class Watch:
    """The thread of a rank; see the module."""

    def __init__(self, launcher: int) -> None:
        """Begin to look whether torchrun runs, where it started this process.

        Args:
            launcher: the parent that this process began with.
        """
        self.on_end: Callable[[str], None] | None = None  # called with "failed" before the exit
        self._parent = launcher if ELASTIC in os.environ else None
        self._next: int | None = None
        self._silent, self._heard, self._whom = 0, b"", ""
        self._over, self.is_orphan = threading.Event(), False  # whether torchrun has ended
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def listen(self, store: dist.Store, rank: int, world: int) -> None:
        """Leave numbers in the store from now on, and hear those of the next rank."""
        # of its own: an operation of the thread that waits must not hold up another's
        clone: Any = store  # torch does not declare the method
        self._store, self._rank = clone.clone(), rank
        if world > 1:
            self._next = (rank + 1) % world

    def end(self) -> None:
        """Say that this rank leaves as it should, and stop."""
        self._over.set()
        self._thread.join(TICK)
        if self._next is not None:
            with suppress(RuntimeError):  # the process that holds the store may have gone
                self._store.set(f"beat {self._rank}", _LEFT)

    def _run(self) -> None:
        number = 0
        while not self._over.wait(TICK):
            number += 1
            if self._parent is not None and os.getppid() != self._parent:
                return self._orphaned()
            if self._next is not None:
                self._listen(str(number))
            if self._silent >= SILENCE:
                self._leave(f"{self._whom} has not been heard of for {SILENCE} s: {_WHY}")

    def _listen(self, number: str) -> None:
        # own ticks are counted, so that ranks that were all suspended together are not lost
        self._silent += 1
        key = f"beat {self._next}"
        try:
            self._store.set(f"beat {self._rank}", number)
            heard = self._store.get(key) if self._store.check([key]) else b""
        except RuntimeError:
            self._whom = "the process that holds the ranks' store"
            return
        self._whom = f"rank {self._next}"
        if heard != self._heard or heard == _LEFT:
            self._silent, self._heard = 0, heard

    def _orphaned(self) -> None:
        """Ask this process to stop as torchrun would have done, and end it if it does not."""
        self.is_orphan = True
        if self._next is None:
            self._leave("torchrun has ended before the ranks had met")
        _say("torchrun has ended, so this rank saves and ends as well")
        os.kill(os.getpid(), signal.SIGTERM)
        grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
        if not self._over.wait((float(grace) if grace.isdecimal() else GRACE) * TICK):
            self._leave("torchrun has ended, and this rank could not save in time")

    def _leave(self, words: str) -> None:
        """End the process from this thread: the main one waits for a message that never comes."""
        _say(words)
        if self.on_end is not None:
            with suppress(Exception):
                self.on_end("failed")
        os._exit(1)


def _say(words: str) -> None:
    """Print to the process's own stderr, which only the main rank's Python writes to."""
    with suppress(OSError):
        os.write(2, f"smbfast: rank {os.environ.get('RANK', '0')}: {words}\n".encode())
