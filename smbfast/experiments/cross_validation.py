"""Cross-validation: an encoder is trained for each fold and judged on the fold it never saw.

The held-out predictions of all folds are put together, so that every patient judges once, by models
that had no part of that patient in training, tuning or calibration. A small dataset gives in this
way as many judged outcomes as it has.
"""

import os
import subprocess
import sys
from pathlib import Path

from smbfast.base.entry import RunFailed
from smbfast.base.held_out import num_looks
from smbfast.data.labels import Labels, find_tasks
from smbfast.data.meds import MedsDataset
from smbfast.experiments.folds import fold_view
from smbfast.judging.compare import compare
from smbfast.judging.compare_table import table
from smbfast.judging.scored import Traits
from smbfast.probing.baselines import baselines
from smbfast.reporting.compare_page import require_outputs, write_comparison
from smbfast.run.folder import status_of
from smbfast.settings import CompareSettings, FoldsSettings, run_arguments


def cross_validate(config: FoldsSettings, command: str) -> Path:
    """Train and judge what is missing of all folds, then judge them together; return the page.

    Whatever is in `work` is used again. Prediction files of other models that lie in
    `runs/fold-N/predictions/<task>/` are judged with ours.

    Args:
        command: that the page names.

    Raises:
        ValueError: the data, a task or a setting is not what it must be.
        RunFailed: a run failed or was stopped.
    """
    work = config.work.resolve()
    tasks = [path.name for path in find_tasks(config.labels, config.data)]
    out = work / "folds"
    require_outputs(out)
    runs = [_Fold(config, work, number, tasks) for number in range(1, config.folds + 1)]
    for run in runs:
        fold_view(config.data, run.view, run.number, config.folds)
        if status_of(run.folder).get("state") != "done":
            run.train([])
    for run in runs:
        if not num_looks(run.folder):
            run.train(["--final"])
    compared = CompareSettings(
        methods=[str(work / "runs")],
        folds=True,
        tasks=tasks,
        bootstraps=config.bootstraps,
        seed=config.seed,
    )
    dataset = MedsDataset.open(runs[0].view)

    def traits(labels: Labels) -> Traits:
        return baselines(dataset, labels.subject_N, labels.time_N).traits(labels)

    record = compare(compared, lambda text: print(f"folds: {text}", flush=True), traits)
    print(table(record))
    return write_comparison(out, record, command)


class _Fold:
    """One fold: the view of the data, and the run that is trained on it."""

    def __init__(self, config: FoldsSettings, work: Path, number: int, tasks: list[str]) -> None:
        self.number, self._config, self._tasks = number, config, tasks
        self.view = work / "data" / f"fold-{number}"
        self.folder = work / "runs" / f"fold-{number}"

    def train(self, more: list[str]) -> None:
        """Run `python -m smbfast.train` on the fold; what it prints is shown as it comes.

        Raises:
            RunFailed: it ended with another status than 0.
        """
        preset, words = run_arguments(self._config.train.split())
        own = [
            f"--data.path={self.view}",
            f"--probe.labels={','.join(self._tasks)}",
            f"--run.dir={self.folder}",
        ]
        command = [sys.executable, "-m", "smbfast.train", preset, *words, *own, *more]
        print(f"folds: fold {self.number} of {self._config.folds}", flush=True)
        if status := subprocess.run(command, env=os.environ).returncode:
            raise RunFailed(
                f"fold {self.number} ended with {status}; when its cause is mended, the same "
                "command goes on"
            )
