"""Models that want to run code: nothing is unpickled, no code of a model's folder is imported."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from smbfast import train
from tests.factory import tiny_run
from tests.refusal import nothing_half_written, refused


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def model_folder(trained: Path, folder: Path) -> Path:
    """A tokenizer and a config, and no weights."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "codes.json"):
        shutil.copy(trained / "final" / name, folder)
    return folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.model"])
def test_a_pickle_in_place_of_weights(trained: Path, meds: Path, tmp_path: Path, name: str) -> None:
    folder, fired = model_folder(trained, tmp_path / "model"), tmp_path / "fired"
    (folder / name).write_bytes(pickle.dumps(Bomb(fired)))
    run = tmp_path / "run"
    refused(
        lambda: train.main(tiny_run(meds, run, f"--model.path={folder}")), folder, "safetensors"
    )
    assert not fired.exists()
    nothing_half_written(tmp_path / "model")
    assert not (run / "final").exists() and not list(run.rglob("*.tmp"))


def test_code_in_the_folder_of_a_model(trained: Path, meds: Path, tmp_path: Path) -> None:
    folder, fired = model_folder(trained, tmp_path / "model"), tmp_path / "fired"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(fired)!r})\nclass Model: pass\n")
    for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        remote = {key: "evil.Model", "AutoModelForCausalLM": "evil.Model"}
        (folder / name).write_text(
            json.dumps({**content, "model_type": "unheard_of", "auto_map": remote})
        )
    refused(lambda: train.main(tiny_run(meds, tmp_path / "run", f"--model.path={folder}")), folder)
    assert not fired.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_a_pickle_in_place_of_an_adapter(
    trained: Path, meds: Path, tmp_path: Path, name: str
) -> None:
    fired, adapter = tmp_path / "fired", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / name).write_bytes(pickle.dumps(Bomb(fired)))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    more = (f"--model.path={trained / 'final'}", f"--model.adapter={adapter}")
    refused(lambda: train.main(tiny_run(meds, tmp_path / "run", *more)), adapter, "adapter")
    assert not fired.exists()
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("header", [b"\xff" * 8, (1 << 62).to_bytes(8, "little"), b"", b"\0" * 8])
def test_a_safetensors_header_that_lies(
    trained: Path, meds: Path, tmp_path: Path, header: bytes
) -> None:
    folder = model_folder(trained, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(header + b"{}")
    refused(lambda: train.main(tiny_run(meds, tmp_path / "run", f"--model.path={folder}")), folder)


def test_a_model_of_codes_without_its_vocabulary(trained: Path, meds: Path, tmp_path: Path) -> None:
    folder = model_folder(trained, tmp_path / "model")
    (folder / "codes.json").unlink()
    shutil.copy(trained / "final" / "model.safetensors", folder)
    start = lambda: train.main(tiny_run(meds, tmp_path / "run", f"--model.path={folder}"))  # noqa: E731
    refused(start, "codes.json")


def test_a_model_of_codes_asked_for_text(trained: Path, meds: Path, tmp_path: Path) -> None:
    more = (f"--model.path={trained / 'final'}", "--data.format=text")
    refused(lambda: train.main(tiny_run(meds, tmp_path / "run", *more)), "data.format", "codes")
