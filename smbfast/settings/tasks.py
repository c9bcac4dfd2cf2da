"""Definitions of tasks in TOML, and the settings of the command `tasks`."""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from smbfast.base.config import Settings, build, read_toml
from smbfast.base.schema import or_one_item
from smbfast.settings.data import whole_fractions

DEATH = "death"  # the set of codes that ends every record
DEFINITION = "task.toml"  # beside the label files that it made
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_LONGEST = 73_050.0  # days, 200 years: what is longer is a mistake, and overflows microseconds


class CodeSet(Settings):
    """A set of codes, and the numbers that an event must have to be in it."""

    prefix: list[str] = Field([], description="Beginnings of codes, in their own case.")
    exact: list[str] = Field([], description="Codes as they stand.")
    regex: list[str] = Field([], description="Regular expressions that match a whole code.")
    without: list[str] = Field([], description="Beginnings of codes that are left out again.")
    at_least: float | None = Field(None, description="The least number of an event in the set.")
    at_most: float | None = Field(None, description="The largest number of an event in the set.")

    @field_validator("regex")
    @classmethod
    def _compile(cls, expressions: list[str]) -> list[str]:
        for text in expressions:
            try:
                re.compile(text)
            except re.error as error:
                raise ValueError(f"must be a regular expression: {error}, got {text!r}") from None
        return expressions

    @model_validator(mode="after")
    def _names_codes(self) -> "CodeSet":
        if not (self.prefix or self.exact or self.regex):
            raise ValueError("must name codes by prefix, exact or regex")
        least, most = self.at_least, self.at_most
        if least is not None and most is not None and least > most:
            raise ValueError(f"at_least must not be above at_most, got {least:g} and {most:g}")
        return self

    def holds(self, code: str) -> bool:
        """Return whether a code is in the set, whatever the number of its event."""
        named = code in self.exact or code.startswith(tuple(self.prefix))
        named = named or any(re.fullmatch(text, code) for text in self.regex)
        return named and not (self.without and code.startswith(tuple(self.without)))


