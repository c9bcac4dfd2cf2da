"""The page docs/settings.md: every key of every command."""

import inspect
import textwrap
from collections.abc import Iterator

from pydantic import BaseModel

from smbfast.base.help_page import default_text, group_class, table_class, type_phrase
from smbfast.settings.commands import EmbedSettings, ProbeCommandSettings, ReportSettings
from smbfast.settings.compare import CompareSettings
from smbfast.settings.data import PrepareSettings, SimulateSettings
from smbfast.settings.experiments import ExperimentSettings, FoldsSettings
from smbfast.settings.plan import PlanSettings
from smbfast.settings.push import PushSettings
from smbfast.settings.tasks import TasksSettings
from smbfast.settings.training import TrainSettings

COLUMNS = 118  # of a line of the page
# in the order of a first day
PAGES: dict[str, type[BaseModel]] = {
    "train": TrainSettings,
    "check": PlanSettings,
    "prepare": PrepareSettings,
    "simulate": SimulateSettings,
    "embed": EmbedSettings,
    "probe": ProbeCommandSettings,
    "compare": CompareSettings,
    "report": ReportSettings,
    "push": PushSettings,
    "tasks": TasksSettings,
    "experiment": ExperimentSettings,
    "experiment folds": FoldsSettings,
}
_INTRODUCTION = """# Settings

Every key of every command, as `smbfast COMMAND --help` has them; how they are given is in
[command-line.md](command-line.md). `python -m smbfast.settings > docs/settings.md` writes this
page."""


def page() -> str:
    """Return docs/settings.md."""
    lines = [_INTRODUCTION]
    for name, model in PAGES.items():
        more = ["It takes the settings of `train`, and these:", ""] if name == "check" else []
        lines += ["", f"## smbfast {name}", "", *more, _text(model)]
        lines += _group(model, "")
    return "\n".join(lines) + "\n"


def _group(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Yield the keys of a group, then its inner groups and tables."""
    later: list[str] = []
    yield ""
    for name, info in model.model_fields.items():
        table = table_class(info.annotation)
        inner = group_class(info.annotation) or table
        if inner:
            head = f"[[{name}]]" if table else f"[{name}]"
            later += ["", f"### {head}", "", _text(inner)]
            later += _group(inner, f"{prefix}{name}.{'NAME.' if table else ''}")
        else:
            default = "required" if info.is_required() else f"default {default_text(info)}"
            text = f"- `{prefix}{name}`: {type_phrase(info)}; {default}. {info.description}"
            yield _wrapped(text, later="  ")
    yield from later


def _text(model: type[BaseModel]) -> str:
    """Return what a group is for, paragraph by paragraph."""
    paragraphs = inspect.cleandoc(model.__doc__ or "").split("\n\n")
    return "\n\n".join(_wrapped(" ".join(paragraph.split())) for paragraph in paragraphs)


def _wrapped(text: str, later: str = "") -> str:
    """Return text in lines of the page, in which `<` outside of code begins no tag of HTML."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "\\<") for part in parts[::2]]
    return textwrap.fill(
        "`".join(parts),
        COLUMNS,
        subsequent_indent=later,
        break_long_words=False,
        break_on_hyphens=False,
    )
