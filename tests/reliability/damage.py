"""Checkpoints that were damaged, exchanged or edited: none may be gone on with in silence."""

import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from smbfast.base.files import MANIFEST
from smbfast.run import checkpoint
from smbfast.run.folder import compared_settings
from smbfast.run.identity import Identity
from smbfast.run.optim import make_optimizer, trained
from smbfast.settings import OptimSettings, load
from tests.reliability.commit_cases import Model

STEPS = (1, 2)
STATE, RECORD = "state.safetensors", "record.json"
_PAGE = 512  # bytes that a disk loses at once
_SETTINGS = compared_settings(load("tiny", []))
_OWN = Identity("run-a", "data", "shards", "encoder", None, None, _SETTINGS)
_OTHERS = {
    "run": replace(_OWN, run="run-b"),
    "data": replace(_OWN, data="other"),
    "shards": replace(_OWN, shards="other"),
    "encoder": replace(_OWN, encoder="other"),
    "backbone": replace(_OWN, backbone="other"),
    "adapter": replace(_OWN, adapter="other"),
    "settings": replace(_OWN, settings={**_SETTINGS, "optim.clip": 2.0}),
}


class Checkpoints:
    """Two checkpoints of a run, and what is gone on with after the newer one was damaged."""

    def __init__(self, folder: Path) -> None:
        self.model, self.run, self.whole = Model(), folder / "run", folder / "whole"
        self.foreign = folder / "foreign"
        for step in STEPS:
            self.model.save(self.run, step, **_OWN.record())
        for name, identity in _OTHERS.items():
            self.model.save(self.foreign / name, STEPS[-1], **identity.record())
        shutil.copytree(self.run, self.whole)
        self.expected = {step: _state(self.model.of(step)) for step in STEPS}
        self.outcomes: Counter[str] = Counter()

    def newest(self) -> Path:
        """The folder that is damaged."""
        return checkpoint.folders(self.run)[-1]

    def judge(self, damaged: Path) -> str:
        """Go on; why that is wrong, empty if it is not."""
        said = StringIO()
        try:
            with redirect_stderr(said):
                saved, _ = checkpoint.latest(self.run)
                if saved is None:
                    return "no checkpoint is left, though the older one is whole"
                _OWN.require(saved)
                encoder = self.model.of(0)
                checkpoint.load(saved, encoder, make_optimizer(encoder, OptimSettings()))
        except ValueError as error:
            self.outcomes["refused"] += 1
            return "" if damaged.name in str(error) else f"refused without its name: {error}"
        except Exception as error:
            return f"a traceback of {type(error).__name__}"
        state, expected = _state(encoder), self.expected[saved.step]
        if not all(torch.equal(state[name], expected[name]) for name in expected):
            return f"step {saved.step} is gone on with, with other weights"
        if saved.folder != damaged:
            self.outcomes["older"] += 1
            return "" if damaged.name in said.getvalue() else "the older one is used in silence"
        whole = self.whole / damaged.relative_to(self.run)
        same = (whole / RECORD).read_bytes() == (damaged / RECORD).read_bytes()
        self.outcomes["means the same"] += 1
        if json.loads((damaged / MANIFEST).read_text())["format"] != 1:
            return "a manifest of another format is read"
        return "" if same else "the record that is gone on with is another"

    def restore(self) -> None:
        """Make both whole again."""
        shutil.rmtree(self.run)
        shutil.copytree(self.whole, self.run)


def _state(encoder: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trained(encoder).items()}


class Draw(random.Random):
    """Draws for one trial, and which turn of its kind of damage that is."""

    turn = 0


def _next(edits: dict[str, Callable[[], object]], draw: Draw) -> str:
    """Each edit in its turn, so that none is left out by chance."""
    return sorted(edits)[draw.turn % len(edits)]


def _any_file(folder: Path, draw: Draw) -> Path:
    return folder / draw.choice((STATE, STATE, RECORD, MANIFEST))


def _flip(folder: Path, draw: Draw) -> str:
    file = _any_file(folder, draw)
    content = bytearray(file.read_bytes())
    at, bit = draw.randrange(len(content)), draw.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} of {file.name} flipped"


def _truncate(folder: Path, draw: Draw) -> str:
    file = _any_file(folder, draw)
    content = file.read_bytes()
    size = draw.randrange(len(content))
    file.write_bytes(content[:size])
    return f"{file.name} cut to {size} of {len(content)} bytes"


