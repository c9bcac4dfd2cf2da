"""What somebody could put into a folder that is then read: models, adapters, data, runs.

A case changes a copy of a folder and seals it again, so that its checksums are right. It is refused
in one line, or, where it says so, read without harm.
"""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability import sealed

REQUIRED = {
    "trains": "everything",
    "backbone": 7,
    "dtype": "float8",
    "vocabulary": 10**9,
    "predictor_layers": 10**9,
    "window": -1,
    "pool": "nope",
    "delimiters": None,
    "format": 99,
    "encoder": [],
    "section_rules": {"rules": {"LAB": 999}, "fallback": 0},
    "options": {"gap_floor": "x"},
}
TOKENIZER = "tokenizer_config.json"
DEEP = "[" * 200_000
HARMLESS = {"backbone missing", "chat template of tokenizer_config.json", "a cache of odd digests"}
HARMLESS |= {"adapter auto_mapping", "adapter pissa", "code of a tokenizer"}
HARMLESS |= {"a card of words", "a regular expression that never ends"}
# of a task that has other files; moments may repeat; 200,000 notes of 4 kB are many, and no harm
HARMLESS |= {"labels that are a pipe", "labels: folder", "labels: rows", "events of many notes"}


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, fired: Path) -> None:
        self.fired = fired

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.fired),)


@dataclass(frozen=True)
class Trial:
    """A case: what it does to a copy of a model's folder, and what is run then."""

    name: str
    of: str  # "whole", "lora", or "data" for what changes the data
    change: Callable[[Path], object]
    seal: bool = True
    command: str = "embed"


def trials(fired: Path) -> list[Trial]:
    """Return all cases.

    Args:
        fired: a folder that code of a case makes where it is run.
    """
    own = [*_records(), *_deep(), *_adapters(), *_tensors(fired), *_code(fired), *_files(fired)]
    return [*own, *_data()]


