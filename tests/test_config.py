"""TOML and dotted overrides: every key checked, a typo names its neighbour."""

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
from pydantic.fields import FieldInfo

from smbfast.base.config import Settings, build, command_line, known_keys, read_toml, to_toml
from smbfast.base.help_page import group_class, table_class
from smbfast.settings import (
    CompareSettings,
    EmbedSettings,
    ExperimentSettings,
    PlanSettings,
    PrepareSettings,
    ProbeCommandSettings,
    PushSettings,
    ReportSettings,
    SimulateSettings,
    TasksSettings,
    TrainSettings,
    load,
    presets,
    run_help,
)

MODELS = [
    TrainSettings,
    PrepareSettings,
    SimulateSettings,
    EmbedSettings,
    ProbeCommandSettings,
    ReportSettings,
    TasksSettings,
    CompareSettings,
    ExperimentSettings,
    PlanSettings,
    PushSettings,
]
HEAVY = ["torch", "peft", "sklearn", "pyarrow", "transformers", "numpy", "scipy", "triton"]
COMMANDS = [
    *("train", "check", "prepare", "simulate", "embed", "probe", "report"),
    *("tasks", "compare", "experiment", "push"),
]
LIGHT = [
    "from smbfast.settings import run_help; print(run_help(['lora'], 'p'))",
    "from smbfast.base.config import to_toml; from smbfast.settings import load; "
    "print(to_toml(load('tiny', ['kernels=timeline_attention:sdpa'])))",
    *(
        f"from smbfast.settings import load\n"
        f"try: load('tiny', ['{refused}'])\n"
        f"except ValueError as error: print(error)"
        for refused in ("optim.bach=3", "kernels=cuda")
    ),
    *(
        f"import runpy; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_module('smbfast.{command}', run_name='__main__')\n"
        f"except SystemExit as stop: assert not stop.code"
        for command in COMMANDS
    ),
]


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_reads_back(name, tmp_path):
    more = ["model.path=somewhere"] if name in ("lora", "clin-jepa") else []
    settings = load(name, more)
    file = tmp_path / "run.toml"
    file.write_text(to_toml(settings))
    assert build(TrainSettings, read_toml(file), []) == settings


@pytest.mark.parametrize("form", ["optim.batch=6", "--optim.batch=6", "--optim.micro-tokens=64"])
def test_overrides_take_both_forms(form):
    optim = load("tiny", [form]).optim
    assert (optim.batch, optim.micro_tokens) in ((6, "auto"), (4, 64))


def test_lists_none_and_tables():
    settings = load(
        "tiny",
        [
            "probe.labels=a,b",
            "objective.horizon=64",
            "objective.context=0.3,0.8",
            "phases.1.lr=0.5",
        ],
    )
    assert settings.probe.labels == ["a", "b"] and settings.objective.horizon == 64
    assert settings.objective.context == (0.3, 0.8) and settings.phases[1].lr == 0.5
    assert load("tiny", ["probe.labels=none"]).probe.labels is None
    assert load("tiny", ["probe.labels=[]"]).probe.labels == []


def test_a_phase_is_changed_by_its_name_or_its_number():
    settings = load("tiny", ["--phases.sft.steps=9", "--phases.1.steps", "8", "phases.jepa.lr=0.2"])
    assert [p.steps for p in settings.phases] == [9, 8] and settings.phases[1].lr == 0.2
    assert load("default", ["--phases.sft.lr=none"]).phases[0].lr is None
    with pytest.raises(ValueError, match=r"one of the 2 phases \(sft, jepa\).*`phases.sft.steps`"):
        load("tiny", ["--phases.stf.steps=9"])
    with pytest.raises(ValueError, match=r"2 phases .sft, jepa., such as"):
        load("tiny", ["--phases.2.steps=9"])


def test_a_command_line_chooses_phases_by_name():
    def names(*words: str) -> list[str]:
        return [phase.name for phase in load("tiny", list(words)).phases]

    assert names("--phases=jepa") == names("--phases=1") == ["jepa"]
    assert names("--phases=jepa,sft") == ["jepa", "sft"]
    chosen = load("tiny", ["--phases=jepa", "--phases.jepa.steps=3", "--phases.0.lr=1"]).phases
    assert [(p.name, p.steps, p.lr) for p in chosen] == [("jepa", 3, 1)]
    for word, said in [
        ("--phases=sft,ahead", "must name one or more of sft, jepa, got `ahead`"),
        ("--phases=sft,sft", "phases must differ in their names"),
        ("--phases=", "at least one phase"),
    ]:
        with pytest.raises(ValueError, match=said):
            load("tiny", [word])


@pytest.mark.parametrize(
    ("typo", "hint"),
    [
        ("optim.bach=2", "did you mean `optim.batch`"),
        ("lr=1", "here it is `phases.sft.lr`, `phases.jepa.lr`"),
        ("objective.mask_rati=0.5", "did you mean `objective.mask_ratio`"),
        ("data.pth=x", "did you mean `data.path`"),
    ],
)
def test_a_typo_names_the_nearest_key(typo, hint):
    with pytest.raises(ValueError, match="unknown key") as error:
        load("tiny", [typo])
    assert hint in str(error.value)


