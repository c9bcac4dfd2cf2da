"""Names that are not ours: the right key, the reason why there is none, and never a wrong hint."""

import random
import re
from pathlib import Path

import pytest

import smbfast
from smbfast.base.config import build, known_keys, read_toml
from smbfast.base.nearest import edits, nearest
from smbfast.settings import (
    CompareSettings,
    EmbedSettings,
    PrepareSettings,
    ProbeCommandSettings,
    ReportSettings,
    SimulateSettings,
    TrainSettings,
    compare_arguments,
    load,
    plan_arguments,
)

DEFAULT = read_toml(Path(smbfast.__file__).parent / "configs" / "default.toml")
WITH_NAMES = [
    *(TrainSettings, PrepareSettings, SimulateSettings, EmbedSettings, ProbeCommandSettings),
    ReportSettings,
]
# what people type first, and what it is here; None where there is no such setting
TYPED = {
    "lr": "phases.ahead.lr",
    "optim.lr": "phases.ahead.lr",
    "learning_rate": "phases.ahead.lr",
    "training.learning_rate": "phases.ahead.lr",
    "batch_size": "optim.batch",
    "per_device_train_batch_size": "optim.micro_tokens",
    "gradient_accumulation_steps": "optim.batch",
    "steps": "phases.ahead.steps",
    "max_steps": "phases.ahead.steps",
    "output_dir": "run.dir",
    "model_name_or_path": "model.path",
    "model": "model.path",
    "max_length": "data.window",
    "max_seq_length": "data.window",
    "block_size": "data.window",
    "cutoff_len": "data.window",
    "sequence_len": "data.window",
    "warmup_steps": "phases.ahead.warmup",
    "warmup_ratio": "phases.ahead.warmup",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora.rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_target_modules": "lora.targets",
    "seed": "run.seed",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "load_in_4bit": "model.dtype",
    "gradient_checkpointing": "model.recompute",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip",
    "logging_steps": "run.log_every",
    "save_steps": "run.save_every",
    "eval_steps": "eval.every",
    "eval.steps": "eval.every",
    "save_total_limit": "run.keep",
    "resume_from_checkpoint": "run.resume",
    "dataset": "data.path",
    "train_file": "data.path",
    "data": "data.path",
    "deepspeed": "model.fsdp",
    "fsdp": "model.fsdp",
    "adam_beta2": "optim.betas",
    "hidden_size": "model.hidden",
    "num_hidden_layers": "model.layers",
    "packing": None,
    "report_to": "run.track",
    "trust_remote_code": None,
    "optim": None,
    "num_gpus": None,
    "do_train": None,
}


def refusal(model: type, word: str) -> str:
    """What is said of one word of a command line."""
    with pytest.raises(ValueError) as error:
        build(model, DEFAULT if model is TrainSettings else {}, [word])
    return str(error.value)


def keys_of(model: type) -> set[str]:
    keys = set(known_keys(model))
    if model is TrainSettings:
        inner = known_keys(model.model_fields["phases"].annotation.__args__[0])
        keys |= {f"phases.{row}.{key}" for row in ("sft", "ahead", "*") for key in inner}
    return keys


@pytest.mark.parametrize("name", TYPED)
def test_what_people_type_gets_the_key_or_the_reason(name):
    for word in (f"--{name}=1", f"--{name.replace('_', '-')}"):
        said = refusal(TrainSettings, word)
        named = set(re.findall(r"`([\w.]+)`", said)) & keys_of(TrainSettings)
        if TYPED[name] is None:
            assert not named and "; " in said and "did you mean" not in said, said
        else:
            assert TYPED[name] in named, said
            leaf = TYPED[name].rsplit(".", 1)[-1]
            assert {key.rsplit(".", 1)[-1] for key in named} == {leaf}, said


@pytest.mark.parametrize("model", WITH_NAMES, ids=lambda model: model.__name__)
def test_every_foreign_name_leads_to_a_key_that_exists(model):
    keys = keys_of(model)
    assert len(model.foreign) >= 5
    for name, foreign in model.foreign.items():
        assert name not in keys and (foreign.key or foreign.why), name
        said = refusal(model, f"--{name}=1")
        assert "did you mean" not in said and said.startswith(f"unknown key `{name}`; "), said
        assert not foreign.key or foreign.key in keys, name
        assert foreign.key.replace("*", "ahead") in said and foreign.why in said


