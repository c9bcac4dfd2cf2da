"""Run folders, checkpoints and final folders that are damaged or of another model."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from smbfast import embed, train
from tests.factory import split_rows, tiny_run, write_meds
from tests.refusal import CANARY, nothing_half_written, refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_report")]


def copied(trained: Path, tmp_path: Path) -> Path:
    run = shutil.copytree(trained, tmp_path / "run")
    config = run / "config.toml"
    config.write_text(config.read_text().replace(str(trained), str(run)))
    return run


def unfinished(trained: Path, tmp_path: Path) -> Path:
    """The run as it stood before its last step was reported."""
    run = copied(trained, tmp_path)
    status = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**status, "state": "running"}))
    return run


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--model.hidden=64", "model.hidden: 32 -> 64"),
        ("--phases.0.steps=3", "phases.0.steps: 2 -> 3"),
        ("--data.window=256", "data.window: 128 -> 256"),
        ("--run.seed=1", "run.seed: 0 -> 1"),
    ],
)
def test_a_run_folder_of_another_run(
    trained: Path, meds: Path, tmp_path: Path, more: str, named: str
) -> None:
    run = unfinished(trained, tmp_path)
    before = files_of(run)
    message = refused(lambda: train.main(tiny_run(meds, run, more)), run, named, "--run.dir")
    assert message.count("->") == 1, "more than the one key that differs is shown"
    assert files_of(run) == before


def test_a_used_folder_and_resume_never(trained: Path, meds: Path, tmp_path: Path) -> None:
    run = unfinished(trained, tmp_path)
    refused(lambda: train.main(tiny_run(meds, run, "--resume=never")), run, "resume")


def test_a_run_folder_whose_config_is_damaged(trained: Path, meds: Path, tmp_path: Path) -> None:
    run = copied(trained, tmp_path)
    (run / "config.toml").write_text("[run")
    refused(lambda: train.main(tiny_run(meds, run)), run / "config.toml", "TOML")


def test_a_run_folder_that_is_a_file(meds: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    refused(lambda: train.main(tiny_run(meds, tmp_path / "run")), tmp_path / "run")


def test_a_damaged_checkpoint_is_passed_over(
    trained: Path, meds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = unfinished(trained, tmp_path)
    flip(run / "checkpoints" / "step-000004" / "state.safetensors")
    train.main(tiny_run(meds, run))
    shown = capsys.readouterr()
    assert str(run / "checkpoints" / "step-000004" / "state.safetensors") in shown.err
    assert "SHA-256" in shown.err
    for name in ("model.safetensors", "predictor.safetensors", "target.safetensors"):
        mine, theirs = load_file(run / "final" / name), load_file(trained / "final" / name)
        assert all((mine[k] == theirs[k]).all() for k in theirs), "resumed from the wrong step"
    nothing_half_written(run / "checkpoints")


def test_a_checkpoint_of_another_shape(trained: Path, meds: Path, tmp_path: Path) -> None:
    """As if the folder of another run had been copied into this one."""
    run = unfinished(trained, tmp_path)
    config = run / "config.toml"
    config.write_text(config.read_text().replace("hidden = 32", "hidden = 64"))
    before = files_of(run / "checkpoints")
    message = refused(
        lambda: train.main(tiny_run(meds, run, "--model.hidden=64")), "checkpoints/step-000004"
    )
    assert "another run" in message and "model.hidden: 32 -> 64" in message
    assert files_of(run / "checkpoints") == before


def embed_words(final: Path, meds: Path, out: Path) -> list[str]:
    return [f"--model={final}", f"--data={meds}", "--labels=task", f"--out={out}"]


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "predictor.safetensors", "target.safetensors", "tokenizer.json"],
)
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_final_folder(
    trained: Path, meds: Path, tmp_path: Path, name: str, how: str
) -> None:
    file = shutil.copytree(trained / "final", tmp_path / "final") / name
    if how == "flip":
        flip(file)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    out = tmp_path / "out.parquet"
    refused(lambda: embed.main(embed_words(file.parent, meds, out)), file)
    assert not out.exists()
    nothing_half_written(tmp_path)


def test_a_final_folder_that_is_none(trained: Path, meds: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    for folder in (tmp_path / "no", trained, trained / "checkpoints" / "step-000004"):
        refused(lambda f=folder: embed.main(embed_words(f, meds, out)), folder, "final")
    plain = shutil.copytree(trained / "final", tmp_path / "plain")
    (plain / "smbfast.json").unlink()
    refused(lambda: embed.main(embed_words(plain, meds, out)), plain, "final")
    (plain / "smbfast.json").write_text("{}")
    refused(lambda: embed.main(embed_words(plain, meds, out)), plain / "smbfast.json")
    assert not out.exists()


def test_tensors_of_another_model_in_a_final_folder(
    trained: Path, meds: Path, tmp_path: Path
) -> None:
    """The manifest is that of the files, but the model's config says another width."""
    from smbfast.base.files import committed_folder

    with committed_folder(tmp_path / "final") as staging:
        for file in (trained / "final").iterdir():
            if file.name != "manifest.json":
                shutil.copy(file, staging)
        config = json.loads((staging / "config.json").read_text())
        (staging / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    out = tmp_path / "out.parquet"
    refused(lambda: embed.main(embed_words(tmp_path / "final", meds, out)), tmp_path / "final")
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("--model.path={}/no", "{}/no"),
        ("--model.path={}/empty", "{}/empty"),
        ("--data.path={}/no", "{}/no"),
        ("--data.prepared={}/file/x", "{}/file"),
        ("--run.device=gpu", "gpu"),
        ("--data.sections={}/no.toml", "{}/no.toml"),
    ],
)
def test_a_run_that_cannot_start(meds: Path, tmp_path: Path, more: str, named: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    run = tmp_path / "run"
    bad = tiny_run(meds, run, more.format(tmp_path))
    refused(lambda: train.main(bad), named.format(tmp_path))
    nothing_half_written(tmp_path)


def test_the_mended_command_is_not_refused(meds: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(lambda: train.main(tiny_run(tmp_path / "no", run)), tmp_path / "no")
    train.main(tiny_run(meds, run, "--phases.0.steps=1", "--phases.1.steps=1"))


def test_bad_data_leaves_no_run(tmp_path: Path) -> None:
    rows = [*split_rows("train"), (99, None, None, 1.0, CANARY)]
    data = write_meds(tmp_path / "data", {"train": rows})
    refused(
        lambda: train.main(tiny_run(data, tmp_path / "run")), "0.parquet", f"row {len(rows) - 1}"
    )
    nothing_half_written(tmp_path)


def test_an_empty_tuning_split(tmp_path: Path) -> None:
    data = write_meds(tmp_path / "data", {"tuning": []})
    refused(lambda: train.main(tiny_run(data, tmp_path / "run")), data, "`tuning`")
