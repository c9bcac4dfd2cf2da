"""examples/meds_dev/model.yaml: its commands, as MEDS-DEV writes them, train, embed and predict."""

import os
import subprocess
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.factory import write_labels, write_meds

MODEL = Path(__file__).resolve().parents[1] / "examples" / "meds_dev" / "model.yaml"
FEWER = {"smbfast.probe": ["--bootstraps=20"]}  # of 2000, nine tenths of the time of a tiny probe
RECORD = 'python() { printf "%s\\n" "$@" >> words; echo >> words; }'


def ran(command: str, folder: Path) -> None:
    """Run a command of model.yaml: its shell words in bash, our programs in this process."""
    folder.mkdir(exist_ok=True)
    for begin in (f"{RECORD}; mv() {{ :; }}; rm() {{ :; }}", "python() { :; }"):
        script = f"set -e; {begin}; {command}"
        subprocess.run(
            ["bash", "-c", script], cwd=folder, check=True, env={"PATH": os.environ["PATH"]}
        )
        words = folder / "words"
        for call in words.read_text().split("\n\n")[:-1] if words.exists() else []:
            flag, module, *argv = call.split("\n")
            assert flag == "-m"
            import_module(module).main([*argv, *FEWER.get(module, [])])
        words.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_its_commands_predict_a_task_as_meds_evaluation_reads_it(tmp_path, capsys):
    data = write_meds(tmp_path / "my data")
    labels = write_labels(data, "readmission")
    commands = yaml.safe_load(MODEL.read_text())["commands"]
    world, task, out = tmp_path / "world", tmp_path / "task", tmp_path / "out"
    shared = {"dataset_dir": data, "labels_dir": labels, "demo": True}
    ran(commands["unsupervised"]["train"].format(output_dir=world, **shared), world)
    ran(
        commands["supervised"]["train"].format(
            output_dir=task, model_initialization_dir=world, **shared
        ),
        task,
    )
    predict = commands["supervised"]["predict"]
    more = {"output_dir": out, "model_initialization_dir": task, "split": "held_out"}
    ran(predict.format(**more, **shared), out)
    assert [str(f.relative_to(out)) for f in out.rglob("*.parquet")] == ["predictions.parquet"]
    table = pq.read_table(out / "predictions.parquet")
    assert set(table["subject_id"].to_pylist()) == set(range(17, 21)), "those of held_out"
    assert {"prediction_time", "boolean_value", "predicted_boolean_probability"} <= set(
        table.column_names
    )
