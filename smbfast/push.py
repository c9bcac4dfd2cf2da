"""python -m smbfast.push: a trained model to a repository of the Hugging Face Hub."""

import sys

from smbfast.base.entry import entry
from smbfast.base.help_page import help_text
from smbfast.base.typed import as_typed
from smbfast.settings import PushSettings, push_arguments


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.run.shipping`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m smbfast.push"
    if {"-h", "--help"} & set(argv):
        print(help_text(PushSettings, f"{prog} MODEL", PushSettings.epilog))
        raise SystemExit(0)
    try:
        settings = push_arguments(argv)
    except ValueError as error:
        print(f"{as_typed(prog)}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    with entry("smbfast.push", stopped="a commit that was not finished is not there"):
        from smbfast.run.shipping import ship

        ship(settings)


if __name__ == "__main__":
    main()
