"""Which backbones can be trained: looked at by their files, before anything large is imported."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from smbfast.base.files import read_regular
from smbfast.base.hub_names import PATIENCE, from_cache, is_local, require_model_folder
from smbfast.settings.training import TrainSettings

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose layers the shared forward writes out
_CAUSAL = ("ForCausalLM", "LMHeadModel")  # how transformers calls models that predict a next token
_TOKENIZERS = ({"tokenizer.json"}, {"tokenizer.model"}, {"vocab.json", "merges.txt"})
_POINTER = b"version https://git-lfs"  # what git leaves of a large file that it has not fetched
_STATE_SPACE = "mamba", "rwkv"  # parts of the names of types that have layers without attention


def require_backbone(settings: TrainSettings, *, weights: bool = True) -> None:
    """Refuse a backbone that no run could train, from its folder or from what the hub lists.

    The folder of an adapter passes, as what becomes of it is decided elsewhere.

    Args:
        weights: whether it must have weights and a tokenizer; a plan needs neither.

    Raises:
        ValueError: it says what is wrong with `model.path` or `model.adapter`, and the remedy.
    """
    path, adapter = settings.model.path, settings.model.adapter
    if path is None:
        return
    shared = settings.objective.path == "shared"
    if is_local(path):
        folder = require_model_folder(path, "model.path")
        names = {entry.name for entry in folder.iterdir()}
        if "adapter_config.json" in names:
            return
        _require_kind(path, _config_of(path, folder, names), shared=shared)
        if weights:
            _require_weights(path, names, folder)
            _require_tokenizer(path, names, settings)
    elif not from_cache(path):
        _require_on_hub(path, shared=shared, weights=weights)
    if adapter and not (Path(adapter) / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"`model.adapter` {adapter} must be a folder with adapter_model.safetensors; it is not"
        )


def _config_of(path: str, folder: Path, names: set[str]) -> dict:
    if "config.json" not in names:
        gguf = any(name.endswith(".gguf") for name in names)
        hint = "; GGUF files are not read, so name the model that they were made of" if gguf else ""
        raise ValueError(f"`model.path` {path} must hold the config.json of a model; none{hint}")
    try:
        config = json.loads(read_regular(folder / "config.json"))
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'} must be the JSON of a model; it is not")
    return config


def _require_kind(path: str, config: dict, *, shared: bool) -> None:
    """Refuse what predicts no next token, and layers that the chosen forward does not have."""
    kind, classes = config.get("model_type"), config.get("architectures") or []
    named = [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []
    shown = f"{_plain(kind)} ({_plain(named[0])})" if named else _plain(kind)
    wanted = f"`model.path` {path} must be a causal language model of type {', '.join(FAMILIES)}"
    if isinstance(kind, str) and kind in FAMILIES:
        return
    if not isinstance(kind, str) or (named and not named[0].endswith(_CAUSAL)):
        raise ValueError(f"{wanted}; its config.json says {shown}, which predicts no next token")
    if any(part in kind for part in _STATE_SPACE):
        raise ValueError(f"{wanted}; its config.json says {shown}, which has no attention")
    if any(key.startswith(("num_experts", "num_local_experts")) and config[key] for key in config):
        raise ValueError(f"{wanted}; its config.json says {shown}, whose experts cannot be trained")
    if shared:
        raise ValueError(
            f"{wanted}; its config.json says {shown}. --objective.path=reference trains other "
            "causal models, with several forwards a step in place of one"
        )


def _plain(value: object) -> str:
    """Return a value of a file of others in letters that a terminal only shows."""
    return "".join(c for c in str(value)[:60] if c.isalnum() or c in "._-")


def _require_weights(path: str, names: Iterable[str], folder: Path | None = None) -> None:
    tensors = sorted(name for name in names if name.endswith(".safetensors"))
    if not tensors:
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        if not others:
            raise ValueError(
                f"`model.path` {path} must hold weights as *.safetensors; it has none: download "
                "the model once more"
            )
        copy = f"{os.path.basename(path.rstrip('/'))}-safetensors"
        raise ValueError(
            f"`model.path` {path} must hold weights as *.safetensors; it has them as "
            f"{_plain(min(others))}, a format that can run code. If you trust it, convert it: "
            'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"[k.from_pretrained('{path}').save_pretrained('{copy}') for k in (M, T)]\""
        )
    if folder is None:
        return
    for name in (*_listed(folder), *tensors):
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} must be there, as its index names it; download it once more")
        with file.open("rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                raise ValueError(f"{file} must hold weights; it is a pointer: run git lfs pull")


def _listed(folder: Path) -> list[str]:
    """Return the files that an index of weights names; none where there is no index."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return sorted({str(Path(name).name) for name in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return []


def _require_tokenizer(path: str, names: set[str], settings: TrainSettings | None = None) -> None:
    if settings is not None:
        prepared = Path(settings.data.prepared or settings.folder / "prepared")
        if (prepared / "prepare.json").is_file():
            return  # shards bring the tokenizer that made them
    if not any(files <= names for files in _TOKENIZERS):
        raise ValueError(
            f"`model.path` {path} must hold the model's tokenizer, tokenizer.json; it has none. "
            "Copy tokenizer.json and tokenizer_config.json from where the model comes from"
        )


def _require_on_hub(path: str, *, shared: bool, weights: bool) -> None:
    """Look at what the hub lists of a model that this user may read, and at its configuration."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        listed = HfApi().model_info(path, timeout=PATIENCE).siblings or []
        config = json.loads(Path(hf_hub_download(path, "config.json")).read_text(encoding="utf-8"))
    except Exception:  # a mirror may list nothing; loading says what is wrong then
        return
    if isinstance(config, dict):
        _require_kind(path, config, shared=shared)
    names = {file.rfilename for file in listed}
    if weights and names:
        _require_weights(path, names)
        _require_tokenizer(path, names)
