"""Conducts an experiment from its plan to its record, table and page."""

import json
from pathlib import Path
from typing import Any

from smbfast.base.files import legal, write_text
from smbfast.base.held_out import count_look, times
from smbfast.base.helpers import helper
from smbfast.base.runtime import git_state, versions
from smbfast.experiments import controls, results
from smbfast.experiments.plans import PLANS, Plan
from smbfast.experiments.sweep import Sweep
from smbfast.reporting.experiment_page import write_experiment
from smbfast.settings import ExperimentSettings

RECORD, PAGE = "experiment.json", "experiment.html"


def conduct(size: ExperimentSettings, command: str) -> dict[str, Any]:
    """Print the plan, do what is left of the work, and write and print the results.

    Returns:
        The record, which is written to `<work>/<name>/experiment.json`.

    Raises:
        ValueError, RunFailed: see `Sweep.work`.
    """
    size = size.model_copy(update={"work": size.work.resolve()})
    plan = PLANS[size.name]
    print(plan.text() + "\n", flush=True)
    folder = size.work / size.name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text(folder / "plan.txt", plan.text() + "\n")
    if plan.name == "controls":
        folders = controls.controls(size.run, size.work, command)
        print("\n" + controls.text(size.run, folders))
        return {"experiment": plan.name, "plan": plan.text()}
    sweep = Sweep(size, plan, command)
    sweep.work()
    # gradients are of patients of train
    looks = 0 if plan.name == "interference" else looked(sweep, command)
    record = {**said(plan, size), "held_out_looks": looks, **results.measured(sweep)}
    record["text"] = results.paragraph(record)
    write_text(folder / RECORD, json.dumps(legal(record), indent=1) + "\n")
    if looks:
        print(f"Held-out figures of these runs were asked for {times(looks)}.")
    print("\n" + results.text(record) + "\n\n" + record["text"])
    page: Path | None = None
    with helper("the page of the experiment"):
        page = write_experiment(folder / PAGE, record)
    if page:
        print(f"\n{page}")
    return record


def said(plan: Plan, size: ExperimentSettings) -> dict[str, Any]:
    """Return what was said before anything was trained, and by what it was done."""
    return {
        "experiment": plan.name,
        "plan": plan.text(),
        "settings": size.model_dump(mode="json", exclude={"work", "jobs", "run"}),
        "replicates": size.replicates or plan.replicates,
        "versions": versions(),
        "git": git_state(),
    }


def looked(sweep: Sweep, command: str) -> int:
    """Count in every run's folder that its held-out figures are shown; return the most counts."""
    runs = [sweep.run_of(name, r) for r in sweep.replicates for name in sweep.plan.arms]
    return max(count_look(folder, command) for folder in {run.folder for run in runs})
