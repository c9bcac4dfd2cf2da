"""The settings of every command, with their defaults and what they mean; presets are in `configs/`.

Imports pydantic and nothing heavier, so that `--help` and a refused setting are answered at once.
"""

from smbfast.settings.backbones import require_backbone
from smbfast.settings.commands import (
    EmbedSettings,
    ProbeCommandSettings,
    ReportSettings,
    report_arguments,
)
from smbfast.settings.compare import CompareSettings, compare_arguments
from smbfast.settings.data import CohortSettings, DataSettings, PrepareSettings, SimulateSettings
from smbfast.settings.decide import (
    decided_data,
    require_meds_folder,
    tokenizer_folder,
)
from smbfast.settings.experiments import (
    EXPERIMENTS,
    Experiment,
    ExperimentSettings,
    FoldsSettings,
)
from smbfast.settings.model import LoraSettings, ModelSettings, ObjectiveSettings
from smbfast.settings.plan import PlanSettings, plan_arguments
from smbfast.settings.pools import POOLS, Pool, RunPool
from smbfast.settings.presets import load, presets, run_arguments, run_help, run_schema
from smbfast.settings.push import PushSettings, push_arguments
from smbfast.settings.tasks import TasksSettings
from smbfast.settings.training import (
    EvalSettings,
    OptimSettings,
    PhaseSettings,
    ProbeSettings,
    RunSettings,
    TrainSettings,
    kernel_choice,
)

__all__ = [
    "EXPERIMENTS",
    "POOLS",
    "CohortSettings",
    "CompareSettings",
    "DataSettings",
    "EmbedSettings",
    "EvalSettings",
    "Experiment",
    "ExperimentSettings",
    "FoldsSettings",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimSettings",
    "PhaseSettings",
    "PlanSettings",
    "Pool",
    "PrepareSettings",
    "ProbeCommandSettings",
    "ProbeSettings",
    "PushSettings",
    "ReportSettings",
    "RunPool",
    "RunSettings",
    "SimulateSettings",
    "TasksSettings",
    "TrainSettings",
    "compare_arguments",
    "decided_data",
    "kernel_choice",
    "load",
    "plan_arguments",
    "presets",
    "push_arguments",
    "report_arguments",
    "require_backbone",
    "require_meds_folder",
    "run_arguments",
    "run_help",
    "run_schema",
    "tokenizer_folder",
]
