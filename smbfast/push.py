"""python -m smbfast.push: a trained model to a repository of the Hugging Face Hub."""

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.settings import PushSettings, push_arguments


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.run.shipping`."""
    prog = "python -m smbfast.push"
    settings = command_line(
        PushSettings,
        argv,
        prog=prog,
        words="MODEL",
        epilog=PushSettings.epilog,
        read=push_arguments,
    )
    with entry("smbfast.push", stopped="a commit that was not finished is not there"):
        from smbfast.run.shipping import ship

        ship(settings)


if __name__ == "__main__":
    main()
