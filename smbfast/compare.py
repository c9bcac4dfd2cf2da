"""python -m smbfast.compare A B: is one method better than another, on the same patients?"""

import shlex
import sys

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.terminal import say_first
from smbfast.settings import CompareSettings, compare_arguments


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, one call of `smbfast.judging.compare`, and where the page lies."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m smbfast.compare"
    settings = command_line(
        CompareSettings, argv, prog=prog, words="METHOD METHOD ...", read=compare_arguments
    )
    with entry("smbfast.compare"):
        say_first("smbfast.compare", "predictions are read and resampled")
        from smbfast.judging.compare import compare
        from smbfast.judging.compare_table import table
        from smbfast.reporting.compare_page import require_outputs, write_comparison

        require_outputs(settings.out)
        record = compare(settings, lambda text: print(f"compare: {text}", file=sys.stderr))
        print(table(record))
        if settings.out is not None:
            command = shlex.join([*prog.split(), *argv])
            print(f"\ncompare: {write_comparison(settings.out, record, command)}")


if __name__ == "__main__":
    main()
