"""The commits that faults are put into: what writes a version, and what reads it back.

A version is a number: 1 lies there, 2 is written while the fault strikes, 3 by the next write. What
is read must be one of them, whole and verified by the readers that the program itself uses.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from smbfast.base.files import committed_folder, standing, verify_folder
from smbfast.data.nodes import Nodes
from smbfast.data.shards import Shard, ShardWriter
from smbfast.data.source_index import map_arrow, write_arrow
from smbfast.model.backbone import PatientEncoder
from smbfast.probing.embedding_file import embedding_file, read_origin
from smbfast.run import checkpoint
from smbfast.run.folder import status_of, write_status
from smbfast.run.model_record import FORMAT
from smbfast.run.optim import make_optimizer
from smbfast.settings import OptimSettings
from tests.tiny import random_window, tiny_encoder

MINE = "mine.bin"  # a file that somebody else has put there
_STEP = re.compile(r"step-\d{6}(\.left-1)?")


@dataclass(frozen=True)
class Commit:
    """A way to write something that must be there whole."""

    name: str
    begin: Callable[[Path], None]  # fills an empty folder, with version 1 or with nothing
    write: Callable[[Path, int], object]  # False: it could not, which is no error there
    read: Callable[[Path], int]  # the version, 0 for none; a ValueError if what is there is damaged
    strange: Callable[[Path], list[str]]  # names that a finished write must not leave
    from_nothing: bool = False  # whether begin writes no version
    exchanges: bool = True  # whether two names are exchanged at once


class Model:
    """A tiny encoder with an adapter, whose weights say the version."""

    def __init__(self) -> None:
        self.encoder: PatientEncoder = tiny_encoder(lora=True)
        self.optimizer = make_optimizer(self.encoder, OptimSettings())
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        words = {f"w{i}": i for i in range(61)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")

    def of(self, version: int) -> PatientEncoder:
        """The encoder with the weights of a version."""
        with torch.no_grad():
            self.encoder.mask_vector.fill_(version)
        return self.encoder

    def save(self, run: Path, step: int, **record: object) -> Path:
        """A checkpoint of the version `step`."""
        encoder, more = self.of(step), {"metrics_offset": 0, **record}
        return checkpoint.save(run, step, encoder, None, self.optimizer, more, keep=2)

    def save_final(self, folder: Path, version: int) -> None:
        """A folder of the model."""
        record = {
            "trains": "lora",
            "backbone": "nowhere",
            "dtype": "float32",
            "vocabulary": 61,
            "predictor_layers": 2,
            "window": 256,
            "pool": "last",
            "data_format": "codes",
            "delimiters": "text",
            "format": 1,
            "encoder": "",
            "section_rules": {"rules": {}, "fallback": 0},
            "options": {"gap_floor": 0, "max_codes": 1, "text_chars": 0},
            "format_version": FORMAT,
            "version": version,
        }
        encoder = self.of(version)
        checkpoint.save_final(folder, encoder, None, self.tokenizer, record, card=f"# {version}\n")


def commits(model: Model) -> list[Commit]:
    """All of them."""
    return [
        Commit(
            "checkpoint",
            lambda run: _begin_checkpoints(model, run),
            lambda run, version: model.save(run, version + 1),
            read_checkpoint,
            strange_checkpoints,
        ),
        Commit(
            "best",
            lambda run: None,
            lambda run, version: model.save_final(run / "best" / "sft", version),
            lambda run: _read_model(run / "best" / "sft"),
            lambda run: _others(run / "best", "sft") + _others(run, "best"),
            from_nothing=True,
        ),
        Commit(
            "final",
            lambda run: _begin_final(model, run),
            lambda run, version: model.save_final(run / "final", version),
            lambda run: _read_model(run / "final"),
            lambda run: _others(run, "final"),
        ),
        Commit(
            "profile",
            lambda run: _write_folder(run, 1),
            _write_folder,
            _read_folder,
            lambda run: _others(run, "profile"),
            exchanges=False,
        ),
        Commit(
            "status",
            lambda run: write_status(run, "running", 1, "train"),
            lambda run, version: write_status(run, "running", version, "train"),
            lambda run: int(status_of(run)["step"]),
            lambda run: _others(run, "status.json"),
        ),
        Commit(
            "embeddings",
            lambda run: _embed(run, 1),
            _embed,
            _read_embeddings,
            lambda run: _others(run, "e.parquet"),
        ),
        Commit(
            "shard",
            lambda run: _write_shard(run, 1),
            _write_shard,
            _read_shard,
            lambda run: _others(run / "train", "0.shard"),
        ),
        Commit(
            "index",
            lambda run: None,
            _write_index,
            _read_index,
            lambda run: _others(run / "out" / "index", "subjects.arrow") + _others(run, "out"),
            from_nothing=True,
        ),
    ]


def _others(folder: Path, *own: str) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in own)


def _begin_checkpoints(model: Model, run: Path) -> None:
    for step in (1, 2):
        model.save(run, step)
    (run / "checkpoints" / "step-000001" / MINE).write_text("mine")


def read_checkpoint(run: Path) -> int:
    """Which of the checkpoints would be gone on with, as a version."""
    newest, damaged = checkpoint.latest(run)
    if damaged or newest is None:
        raise ValueError(f"{len(damaged)} checkpoints are damaged")
    tensors = load_file(newest.folder / "state.safetensors")
    if set(tensors["model.mask_vector"].tolist()) != {float(newest.step)}:
        raise ValueError(f"step {newest.step} has the weights of another")
    return newest.step - 1


def strange_checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    bad = [p.name for p in folder.iterdir() if not _STEP.fullmatch(p.name)]
    whole = checkpoint.folders(run)
    for own in whole:
        verify_folder(own)
    if len(whole) != 2:
        bad.append(f"{len(whole)} checkpoints where 2 stay")
    return bad + _others(run, "checkpoints")


def _begin_final(model: Model, run: Path) -> None:
    model.save_final(run / "final", 1)
    (run / "final" / MINE).write_text("mine")


def _read_model(folder: Path) -> int:
    folder = standing(folder)
    if not folder.exists():
        return 0
    version = checkpoint.verified_final(folder)["version"]
    weight = load_file(folder / "predictor.safetensors")["mask_vector"]
    if set(weight.tolist()) != {float(version)}:
        raise ValueError(f"version {version} has the weights of another")
    return version


def _write_folder(run: Path, version: int) -> None:
    with committed_folder(run / "profile", replace=True) as folder:
        (folder / "profile.json").write_text(str(version))
    if version == 1:
        (run / "profile" / MINE).write_text("mine")


def _read_folder(run: Path) -> int:
    folder = standing(run / "profile")
    verify_folder(folder)
    return int((folder / "profile.json").read_text())


def _embed(run: Path, version: int) -> None:
    num, width = 40, 8
    nodes = Nodes(
        np.arange(num, dtype=np.int64),
        np.arange(num, dtype=np.int64),
        np.zeros(num, np.int8),
    )
    with embedding_file(run / "e.parquet", nodes) as file:
        for first in (0, num // 2):
            index = list(range(first, first + num // 2))
            file.put(index, np.full((len(index), width), version, np.float32))
        file.write({"version": version})


def _read_embeddings(run: Path) -> int:
    try:
        table = pq.read_table(run / "e.parquet", page_checksum_verification=True)
        origin = read_origin(run / "e.parquet")
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"embeddings cannot be read: {error}") from None
    values = set(np.concatenate(table["embedding"].to_numpy()).tolist())
    if origin is None or values != {float(origin["version"])} or len(table) != 40:
        raise ValueError("embeddings are of two versions")
    return origin["version"]


def _write_shard(run: Path, version: int) -> None:
    with ShardWriter(run / "train" / "0.shard") as shard:
        shard.add(*3 * [random_window(version)])
        shard.add_codes(["A", "B"])


def _read_shard(run: Path) -> int:
    shard = Shard(run / "train" / "0.shard")
    shard.verify()
    versions = {shard[i].subject for i in range(len(shard))}
    (version,) = versions
    expected = random_window(version)
    for i in range(3):
        if not np.array_equal(shard[i].ids_T, expected.ids_T):
            raise ValueError("a shard has other tokens")
    return version


def _index_of(run: Path) -> Path:
    return run / "out" / "index" / "subjects.arrow"


def _write_index(run: Path, version: int) -> bool:
    return write_arrow(_index_of(run), pa.table({"version": [version] * 100}))


def _read_index(run: Path) -> int:
    if not _index_of(run).exists():
        return 0
    table = map_arrow(_index_of(run), lambda schema: schema.names == ["version"])
    if table is None or len(table) != 100 or len(set(table["version"].to_pylist())) != 1:
        raise ValueError("the index is damaged")
    return table["version"][0].as_py()


def holds_of_others(run: Path, before: Path) -> list[str]:
    """Files of others that are gone."""
    wanted = any(before.rglob(MINE))
    found = [p for p in run.rglob(MINE) if p.read_text() == "mine"]
    return ["a file of others is gone"] if wanted and not found else []
