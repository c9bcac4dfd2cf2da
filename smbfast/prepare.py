"""python -m smbfast.prepare: a MEDS folder to memory-mapped token shards."""

import time
from pathlib import Path

from smbfast.base.config import command_line
from smbfast.base.entry import entry, own_folder
from smbfast.base.hub_names import options_of
from smbfast.base.terminal import say_first
from smbfast.settings import PrepareSettings, require_meds_folder


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, one call of `smbfast.data.preparing`, what it counted."""
    settings = command_line(PrepareSettings, argv, prog="python -m smbfast.prepare")
    with entry("smbfast.prepare", stopped="the same command goes on"):
        require_meds_folder(
            settings.folder
        )  # refused at once, before the imports that take seconds
        if settings.tokenizer:
            options_of(settings.tokenizer, "tokenizer")
        settings.decided(settings.tokenizer)
        say_first("smbfast.prepare")
        from smbfast.base.runtime import few
        from smbfast.data.explaining import explained
        from smbfast.data.preparing import prepare
        from smbfast.settings import ObjectiveSettings

        start = time.monotonic()
        out, splits = Path(settings.out), tuple(settings.splits)
        prepared = prepare(settings, out, settings.tokenizer, splits, on=settings.on)
        own_folder(out)
        for split in settings.splits:  # what a run with the defaults of its objective needs
            prepared.windows(split, settings.window, ObjectiveSettings(), settings.stride)
        seconds = time.monotonic() - start
        table = explained(prepared, settings) if settings.explain else []
    counts = prepared.counts
    print(
        f"prepared {few(counts['subjects'])} subjects, {few(counts['events'])} events, "
        f"{counts['tokens']:,} tokens ({prepared.format_text}{prepared.split_text}) in "
        f"{seconds:.1f} s: {prepared.folder}"
    )
    print(prepared.left_out())
    if prepared.record["unmapped"]:
        print(f"families of codes without a section rule: {prepared.record['unmapped']}")
    if table:
        print("", *table, sep="\n")


if __name__ == "__main__":
    main()
