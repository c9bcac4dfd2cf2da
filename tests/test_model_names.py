"""Names of models and what their folders hold: one line with cause and remedy, no socket."""

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

from smbfast import check, embed, prepare, train
from smbfast.base import hub_names
from smbfast.base.runtime import choose_device
from smbfast.model.backbone import load_lm
from tests.refusal import refused
from tests.tiny import tiny_lm

QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


@pytest.fixture(autouse=True)
def _asked_anew() -> None:
    hub_names.from_cache.cache_clear()


@pytest.fixture
def no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets and look-ups of hosts fail, also where the environment lets the hub be asked."""

    def closed(*_args: object, **_more: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", closed)
    monkeypatch.setattr(socket, "getaddrinfo", closed)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def model(folder: Path, config: dict = QWEN, **files: str) -> Path:
    """A folder that passes, with other files beside or in place; "" leaves one out."""
    folder.mkdir()
    content = {
        "config.json": json.dumps(config),
        "tokenizer.json": "{}",
        "model.safetensors": "weights",
    }
    for name, text in {**content, **{k.replace("__", "."): v for k, v in files.items()}}.items():
        if text:
            (folder / name).write_text(text)
    return folder


def start(path: str, *more: str, command: Callable = train.main) -> Callable[[], None]:
    return lambda: command(["lora", f"--model.path={path}", "--data.path=nowhere", *more])


@pytest.mark.usefixtures("no_socket")
@pytest.mark.parametrize("command", [train.main, check.main])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nope", ("there is none",)),
        ("/no/where", ("not even /no",)),
        ("~/model", ("$HOME",)),
        ("here/nope", ("there is none",)),
        ("here/modle", ("did you mean here/model?",)),
        ("a/b/c", ("not even a/b",)),
        ("here/model/config.json", ("it is a file",)),
        ("https://huggingface.co/Qwen/Qwen3-8B", ("OWNER/MODEL",)),
    ],
)
def test_a_name_that_looks_like_a_folder_opens_no_socket(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable,
    name: str,
    words: tuple[str, ...],
) -> None:
    (tmp_path / "here").mkdir()
    model(tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path)
    typed = os.path.expanduser(name)  # no shell has expanded a `~` behind a key
    more = words if typed == name else ("there is none",)
    refused(start(name, command=command), f"`model.path` {typed} must be a folder", *more)
    refused(lambda: load_lm(name, torch.float32), f"`model.path` {name} must be a folder", *words)


@pytest.mark.usefixtures("no_socket")
def test_so_do_the_names_of_a_tokenizer_and_of_a_trained_model(tmp_path: Path) -> None:
    words = [f"--path={tmp_path}", f"--out={tmp_path / 'out'}", "--tokenizer=./nope"]
    refused(lambda: prepare.main(words), "`tokenizer` ./nope must be a folder", "there is none")
    words = [f"--data={tmp_path}", "--out=x.parquet", "--at=last", "--model=./nope"]
    refused(lambda: embed.main(words), "`model` ./nope must be a folder", "there is none")
    hub_names.refuse_missing("owner/name@v1", "model")  # of the hub


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        (QWEN, {"tokenizer__json": ""}, ("tokenizer.json; it has none",)),
        (QWEN, {"model__safetensors": ""}, ("*.safetensors; it has none",)),
        (
            QWEN,
            {"model__safetensors": "", "pytorch_model__bin": "x"},
            ("pytorch_model.bin", "save_pretrained"),
        ),
        (
            QWEN,
            {"model__safetensors__index__json": '{"weight_map": {"a": "b.safetensors"}}'},
            ("b.safetensors must be there",),
        ),
        (QWEN, {"model__safetensors": "version https://git-lfs/spec/v1"}, ("git lfs pull",)),
        (QWEN, {"config__json": ""}, ("config.json of a model; none",)),
        (QWEN, {"config__json": "", "x__gguf": "x"}, ("GGUF",)),
        (QWEN, {"config__json": "["}, ("must be the JSON",)),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            {},
            ("bert (BertForMaskedLM), which predicts no next token",),
        ),
        (
            {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
            {},
            ("gpt2 (GPT2LMHeadModel). --objective.path=reference",),
        ),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, {}, ("no attention",)),
        ({"model_type": "mixtral", "num_local_experts": 4}, {}, ("experts",)),
        ({"model_type": "\x1b[31mred"}, {}, ("says 31mred.",)),
    ],
)
def test_a_folder_that_no_run_could_train(
    tmp_path: Path, config: dict, files: dict[str, str], words: tuple[str, ...]
) -> None:
    folder = model(tmp_path / "model", config, **files)
    message = refused(start(str(folder)), folder, *words)
    assert "\x1b" not in message


def test_what_passes_goes_on_to_the_data(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    refused(start(str(folder)), "nowhere must be the folder of a MEDS dataset")
    gpt2 = model(tmp_path / "gpt2", {"model_type": "gpt2"})
    reference = "--objective.path=reference"
    refused(start(str(gpt2), reference), "nowhere must be the folder of a MEDS dataset")
    # what a converted copy of the tokenizer stands for
    old = model(tmp_path / "old", tokenizer__json="", vocab__json="{}", merges__txt="x")
    refused(start(str(old)), "nowhere must be the folder of a MEDS dataset")


def hub_says(monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, asked: list) -> None:
    """The hub answers with an error, or with what it has."""

    def answer(url: str, **more: object) -> None:
        asked.append((url, more))
        if error is not None:
            raise error.__new__(error)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError, ("no such model, or a private one", "hf auth login")),
        (GatedRepoError, ("https://huggingface.co/some/model", "accepted its terms")),
        (LocalEntryNotFoundError, ("config.json",)),
        (OSError, ("does not answer", "hf download")),
    ],
)
def test_a_name_of_the_hub_is_asked_for_once(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], words: tuple[str, ...]
) -> None:
    asked: list = []
    hub_says(monkeypatch, error, asked)
    refused(start("some/model"), "`model.path` some/model must be a folder, or the name", *words)
    assert len(asked) == 1 and asked[0][1]["timeout"] <= hub_names.PATIENCE


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_names, "PATIENCE", 0.01)
    free, left = threading.Event(), threading.enumerate()
    monkeypatch.setattr(hub_names, "_problem", lambda _name: free.wait() and "")
    refused(start("some/model"), "does not answer")
    free.set()
    for thread in set(threading.enumerate()) - set(left):
        thread.join(60)


def test_the_cache_serves_where_the_hub_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub_says(monkeypatch, OSError, [])
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args: "a path")
    assert hub_names.options_of("some/model")["local_files_only"] is True
    hub_names.options_of("some/model")
    assert capsys.readouterr().err.count("is read from the cache") == 1
    hub_names.from_cache.cache_clear()
    hub_says(monkeypatch, None, [])
    assert hub_names.options_of("some/model")["local_files_only"] is False
    hub_names.from_cache.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args: None)
    refused(start("some/model"), "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("name", ["mps", "mps:0", "gpu", "meta", "cuda:x"])
def test_a_device_that_is_not_known(name: str) -> None:
    words = ("run.device", "auto, cpu or cuda[:n]", *(["Apple"] if "mps" in name else []))
    refused(lambda: train.main(["tiny", f"--run.device={name}"]), *words)
    refused(lambda: choose_device(name), *words)


def test_weights_that_are_not_there_are_not_drawn_anew(tmp_path: Path) -> None:
    """And what libraries say of them is an error, or nothing."""
    lm = tiny_lm("qwen3")
    lm.save_pretrained(tmp_path)
    assert load_lm(str(tmp_path), torch.float32) is not None
    state = {n: w for n, w in lm.state_dict().items() if "layers.1.mlp.up" not in n}
    state.pop("lm_head.weight", None)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    refused(
        lambda: load_lm(str(tmp_path), torch.float32), "1 are not there", "layers.1.mlp.up_proj"
    )