def _json(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda folder: sealed.edit(folder / name, change)


def _put(name: str, **values: Any) -> Callable[[Path], object]:
    return _json(name, lambda content: content.update(values))


def _records() -> Iterator[Trial]:
    for key, odd in REQUIRED.items():
        yield Trial(f"{key} odd", "whole", _put("smbfast.json", **{key: odd}))
        yield Trial(f"{key} missing", "whole", _json("smbfast.json", lambda c, k=key: c.pop(k)))
    for key in ("vocabulary", "predictor_layers", "window", "format"):
        for value in (float("nan"), -(1 << 63), 1e308):
            yield Trial(f"{key} {value}", "whole", _put("smbfast.json", **{key: value}))
    for key, value in (("compute", "load"), ("data_format", "pickle"), ("format_version", 2)):
        yield Trial(f"{key} odd", "whole", _put("smbfast.json", **{key: value}))
    lora = {"backbone": "someorg/not-there", "weights_digest": "0" * 64, "compute": "bfloat16"}
    for key, value in lora.items():
        yield Trial(f"adapter's {key}", "lora", _put("smbfast.json", **{key: value}))
    yield Trial("adapter's backbone null", "lora", _put("smbfast.json", backbone=None))


def _deep() -> Iterator[Trial]:
    names = ("smbfast.json", "config.json", "tokenizer.json", "tokenizer_config.json", "codes.json")
    for name in names:
        yield Trial(f"deep {name}", "whole", lambda f, n=name: (f / n).write_text(DEEP))
    deep = Trial("deep manifest", "whole", lambda f: (f / "manifest.json").write_text(DEEP), False)
    yield deep
    yield Trial("deep adapter", "lora", lambda f: (f / "adapter_config.json").write_text(DEEP))


def _adapters() -> Iterator[Trial]:
    odd: dict[str, dict[str, Any]] = {
        "lora_alpha 1e308": {"lora_alpha": 1e308},
        "lora_alpha text": {"lora_alpha": "2"},
        "lora_alpha nan": {"lora_alpha": float("nan")},
        "r huge": {"r": 10**9},
        "r negative": {"r": -1},
        "target_modules none": {"target_modules": []},
        "target_modules regex": {"target_modules": ".*"},
        "a regular expression that never ends": {"target_modules": "(a*)*b|.*q_proj"},
        "megatron": {"megatron_config": {"a": 1}, "megatron_core": "os"},
        "auto_mapping": {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        "pissa": {"init_lora_weights": "pissa"},
        "rank pattern": {"rank_pattern": {"q_proj": 10**9}},
        "alpha pattern": {"alpha_pattern": {"q_proj": float("inf")}},
        "peft_type": {"peft_type": "EVIL"},
        "rows": {"trainable_token_indices": [10**9]},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "dora": {"use_dora": True},
        "replication": {"layer_replication": [[0, 10**7]]},
        "dropout": {"lora_dropout": 0.5},
    }
    for name, values in odd.items():
        named = name if name in HARMLESS else f"adapter {name}"
        yield Trial(named, "lora", _put("adapter_config.json", **values))


def _tensors(fired: Path) -> Iterator[Trial]:
    for name in ("model", "predictor", "target"):
        file = f"{name}.safetensors"
        pickled = pickle.dumps(Bomb(fired))
        yield Trial(f"pickle as {file}", "whole", lambda f, n=file, p=pickled: _write(f / n, p))
        for say, size in (("2^63", 1 << 63), ("huge", 1 << 40), ("none", 0)):
            raw = struct.pack("<Q", size) + b"{}"
            yield Trial(f"{file} {say}", "whole", lambda f, n=file, r=raw: _write(f / n, r))
    info = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}
    yield Trial("a tensor of 2^40", "whole", lambda f: _header(f / "predictor.safetensors", info))
    two = '{"a": %s, "a": %s}' % ((json.dumps({**info, "shape": [1]}),) * 2)
    double = struct.pack("<Q", len(two)) + two.encode() + bytes(4)
    yield Trial("duplicate names", "whole", lambda f: _write(f / "predictor.safetensors", double))
    yield Trial("an empty target", "whole", lambda f: _tensor(f / "target.safetensors", {}))
    for kind in ("cut", "wide", "text"):
        change = lambda f, k=kind: _predictor(f / "predictor.safetensors", k)  # noqa: E731
        yield Trial(f"a predictor that is {kind}", "whole", change)
    yield Trial("layers", "whole", _put("config.json", num_hidden_layers=10**7))
    yield Trial("width", "whole", _put("config.json", hidden_size=10**7))
    yield Trial("vocabulary of the model", "whole", _put("config.json", vocab_size=10**9))


def _code(fired: Path) -> Iterator[Trial]:
    evil = f"import os\nos.mkdir({str(fired)!r})\nclass Model: pass\n"

    def remote(folder: Path, name: str, key: str) -> None:
        (folder / "evil.py").write_text(evil)
        auto = {key: "evil.Model", "AutoModelForCausalLM": "evil.Model"}
        sealed.edit(folder / name, lambda c: c.update(auto_map=auto, model_type="unheard_of"))

    yield Trial("auto_map of a model", "whole", lambda f: remote(f, "config.json", "AutoConfig"))
    yield Trial(
        "code of a tokenizer", "whole", _put("tokenizer_config.json", tokenizer_class="x.Y")
    )
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for i in range(10**12) %}{% endfor %}"
    )
    yield Trial(
        "chat template of tokenizer_config.json",
        "whole",
        _put(TOKENIZER, chat_template=template),
    )
    yield Trial("a tokenizer of no kind", "whole", _json("tokenizer.json", _no_model))
    yield Trial("an empty tokenizer", "whole", lambda f: (f / "tokenizer.json").write_text("{}"))
    yield Trial("tokens that clash", "whole", _json("tokenizer.json", _clash))
    yield Trial("many tokens", "whole", _json("tokenizer.json", _many))
    yield Trial("a card of words", "whole", lambda f: (f / "README.md").write_text("\x1b[2J" * 99))


