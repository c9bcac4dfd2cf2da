"""The fifth reader that is fuzzed: checkpoints and the folders of models, sealed and sealed again.

Most cases change a record or a header and are refused before a model is made of them; a few are
loaded whole.
"""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from tests.reliability import sealed
from tests.reliability.fuzzing import Case, Wrong, changed, draw_bytes, draw_json, edit_bytes
from tests.reliability.fuzzing import edit_json as edit_text

STEP = "checkpoints/step-000002"
FOLDERS = {"checkpoint": STEP, "whole": "final", "lora": "lora"}
SCENES = ("gone", "more", "moved", "all gone", "no older one", "untouched", "no target")
ODD: list[tuple[list, Any]] = [
    (["backbone"], None),
    (["backbone"], "someorg/not-there"),
    (["backbone"], "/not/there"),
    (["section_rules", "rules", "LAB"], 999),
    (["format"], 99),
    (["format_version"], 2),
    (["trains"], "all"),
    (["trains"], "lora"),
    (["weights_digest"], "0" * 64),
    (["compute"], "bfloat16"),
    (["predictor_layers"], 10**9),
    (["weights_digest"], None),
    (["vocabulary"], 10**9),
]
HOW = ("gone", "renamed", "shape", "dtype", "nan", "empty", "scalar", "long", "huge")
LIGHT = ("smbfast.json", "record.json", "manifest.json")


