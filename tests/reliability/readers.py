"""Three of the five readers that are fuzzed: settings, events and labels.

A case of bytes is read from a file that lies where the real one does. The other two read what is
sealed: `shard_reader` and `model_reader`.
"""

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.reliability.fuzzing import (
    Case,
    Wrong,
    changed,
    draw_bytes,
    edit_bytes,
)

WORDS = ["x", "0", "-1", "1e400", "nan", "inf", "true", "none", "", "[", "[[1,2],[3]]", "{}", "a,b"]
WORDS += ["jepa", "1,jepa", "[1]"]
WORDS += ["'", '"""', "2020-01-01", "0x10", "1_000", "9" * 400, "é", "\0", "[" * 3000, "=", "../x"]
PRESETS = ("tiny", "default", "lora", "sft", "nothing")


class Config:
    """Settings from TOML and from the words of a command line."""

    name = "config"

    def __init__(self, folder: Path) -> None:
        from smbfast.base.config import known_keys
        from smbfast.settings import (
            EmbedSettings,
            ObjectiveSettings,
            PrepareSettings,
            ProbeCommandSettings,
            SimulateSettings,
            TasksSettings,
            TrainSettings,
            presets,
        )

        commands = (EmbedSettings, PrepareSettings, ProbeCommandSettings, SimulateSettings)
        self.models = {m.__name__: m for m in (*commands, TasksSettings, ObjectiveSettings)}
        self.keys = known_keys(TrainSettings)
        self.keys += [f"phases.{row}.{key}" for row in ("0", "1", "jepa") for key in PHASE_KEYS]
        self.keys += ["phases"] * 5
        root = Path(__import__("smbfast").__file__).parent / "configs"
        self.texts = {name: (root / f"{name}.toml").read_text() for name in presets()}
        self.file = folder / "run.toml"

    def draw(self, dice: random.Random) -> Case:
        kind = dice.random()
        if kind < 0.25:
            model = dice.choice(list(self.models))
            from smbfast.base.config import known_keys

            keys = known_keys(self.models[model])
            return {"model": model, "words": self._words(dice, keys)}
        words = self._words(dice, self.keys) if dice.random() < 0.7 else []
        if kind < 0.6:
            return {"preset": dice.choice(PRESETS), "words": words}
        edits = [self._line(dice) for _ in range(dice.randint(1, 3))]
        if dice.random() < 0.05:  # what should be a table is none, and a word reaches into it
            key = dice.choice([key for key in self.keys if "." in key])
            edits = [["only", 0, dice.choice(WORDS), key]]
            words = [f"--{key}={dice.choice(WORDS)}", *words]
        return {"toml": dice.choice(list(self.texts)), "edits": edits, "words": words}

    def more(self, case: Case, dice: random.Random) -> Case:
        made = {**case, "words": list(case["words"])}
        if "edits" in made:
            made["edits"] = [*made["edits"], self._line(dice)][-4:]
        elif made["words"]:
            made["words"].pop(dice.randrange(len(made["words"])))
        made["words"] += self._words(dice, self.keys)[:1]
        return made

    def _words(self, dice: random.Random, keys: list[str]) -> list[str]:
        words = []
        for _ in range(dice.randint(1, 3)):
            key = dice.choice(keys)
            if dice.random() < 0.25:
                at = dice.randrange(len(key))
                key = dice.choice([key[:at], key[at:], key[:at] + "x" + key[at:], key + ".0", "."])
            value = dice.choice(WORDS) if dice.random() < 0.8 else str(dice.randint(-5, 10**6))
            form = dice.choice(["--{}={}", "--{}={}", "{}={}", "--{}", "--{} {}", "-{}{}", "{}"])
            words += form.format(key, value).split(" ", 1)
        return words

    def _line(self, dice: random.Random) -> list:
        kind = dice.choice(["value", "value", "value", "drop", "twice", "text", "table", "flip"])
        return [kind, dice.randrange(100), dice.choice(WORDS), dice.choice(self.keys)]

    def read(self, case: Case) -> None:
        from smbfast.base.config import build, to_toml
        from smbfast.settings import TrainSettings, load
        from smbfast.settings.presets import run_arguments

        if "model" in case:
            model: Any = self.models[case["model"]]
            settings = build(model, {}, case["words"])
        else:
            model, name = TrainSettings, case.get("preset", "")
            if "toml" in case:
                text = edit_lines(self.texts[case["toml"]], case["edits"])
                self.file.write_bytes(text.encode("utf-8", "surrogatepass"))
                name = str(self.file)
            _, words = run_arguments([name, *case["words"]])
            settings = load(name, words)
        self.file.write_text(to_toml(settings), encoding="utf-8")
        from smbfast.base.config import read_toml

        if build(model, read_toml(self.file), []) != settings:
            raise Wrong("settings that were written as TOML read back as others")


