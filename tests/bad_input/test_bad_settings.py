"""Keys and values that are wrong: one line that names the key, and the nearest one that exists."""

from collections.abc import Callable
from pathlib import Path

import pytest

from smbfast import embed, prepare, probe, report, simulate, train
from smbfast.simulation import dataset
from tests.refusal import refused, told

ENTRIES = [prepare.main, embed.main, probe.main, report.main, simulate.main]


def train_with(run: Path, *words: str) -> Callable[[], None]:
    return lambda: train.main(["tiny", f"--run.dir={run}", *words])


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--data.paht=x", "data.path"),
        ("data.windw=128", "data.window"),
        ("--run.dirr=x", "run.dir"),
        ("--optim.learning_rate=1", ""),
        ("--phases.0.stps=2", "phases.0.steps"),
        ("--phases.0.0=2", ""),
        ("--phases.first.steps=2", "phases"),
        ("--phases.9.steps=2", "phases"),
        ("--phases.0=2", "phases"),
        ("--phases.0.steps.x=2", "phases"),
        ("--data=3", "data.path"),
        ("--model.path.x=3", "model.path"),
        ("--lora.targets.0=q_proj", "lora.targets"),
        ("--=3", ""),
        ("--.=3", ""),
        ("--data.=3", ""),
        ("--window", "data.window"),
    ],
)
def test_an_unknown_key_on_the_command_line(tmp_path: Path, word: str, nearest: str) -> None:
    key = word.removeprefix("--").split("=")[0]
    refused(train_with(tmp_path / "run", word), f"`{nearest}" if nearest else "`", key)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[data]\nwindo = 5", ("data.windo", "did you mean `data.window`")),
        ("[dat]\nwindow = 128", ("`dat`", "did you mean `data`")),
        ("[[phases]]\nname = 'x'\nstep = 3", ("phases.0.step", "phases.0.steps")),
        ("[[phases]]\nname = 'x'\nsteps = 3\nw_sft = 1", ("phases.0.w_jepa", "required")),
        ("data = 3", ("`data`",)),
        ("phases = 3", ("`phases`",)),
        ("phases = [3]", ("`phases.0`",)),
        ("run = []", ("`run`",)),
        ("x = \ny = 1", ("TOML", "line 1")),
        ("a = 1\na = 2\nb = 3", ("TOML", "line 2")),
        ("x = " + "[" * 5000, ("TOML",)),
        ("\x00", ("TOML",)),
    ],
)
@pytest.mark.parametrize("override", [(), ("--data.window=128",), ("--phases.0.steps=3",)])
def test_a_bad_toml_file(
    tmp_path: Path, text: str, words: tuple[str, ...], override: tuple[str, ...]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    message = refused(lambda: train.main([str(file), f"--run.dir={tmp_path / 'run'}", *override]))
    if not override:
        assert all(w in message for w in words), message
    assert not (tmp_path / "run").exists()


def test_a_toml_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    refused(lambda: train.main([str(tmp_path / "no.toml")]), tmp_path / "no.toml")
    (tmp_path / "folder.toml").mkdir()
    refused(lambda: train.main([str(tmp_path / "folder.toml")]), "folder.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: train.main([str(tmp_path / "binary.toml")]), "binary.toml", "TOML")


@pytest.mark.parametrize("name", ["tinny", "sections", "../tiny", "tiny/", ""])
def test_an_unknown_preset(name: str) -> None:
    refused(lambda: train.main([name]), "preset", "tiny", "default")


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("--phases.0.lr=-0.1", ("phases.0.lr", "greater than 0", "-0.1")),
        ("--phases.0.lr=nan", ("phases.0.lr",)),
        ("--phases.0.lr=inf", ("phases.0.lr", "finite")),
        ("--phases.0.lr=fast", ("phases.0.lr", "number")),
        ("--phases.0.steps=0", ("phases.0", "steps must be at least 1")),
        ("--phases.0.steps=2.5", ("phases.0.steps", "integer")),
        ("--phases.0.w_sft=0", ("phases.0", "above 0")),
        ("--phases=", ("phases", "at least one")),
        ("--lora.dropout=0.1", ("lora.dropout", "must be 0")),
        ("--lora.r=0", ("lora.r",)),
        ("--objective.mask_ratio=0", ("objective.mask_ratio", "greater than 0")),
        ("--objective.mask_ratio=1.5", ("objective.mask_ratio", "1")),
        ("--objective.mask_unit=word", ("objective.mask_unit", "token", "event", "span")),
        ("--objective.context=0.9,0.1", ("objective.context", "order")),
        ("--objective.context=0.5", ("objective.context",)),
        ("--objective.tau=nan", ("objective.tau",)),
        ("--optim.micro_tokens=8", ("optim.micro_tokens", "64")),
        ("--optim.micro_batch=2", ("unknown key", "optim.micro_batch")),
        ("--objective.path=fast", ("objective.path", "shared", "reference")),
        ("--kernels=cuda", ("kernels", "torch", "cuda")),
        ("--kernels=attention:sdpa", ("kernels", "timeline_attention", "attention")),
        ("--model.hidden=30", ("model.hidden", "heads")),
        ("--model.adapter=x", ("model.adapter", "model.path")),
        ("--model.train=lora", ("model.train", "model.path")),
        ("--data.window=8", ("data.window", "64")),
        ("--data.gap_floor=-1", ("data.gap_floor", "0 minutes or more", "got -1")),
        ("--data.bucket=week", ("data.bucket", "day", "hour", "moment")),
        ("--data.window=", ("data.window",)),
        ("--run.resume=maybe", ("run.resume", "auto", "never")),
    ],
)
def test_a_bad_value(tmp_path: Path, word: str, words: tuple[str, ...]) -> None:
    refused(train_with(tmp_path / "run", word), *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("entry", ENTRIES)
def test_unknown_keys_of_the_other_commands(
    entry: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    told(lambda: entry(["--otu=x"]), capsys, "`otu`")
    if entry is not report.main:  # there a word names a run
        told(lambda: entry(["whatever"]), capsys, "`whatever`", "--key=value")


@pytest.mark.parametrize(
    ("entry", "words", "named"),
    [
        (prepare.main, ["--path=x"], "`out` is required"),
        (prepare.main, ["--path=x", "--out=y", "--splits=test"], "held_out"),
        (prepare.main, ["--path=x", "--out=y", "--splits="], "`splits`"),
        (embed.main, ["--model=x"], "`data` is required"),
        (embed.main, ["--model=x", "--data=y", "--labels=z", "--out=o", "--pool=max"], "mean"),
        (embed.main, ["--model=x", "--data=y", "--labels=z", "--out=o", "--tokens=0"], "`tokens`"),
        (probe.main, ["--data=x"], "`embeddings` is required"),
        (simulate.main, ["--out=x", "--patients=0"], "`patients`"),
    ],
)
def test_missing_and_bad_arguments(
    entry: Callable[[list[str]], None],
    words: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told(lambda: entry(words), capsys, named)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[sections]\nlab = ['LAB']", ("lab", "measurements")),
        ("fallback = 'other'", ("other", "measurements")),
        ("fallback = 3", ("3", "measurements")),
        ("[section]\nlab = ['LAB']", ("`sections`", "section")),
        ("sections = 3", ("`sections`",)),
        ("[sections]\ndrugs = 'RX'", ("sections.drugs", "list")),
        ("[sections]\ndrugs = [3]", ("sections.drugs", "text")),
        ("[sections]\ndrugs = ['RX']\nnotes = ['rx']", ("`rx`", "two sections")),
        ("[sections", ("TOML",)),
    ],
)
def test_a_bad_table_of_sections(
    meds: Path, tmp_path: Path, text: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    argv = [f"--path={meds}", f"--out={tmp_path / 'out'}", f"--sections={file}"]
    refused(lambda: prepare.main(argv), file, *words)
    assert not (tmp_path / "out").exists()


def test_a_missing_table_of_sections(meds: Path, tmp_path: Path) -> None:
    argv = [f"--path={meds}", f"--out={tmp_path / 'out'}", f"--sections={tmp_path / 'no.toml'}"]
    refused(lambda: prepare.main(argv), tmp_path / "no.toml")
    assert not (tmp_path / "out").exists()


def test_simulate_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    refused(lambda: dataset.simulate(tmp_path / "out", 3, 0), tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        simulate.main([f"--out={tmp_path / 'out'}", "--patients=3"])
    assert caught.value.code not in (0, None)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_report_of_no_run(tmp_path: Path) -> None:
    refused(lambda: report.main([f"--run={tmp_path / 'no'}"]), tmp_path / "no")
    (tmp_path / "empty").mkdir()
    refused(lambda: report.main([f"--run={tmp_path / 'empty'}"]), "metrics.jsonl")
    (tmp_path / "empty" / "metrics.jsonl").write_bytes(b"\xff\x00{")
    refused(lambda: report.main([f"--run={tmp_path / 'empty'}"]), "metrics.jsonl")
    assert [p.name for p in (tmp_path / "empty").iterdir()] == ["metrics.jsonl"]
