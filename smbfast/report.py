"""python -m smbfast.report: one page that says what a run did, from the files of its folder."""

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.settings import ReportSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.reporting.page`."""
    settings = command_line(ReportSettings, argv, prog="python -m smbfast.report")
    with entry("smbfast.report"):
        from smbfast.reporting.page import write_report

        path = write_report(settings.run)
    print(f"report: {path}")


if __name__ == "__main__":
    main()
