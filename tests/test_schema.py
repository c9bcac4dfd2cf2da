"""The JSON schema of files of settings, and the page of all settings."""

import json
import re
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from smbfast import commands
from smbfast.base.config import known_keys, to_toml
from smbfast.base.nearest import nearest
from smbfast.settings import TrainSettings, load, presets, run_schema
from smbfast.settings.page import PAGES, page
from smbfast.settings.tasks import TaskFile, shipped_tasks

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "smbfast" / "configs"
PAGE = ROOT / "docs" / "settings.md"
GUIDE = ROOT / "docs" / "command-line.md"
PHASE = '[[phases]]\nname = "a"\nw_sft = 1.0\nw_jepa = 0.0\n'


def schema(command: str, capsys: pytest.CaptureFixture) -> Draft202012Validator:
    """The schema that a command prints."""
    try:
        commands.main([command, "--schema"])
    except SystemExit as stop:
        assert stop.code == 0
    content = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


@pytest.fixture(scope="module")
def of_run() -> Draft202012Validator:
    """The schema of a file of a run."""
    return Draft202012Validator(json.loads(run_schema()))


def test_what_is_shipped_and_written_fits_the_schema(of_run, capsys):
    of_tasks = schema("tasks", capsys)
    for name in presets():
        of_run.validate(tomllib.loads((CONFIGS / f"{name}.toml").read_text()))
    for name in shipped_tasks():
        of_tasks.validate(tomllib.loads((CONFIGS / "tasks" / f"{name}.toml").read_text()))
    of_run.validate(tomllib.loads(to_toml(load("tiny", ["--phases.sft.epochs=2"]))))
    [shown] = re.findall(r"^```toml\n(.*?)^```", GUIDE.read_text(), re.S | re.M)
    assert shown.startswith("#:schema ./train.schema.json\n")
    of_run.validate(tomllib.loads(shown))


@pytest.mark.parametrize(
    "text",
    [
        "[optim]\nbach = 3",
        "[optim]\nbatch = 0",
        "[optim]\nbatch = 'many'",
        "[data]\nformat = 'words'",
        "lr = 1",
        "base = 'defualt'",
        PHASE,
        PHASE + "steps = 3\nfreeze = 'all'",
        PHASE + "epochs = 0",
        "[[phases]]\nsteps = 3\nw_sft = 1",
    ],
)
def test_mistakes_of_a_file_do_not_fit(of_run, text):
    assert not of_run.is_valid(tomllib.loads(text))
    assert of_run.is_valid(tomllib.loads(PHASE + "steps = 3"))
    assert of_run.is_valid(tomllib.loads(PHASE + "epochs = 0.5"))


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_every_command_has_a_schema_of_all_its_keys(command, capsys):
    model = {"check": PAGES["train"], "tasks": TaskFile}.get(command, PAGES.get(command))
    properties = schema(command, capsys).schema["properties"]
    more = {"base"} if command in ("train", "check") else set()  # a file begins from a preset
    assert set(properties) == set(model.model_fields) | more


def test_the_page_of_settings_is_current():
    """Else: python -m smbfast.settings > docs/settings.md"""
    assert PAGE.read_text() == page()
    assert {name.split()[0] for name in PAGES} == set(commands.COMMANDS)
    assert max(map(len, page().splitlines())) <= 120


def test_no_word_of_the_page_is_taken_for_a_tag():
    for line in re.sub(r"^```.*?^```", "", page(), flags=re.S | re.M).split("\n\n"):
        assert not re.search(r"(?<!\\)<", re.sub(r"`[^`]*`", "", line)), line


def test_the_guide_names_the_keys_that_the_messages_name():
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|$", GUIDE.read_text(), re.M)
    assert len(rows) >= 10
    for typed, here in rows:
        keys = re.findall(r"`((?:\w+\.)+\w+)`", here.replace("NAME", "sft"))
        groups = [re.findall(r"--(\w+)", part) for part in typed.split(";")]
        names = [name for group in groups for name in group]
        expected = {key for name in names if (key := names_table(name))}
        assert expected == set(keys), (typed, expected)


def names_table(name: str) -> str:
    """The key of a phase or of the run that stands in the message about a name."""
    foreign = TrainSettings.foreign.get(name)
    if foreign is None:  # lora_r is lora.r
        [near] = nearest(name, known_keys(TrainSettings))
        return near
    return "" if foreign.key == "run.resume" else foreign.key.replace("*", "sft")
