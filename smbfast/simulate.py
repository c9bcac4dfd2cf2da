"""python -m smbfast.simulate: a simulated cohort as a MEDS dataset, with labels and oracles."""

from smbfast.base.config import command_line
from smbfast.base.entry import entry
from smbfast.base.terminal import say_first
from smbfast.settings import SimulateSettings


def main(argv: list[str] | None = None) -> None:
    """The command: arguments and one call of `smbfast.simulation.dataset`."""
    config = command_line(SimulateSettings, argv, prog="python -m smbfast.simulate")
    with entry("smbfast.simulate", private=False):  # nobody real
        say_first("smbfast.simulate", "patients are drawn")
        from smbfast.simulation.dataset import simulate

        simulate(
            config.out,
            config.patients,
            config.seed,
            held_out=config.held_out,
            nodes=config.nodes,
            patients_per_file=config.patients_per_file,
        )
    further = f" and {config.held_out:,} held out" if config.held_out else ""
    print(f"{config.out}: {config.patients:,} simulated patients{further}, seed {config.seed}")


if __name__ == "__main__":
    main()
