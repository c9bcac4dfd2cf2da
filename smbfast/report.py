"""python -m smbfast.report: one page that says what a run did, from the files of its folder."""

import shlex
import sys

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.settings import ReportSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.reporting.page`."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m smbfast.report"
    settings = command_line(ReportSettings, argv, prog=prog)
    with entry("smbfast.report"):
        from smbfast.reporting.page import write_report

        counted = shlex.join([*prog.split(), *argv])
        path = write_report(settings.run, final=settings.final, counted=counted)
    print(f"report: {path}")


if __name__ == "__main__":
    main()
