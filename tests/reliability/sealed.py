"""Tiny folders of every kind that smbfast seals, made without a training run, and seals anew.

Whoever made a folder can also write its checksums. What is behind them is reached only by a file
that was changed and sealed again, which `reseal` and `seal_arrays` do.

They import smbfast inside, so that a row can be proven on a copy of it.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
MARK = b"smbarray"
PREFIX = len(MARK) + 8 + 32
WORDS = ("--model.hidden=16", "--model.layers=1", "--model.ffn=16", "--data.window=128")


@dataclass(frozen=True)
class Sealed:
    """Where they lie."""

    root: Path

    @property
    def data(self) -> Path:
        """A MEDS folder with one task."""
        return self.root / "data"

    @property
    def prepared(self) -> Path:
        """Its token shards."""
        return self.root / "run" / "prepared"

    @property
    def whole(self) -> Path:
        """A model all of whose weights are in its folder, with a target encoder."""
        return self.root / "run" / "final"

    @property
    def base(self) -> Path:
        """A plain model, the backbone of `lora`."""
        return self.root / "base"

    @property
    def lora(self) -> Path:
        """An adapter of `base`, with a target encoder."""
        return self.root / "lora"

    @property
    def run(self) -> Path:
        """The folder of `whole`, with two checkpoints."""
        return self.root / "run"


def make(root: Path) -> Sealed:
    """Make all of them."""
    import numpy as np
    import torch
    from peft import get_peft_model

    from smbfast.base.digests import weights_digest
    from smbfast.data.preparing import prepare
    from smbfast.model.backbone import PatientEncoder, load_lm, lora_config, make_encoder
    from smbfast.model.target import TargetEncoder, TargetForm
    from smbfast.run import checkpoint
    from smbfast.run.optim import make_optimizer
    from smbfast.run.step import Updater
    from smbfast.settings import LoraSettings, load
    from tests.factory import SPLITS, subject_rows, write_labels, write_meds

    made = Sealed(root)
    rows = {split: [r for s in own for r in subject_rows(s, 3)] for split, own in SPLITS.items()}
    write_labels(write_meds(made.data, rows))
    settings = load("tiny", [*WORDS, f"--data.path={made.data}", f"--run.dir={made.run}"])
    data = settings.data.model_copy(update={"format": "codes", "workers": 1})
    prepared = prepare(data, made.prepared, None, ("train", "tuning"))
    heads: dict[str, Any] = {"num_horizons": 2, "prevalence_HK": np.full((2, 5), 0.1)}
    encoder = make_encoder(settings, prepared.tokenizer, torch.device("cpu"), **heads)
    target = TargetEncoder(encoder, TargetForm("merged"))
    updater = Updater(make_optimizer(encoder, settings.optim), clip=1.0)
    record = _record(prepared)
    for step in (1, 2):
        for parameter in encoder.parameters():
            parameter.grad = torch.full_like(parameter, 0.01 * step)
        updater.step(1e-3, target, 0.9)
        more = {"identity": {"format_version": 1, "run": "0" * 16}, "metrics_offset": 0}
        checkpoint.save(made.run, step, encoder, target, updater.optimizer, more, keep=2)
    files = prepared.tokenizer, prepared.vocabulary_file
    _final(made.whole, encoder, target, {**record, "trains": "all", "backbone": None}, *files)
    encoder.lm.save_pretrained(made.base)
    prepared.tokenizer.save_pretrained(made.base)
    lm = load_lm(str(made.base), torch.float32)
    adapted = PatientEncoder(get_peft_model(lm, lora_config(lm, LoraSettings(r=2), [1, 2])), 2)
    tracked = TargetEncoder(adapted, TargetForm("tracked", 4, 1))
    lora = {**record, "trains": "lora", "backbone": str(made.base.resolve())}
    lora["weights_digest"] = weights_digest(made.base)
    _final(made.lora, adapted, tracked, lora, *files)
    return made


def _record(prepared: Any) -> dict[str, Any]:
    named = ("data_format", "delimiters", "format", "encoder", "section_rules")
    return {
        **{name: prepared.record[name] for name in named},
        "dtype": "float32",
        "vocabulary": len(prepared.tokenizer),
        "predictor_layers": 2,
        "window": 128,
        "pool": "last",
        "options": prepared.options,
        "step": 2,
        "format_version": 1,
        "run": "0" * 16,
        "data_digest": "0" * 16,
        "weights_digest": None,
    }


def _final(folder: Path, encoder: Any, target: Any, record: dict, tokenizer: Any, own: Any) -> None:
    from smbfast.run import checkpoint

    checkpoint.save_final(folder, encoder, target, tokenizer, record, own)


def reseal(folder: Path) -> None:
    """Give a folder the manifest of the files that it holds now, links and all."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != MANIFEST:
            content = file.read_bytes()
            name = str(file.relative_to(folder))
            files[name] = (len(content), hashlib.sha256(content).hexdigest())
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Change the JSON in a file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def seal_arrays(content: bytes) -> bytes:
    """Return the bytes of an array file with the SHA-256 of what follows it."""
    return content[: PREFIX - 32] + hashlib.sha256(content[PREFIX:]).digest() + content[PREFIX:]


def seal_arrow(content: bytes) -> bytes:
    """Return the bytes of an arrow file, less their seal, with one that is right."""
    from smbfast.data.source_index import _SEAL, _SEALED

    body = content[: max(len(content) - _SEALED, 0)]
    return body + _SEAL + hashlib.sha256(body).digest()


def with_header(content: bytes, change: Callable[[str], str]) -> bytes:
    """Return an array file with another header, sealed; the arrays stay as they are."""
    (size,) = struct.unpack("<Q", content[len(MARK) : len(MARK) + 8])
    raw = change(content[PREFIX : PREFIX + size].decode()).encode()
    raw += b" " * (-(PREFIX + len(raw)) % 64)
    return seal_arrays(
        MARK + struct.pack("<Q", len(raw)) + bytes(32) + raw + content[PREFIX + size :]
    )