def test_a_file_gets_the_same_words(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('base = "tiny"\n[optim]\nlearning_rate = 1e-3\n')
    with pytest.raises(ValueError, match=r"`optim.learning_rate`; here it is `phases.sft.lr`"):
        load(str(file), [])
    file.write_text('[[phases]]\nname = "x"\nmax_steps = 3\n')
    with pytest.raises(ValueError, match=r"`phases.0.max_steps`; here it is `phases.0.steps`"):
        load(str(file), [])


def typo(key: str, draw: random.Random) -> str:
    """The key with one letter left out, doubled, replaced, or exchanged with the next."""
    at = draw.choice([i for i, letter in enumerate(key) if letter != "."])
    one, rest = key[at], key[at + 1 :]
    forms = [rest, one * 2 + rest, draw.choice("abcdefghijklmnopqrstuvwxyz") + rest]
    if rest and rest[0] != ".":
        forms.append(rest[0] + one + rest[1:])
    return key[:at] + draw.choice(forms)


def test_of_200_typing_mistakes_the_right_key_comes_in_95_percent():
    draw, keys, right = random.Random(0), sorted(keys_of(TrainSettings)), 0
    keys = [key for key in keys if key != "phases" and "*" not in key and "phases.sft" not in key]
    for _ in range(200):
        key = draw.choice(keys)
        mistake = next(m for m in iter(lambda k=key: typo(k, draw), None) if m not in keys)
        right += f"`{key}`" in refusal(TrainSettings, f"--{mistake}=1")
    assert right >= 190


@pytest.mark.parametrize(
    "name", ["foo", "xyz.abc", "temperature", "beam", "chat_template", "a.b.c"]
)
def test_a_name_that_is_near_to_nothing_gets_no_hint(name):
    assert refusal(TrainSettings, f"--{name}=1") == f"unknown key `{name}`"


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        ("batch", "batch", 0),
        ("bach", "batch", 1),
        ("abtch", "batch", 1),
        ("", "ab", 2),
        ("ab", "cd", 2),
    ],
)
def test_edits(one, other, count):
    assert edits(one, other) == edits(other, one) == count


def test_the_same_key_in_another_group_is_named():
    assert nearest("optim.window", ["data.window", "run.seed", "cohort.seed"]) == ["data.window"]
    assert nearest("model.seed", ["run.seed", "cohort.seed"]) == ["run.seed", "cohort.seed"]
    assert nearest("Data-Window", ["data.window"]) == ["data.window"]


def test_a_blank_in_place_of_the_equals_sign():
    words = ["--optim.batch", "9", "--probe.labels", "a,b", "--optim.min-lr", "0.5"]
    settings = load("tiny", [*words, "--probe.few_shot", "--phases.0.lr", "0.25"])
    assert settings.optim.batch == 9 and settings.optim.min_lr == 0.5
    assert settings.probe.labels == ["a", "b"] and settings.probe.few_shot
    assert settings.phases[0].lr == 0.25
    assert not load("tiny", ["--probe.few_shot", "false"]).probe.few_shot
    assert plan_arguments(["--gpus", "8", "--data.path", "x"])[0] == ["--gpus=8"]
    compared = compare_arguments(["a", "--against", "all", "b", "--folds", "c"])
    assert compared == CompareSettings(methods=["a", "b", "c"], against="all", folds=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.batch"], "`--optim.batch` must have the form --key=value"),
        (["--optim.batch", "--run.seed=1"], "`--optim.batch` must have the form --key=value"),
        (["--probe.labels", "a", "b"], "with commas, --probe.labels=a,b"),
        (["--optim.batch=2", "b"], "argument `b` must have the form --key=value"),
        (["--optim.batch="], "`optim.batch`: must have a value, got nothing"),
    ],
)
def test_what_stands_alone_gets_the_form_to_type(words, said):
    with pytest.raises(ValueError) as error:
        load("tiny", words)
    assert said in str(error.value)
