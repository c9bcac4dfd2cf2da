"""A model by its name on the Hub: exactly its files, each verified; a path asks no network."""

import json
import socket
from pathlib import Path

import pytest

from smbfast.base.files import MANIFEST, committed_folder
from smbfast.base.hub_names import divided, is_local, is_repository
from smbfast.run.hub import fetched
from tests.hub_server import COMMIT, hub
from tests.refusal import refused

FILES = ("config.json", "model.safetensors", "predictor.safetensors", "smbfast.json")
OTHER = "d00d" + "0" * 36


def shipped(root: Path, commit: str = COMMIT, *more: str) -> Path:
    """A model in the form of one, with a card and a file that is no part of it beside it."""
    folder = root / "org" / "name" / commit
    folder.parent.mkdir(parents=True, exist_ok=True)
    with committed_folder(folder) as staging:
        for name in (*FILES, *more):
            (staging / name).write_text(f"{commit} {name}")
    (folder / "README.md").write_text("a card")
    (folder / "events.parquet").write_text("what nobody asks for")
    return folder


def test_exactly_the_files_of_a_model_are_fetched_and_once(tmp_path, monkeypatch, capsys):
    folder = shipped(tmp_path / "hub")
    with hub(tmp_path / "hub", tmp_path / "cache", monkeypatch) as asked:
        model = fetched("org/name")
        assert sorted(p.name for p in model.iterdir()) == sorted([*FILES, MANIFEST])
        assert all((model / n).read_bytes() == (folder / n).read_bytes() for n in FILES)
        assert f"fetching org/name at commit {COMMIT[:12]}: 4 files" in capsys.readouterr().err
        asked.clear()
        assert fetched(f"org/name@{COMMIT}") == model and not asked  # a commit does not change
        assert not capsys.readouterr().err
        shipped(tmp_path / "hub", OTHER)
        newest = fetched("org/name")
        assert newest.name == OTHER and fetched("org/name", COMMIT) == model
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert fetched("org/name") == newest


def test_what_is_absent_or_has_changed_is_refused(tmp_path, monkeypatch):
    folder = shipped(tmp_path / "hub")
    (tmp_path / "hub" / "org" / "other" / COMMIT).mkdir(parents=True)
    with hub(tmp_path / "hub", tmp_path / "cache", monkeypatch):
        refused(lambda: fetched("org/none"), "org/none", "absent, or private")
        refused(lambda: fetched("org/name@v9"), "org/name@v9", "no such revision")
        refused(lambda: fetched("org/other"), "org/other", f"no {MANIFEST}")
        refused(lambda: fetched("org/name@a", "b"), "got a and b")
        (folder / "model.safetensors").write_text("other weights")
        refused(lambda: fetched("org/name"), "org/name", "model.safetensors", "manifest")


@pytest.mark.parametrize("name", ["../../x", "x/model.safetensors", "a.py", "pytorch_model.bin"])
def test_a_manifest_that_names_anything_else_is_refused_before_it_is_asked_for(
    tmp_path, monkeypatch, name
):
    folder = shipped(tmp_path / "hub")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = [1, "0" * 64]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with hub(tmp_path / "hub", tmp_path / "cache", monkeypatch) as asked:
        refused(lambda: fetched("org/name"), "files of a model alone", name)
        assert all(MANIFEST in line or "/api/" in line for line in asked)


def test_a_path_opens_no_socket(tmp_path, monkeypatch):
    def opened(*_words, **_more):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", opened)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x@1").mkdir(parents=True)
    assert fetched("runs/x@1") == Path("runs/x@1") and fetched(tmp_path) == tmp_path
    refused(lambda: fetched("runs/x@1", "main"), "`revision`", "main")
    for name in ("runs/y", "./org/name", "/org/name", "~/name", "name", "a/b/c", "org/.."):
        refused(lambda name=name: fetched(name), name, "no such folder")


def test_names():
    assert divided("org/name@v1") == ("org/name", "v1")
    assert divided("org/name") == ("org/name", None)
    assert is_repository("Qwen/Qwen3-8B") and is_local("tests/none")
    assert not any(map(is_repository, ("org/a/b", "gpt2", "org/..", "tests/none")))


def test_without_network_it_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    asked = []

    def lost(*_words, **_more):
        asked.append(1)
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lost)
    refused(lambda: fetched("org/name"), "org/name", "no network")
    assert asked == [1]  # once, not six times
