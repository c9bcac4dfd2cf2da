"""The fourth reader that is fuzzed: token shards, and the indices and records beside them.

What is sealed by a checksum is read twice over: as it is, when nothing but what was written may be
read, and sealed again, when it may be refused and must not break.
"""

import json
import random
import struct
from pathlib import Path

from tests.reliability import sealed
from tests.reliability.fuzzing import (
    Case,
    Wrong,
    changed,
    draw_bytes,
    draw_json,
    edit_bytes,
    edit_json,
)


class Shards:
    """Token shards, and the indices and records beside them."""

    name = "shards"
    OWN = ("train/0.shard", "tuning/0.shard")
    RECORDS = ("prepare.json", "verified.json", "classes.json", "tokenizer/codes.json")
    INDICES = ("source/files.arrow", "source/codes.arrow", "windows")
    SCENES = ("changed", "another", "no place", "twice")
    ODD: tuple[tuple[str, list], ...] = (  # what is drawn too seldom
        ("prepare.json", ["put", ["shards", "train", 0, "file"], "../../outside.shard"]),
        ("prepare.json", ["put", ["shards", "train", 0, "file"], "/etc/hostname"]),
        ("prepare.json", ["put", ["shards", "train", 0, "file"], "train/\u00e9.shard"]),
        ("train/0.shard", ["put", ["arrays", "subjects_K2", 2], 1]),
        ("train/0.shard", ["codes", "[1]"]),
        ("train/0.shard", ["codes", '{"a": "b"}']),
        ("train/0.shard", ["codes", "[" * 100_000]),
    )

    def __init__(self, folder: Path, made: sealed.Sealed) -> None:
        import shutil

        from smbfast.settings import load

        self.data, self.made = made.data, made
        self.folder = shutil.copytree(made.prepared, folder / "prepared")
        self.objective = load("tiny", []).objective
        self.windows = self._windows()  # whose name has a digest in it
        names = [*self.OWN, *self.RECORDS, *self.INDICES]
        self.bytes = {name: self._file(name).read_bytes() for name in names}
        self.good = {name: self._timelines(name) for name in self.OWN}
        self.fine = self._opened()
        self.last: list[str] = []

    def _file(self, name: str) -> Path:
        return self.folder / (self.windows if name == "windows" else name)

    def _windows(self) -> str:
        from smbfast.data.prepared import Prepared

        Prepared.open(self.folder).windows("train", 128, self.objective)
        file = next((self.folder / "windows").rglob("*.windows"))
        return str(file.relative_to(self.folder))

    def draw(self, dice: random.Random) -> Case:
        if dice.random() < 0.01:
            return {
                "base": self.OWN[0],
                "seal": True,
                "edits": [],
                "scene": dice.choice(self.SCENES),
            }
        if dice.random() < 0.02:
            name, odd = dice.choice(self.ODD)
            if name in self.RECORDS:
                return {"base": name, "seal": True, "json": [odd]}
            edit = odd if odd[0] == "codes" else ["header", 0, odd]
            return {"base": name, "seal": True, "edits": [edit]}
        name = dice.choice([*self.OWN * 16, *self.RECORDS * 2, *self.INDICES * 2])
        case: Case = {"base": name, "seal": dice.random() < 0.6}
        if name in self.RECORDS:
            content = json.loads(self.bytes[name])
            case["json"] = [draw_json(dice, content) for _ in range(dice.randint(1, 2))]
            return case
        case["edits"] = [self._edit(dice, name) for _ in range(dice.randint(1, 3))]
        return case

    def _edit(self, dice: random.Random, name: str) -> list:
        content = self.bytes[name]
        if name in self.RECORDS or name.endswith(".arrow") or dice.random() < 0.3:
            return draw_bytes(dice, len(content))
        (size,) = struct.unpack("<Q", content[8:16])
        header = json.loads(content[sealed.PREFIX : sealed.PREFIX + size])
        if dice.random() < 0.4:
            return ["header", 0, draw_json(dice, header)]
        if dice.random() < 0.1:  # an array that is shorter, as the header says
            array = dice.choice(list(header["arrays"]))
            num = header["arrays"][array][2]
            return ["header", 0, ["put", ["arrays", array, 2], max(num - dice.choice([1, 8]), 0)]]
        array = dice.choice(list(header["arrays"]))
        dtype, first, num = header["arrays"][array]
        width = int(dtype[-1])
        at = sealed.PREFIX + size + first + width * dice.randrange(max(num, 1))
        return ["int", at, dice.choice([0, 1, 3, 255, 10**6, (1 << 63) - 1, (1 << 64) - 1])]

    def more(self, case: Case, dice: random.Random) -> Case:
        if "scene" in case:
            return self.draw(dice)
        if "json" in case:
            new = draw_json(dice, json.loads(self.bytes[case["base"]]))
            return {**case, "json": changed(case["json"], new, dice)}
        new = self._edit(dice, case["base"])
        return {**case, "edits": changed(case["edits"], new, dice), "seal": dice.random() < 0.8}

    def read(self, case: Case) -> None:
        name = case["base"]
        for before in self.last:
            self._file(before).write_bytes(self.bytes[before])
        self.last = [name, "verified.json", "windows"]
        content = self._content(case)
        if case["seal"] and name in (*self.OWN, "windows"):
            content = sealed.seal_arrays(content)
        elif case["seal"] and name.endswith(".arrow"):
            content = sealed.seal_arrow(content)
        self._file(name).write_bytes(content)
        if "scene" in case:
            self._scene(case["scene"], name)
            return
        whole = case["seal"]
        if name in self.OWN:
            sha = content[16:48].hex() if whole else self.bytes[name][16:48].hex()
            self._shard(name, sha, whole)
        elif name.startswith("source"):
            from smbfast.data.meds import MedsDataset

            dataset = MedsDataset.open(self.data, index=self.folder / "source")
            dataset.digest(("train",))
            for code in dataset.descriptions:
                dataset.parents.get(code)
        elif self._opened() != self.fine and not (whole or name in self.RECORDS):
            raise Wrong("windows that were not written are read")

    def _scene(self, scene: str, name: str) -> None:
        """Read what another process changes meanwhile, or where nothing can be written."""
        from smbfast.data.shards import Shard
        from smbfast.data.verified import verify_files

        file, sha256 = self._file(name), self.bytes[name][16:48].hex()
        if scene == "changed":  # after its header was read
            shard = Shard(file)
            file.write_bytes(self.bytes[name] + bytes(64))
            list(shard)
            raise Wrong("a shard that has changed is read on")
        if scene == "another":
            list(Shard(file, sha256="0" * 64))
            raise Wrong("a shard is read in the place of another")
        if scene == "twice":  # what is verified is verified again where that is asked for
            for _ in range(2):
                verify_files(self.folder, {name: sha256}, [self.folder], every=True)
            return
        folder, aside = self.folder / "windows", self.folder / "aside"
        folder.rename(aside)
        folder.write_text("a file where the tables of windows would be written")
        try:
            if self._opened() != self.fine:
                raise Wrong("windows that cannot be stored are others")
        finally:
            folder.unlink()
            aside.rename(folder)

    def _content(self, case: Case) -> bytes:
        content = self.bytes[case["base"]]
        if "json" in case:
            made = edit_json(content.decode(), case["json"])
            if case["base"].endswith("codes.json") and case["seal"]:
                made = _with_digest(made)
            return made.encode("utf-8", "surrogatepass")
        for edit in case["edits"]:
            if edit[0] == "header":
                try:
                    content = sealed.with_header(content, lambda h, e=edit[2]: edit_json(h, [e]))
                except (ValueError, struct.error, RecursionError):
                    continue
            elif edit[0] == "codes":
                content = _with_codes(content, edit[1])
            else:
                content = edit_bytes(content, [edit])
        return content

    def _shard(self, name: str, sha256: str, whole: bool) -> None:
        from smbfast.data.verified import verify_files

        verify_files(self.folder, {name: sha256}, [self.folder], every=True)
        read = self._timelines(name)
        if not whole and read != self.good[name]:
            raise Wrong("a shard is read that was not written")

    def _timelines(self, name: str) -> list:
        from smbfast.data.shards import FIELDS, Shard

        shard = Shard(self.folder / name)
        about = [shard.subjects().tolist(), shard.codes(), shard.subjects_of_codes().tolist()]
        about += [shard.index["tokens"], len(shard)]
        for block in shard.blocks():
            about.append([len(block[i]) for i in range(len(block.about_S5))])
            about.append(block.num_S3.tolist())
        for timeline in shard:
            about.append([getattr(timeline, field).tolist() for field in FIELDS])
            about.append([timeline.subject, timeline.birth, timeline.header, timeline.last])
        return about

    def _opened(self) -> list:
        from smbfast.data.prepared import Prepared

        prepared = Prepared.open(self.folder)
        windows = prepared.windows("train", 128, self.objective)
        classes = prepared.classes()
        shown = [prepared.size_text, prepared.left_out(), prepared.new_tokens]
        begins = prepared.preamble
        return [
            *map(str, shown),
            begins.begin,
            [ids.tolist() for ids in (*begins.age_ids, *begins.section_ids)],
            classes.num_classes,
            len(windows),
            [windows[i].ids_T.tolist() for i in range(len(windows))],
        ]


def _with_codes(content: bytes, text: str) -> bytes:
    """Return a shard whose codes are another text, as far as there is room."""
    (size,) = struct.unpack("<Q", content[8:16])
    _, first, num = json.loads(content[sealed.PREFIX : sealed.PREFIX + size])["arrays"]["codes"]
    at, raw = sealed.PREFIX + size + first, text.encode()[:num]
    return content[:at] + raw + b" " * (num - len(raw)) + content[at + num :]


def _with_digest(text: str) -> str:
    """Return the file of a vocabulary with the digest of what it says."""
    from smbfast.base.files import digest_of

    try:
        record = json.loads(text)
        record["digest"] = digest_of(record["vocabulary"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return text
    return json.dumps(record)
