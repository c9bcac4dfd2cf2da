"""Keys and values that are wrong: one line that names the key, and the nearest one that exists."""

from collections.abc import Callable
from pathlib import Path

import pytest

from smbfast import prepare, report, simulate, train
from smbfast.simulation import dataset
from tests.refusal import refused


def train_with(run: Path, *words: str) -> Callable[[], None]:
    return lambda: train.main(["tiny", f"--run.dir={run}", *words])


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("--run.dirr=x", "run.dir"),
        ("--optim.learning_rate=1", ""),
        ("--phases.0.0=2", ""),
        ("--phases.first.steps=2", "phases"),
        ("--phases.0=2", "phases"),
        ("--phases.0.steps.x=2", "phases"),
        ("--lora.targets.0=q_proj", "lora.targets"),
        ("--=3", ""),
        ("--.=3", ""),
        ("--data.=3", ""),
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


def test_brackets_without_end_on_the_command_line(tmp_path: Path) -> None:
    refused(train_with(tmp_path / "run", "--optim.betas=" + "[" * 3000), "`optim.betas")
    assert not (tmp_path / "run").exists()


def test_a_toml_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    refused(lambda: train.main([str(tmp_path / "no.toml")]), tmp_path / "no.toml")
    (tmp_path / "folder.toml").mkdir()
    refused(lambda: train.main([str(tmp_path / "folder.toml")]), "folder.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    refused(lambda: train.main([str(tmp_path / "binary.toml")]), "binary.toml", "TOML")


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
