"""python -m smbfast.simulate: a simulated cohort as a MEDS dataset, with labels and oracles."""

from pathlib import Path

from pydantic import Field

from smbfast.base.config import Settings, command_line
from smbfast.base.entry import entry


class SimulateConfig(Settings):
    """Write a simulated cohort (a fictional disease) as a MEDS dataset with labels and oracles."""

    out: Path = Field(description="folder to write; must not exist")
    patients: int = Field(3000, ge=1, description="number of patients")
    seed: int = Field(0, ge=0, description="another seed is another cohort")
    nodes: int = Field(
        1, ge=1, le=8, description="decision nodes drawn per patient; draws that meet are one node"
    )
    patients_per_file: int = Field(
        16384, ge=1, description="patients held in memory at once, rounded up to blocks of 256"
    )


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.simulation.dataset`."""
    config = command_line(SimulateConfig, argv, prog="python -m smbfast.simulate")
    with entry("smbfast.simulate"):
        from smbfast.simulation.dataset import simulate

        simulate(
            config.out,
            config.patients,
            config.seed,
            nodes=config.nodes,
            patients_per_file=config.patients_per_file,
        )
    print(f"{config.out}: {config.patients:,} simulated patients, seed {config.seed}")


if __name__ == "__main__":
    main()