class TaskDefinition(Settings):
    """A prediction task: at which moments it is asked, and what its answer is.

    A decision node is an index event plus an offset. The outcome window begins after the node and
    ends `horizon_days` later, or with the first event of `until`, whichever is first.
    """

    name: str = Field(description="Name of the task and of its folder of label files.")
    about: str = Field("", description="What the task is, in words, for people.")
    kind: Literal["binary", "time_to_event"] = Field(description="What a label holds.")

    index: str | None = Field(None, description="Set of the events from which nodes are counted.")
    which: Literal["each", "first"] = Field(
        "each", description="Whether each index event of a patient has nodes or the first alone."
    )
    nodes: str | None = Field(
        None,
        description="Label files whose nodes are taken in place of an index: a folder, or the name "
        "of one under <data>/labels.",
    )
    offset_hours: list[float] = Field(
        [0.0], min_length=1, description="Hours from the index event to each of its nodes."
    )
    clock: str | None = Field(
        None, description="Time of day, HH:MM, at which nodes stand on the day they fall on."
    )
    not_after: list[str] = Field(
        [], description="Sets of which no event may lie between index and node, as a discharge."
    )
    inside: tuple[str, str] | None = Field(
        None, description="Sets of events that open and close a stay, which must be open at a node."
    )
    need: list[str] = Field([], description="Sets of which an event must be known at a node.")
    without: list[str] = Field([], description="Sets of which no event may be known at a node.")
    first_only: bool = Field(
        False, description="Whether nodes with an outcome already present are left out."
    )
    history_days: float = Field(0.0, ge=0, description="Days of record that a node must have.")
    age: tuple[float, float] | None = Field(
        None, description="Years of age at a node: at least the first, below the second."
    )

    outcome: str = Field(description="Set of the events that are predicted.")
    value: Literal["occurs", "lasts"] = Field(
        "occurs",
        description="Whether a label is true if an outcome comes up to the end of the window, or "
        "if none comes before that end (as a discharge in a stay that lasts).",
    )
    horizon_days: list[float] = Field(
        [],
        description="Lengths of the window. Several make a task each, NAME_<days>d.",
        json_schema_extra=or_one_item,
    )
    horizon_from: Literal["node", "index"] = Field(
        "node", description="From what the horizon is counted."
    )
    until: str | None = Field(None, description="Set whose first event after a node ends a window.")
    competing: str = Field(
        DEATH, description="Set of the events after which the outcome cannot happen."
    )
    competing_is: Literal["negative", "excluded", "competing", "censored", "auto"] = Field(
        "auto",
        description="What a row is whose competing event comes before its outcome. `auto` is "
        "negative for binary tasks and competing for time to event.",
    )
    follow_up: Literal["required", "assumed"] = Field(
        "required",
        description="Whether a binary row without outcome is left out if the record ends within "
        "its window, or taken as negative.",
    )
    followed_to: str | None = Field(
        None, description="Set whose last event ends the record; `none`: its last event of all."
    )
    followed_days: float = Field(
        0.0, ge=0, description="Days for which outcomes are known beyond that event."
    )

    @field_validator("horizon_days", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @model_validator(mode="after")
    def _is_whole(self) -> "TaskDefinition":
        wrong = _contradiction(self)
        if wrong:
            raise ValueError(f"task {self.name}: {wrong}")
        return self

    @property
    def on_competing(self) -> str:
        """What a row with a competing event is, with `auto` decided."""
        if self.competing_is != "auto":
            return self.competing_is
        return "negative" if self.kind == "binary" else "competing"

    def sets_named(self) -> set[str]:
        """Return the names of the code sets that the task uses, that of death among them."""
        more = (self.index, self.until, self.followed_to, *(self.inside or ()))
        named = {DEATH, self.outcome, self.competing, *self.not_after, *self.need, *self.without}
        return named | {name for name in more if name is not None}

    def by_horizon(self) -> list["TaskDefinition"]:
        """Return a task for each horizon: itself where there is at most one."""
        if len(self.horizon_days) < 2:
            return [self]
        return [
            self.model_copy(update={"name": f"{self.name}_{days:g}d", "horizon_days": [days]})
            for days in self.horizon_days
        ]


class TaskFile(Settings):
    """A file of task definitions: code sets by name, and the tasks that use them."""

    sets: dict[str, CodeSet] = Field({}, description="Sets of codes by name.")
    tasks: list[TaskDefinition] = Field(min_length=1, description="The tasks, [[tasks]] each.")

    @model_validator(mode="after")
    def _sets_exist(self) -> "TaskFile":
        self.sets.setdefault(DEATH, CodeSet(exact=["MEDS_DEATH"]))
        for task in self.tasks:
            if missing := sorted(task.sets_named() - self.sets.keys()):
                raise ValueError(
                    f"task {task.name} must use sets that the file defines "
                    f"({', '.join(sorted(self.sets))}), got {missing[0]!r}"
                )
        names = [task.name for task in self.each()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"tasks must have a name each, got {twice[0]!r} twice")
        return self

    def each(self) -> list[TaskDefinition]:
        """Return the tasks, one for each horizon."""
        return [one for task in self.tasks for one in task.by_horizon()]

    def of(self, task: TaskDefinition) -> "TaskFile":
        """Return the file of one task: what lies beside its labels."""
        used = {name: self.sets[name] for name in sorted(task.sets_named())}
        return TaskFile(sets=used, tasks=[task])


def shipped_tasks() -> list[str]:
    """Return the names of the shipped files of task definitions."""
    folder = files("smbfast.configs") / "tasks"
    return sorted(Path(str(f)).stem for f in folder.iterdir() if f.name.endswith(".toml"))


def load_tasks(name: str | Path) -> TaskFile:
    """Return a shipped file of task definitions, or one of your own (.toml).

    Raises:
        ValueError: no such file, an unknown key, a wrong type, or a definition that contradicts
            itself; the file is named.
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in shipped_tasks():
            raise ValueError(
                f"`{name}` must be a .toml file of task definitions or one of those shipped "
                f"({', '.join(shipped_tasks())})"
            )
        path = Path(str(files("smbfast.configs") / "tasks" / f"{name}.toml"))
    try:
        return build(TaskFile, read_toml(path), [])
    except ValueError as error:
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path}: {text}") from None


def _contradiction(task: TaskDefinition) -> str | None:
    """Return what is wrong with a definition, or None."""
    if not _NAME.fullmatch(task.name):
        return "its name must be of letters, digits, `_`, `-` and `.`"
    if task.name == "tasks.json":
        return "its name must not be tasks.json, a file that lies beside the tasks"
    if (task.index is None) == (task.nodes is None):
        return "one of index and nodes must say where its nodes are"
    if task.index is None and (task.not_after or task.horizon_from == "index"):
        return "not_after and horizon_from need an index"
    if min(task.offset_hours) < 0:
        return f"offset_hours must not be negative, got {min(task.offset_hours):g}"
    if task.clock is not None and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", task.clock):
        return f"clock must be HH:MM, got {task.clock!r}"
    lengths = [*task.horizon_days, task.followed_days, *(h / 24 for h in task.offset_hours)]
    if max(lengths) > _LONGEST:
        return (
            f"horizon_days, followed_days and offset_hours must be at most 200 years, "
            f"got {max(lengths):g} days"
        )
    if task.age is not None and task.age[0] >= task.age[1]:
        return f"the first age must be below the second, got {task.age[0]:g} and {task.age[1]:g}"
    if task.horizon_days and min(task.horizon_days) <= 0:
        return f"horizon_days must be above 0, got {min(task.horizon_days):g}"
    if task.kind == "binary":
        if not (task.horizon_days or task.until):
            return "a binary task needs horizon_days or until"
        if task.on_competing in ("competing", "censored"):
            return "competing_is must be negative or excluded in a binary task"
    elif task.on_competing == "negative":
        return "competing_is must be competing, censored or excluded in a time-to-event task"
    elif task.value == "lasts":
        return "value must be occurs in a time-to-event task"
    return None


class TasksSettings(Settings):
    """Make MEDS label files from task definitions, and check label files for leakage.

    TASKS is a .toml file, or a name of those shipped. A definition says at which moments a
    prediction is asked for (index event, offset, exclusions), what the outcome is (a set of codes)
    and up to when it counts (horizon, or an event that ends the stay), and what becomes of rows
    whose record ends first or in which a competing event comes first.

    Events up to and including the prediction time may be read by a model; the outcome window begins
    after it. Each task is written as one MEDS label file for each split, with its definition beside
    it as task.toml; tasks.json has the rows, and how many were left out for which reason.

    --check reads label files and says what of the outcome a model could read: with a definition,
    that of the same name in TASKS or one that lies beside them, each row is computed again; without
    one each code is tried as the only predictor.
    """

    epilog: ClassVar[str] = """A definition

  [sets.admission]
  prefix = ["HOSPITAL_ADMISSION//"]
  [sets.discharge]
  prefix = ["HOSPITAL_DISCHARGE//"]

  [[tasks]]
  name = "in_hospital_mortality"
  kind = "binary"
  index = "admission"
  offset_hours = [24, 72, 168]
  not_after = ["discharge"]    # still in hospital at the node
  outcome = "death"            # MEDS_DEATH, unless the file defines the set
  until = "discharge"          # of this stay

Examples

  Make the labels of the shipped tasks of MIMIC-IV:
    python -m smbfast.tasks mimic --data=MEDS_FOLDER --out=labels

  Make labels of your own and check those that lie with the data:
    python -m smbfast.tasks my_tasks.toml --data=MEDS_FOLDER --out=labels
    python -m smbfast.tasks --data=MEDS_FOLDER --check=MEDS_FOLDER/labels/mortality_1y

  Check labels of another source against a definition of the same name:
    python -m smbfast.tasks mimic --data=MEDS_FOLDER --check=mortality_1y"""

    definitions: str | None = Field(
        None,
        description="File of task definitions, or the name of one that is shipped; it may stand "
        "first without the name of the setting, as TASKS.",
    )
    data: Path = Field(description="Folder of the MEDS dataset whose events are read.")
    split: tuple[float, float, float] | None = Field(
        None,
        description="For a dataset without splits: the fractions of patients in train, tuning and "
        "held_out, such as 0.8,0.1,0.1. `none` takes the splits of the dataset.",
    )
    out: Path = Field(
        Path("labels"),
        description="Folder that receives a folder of label files for each task, and tasks.json. "
        "Tasks that were made earlier are replaced; what lies there and was not made by this "
        "command is not.",
    )
    check: list[str] = Field(
        [],
        description="Label folders to check for leakage, or names of folders under <data>/labels; "
        "nothing is written. The exit code is 1 if one has a fault. Labels of held_out are checked "
        "as all others, and no figure of a model is computed from them.",
    )

    @field_validator("split", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return whole_fractions(value)

    @model_validator(mode="after")
    def _has_work(self) -> "TasksSettings":
        if self.definitions is None and not self.check:
            raise ValueError("TASKS or check must be given, got neither")
        return self
