"""python -m bench.planted: how soon `check` and `train` say what is wrong with planted datasets.

Each dataset of `tests/test_data_card.py` has one thing wrong. Seconds are from the call of the
command, after its imports, to the end of a refusal, or to the moment at which a model would be made
where something is warned of. A fresh folder is prepared for each command.
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

import smbfast.check
import smbfast.train
from bench import records
from smbfast.base.config import Settings, command_line
from smbfast.run import loop, open_run, preflight
from tests.test_data_card import NEXT, REFUSED, WARNED

LIMIT = 10.0  # seconds
IMPORTED = (loop, preflight)  # which the commands import when they run


class PlantedBench(Settings):
    """Time how soon `check` and `train` say what is wrong with datasets that have one mistake."""

    epilog: ClassVar[str] = """Examples

  All of them:
    python -m bench.planted"""

    save: bool = Field(False, description="Append the results to bench/results/planted.jsonl.")


def timed(command: Callable[[list[str]], None], words: list[str], line: str) -> tuple[float, bool]:
    """Return the seconds of a command, and whether it said the line and did not say `ready`."""
    output, start = io.StringIO(), time.monotonic()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            command(words)
    except SystemExit as stop:
        output.write(str(stop.code))
    said = output.getvalue()
    return time.monotonic() - start, line in said and "ready" not in said


def main(argv: list[str] | None = None) -> None:
    settings = command_line(PlantedBench, argv, prog="python -m bench.planted")
    stamp = records.stamp("planted", "cpu")

    def stop(*_args: object) -> None:
        raise ValueError(NEXT)

    open_run.make_encoder = stop  # type: ignore[assignment]
    results: list[dict[str, Any]] = []
    for plant, line in {**REFUSED, **WARNED}.items():
        said: dict[str, Any] = {"data": plant.__name__, "refused": plant in REFUSED}
        for name, command in (("check", smbfast.check.main), ("train", smbfast.train.main)):
            with tempfile.TemporaryDirectory() as folder:
                data = Path(folder) / "data"
                words = [f"--data.path={data}", f"--run.dir={folder}/run", *plant(data)]
                seconds, right = timed(command, ["tiny", *words], line)
            said |= {f"{name}_s": round(seconds, 2), f"{name}_said": right}
        results.append({**stamp, **said})
    cells = [
        [r["data"], *(f"{r[f'{c}_s']:.2f} s {r[f'{c}_said']}" for c in ("check", "train"))]
        for r in results
    ]
    print(records.columns([["dataset", "check", "train"], *cells]))
    if settings.save:
        records.append("planted", results)
    late = max(max(r["check_s"], r["train_s"]) for r in results) > LIMIT
    if late or not all(r["check_said"] and r["train_said"] for r in results):
        sys.exit("python -m bench.planted: a line is missing or late")


if __name__ == "__main__":
    main()
