"""python -m smbfast.probe: how much do frozen embeddings say about outcomes?"""

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.settings import ProbeConfig

EPILOG = """Example:
  python -m smbfast.probe --data=my_meds --labels=mortality_1y,readmission_30d \\
      --embeddings=runs/x/embeddings/online.parquet \\
      --untrained=runs/x/embeddings/untrained.parquet"""


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.probing.run_probe`, which prints."""
    config = command_line(ProbeConfig, argv, prog="python -m smbfast.probe", epilog=EPILOG)
    with entry("smbfast.probe"):
        from smbfast.probing.run_probe import run_probe

        run_probe(config)


if __name__ == "__main__":
    main()
