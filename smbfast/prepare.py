"""python -m smbfast.prepare: a MEDS folder to memory-mapped token shards."""

import time
from pathlib import Path

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.settings import PrepareSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, one call of `smbfast.data.preparing`, what it counted."""
    settings = command_line(PrepareSettings, argv, prog="python -m smbfast.prepare")
    with entry("smbfast.prepare", stopped="the same command goes on"):
        from smbfast.data.preparing import prepare

        start = time.monotonic()
        prepared = prepare(settings, Path(settings.out), settings.tokenizer, tuple(settings.splits))
    counts = prepared.counts
    share = sum(prepared.record["unmapped"].values()) / max(counts["events"], 1)
    print(
        f"prepared {counts['subjects']:,} subjects, {counts['events']:,} events, "
        f"{counts['tokens']:,} tokens in {time.monotonic() - start:.1f} s: {prepared.folder}"
    )
    print(
        f"unmapped {share:.2%} of events (by the fallback rule alone), values beyond the latest "
        f"{settings.values_per_line} of a line {counts['values_left_out']:,}, texts cut "
        f"{counts['texts_cut']:,}, values that were NaN or infinite {counts['nonfinite_values']:,}"
        f", births after a subject's first event {counts['late_births']:,}"
    )
    if prepared.record["unmapped"]:
        print(f"unmapped families of codes: {prepared.record['unmapped']}")


if __name__ == "__main__":
    main()