class Models:
    """Checkpoints, models that are whole in their folder, and adapters."""

    name = "models"

    def __init__(self, folder: Path, made: sealed.Sealed) -> None:
        import torch

        from smbfast.run.checkpoint import restore_final
        from smbfast.run.optim import make_optimizer
        from smbfast.settings import load

        self.folder, self.base = folder / "models", made.base
        self.folder.mkdir()
        shutil.copytree(made.run / "checkpoints", self.folder / "checkpoints")
        shutil.copytree(made.whole, self.folder / "final")
        shutil.copytree(made.lora, self.folder / "lora")
        self.files = {
            kind: {
                str(file.relative_to(self.folder / where)): file.read_bytes()
                for file in sorted((self.folder / where).rglob("*"))
                if file.is_file() and file.suffix != ".md"
            }
            for kind, where in FOLDERS.items()
        }
        self.cpu = torch.device("cpu")
        self.encoder, _, _ = restore_final(made.whole, self.cpu)
        self.weights = {n: p.detach().clone() for n, p in self.encoder.named_parameters()}
        self.optimizer = make_optimizer(self.encoder, load("tiny", []).optim)
        self.last: tuple[str, str] = ("checkpoint", "record.json")

    def draw(self, dice: random.Random) -> Case:
        kind = dice.choice(["checkpoint"] * 5 + ["whole"] * 4 + ["lora"] * 3)
        names = list(self.files[kind])
        light = [n for n in names if n in LIGHT]
        name = dice.choice(light * 5 + names)
        case: Case = {"base": kind, "file": name, "seal": dice.random() < 0.75}
        if dice.random() < 0.08:
            name = dice.choice(names)
            return {**case, "file": name, "scene": dice.choice(SCENES), "edits": [], "seal": True}
        if dice.random() < 0.08 and kind != "checkpoint":
            key, value = dice.choice(ODD)
            return {**case, "file": "smbfast.json", "json": [["put", key, value]], "seal": True}
        if name.endswith(".json") and dice.random() < 0.85:
            content = json.loads(self.files[kind][name])
            case["json"] = [draw_json(dice, content) for _ in range(dice.randint(1, 2))]
        else:
            case["edits"] = [self._edit(dice, kind, name) for _ in range(dice.randint(1, 2))]
        return case

    def _edit(self, dice: random.Random, kind: str, name: str) -> list:
        content = self.files[kind][name]
        if not name.endswith(".safetensors") or dice.random() < 0.3:
            return draw_bytes(dice, len(content))
        if dice.random() < 0.2:
            return ["size", 0, dice.choice([0, 1, 1 << 20, 1 << 62, 1 << 63, (1 << 64) - 1])]
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        if dice.random() < 0.5:  # a tensor that is not there, another, or one too many
            tensor = dice.choice(list(header))
            how = dice.choice(HOW)
            return ["tensor", how, tensor]
        return ["header", 0, draw_json(dice, header)]

    def more(self, case: Case, dice: random.Random) -> Case:
        if "scene" in case:
            return self.draw(dice)
        if "json" in case:
            new = draw_json(dice, json.loads(self.files[case["base"]][case["file"]]))
            return {**case, "json": changed(case["json"], new, dice)}
        new = self._edit(dice, case["base"], case["file"])
        return {**case, "edits": changed(case["edits"], new, dice), "seal": True}

    def read(self, case: Case) -> None:
        kind, name = case["base"], case["file"]
        before, file = self.last
        for own in (file, "manifest.json"):
            (self.folder / FOLDERS[before] / own).write_bytes(self.files[before][own])
        self.last = kind, name
        folder = self.folder / FOLDERS[kind]
        if "scene" in case:
            self._scene(case, folder)
            return
        content = self._content(case)
        (folder / name).write_bytes(content)
        if case["seal"] and name != "manifest.json":
            entries = json.loads(self.files[kind]["manifest.json"])
            entries["files"][name] = (len(content), _sha256(content))
            (folder / "manifest.json").write_text(json.dumps(entries))
        if kind == "checkpoint":
            self._checkpoint(case, content)
        else:
            self._final(case, folder, content)

    def _scene(self, case: Case, folder: Path) -> None:
        """Read a folder that lacks a file, or has one too many, by its manifest as well."""
        from smbfast.run import checkpoint

        kind, scene = case["base"], case["scene"]
        own, more = folder / case["file"], folder / "adapter_model.safetensors.index.json"
        moved = str(self.base.with_name("not there")) if scene == "moved" else None
        gone = [own] if scene == "gone" else []
        if scene == "all gone":  # as if the run had no checkpoint, or the model no averages
            named = (folder / name for name in ("target.safetensors", "predictor.safetensors"))
            gone = [file for file in named if file.is_file()]
        if scene == "more":
            more.write_text("{}")
        saved = [folder / own for own in self.files[kind]] if kind == "checkpoint" else gone
        before = {file: file.read_bytes() for file in (*saved, folder / "manifest.json")}
        for file in gone:
            file.unlink()
        if scene != "more" and kind != "checkpoint":
            sealed.reseal(folder)
        try:
            if kind == "checkpoint":
                self._checkpoint_scene(scene, folder)
            else:
                checkpoint.restore_final(folder, self.cpu, moved)
        finally:
            more.unlink(missing_ok=True)
            for file, content in before.items():
                file.write_bytes(content)

    def _checkpoint_scene(self, scene: str, folder: Path) -> None:
        """Read a checkpoint whose files agree with each other and are not those of this run."""
        from safetensors.torch import load, save

        from smbfast.run import checkpoint

        if scene == "no older one":
            older = folder.with_name("step-000001") / "record.json"
            before, newer = older.read_bytes(), folder / "record.json"
            older.write_bytes(b"{}")
            newer.write_bytes(b"{}")
            try:
                if checkpoint.latest(self.folder)[0] is not None:
                    raise Wrong("a checkpoint is read that is damaged")
            finally:
                older.write_bytes(before)
                newer.write_bytes(self.files["checkpoint"]["record.json"])
            return
        if scene in ("untouched", "no target"):
            record = json.loads((folder / "record.json").read_text())
            tensors = load((folder / "state.safetensors").read_bytes())
            gone = ("target.",)
            if scene == "no target":
                record["target_updates"] = None
            else:  # a parameter that no step has moved has no moments
                name = sorted(record["optimizer_steps"])[0]
                del record["optimizer_steps"][name]
                gone = (f"exp_avg.{name}", f"exp_avg_sq.{name}")
            kept = {n: t for n, t in tensors.items() if not n.startswith(gone)}
            (folder / "record.json").write_text(json.dumps(record))
            (folder / "state.safetensors").write_bytes(save(kept))
            sealed.reseal(folder)
        newest, _ = checkpoint.latest(self.folder)
        if newest is None:
            raise Wrong("the older checkpoint is passed over too")
        target = checkpoint.load(newest, self.encoder, self.optimizer)
        if (target is None) != (scene == "no target"):
            raise Wrong("a target encoder is made that was not saved, or is not")

    def _checkpoint(self, case: Case, content: bytes) -> None:
        from smbfast.run import checkpoint

        newest, damaged = checkpoint.latest(self.folder)
        if newest is None or newest.step == 1:
            if not damaged:
                raise Wrong("a checkpoint is passed over without a word")
            raise ValueError("a damaged checkpoint is passed over, and the older one is used")
        same = content == self.files["checkpoint"][case["file"]]
        if not same and not case["seal"] and case["file"] != "manifest.json":
            raise Wrong("a checkpoint is read that was not written")
        checkpoint.load(newest, self.encoder, self.optimizer)

    def _final(self, case: Case, folder: Path, content: bytes) -> None:
        from smbfast.run.checkpoint import restore_final, verified_final

        verified_final(folder)
        same = content == self.files[case["base"]][case["file"]]
        if not same and not case["seal"] and case["file"] != "manifest.json":
            raise Wrong("a model is read that was not written")
        if case["file"] == "manifest.json":
            return  # nothing of it is another
        restore_final(folder, self.cpu)

    def _content(self, case: Case) -> bytes:
        content = self.files[case["base"]][case["file"]]
        if "json" in case:
            return edit_text(content.decode(), case["json"]).encode("utf-8", "surrogatepass")
        for edit in case["edits"]:
            kind, how, what = edit
            if kind == "size":
                content = what.to_bytes(8, "little") + content[8:]
            elif kind in ("tensor", "header"):
                content = _with_tensors(content, kind, how, what)
            else:
                content = edit_bytes(content, [edit])
        return content


def _with_tensors(content: bytes, kind: str, how: Any, what: Any) -> bytes:
    """Return a safetensors file with another header, or with one tensor another."""
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    try:
        if kind == "header":
            (size,) = struct.unpack("<Q", content[:8])
            text = edit_text(content[8 : 8 + size].decode(), [what])
            raw = text.encode("utf-8", "surrogatepass")
            return struct.pack("<Q", len(raw)) + raw + content[8 + size :]
        tensors = load(content)
    except (ValueError, SafetensorError, struct.error, MemoryError, OverflowError, RecursionError):
        return content
    tensor = tensors.pop(what, None)
    if tensor is None:
        return content
    made = {
        "renamed": lambda t: {f"{what}x": t},
        "shape": lambda t: {what: t.flatten()[1:].clone()},
        "dtype": lambda t: {what: t.char()},
        "nan": lambda t: {what: t * float("nan")},
        "empty": lambda t: {what: t.flatten()[:0].clone()},
        "scalar": lambda t: {what: t.flatten()[:1].sum()},
        "long": lambda t: {what: t.new_zeros(10**8, 0)},  # of no bytes
        "huge": lambda t: {what: t.double() + 1e300 if t.is_floating_point() else t + 2**40},
        "gone": lambda t: {},
    }[how](tensor)
    return save(tensors | made)


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()