def test_a_file_may_begin_from_a_preset(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\n[optim]\nbatch = 9\n')
    settings = load(str(file), [])
    assert (settings.preset, settings.optim.batch) == ("mine", 9)
    assert settings.optim.micro_tokens == load("tiny", []).optim.micro_tokens
    assert settings.phases == load("tiny", []).phases


def test_a_switch_needs_no_value():
    class Switch(Settings):
        save: bool = False

    assert build(Switch, {}, ["--save"]).save and not build(Switch, {}, ["--save=false"]).save
    with pytest.raises(ValueError, match=r"must have the form --key=value"):
        load("tiny", ["--optim.batch"])


def inner_class(info: FieldInfo) -> type[Settings] | None:
    return group_class(info.annotation) or table_class(info.annotation)


def inner_classes(model: type[Settings]) -> list[type[Settings]]:
    return [inner for info in model.model_fields.values() if (inner := inner_class(info))]


def descriptions(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a model, those of its groups and tables among them, with its description."""
    for name, info in model.model_fields.items():
        if inner := inner_class(info):
            yield from descriptions(inner, f"{prefix}{name}.")
        else:
            yield f"{model.__name__}.{prefix}{name}", info.description or ""


def lines_of(text: str, key: str) -> str:
    """What help says of one key, on one line."""
    lines = text.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith(f"  --{key}="))
    more = itertools.takewhile(lambda line: line.startswith("      "), lines[first + 1 :])
    return " ".join([lines[first].strip(), *(line.strip() for line in more)])


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_help_describes_every_key(model, capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(model, ["--help"], prog="p")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for key in known_keys(model):
        assert f"--{key.replace('phases', 'phases.0.steps')}=" in text, key
    assert max(map(len, text.splitlines())) < 100


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_description_is_made_of_whole_sentences(model):
    named = list(descriptions(model))
    assert named
    for key, text in named:
        assert re.match(r"[A-Z`]", text) and text.endswith(".") and len(text) >= 25, (key, text)
        assert not re.search(r"\b(told|found|some|kept|apart)\b", text), (key, text)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_group_says_what_it_is_for(model):
    for group in [model, *inner_classes(model)]:
        assert group.__doc__ and re.search(r"[.?]$", group.__doc__.strip()), group


@pytest.mark.parametrize(
    "term",
    [
        "random seed",
        "context length",
        "sequence packing",
        "micro-batch",
        "gradient accumulation",
        "activation checkpointing",
        "gradient checkpointing",
        "shared-prefix attention",
        "tree attention",
        "EMA teacher",
    ],
)
def test_help_uses_the_terms_that_people_search_for(term):
    assert term.lower() in " ".join(run_help([], "p").split()).lower()


@pytest.mark.parametrize("term", ["bucket", "timeline", "window", "cut", "trunk", "branch", "tail"])
def test_a_word_of_our_own_is_explained_in_a_heading(term):
    headings = " ".join(group.__doc__ for group in inner_classes(TrainSettings))
    assert re.search(rf"\b{term}", headings)


def test_help_shows_the_values_of_the_preset_it_names():
    default, lora = run_help([], "p"), run_help(["lora", "--help"], "p")
    assert "default 4096, set by preset lora (1024 without it)" in lines_of(lora, "data.window")
    assert "default lora, set by preset lora (none without it)" in lines_of(lora, "model.train")
    assert "default 256, set by preset default" in lines_of(default, "data.window")
    assert "default 16;" not in lora and "default 8, set by" in lines_of(lora, "optim.batch")
    assert lines_of(default, "lora.r") == lines_of(lora, "lora.r")
    assert "phases.1:  name=jepa  steps=1200  w_sft=0.1  w_jepa=1  w_codes=0  warmup=" in lora
    assert "phases.1:  name=ahead  steps=500  w_sft=1  w_jepa=1  w_codes=1  lr=0.003" in default


def test_help_shows_overrides_and_files(tmp_path):
    text = run_help(["tiny", "--optim.batch=9", "-h", "--phases.1.lr=0.5"], "p")
    assert "given here: 9 (preset tiny has 4)" in lines_of(text, "optim.batch")
    assert "phases.1:  name=jepa  steps=6  w_sft=0.1  w_jepa=1  w_codes=0  lr=0.5  warmup=2" in text
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\n[data]\nwindow = 77\n')
    text = run_help([str(file), "--help"], "p")
    assert f"default 77, set by file {file}" in " ".join(text.split())
    assert "default 4, set by" in lines_of(text, "optim.batch")
    with pytest.raises(ValueError, match="must be a preset"):
        run_help(["tinny", "--help"], "p")
    with pytest.raises(ValueError, match=r"did you mean `data\.window`"):
        run_help(["--help", "--data.windw=3"], "p")


@pytest.mark.parametrize(
    ("key", "phrase"),
    [
        ("objective.tau", "a number from 0 to 1; default 0.996"),
        ("objective.mask_ratio", "a number above 0 and at most 1"),
        ("objective.horizon", "an integer of at least 1, or none; default none"),
        ("objective.context", "2 numbers with a comma between them; default 0.25,0.9"),
        ("objective.self_check", "true or false; default true"),
        ("optim.micro_tokens", "an integer, or auto; default auto"),
        ("optim.clip", "a number above 0; default 1"),
        ("data.bucket", "one of auto, day, hour, moment; default auto"),
        ("lora.targets", "a list; default q_proj,k_proj"),
        ("phases.0.steps", "an integer of at least 0; default 0"),
        ("phases.0.epochs", "a number above 0, or none; default none"),
        ("phases.0.name", "text; required in each table"),
    ],
)
def test_help_says_what_a_value_may_be(key, phrase):
    assert f"--{key}=VALUE {phrase}" in re.sub(" +", " ", lines_of(run_help([], "p"), key))


def test_a_message_says_once_what_it_got():
    for word in ("kernels=timeline_attention:cuda", "kernels=torch,sdpa", "data.window=8"):
        with pytest.raises(ValueError) as error:
            load("tiny", [word])
        assert str(error.value).count("got ") == 1, error.value


@pytest.mark.parametrize("command", LIGHT)
def test_settings_import_nothing_heavy(command):
    script = f"import sys\n{command}\nprint(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
