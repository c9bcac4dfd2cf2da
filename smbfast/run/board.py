"""TensorBoard's events, written at once: there is no thread and no queue to wait for.

The writer with a thread that tensorboardX offers blocks for ever after one failed write.
"""

import os
import time
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from smbfast.base.helpers import warn_failed

_FLUSH = 30.0  # seconds between flushes


class Board:
    """A file of TensorBoard's events. If it cannot be written, that is said once and it is left."""

    def __init__(self, folder: Path, step: int) -> None:
        """Begin a file in `folder`; events of `step` and later, in older files, count no more."""
        self._folder, self._flushed = folder, time.monotonic()
        self._writer: EventsWriter | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            self._write(step=step, file_version="brain.Event:2")
            self._write(step=step, session_log=SessionLog(status=SessionLog.START))
        except Exception as error:
            self._failed(error)

    def add(self, name: str, value: float, step: int) -> None:
        """Write a scalar."""
        if self._writer is None:
            return
        try:
            self._write(step=step, summary=scalar(name, value))
            if time.monotonic() - self._flushed > _FLUSH:
                self._writer.flush()
                self._flushed = time.monotonic()
        except Exception as error:
            self._failed(error)

    def close(self) -> None:
        """Write what is left, and close the file."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None:
                writer.close()
        except Exception as error:
            self._failed(error)

    def _write(self, **content: object) -> None:
        assert self._writer is not None
        self._writer.write_event(Event(wall_time=time.time(), **content))

    def _failed(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(self._folder)
        warn_failed("TensorBoard", error, "the run goes on without it")
        self._writer = None
