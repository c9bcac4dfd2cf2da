"""TOML and dotted overrides: every key checked, a typo names its neighbour."""

import pytest

from smbfast.base.config import Settings, build, command_line, known_keys, read_toml, to_toml
from smbfast.settings import TrainSettings, load, presets


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_and_reads_back(name, tmp_path):
    more = ["model.path=somewhere"] if name == "lora" else []
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


@pytest.mark.parametrize(
    ("typo", "hint"),
    [
        ("optim.bach=2", "did you mean `optim.batch`"),
        ("lr=1", "did you mean"),
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


def test_help_describes_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        command_line(TrainSettings, ["--help"], prog="p")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for key in known_keys(TrainSettings):
        assert f"--{key}=" in text, key


def test_every_setting_says_what_it_is():
    def check(model):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                check(inner)
            else:
                assert field.description, f"{model.__name__}.{name}"

    check(TrainSettings)