def _zero(folder: Path, draw: Draw) -> str:
    file = _any_file(folder, draw)
    content = bytearray(file.read_bytes())
    at = draw.randrange(-(-len(content) // _PAGE)) * _PAGE
    size = len(content[at : at + _PAGE])
    content[at : at + size] = bytes(size)
    file.write_bytes(content)
    return f"page {at // _PAGE} of {file.name} zero"


def _swap(folder: Path, draw: Draw) -> str:
    one, other = draw.sample((STATE, RECORD, MANIFEST), 2)
    first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
    (folder / one).write_bytes(second)
    (folder / other).write_bytes(first)
    return f"{one} and {other} exchanged"


def _of_another_step(folder: Path, draw: Draw) -> str:
    other = checkpoint.folders(folder.parent.parent)[0]
    names = draw.choice(((STATE,), (RECORD,), (MANIFEST,), (STATE, RECORD), (STATE, MANIFEST)))
    for name in names:
        shutil.copy(other / name, folder / name)
    return f"{', '.join(names)} of step {STEPS[0]}"


def _all_of_another_step(folder: Path, draw: Draw) -> str:
    shutil.rmtree(folder)
    shutil.copytree(checkpoint.folders(folder.parent.parent)[0], folder)
    return "all of another step"


def _delete(folder: Path, draw: Draw) -> str:
    name = draw.choice((STATE, RECORD, MANIFEST))
    (folder / name).unlink()
    if draw.random() < 0.3:
        (folder / name).mkdir()
        return f"a folder in the place of {name}"
    return f"{name} deleted"


def _edit_manifest(folder: Path, draw: Draw) -> str:
    manifest = json.loads((folder / MANIFEST).read_text())
    files, name = manifest["files"], draw.choice((STATE, RECORD))
    edits: dict[str, Callable[[], object]] = {
        "format 2": lambda: manifest.update(format=2),
        "format 99 and no file": lambda: manifest.update(format=99, files={}),
        "a format in words": lambda: manifest.update(format="1"),
        "no format": lambda: manifest.pop("format"),
        "no file": lambda: manifest.update(files={}),
        "no files": lambda: manifest.pop("files"),
        "files as a list": lambda: manifest.update(files=[name]),
        "without one file": lambda: files.pop(name),
        "another size": lambda: files.update({name: [files[name][0] + 1, files[name][1]]}),
        "another hash": lambda: files.update({name: [files[name][0], "0" * 64]}),
        "no hash": lambda: files.update({name: [files[name][0]]}),
        "a file outside": lambda: files.update({"../../run.json": [1, "0" * 64]}),
        "a file that is not there": lambda: files.update({"more": [1, "0" * 64]}),
    }
    what = _next(edits, draw)
    edits[what]()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return f"manifest edited: {what}"


def _reseal(folder: Path) -> None:
    files = {n: (folder / n).read_bytes() for n in (STATE, RECORD)}
    entries = {n: (len(b), hashlib.sha256(b).hexdigest()) for n, b in files.items()}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))


def _edit_record(folder: Path, draw: Draw) -> str:
    """An edit with hashes that agree; weights that were edited so cannot be told."""
    record = json.loads((folder / RECORD).read_text())
    edits: dict[str, Callable[[], object]] = {
        "another step": lambda: record.update(step=7),
        "a step in words": lambda: record.update(step="2"),
        "no step": lambda: record.pop("step"),
        "averages that are not there": lambda: record.update(target_updates=3),
        "no counts": lambda: record.pop("optimizer_steps"),
        "fewer counts": lambda: record["optimizer_steps"].popitem(),
        "another format": lambda: record["identity"].update(format_version=2),
        "no identity": lambda: record.pop("identity"),
        "another offset": lambda: record.update(metrics_offset="x"),
        "no object": lambda: None,
    }
    what = _next(edits, draw)
    edits[what]()
    text = "[]" if what == "no object" else json.dumps(record)
    (folder / RECORD).write_text(text)
    _reseal(folder)
    return f"record edited and resealed: {what}"


# each changes a checkpoint, and returns what it did, in words
DAMAGES: dict[str, Callable[[Path, Draw], str]] = {
    "flip": _flip,
    "truncate": _truncate,
    "zero": _zero,
    "swap": _swap,
    "another step": _of_another_step,
    "all of another step": _all_of_another_step,
    "delete": _delete,
    "manifest": _edit_manifest,
    "record": _edit_record,
}


def trial(checkpoints: Checkpoints, number: int, seed: int) -> tuple[str, str]:
    """Damage the newer checkpoint; what was done, and what is wrong with how it was met."""
    draw, folder = Draw(f"{seed}-{number}"), checkpoints.newest()
    kinds = [*DAMAGES, "foreign"]
    draw.turn = number // len(kinds)
    kind = kinds[number % len(kinds)]
    if kind == "foreign":
        names = sorted(_OTHERS)
        name = names[number // len(kinds) % len(names)]
        shutil.rmtree(folder)
        shutil.copytree(checkpoints.foreign / name / folder.relative_to(checkpoints.run), folder)
        what = f"a checkpoint with another {name}"
    else:
        what = DAMAGES[kind](folder, draw)
    why = checkpoints.judge(folder)
    checkpoints.restore()
    return what, why
