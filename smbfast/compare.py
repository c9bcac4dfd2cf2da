"""python -m smbfast.compare A B: is one method better than another, on the same patients?"""

import shlex
import sys

from smbfast.base.entry import entry
from smbfast.base.help_page import help_text
from smbfast.base.typed import as_typed
from smbfast.settings import CompareSettings, compare_arguments


def main(argv: list[str] | None = None) -> None:
    """The command: arguments, one call of `smbfast.judging.compare`, and where the page lies."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m smbfast.compare"
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(CompareSettings, f"{prog} METHOD METHOD ..."))
        raise SystemExit(0)
    try:
        settings = compare_arguments(argv)
    except ValueError as error:
        print(f"{as_typed(prog)}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with entry("smbfast.compare"):
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
