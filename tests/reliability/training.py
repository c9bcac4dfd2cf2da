"""Tiny runs in this process, and what they leave and say: for rows that train again and again."""

import contextlib
import importlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

TINY = (
    "tiny",
    "--probe.labels=[]",
    "--run.threads=1",
    "--data.window=128",
    "--model.hidden=16",
    "--model.layers=1",
    "--model.ffn=24",
    "--model.heads=1",
    "--eval.windows=2",
    "--eval.every=1000",
    "--run.save_every=1000",
    "--run.log_every=1",
    "--kernels=linear:torch",
)
CLEAN = "--objective.self_check=false"


@dataclass(frozen=True)
class Ran:
    """How a run ended and what it said."""

    folder: Path
    code: int  # exit status
    out: str
    err: str  # with the last words of a run that failed

    @property
    def records(self) -> list[dict[str, Any]]:
        """The lines of its log."""
        file = self.folder / "metrics.jsonl"
        return [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []

    @property
    def checkpoints(self) -> list[str]:
        """The names of its checkpoints."""
        return sorted(p.name for p in (self.folder / "checkpoints").glob("step-*"))


def cohort(folder: Path, patients: int = 60) -> list[str]:
    """Simulate a small cohort; return the words that train on it, prepared once for all runs."""
    from smbfast.simulation.dataset import simulate

    simulate(folder / "cohort", patients, 0)
    return [f"--data.path={folder / 'cohort'}", f"--data.prepared={folder / 'prepared'}"]


def train(
    folder: Path,
    words: Sequence[str],
    *patches: AbstractContextManager,
    report: bool = False,
) -> Ran:
    """Run `smbfast.train` here, with a report if it is asked for.

    Args:
        patches: entered before it and left after it.
    """
    import smbfast.train as entry

    out, err, code = io.StringIO(), io.StringIO(), 0
    with ExitStack() as stack:
        # the prediction of memory would take half of the time of a tiny run, and a report too
        stack.enter_context(mock.patch("smbfast.run.open_run.micro_tokens", _asked))
        if not report:
            stack.enter_context(mock.patch("smbfast.run.loop.write_report", _nothing))
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            entry.main([*words, f"--run.dir={folder}"])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
    return Ran(folder, code, out.getvalue(), err.getvalue())


def replaced(place: str, make: Callable[[Any], Any]) -> AbstractContextManager:
    """Put `make(what is there)` in the place of `module:name`, or of `module:Class.name`."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = path.split(".")
    for part in owners:
        owner = getattr(owner, part)
    return mock.patch.object(owner, name, make(getattr(owner, name)))


def _asked(settings: Any, *_others: Any) -> tuple[int, int]:
    """The size of micro-batches, as the settings have it, and no peak."""
    asked = settings.optim.micro_tokens
    return (512 if asked == "auto" else asked), 0


def _nothing(*_args: Any, **_more: Any) -> None:
    """No report, which would take half of the time of a tiny run."""