def _no_model(content: dict) -> None:
    content["model"] = {"type": "Evil", "vocab": {}}


def _clash(content: dict) -> None:
    token = {"id": 3, "content": "x", "special": True, "single_word": False, "lstrip": False}
    token |= {"rstrip": False, "normalized": False}
    content["added_tokens"] = [{**token, "id": i} for i in (3, 3, 9)]


def _many(content: dict) -> None:
    content["model"]["vocab"] |= {f"t{i}": i + 10_000 for i in range(200_000)}


def _files(fired: Path) -> Iterator[Trial]:
    names = ("smbfast.json", "manifest.json", "config.json", "predictor.safetensors", "codes.json")
    for name in (*names, "model.safetensors", "tokenizer.json"):
        yield Trial(f"a pipe as {name}", "whole", lambda f, n=name: _special(f / n, "pipe"), False)
    for name in ("smbfast.json", "manifest.json", "codes.json", "target.safetensors"):
        yield Trial(f"a folder as {name}", "whole", lambda f, n=name: _special(f / n, "dir"), False)
        change = lambda f, n=name: _special(f / n, "zero")  # noqa: E731
        yield Trial(f"a device as {name}", "whole", change, False)
    yield Trial("a link out", "whole", lambda f: _special(f / "config.json", "link"), False)
    for name in ("../outside", "/etc/hostname", "a/../../b"):
        yield Trial(f"{name} in a manifest", "whole", lambda f, n=name: _outside(f, n), False)
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        pickled = pickle.dumps(Bomb(fired))
        change = lambda f, n=name, p=pickled: _instead(f, n, p)  # noqa: E731
        yield Trial(f"{name} alone", "whole" if name[0] == "p" else "lora", change)


def _data() -> Iterator[Trial]:
    for rows in ("rows", "notes"):
        yield Trial(f"events of many {rows}", "data", lambda f, r=rows: _bomb(f, r), command="data")
    yield Trial("events that are a pipe", "data", lambda f: _pipe(f, "events"), command="data")
    yield Trial("labels that are a pipe", "data", lambda f: _pipe(f, "labels"), command="data")
    for name in ("rows", "text", "folder"):
        yield Trial(f"labels: {name}", "data", lambda f, n=name: _labels(f, n), command="data")
    for name in ("kind", "width", "null", "text", "deep", "bomb"):
        change = lambda f, n=name: _embeddings(f, n)  # noqa: E731
        yield Trial(f"embeddings: {name}", "data", change, command="probe")
    for name in ("status.json", "config.toml", "run.json", "record.json"):
        for value in (DEEP, '{"step": "x", "state": []}', "[1]", "\0"):
            change = lambda f, n=name, v=value: _run(f, n, v)  # noqa: E731
            yield Trial(f"{name}: {value[:12]!r}", "run", change, command="run")


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _tensor(file: Path, tensors: dict) -> None:
    from safetensors.torch import save_file

    save_file(tensors, file)


def _header(file: Path, info: dict) -> None:
    raw = json.dumps({"mask_vector": info}).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))


def _predictor(file: Path, kind: str) -> None:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(file)
    if kind == "cut":
        tensors = {"mask_vector": tensors["mask_vector"]}
    elif kind == "wide":
        tensors["mask_vector"] = torch.zeros(3)
    else:
        tensors = {name: tensor.to(torch.uint8).flatten()[:1] for name, tensor in tensors.items()}
    _tensor(file, tensors)


def _special(file: Path, kind: str) -> None:
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "dir":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "zero" else "/etc/hostname")


def _outside(folder: Path, name: str) -> None:
    sealed.edit(folder / "manifest.json", lambda c: c["files"].update({name: [1, "0" * 64]}))


def _instead(folder: Path, name: str, content: bytes) -> None:
    """A pickle in place of the weights that safetensors should hold."""
    for file in ("model.safetensors", "adapter_model.safetensors"):
        (folder / file).unlink(missing_ok=True)
    (folder / name).write_bytes(content)


