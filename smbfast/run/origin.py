"""Where embeddings come from: what stands in the metadata of their file."""

import json
from pathlib import Path

import smbfast
from smbfast.base.files import MANIFEST, digest_of


def origin_of(folder: Path, encoder: str, pool: str) -> dict:
    """Return what the embeddings of a model are made by and with, as JSON values.

    Args:
        folder: of the model (`smbfast.run.checkpoint.save_final`).
        encoder: `online` or `target`; of the model before training, `untrained`.
        pool: one of `smbfast.settings.POOLS`.

    Returns:
        version: of smbfast; model: a digest of all files of the model, notes aside; run: its id;
        data: the digest of what it was trained on; step; backbone and its digest, where there is
        one; encoder; pool; pool_choice: why the run chose this pool, where it did; window: the
        context length; data_format and format: its number; tokens: the digest of tokenizer or
        vocabulary.
    """
    record = json.loads((folder / "smbfast.json").read_text())
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return {
        "version": smbfast.__version__,
        "model": digest_of(files),
        "run": record.get("run"),
        "data": record.get("data_digest"),
        "step": record.get("step"),
        "backbone": record.get("backbone"),
        "backbone_digest": record.get("weights_digest"),
        "encoder": encoder,
        "pool": pool,
        "pool_choice": record.get("pool_choice") if pool == record["pool"] else None,
        "window": record["window"],
        "data_format": record.get("data_format", "text-paper"),
        "format": record.get("format"),
        "tokens": record.get("encoder"),
    }