PHASE_KEYS = ("steps", "lr", "w_sft", "w_jepa", "warmup", "epochs", "name", "nothing")


def edit_lines(text: str, edits: list[list]) -> str:
    """Return TOML with other values, without or with a line twice, a new table, or one value."""
    lines = text.splitlines()
    for kind, at, word, key in edits:
        if kind == "only":
            lines = [f"{key.partition('.')[0]} = {word}"]
            continue
        at = at % max(len(lines), 1)
        if not lines or kind == "text":
            lines.insert(at, word)
        elif kind == "value" and "=" in lines[at]:
            lines[at] = f"{lines[at].partition('=')[0]}= {word}"
        elif kind == "drop":
            lines.pop(at)
        elif kind == "twice":
            lines.insert(at, lines[at])
        elif kind == "table":
            lines.insert(at, f"[{key}]\n{key.rpartition('.')[2]} = {word}")
        elif kind == "flip":
            lines[at] = lines[at][::-1]
    return "\n".join(lines)


class Tables:
    """What events and labels share: parquet by bytes, and tables whose columns break a rule."""

    SCENES: tuple[str, ...] = ()  # what may be wrong with a folder
    KINDS = ("int32", "uint64", "float64", "string", "large_string", "binary", "bool", "null")
    KINDS += ("date32", "ms", "ns", "s", "utc", "paris", "list", "dictionary", "decimal", "int8")

    def __init__(self, rows: int, columns: list[str], sizes: dict[str, int]) -> None:
        self.rows, self.columns, self.sizes = rows, columns, sizes

    def draw(self, dice: random.Random) -> Case:
        base = dice.choice(list(self.sizes))
        if self.SCENES and dice.random() < 0.04:
            return {"base": base, "scene": dice.choice(self.SCENES), "table": [], "group": 0}
        if dice.random() < 0.55:
            edits = [draw_bytes(dice, self.sizes[base]) for _ in range(dice.randint(1, 3))]
            return {"base": base, "edits": edits}
        edits = [self._edit(dice) for _ in range(dice.randint(1, 3))]
        return {"base": base, "table": edits, "group": dice.choice([0, 1, 7, 64])}

    def more(self, case: Case, dice: random.Random) -> Case:
        if "scene" in case:
            return self.draw(dice)
        if "table" in case:
            return {**case, "table": changed(case["table"], self._edit(dice), dice)}
        new = draw_bytes(dice, self.sizes[case["base"]])
        return {**case, "edits": changed(case["edits"], new, dice)}

    def _edit(self, dice: random.Random) -> list:
        kind = dice.choice(KINDS)
        column = dice.choice(self.columns)
        row = dice.randrange(self.rows)
        value = {
            "cast": dice.choice(self.KINDS),
            "swap": dice.randrange(self.rows),
            "copy": dice.randrange(self.rows),
            "rename": dice.choice([*self.columns, "patient_id", "", "é"]),
        }.get(kind, dice.choice([*NUMBERS, *TEXTS]))
        return [kind, column, row, value]

    def table(self, base: Any, edits: list[list]) -> Any:
        """Return a table after edits; those that make no sense of it are left out."""
        import pyarrow as pa

        table = base
        for kind, column, row, value in edits:
            names = table.column_names
            if kind == "none":
                table = table.slice(0, row % 3)
            if column not in names:
                continue
            at = names.index(column)
            try:
                table = _edited(table, kind, at, row, value)
            except (pa.ArrowException, TypeError, ValueError, OverflowError, LookupError):
                continue
        return table

    def write(self, file: Path, base: Any, case: Case) -> bool:
        """Write the table of a case, if parquet can hold it."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        options = {"row_group_size": case["group"]} if case["group"] else {}
        try:
            pq.write_table(self.table(base, case["table"]), file, **options)
        except (pa.ArrowException, OverflowError):
            return False
        return True


KINDS = ["cast", "cast", "null", "value", "value", "drop", "twice", "rename", "swap", "none"]
KINDS += ["copy"]
NUMBERS = [True, True, False, 0, -1, 1, 1 << 31, (1 << 63) - 1, -(1 << 63), (1 << 62) + 1, 10**15]
TEXTS = ["", "\0", "é", "//", "LAB//", "\ud800", "x" * 5000, "MEDS_BIRTH", "<script>", "\x1b[2J"]


def _edited(table: Any, kind: str, at: int, row: int, value: Any) -> Any:
    import pyarrow as pa

    name, column = table.column_names[at], table.column(at)
    if kind == "drop":
        return table.drop_columns([name])
    if kind == "twice":
        return table.append_column(name, column)
    if kind == "rename":
        names = table.column_names
        return table.rename_columns([*names[:at], value, *names[at + 1 :]])
    if kind == "cast":
        return table.set_column(at, name, _cast(column, value))
    rows = column.to_pylist()
    row %= max(len(rows), 1)
    if kind == "swap" and rows:
        order = list(range(len(rows)))
        order[row], order[value % len(rows)] = order[value % len(rows)], order[row]
        return table.take(pa.array(order))
    if kind == "copy" and rows:
        value = rows[value % len(rows)]
    if rows:
        rows[row] = None if kind == "null" else value
    if kind == "value" and isinstance(value, int) and pa.types.is_timestamp(column.type):
        whole = column.cast(pa.int64()).to_pylist()
        whole[row] = value
        return table.set_column(at, name, pa.array(whole, pa.int64()).cast(column.type))
    return table.set_column(at, name, pa.array(rows, column.type))


def _cast(column: Any, kind: str) -> Any:
    import pyarrow as pa

    kinds = {
        "ms": pa.timestamp("ms"),
        "ns": pa.timestamp("ns"),
        "s": pa.timestamp("s"),
        "utc": pa.timestamp("us", "UTC"),
        "paris": pa.timestamp("us", "Europe/Paris"),
        "list": pa.list_(pa.int64()),
        "decimal": pa.decimal128(38, 3),
        "bool": pa.bool_(),
    }
    if kind == "dictionary":
        return column.combine_chunks().dictionary_encode()
    if kind == "list":
        return pa.array([[1]] * len(column), kinds[kind])
    if kind == "null":
        return pa.nulls(len(column))
    wanted = kinds.get(kind) or getattr(pa, kind)()
    try:
        return column.cast(wanted, safe=False)
    except pa.ArrowException:
        return pa.nulls(len(column), wanted)


class Events(Tables):
    """A MEDS folder: one file of events, and what is said of codes."""

    name = "events"

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from tests.factory import subject_rows, table_of, write_codes, write_table
        from tests.refusal import CANARY, CANARY_SUBJECT

        self.folder, self.file = folder / "meds", folder / "meds" / "data" / "0.parquet"
        self.codes = self.folder / "metadata" / "codes.parquet"
        rows = [r for s in (3, 4, CANARY_SUBJECT) for r in subject_rows(s, days=2)]
        rows.append((CANARY_SUBJECT + 1, rows[-1][1], f"LAB//{CANARY}", 1.5, CANARY))
        self.base = table_of(rows)
        write_codes(self.folder, {"LAB//glucose": "Glucose", f"LAB//{CANARY}": CANARY})
        said = pq.read_table(self.codes)
        self.said = pa.concat_tables([said, said.slice(0, 1)])  # a code may be there again
        self.bytes = {"codes": self.codes.read_bytes()}
        for name, options in {
            "sums": {"write_page_checksum": True, "compression": "none"},
            "snappy": {"row_group_size": 8},
            "plain": {"use_dictionary": False, "compression": "gzip", "data_page_version": "2.0"},
        }.items():
            self.bytes[name] = write_table(self.file, self.base, **options).read_bytes()
        sizes = {name: len(content) for name, content in self.bytes.items()}
        super().__init__(len(rows), [*self.base.column_names, "description", "parent_codes"], sizes)
        self._events()

    def read(self, case: Case) -> None:
        file, base = self.file, self.base
        if case["base"] == "codes":
            self.file.write_bytes(self.bytes["snappy"])
            file, base = self.codes, self.said
        elif "scene" in case:
            self.codes.write_bytes(self.bytes["codes"])
        else:  # which would take longer to read than the events
            self.codes.unlink(missing_ok=True)
        if "table" in case:
            if not self.write(file, base, case):
                return
        else:
            file.write_bytes(edit_bytes(self.bytes[case["base"]], case["edits"]))
        with self._scene(case.get("scene", "")):
            self._events(case.get("scene", ""))

    SCENES = ("train", "folder", "pointer", "flat", "no codes", "some", "nobody", "untrained")
    SCENES += ("no data", "pipe", "alike", "in memory", "bare")

    @contextmanager
    def _scene(self, scene: str) -> Iterator[None]:
        """Let the folder be another for a while."""
        from tests.factory import write_table

        aside = self.folder.parent / "aside"
        if scene == "folder":
            self.file.unlink()
            self.file.mkdir()
        elif scene == "pointer":
            self.file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
        elif scene == "no codes":
            self.codes.rename(aside)
        elif scene == "pipe":
            self.file.unlink()
            os.mkfifo(self.file)
        elif scene == "alike":  # far more rows than bytes
            write_table(self.file, _table({"subject_id": _same(1 << 21)}))
        elif scene == "bare":
            write_table(self.file, self.base.select(["subject_id", "time", "code"]))
        elif scene == "no data":
            self.file.parent.rename(self.folder / "elsewhere")
        elif scene in ("flat", "untrained"):
            splits = ["train" if scene == "flat" else "held_out", "tuning"]
            table = {"subject_id": [3, 4], "split": splits}
            write_table(self.codes.with_name("subject_splits.parquet"), _table(table))
        try:
            yield
        finally:
            self.codes.with_name("subject_splits.parquet").unlink(missing_ok=True)
            if scene == "no data":
                (self.folder / "elsewhere").rename(self.file.parent)
            if scene == "pipe":
                self.file.unlink()
            if scene == "folder":
                self.file.rmdir()
            if aside.exists():
                aside.rename(self.codes)

    def _events(self, scene: str = "") -> list[tuple]:
        import numpy as np

        from smbfast.data.meds import STATIC, MedsDataset

        if scene == "in memory":
            dataset = MedsDataset.of_table(self.base, self.said)
        else:
            train = scene in ("train", "untrained", "no data")
            dataset = MedsDataset.open(self.folder, need_train=train)
        said = {code: dataset.descriptions.get(code) for code in dataset.descriptions}
        said |= {code: str(dataset.parents.get(code)) for code in dataset.parents}
        events: list[tuple] = [tuple(said.items())]
        known: set[int] = set()
        split = "train" if scene == "flat" else ""
        asked = {"some": np.array([3]), "nobody": np.array([9])}.get(scene)
        for batch in dataset.batches(split, asked, text_chars=64):
            subject_N, time_N = batch.subject_N, batch.time_N
            same_N = subject_N[1:] == subject_N[:-1]
            if (time_N[1:] < time_N[:-1])[same_N].any():
                raise Wrong("events of a subject are not in order")
            if not np.isfinite(batch.value_N[~np.isnan(batch.value_N)]).all():
                raise Wrong("a value is infinite")
            own = set(subject_N.tolist())
            if own & known or len(own) != len(batch.offset_S1) - 1 - (not len(subject_N)):
                raise Wrong("a subject is read in two pieces")
            known |= own
            far_N = (np.abs(time_N.astype(float)) > 2.0**62) & (time_N != STATIC)
            if far_N.any() or (batch.code_N < 0).any():
                raise Wrong("a time or a code that none can be")
            rows = zip(subject_N, time_N, batch.code_N, batch.value_N, batch.text_N, strict=True)
            for s, t, c, v, x in rows:
                text = batch.texts[x] if x >= 0 else None
                events.append((int(s), int(t), batch.codes[c], str(v), text))
        return events


def _table(columns: dict[str, Any]) -> Any:
    import pyarrow as pa

    return pa.table(columns)


def _same(num: int) -> Any:
    import numpy as np

    return np.zeros(num, np.int64)


class Labels(Tables):
    """The labels of a task, of both kinds."""

    name = "labels"

    def __init__(self, folder: Path) -> None:
        import numpy as np
        import pyarrow as pa

        from tests.factory import write_table
        from tests.refusal import CANARY_SUBJECT

        self.SCENES = ("gone", "empty", "two splits", "two kinds", "twice")
        self.folder = folder / "labels" / "task"
        self.file = self.folder / "train.parquet"
        subject = pa.array([1, 1, 2, 3, CANARY_SUBJECT], pa.int64())
        time = pa.array(np.arange(5) * 10**12, pa.timestamp("us"))
        keys = {"subject_id": subject, "prediction_time": time}
        true = pa.array([True, False, True, False, True])
        days = pa.array([1.0, 2.5, 0.0, 100.0, 3.0])
        survival = {"duration_days": days, "event": true}
        self.bases = {
            "binary": pa.table({**keys, "boolean_value": true}),
            "survival": pa.table({**keys, **survival}),
            "competing": pa.table({**keys, **survival, "competing": pa.array([False] * 5)}),
        }
        other = pa.table({"subject_id": [9], "prediction_time": time[:1], "boolean_value": [True]})
        write_table(self.folder / "tuning.parquet", other)
        self.bytes = {
            name: write_table(self.file, table, write_page_checksum=True).read_bytes()
            for name, table in self.bases.items()
        }
        columns = self.bases["competing"].column_names
        sizes = {name: len(content) for name, content in self.bytes.items()}
        super().__init__(5, [*columns, "boolean_value"], sizes)

    def read(self, case: Case) -> None:
        import numpy as np

        from smbfast.data.labels import read_labels

        if "table" in case:
            if not self.write(self.file, self.bases[case["base"]], case):
                return
        else:
            self.file.write_bytes(edit_bytes(self.bytes[case["base"]], case["edits"]))
        values = len(json.dumps(case)) % 4 != 0  # a quarter as times of prediction alone
        scene = case.get("scene", "")
        where = self.folder if case["base"] == "binary" or scene == "two kinds" else self.file
        if scene == "gone":
            where = self.folder / "not there"
        elif scene == "empty":
            where = self.file.parents[1] / "empty"
            where.mkdir(exist_ok=True)
        elif scene in ("two splits", "twice"):
            table = self.bases[case["base"]]
            other = self.folder / "held_out.parquet"
            try:
                _write(_later(table) if scene == "two splits" else _doubled(table), other)
                labels = read_labels(self.folder, values=True)
            finally:
                other.unlink()
            raise Wrong(f"labels that are in {scene} are read")
        labels = read_labels(where, values=values)
        sizes = {len(a) for n, a in vars(labels).items() if n.endswith("_N") and a is not None}
        if len(sizes) != 1:
            raise Wrong("columns of labels are of several lengths")
        if labels.kind == "time_to_event":
            duration_N, event_N = labels.survival_N
            if not (np.isfinite(duration_N).all() and (duration_N >= 0).all()):
                raise Wrong("a duration that none can be")
            if labels.competing_N is not None and (labels.competing_N & event_N).any():
                raise Wrong("an event competes with itself")


def _write(table: Any, file: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, file)


def _later(table: Any) -> Any:
    """Return the same labels at other times, which repeat none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    at = table.column_names.index("prediction_time")
    return table.set_column(
        at, "prediction_time", pc.add(table[at], pa.scalar(1, pa.duration("us")))
    )


def _doubled(table: Any) -> Any:
    import pyarrow as pa

    return pa.concat_tables([table.slice(0, 1), table.slice(0, 1)])
