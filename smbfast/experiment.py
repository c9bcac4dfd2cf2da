"""python -m smbfast.experiment NAME: arms that differ in one thing, over replicates."""

import shlex
import sys

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.experiments.plans import epilog
from smbfast.settings import ExperimentSettings

PROG = "python -m smbfast.experiment"


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.experiments.conduct`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words[0] = f"--name={words[0]}"
    config = command_line(ExperimentSettings, words, prog=f"{PROG} [NAME]", epilog=epilog())
    stopped = "what is in `work` is used again: the same command goes on"
    with entry("smbfast.experiment", stopped=stopped):
        from smbfast.experiments.conduct import conduct

        conduct(config, shlex.join([*PROG.split(), *words]))


if __name__ == "__main__":
    main()
