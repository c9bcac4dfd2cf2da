"""python -m smbfast.experiment NAME: arms that differ in one thing, over replicates."""

import shlex
import sys
from pathlib import Path

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.terminal import say_first
from smbfast.experiments.plans import epilog
from smbfast.settings import ExperimentSettings, FoldsSettings, require_meds_folder

PROG = "python -m smbfast.experiment"


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.experiments.conduct`, or of
    `cross_validation`, whose runs are on data of one's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = shlex.join([*PROG.split(), *words])
    stopped = "what is in `work` is used again: the same command goes on"
    if words[:1] == ["folds"]:
        folds = command_line(FoldsSettings, words[1:], prog=f"{PROG} folds")
        with entry("smbfast.experiment", stopped=stopped):
            require_meds_folder(Path(folds.data))
            say_first("smbfast.experiment")
            from smbfast.experiments.cross_validation import cross_validate

            print(f"folds: {cross_validate(folds, command)}")
        return
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words[0] = f"--name={words[0]}"
    config = command_line(ExperimentSettings, words, prog=PROG, words="[NAME]", epilog=epilog())
    with entry("smbfast.experiment", stopped=stopped):
        say_first("smbfast.experiment")
        from smbfast.experiments.conduct import conduct

        conduct(config, command)


if __name__ == "__main__":
    main()
