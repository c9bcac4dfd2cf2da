"""Simulated patients that rows train on, and processes that have imported what training does."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.proof import Work


@dataclass(frozen=True)
class Cohort:
    """Simulated patients, and the words of a run on them but for its folder."""

    folder: Path

    def words(self, form: str = "codes", steps: int = 3, save: int = 2) -> list[str]:
        """Arguments of `smbfast.train` for two phases of so many steps."""
        from tests.ranks_case import COMMON, PHASE

        preset = self.folder / f"{steps}.toml"
        phases = PHASE.format("a", steps, 1.0, 0.0, "") + PHASE.format("b", steps, 0.5, 1.0, "")
        preset.write_text('base = "tiny"\n' + phases)
        common = [word for word in COMMON if not word.startswith("--run.save_every")]
        data = [f"--data.path={self.folder / 'cohort'}", f"--data.format={form}"]
        more = [f"--data.prepared={self.folder / form}", f"--run.save_every={save}"]
        return [str(preset), *common, *data, *more, "--data.vocab_size=400"]


def cohort(work: Work, *formats: str) -> Cohort:
    """Simulate and prepare, once."""
    from smbfast.run.folder import data_of, prepared_data
    from smbfast.settings import load
    from smbfast.simulation.dataset import simulate

    made = Cohort(work.folder / "data")
    made.folder.mkdir()
    simulate(made.folder / "cohort", 40, work.seed)
    for form in formats:
        preset, *words = made.words(form)
        settings = load(preset, words)
        prepared_data(settings, data_of(settings, made.folder), made.folder)
    return made


def imported() -> None:
    """Import what forked ranks need, and let the server of ranks run in this process."""
    from tests import rank_server

    read, _ = os.pipe()
    os.dup2(read, 0)  # the server of ranks looks whether its input has ended
    rank_server._import()