def _bomb(folder: Path, kind: str) -> None:
    """A small file that says, and is, many millions of rows of one patient."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    num, groups = (1 << 22, 4) if kind == "rows" else (200_000, 1)
    ids = np.zeros(num, np.int64) + 5
    columns = {"subject_id": ids, "time": pa.array(ids, pa.timestamp("us"))}
    place = pa.array(np.zeros(num, np.int32))
    code = pa.DictionaryArray.from_arrays(place, pa.array(["LAB//x"]))
    table = pa.table({**columns, "code": code})
    if kind == "notes":
        note = pa.DictionaryArray.from_arrays(place, pa.array(["note " * 800]))
        table = table.append_column("text_value", note)
    with pq.ParquetWriter(folder / "data" / "train" / "0.parquet", table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table, row_group_size=num)


def _pipe(folder: Path, kind: str) -> None:
    file = "data/train/0.parquet" if kind == "events" else "labels/task/train.parquet"
    _special(folder / file, "pipe")


def _labels(folder: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / "labels" / "task" / "train.parquet"
    if kind == "rows":
        num = 1 << 21
        import numpy as np

        column, options = np.zeros(num, np.int64), {"row_group_size": num}
        times = pa.array(column, pa.timestamp("us"))
        table = pa.table({"subject_id": column, "prediction_time": times})
        pq.write_table(table.append_column("boolean_value", pa.array(column == 0)), file, **options)
    elif kind == "text":
        file.write_text("subject_id,prediction_time,boolean_value\n=cmd|' /C calc'!A0,1,1\n")
    else:
        _special(file, "dir")


def _embeddings(folder: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = {
        "subject_id": pa.array([1, 2], pa.int64()),
        "prediction_time": pa.array([0, 1], pa.timestamp("us")),
        "split": pa.array(["train", "tuning"]),
    }
    vectors = {
        "kind": pa.array(["a", "b"]),
        "width": pa.array([[1.0], [1.0, 2.0]]),
        "null": pa.array([[1.0], [None]], pa.list_(pa.float32(), 1)),
        "text": pa.array([["a"], ["b"]]),
        "deep": pa.array([[1.0], [2.0]], pa.list_(pa.float32(), 1)),
        "bomb": pa.array([[1.0], [float("inf")]], pa.list_(pa.float32(), 1)),
    }
    table = pa.table({**keys, "embedding": vectors[kind]})
    if kind == "deep":
        table = table.replace_schema_metadata({"smbfast": DEEP, "smbfast_request": DEEP})
    pq.write_table(table, folder / "e.parquet")


def _run(folder: Path, name: str, content: str) -> None:
    if name == "record.json":
        checkpoint = folder / "checkpoints" / "step-000002"
        (checkpoint / name).write_text(content)
        sealed.reseal(checkpoint)
        return
    (folder / name).write_text(content)


def commands(made: sealed.Sealed, folder: Path, out: Path) -> dict[str, Callable[[], object]]:
    """Return what a user would run on the copy in `folder`, by the name of a trial's command."""

    def embed() -> None:
        from smbfast import embed as command

        words = [f"--model={folder}", f"--data={made.data}", "--labels=task", f"--out={out}"]
        command.main(words)

    def data() -> None:
        from smbfast import embed as command

        words = [f"--model={made.whole}", f"--data={folder}", "--labels=task", f"--out={out}"]
        command.main(words)

    def probe() -> None:
        from smbfast import probe as command

        words = [f"--embeddings={folder / 'e.parquet'}", f"--data={folder}", "--labels=task"]
        command.main([*words, f"--out={out.parent / 'probed'}"])

    def run() -> None:
        from smbfast import report as command

        command.main([str(folder)])

    return {"embed": embed, "data": data, "probe": probe, "run": run}


def copied(made: sealed.Sealed, of: str, folder: Path) -> Path:
    """Return a copy of what a trial changes."""
    source = {"whole": made.whole, "lora": made.lora, "data": made.data, "run": made.run}[of]
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(source, folder)
