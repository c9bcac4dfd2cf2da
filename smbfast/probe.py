"""python -m smbfast.probe: how much do frozen embeddings say about outcomes?"""

import shlex
import sys

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.terminal import say_first
from smbfast.settings import ProbeCommandSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.probing.run_probe`, which prints."""
    argv = sys.argv[1:] if argv is None else argv
    prog = "python -m smbfast.probe"
    config = command_line(ProbeCommandSettings, argv, prog=prog)
    with entry("smbfast.probe"):
        say_first("smbfast.probe")
        from smbfast.probing.run_probe import run_probe

        run_probe(config, command=shlex.join([*prog.split(), *argv]))


if __name__ == "__main__":
    main()
