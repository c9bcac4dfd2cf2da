"""python -m smbfast.report: one page that says what a run did, or how runs differ."""

import shlex
import sys
from pathlib import Path

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.terminal import say_first
from smbfast.settings import ReportSettings, report_arguments


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of a room, by what is asked for."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m smbfast.report"
    settings = command_line(
        ReportSettings, argv, prog=prog, words="[RUN ...]", read=report_arguments
    )
    command = shlex.join([*prog.split(), *argv])
    with entry("smbfast.report"):
        path = _written(settings, command)
    print(f"report: {path}")


def _written(settings: ReportSettings, command: str) -> Path:
    if settings.patient is not None:
        say_first("smbfast.report")
    else:
        say_first("smbfast.report", "the folder is read, and the page drawn")
    if settings.against:
        from smbfast.reporting.runs_page import write_runs

        return write_runs(
            [settings.run, *settings.against],
            settings.out or Path("comparison.html"),
            final=settings.final,
            command=command,
            tell=lambda text: print(f"report: {text}", file=sys.stderr),
        )
    if settings.patient is not None:
        from smbfast.run.risk import write_patient

        more = {"out": settings.out, "data": settings.data}
        return write_patient(settings.run, settings.patient, command, **more)
    from smbfast.reporting.page import write_report

    return write_report(settings.run, final=settings.final, counted=command)


if __name__ == "__main__":
    main()
