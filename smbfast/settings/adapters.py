"""A LoRA adapter that is named as the backbone: training goes on with it, on its own backbone."""

import os
import sys
from pathlib import Path

from smbfast.base.files import read_json
from smbfast.base.hub_names import is_local
from smbfast.settings.training import TrainSettings


def on_its_backbone(settings: TrainSettings) -> TrainSettings:
    """Return the settings of a run whose `model.path` is the folder of an adapter as those of both.

    The backbone is the one that the adapter was trained on: that of `smbfast.json`, or what PEFT
    has written. Whether its weights are the same is compared when they are read.

    Raises:
        ValueError: the adapter does not say what it is for, its backbone is no longer there, or
            `model.adapter` is another one.
    """
    path, other = settings.model.path, settings.model.adapter
    if not path or not (Path(path) / "adapter_config.json").is_file():
        return settings
    base = _backbone(Path(path))
    both = f"--model.path={base or 'BACKBONE'} --model.adapter={path}"
    if base is None or (is_local(base) and not Path(base).is_dir()):
        where = f"its backbone {base} is not there" if base else "it does not say of which backbone"
        raise ValueError(
            f"model.path {path} holds a LoRA adapter, and {where}; give both, the backbone by its "
            "folder or hub name: --model.path=BACKBONE "
            f"--model.adapter={path}"
        )
    if other is not None and Path(other).resolve() != Path(path).resolve():
        raise ValueError(
            f"model.path {path} holds a LoRA adapter, and model.adapter is another, {other}; give "
            f"one adapter and its backbone, such as {both}"
        )
    if settings.model.train == "all":
        raise ValueError(
            f"model.train must be lora for model.path {path}, which holds a LoRA adapter; got all"
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"smbfast: {path} holds a LoRA adapter; it goes on with {both}", file=sys.stderr)
    model = settings.model.model_copy(update={"path": base, "adapter": path})
    return settings.model_copy(update={"model": model})


def _backbone(adapter: Path) -> str | None:
    """Return the folder or hub name of the backbone of an adapter, None if it names none."""
    for file, key in (
        ("smbfast.json", "backbone"),
        ("adapter_config.json", "base_model_name_or_path"),
    ):
        try:
            base = read_json(adapter / file).get(key)
        except ValueError:
            continue
        if isinstance(base, str) and base:
            return base
    return None
