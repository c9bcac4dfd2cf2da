"""python -m smbfast.tasks: label files from task definitions, and checks of labels for leakage."""

import sys

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.schema import schema_text
from smbfast.base.terminal import say_first
from smbfast.settings.tasks import TaskFile, TasksSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call into `smbfast.labelling`, which prints."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--schema" in argv:  # of what one writes: a file of definitions
        print(schema_text(TaskFile))
        return
    if argv and "=" not in argv[0] and not argv[0].startswith("-"):
        argv[0] = f"--definitions={argv[0]}"
    config = command_line(TasksSettings, argv, prog="python -m smbfast.tasks")
    with entry("smbfast.tasks"):
        say_first("smbfast.tasks", "events and labels are read")
        if config.check:
            from smbfast.labelling.checking import check_labels

            raise SystemExit(0 if check_labels(config) else 1)
        from smbfast.labelling.making import make_labels

        make_labels(config)


if __name__ == "__main__":
    main()
