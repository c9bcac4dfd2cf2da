"""What no patient but one has, planted in every field; and whether any of it is elsewhere.

    python -m tests.canary FOLDER

runs every command on such data, in each format, and prints each file and line with a piece. There
are strings of letters that no word has, a subject id, a number, dates and a time of day.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from tests.factory import SCHEMA, write_labels, write_meds

LETTERS = "qxzjkvw"  # no word, name or digest holds four of them in a row
NUM_STRINGS = 48
REPEATS = 30
PIECE = 4
RUN = re.compile(rf"[{LETTERS}]{{{PIECE},}}")
NUMBER = 83519.75  # a value of an ordinary code
SUBJECT = 7_043_829_615
STAY = 5_920_817_364  # in a column that MEDS does not have
CLOCK = (5, 43, 21, 987_654)
YEARS = 13  # from the last event of the patient to the planted ones

PRIVATE = ("train", "tuning", "held_out", "source")  # folders of shards and of the index
# files with a row for each patient or for each of its decision nodes, 0600: they need id and time
_OF_NODES = re.compile(
    r"(^|/)(embeddings/|predictions/|again/|folds/|parts/)"
    r"|(^|/)(embeddings|now|out|subject_splits)\.parquet$"
)


@dataclass(frozen=True)
class Planted:
    """A dataset with one patient to be known by, and what to seek of that patient."""

    folder: Path
    task: str
    marks: re.Pattern[str]
    raw: tuple[bytes, ...]  # numbers, as a file that is no text may hold them

    @property
    def is_tiny(self) -> bool:
        """Whether it is of the twenty patients of `tests.factory`."""
        return self.task == "task"

    def shown(self, text: str) -> list[str]:
        """Return what of the patient stands in a text, in whatever case."""
        return shown(text) + [match[0] for match in self.marks.finditer(text)]


def planted_strings() -> list[str]:
    random = np.random.default_rng(0)
    return [
        "".join(random.choice(list(LETTERS), random.integers(8, 13)).tolist())
        for _ in range(NUM_STRINGS)
    ]


def _codes(words: list[str]) -> list[str]:
    """Codes of every shape: families, codes without a prefix, rare ends of common codes."""
    shapes = ("{}//{}", "{}", "LAB//{}", "{}:1950", "DIAGNOSIS//ICD10CM//{}", "{}/{}|x", "{} {}")
    return [shapes[i % len(shapes)].format(word, word[::-1]) for i, word in enumerate(words)]


def plant(folder: Path, patients: int = 0, split: str = "train") -> Planted:
    """A dataset in which the first patient of a split has all of the strings and numbers.

    Sixteen strings are in codes, twelve in texts, six in descriptions, six in names of parents, two
    each in a column of events that MEDS does not have, in two of labels and in one of splits.

    Args:
        patients: how many are simulated; 0 for the twenty of `tests.factory`.
    """
    if patients:
        from smbfast.simulation.dataset import simulate

        simulate(folder, patients, 0)
        task = "death_1y"
    else:
        write_labels(write_meds(folder))
        task = "task"
    words = planted_strings()
    codes = _codes(words[:16])
    file = sorted((folder / "data" / split).glob("*.parquet"))[0]
    table = pq.read_table(file)
    rows = [tuple(row.get(name) for name in SCHEMA.names) for row in table.to_pylist()]
    subject = rows[0][0]
    own = [(SUBJECT, *row[1:]) for row in rows if row[0] == subject]
    common = next(r[2] for r in rows if r[0] != subject and r[3] is not None)
    first = max(row[1] for row in own if row[1] is not None)
    hour, minute, second, micro = CLOCK
    first = first.replace(
        year=first.year + YEARS,
        month=9,
        day=2,
        hour=hour,
        minute=minute,
        second=second,
        microsecond=micro,
    )
    for day in range(REPEATS):
        of_a_day = [(common, NUMBER, words[16 + day % 12]), *((code, None, None) for code in codes)]
        twice = [f"{text} {text[::-1]} visit {day}" for text in words[16:28]]
        of_a_day += [(codes[i % 16], None, text) for i, text in enumerate(twice)]
        for at, event in enumerate(of_a_day):  # three at a time: no window holds a whole day
            hours = np.timedelta64(24 * day + at // 3, "h")
            own.append((SUBJECT, np.datetime64(first, "us") + hours, *event))
    others = [row for row in rows if row[0] != subject]
    write_table(file, own, others, words[40:42])
    _describe(folder / "metadata" / "codes.parquet", codes, words[28:34], words[34:40])
    _rename(folder, subject, words[42:])
    return Planted(folder, task, _marks(first), _raw(first))


def write_table(file: Path, own: list[tuple], others: list[tuple], authors: list[str]) -> None:
    """The events of the planted patient and of the others, with two columns more than MEDS has."""
    rows = own + others
    columns: dict[str, Any] = {
        name: pa.array([row[at] for row in rows], SCHEMA.field(name).type)
        for at, name in enumerate(SCHEMA.names)
    }
    more = len(rows) - len(own)
    columns["hadm_id"] = pa.array([STAY] * len(own) + [None] * more, pa.int64())
    signed = [authors[i % len(authors)] for i in range(len(own))]
    columns["author"] = pa.array(signed + [None] * more, pa.string())
    pq.write_table(pa.table(columns), file)


def _rename(folder: Path, subject: int, words: list[str]) -> None:
    """Give the patient its id in labels and splits too, with words in columns of their own."""
    files = sorted(folder.glob("labels/**/*.parquet")) + sorted(folder.glob("oracles/**/*.parquet"))
    splits = folder / "metadata" / "subject_splits.parquet"
    if not splits.is_file():
        ids = {
            s: file.parent.name
            for file in sorted((folder / "data").glob("*/*.parquet"))
            for s in pq.read_table(file, columns=["subject_id"])["subject_id"].unique().to_pylist()
        }
        pq.write_table(pa.table({"subject_id": list(ids), "split": list(ids.values())}), splits)
    names = {"categorical_value": words[:2], "note": words[2:4]}
    for file in [*files, splits]:
        table = pq.read_table(file)
        known = table["subject_id"].to_pylist()
        is_own = [s in (subject, SUBJECT) for s in known]
        ids = pa.array([SUBJECT if mine else s for mine, s in zip(is_own, known, strict=True)])
        table = table.set_column(0, "subject_id", ids.cast(pa.int64()))
        for name, own in ({"note": words[4:]} if file == splits else names).items():
            given = [own[i % 2] if mine else None for i, mine in enumerate(is_own)]
            table = table.append_column(name, pa.array(given, pa.string()))
        pq.write_table(table, file)


def _describe(file: Path, codes: list[str], words: list[str], parents: list[str]) -> None:
    known = pq.read_table(file).to_pylist() if file.is_file() else []
    known += [
        {
            "code": code,
            "description": f"{words[i % len(words)]} of {code}",
            "parent_codes": [f"{parents[i % len(parents)]}//{i}", parents[-1]],
        }
        for i, code in enumerate(codes)
    ]
    schema = [("code", pa.string()), ("description", pa.string())]
    columns = pa.schema([*schema, ("parent_codes", pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(known, columns), file)


def _marks(first: Any) -> re.Pattern[str]:
    """Everything that a number, id or time of the patient may look like in print."""
    whole = str(int(NUMBER))
    numbers = [rf"{whole[:-3]}[,._ ]?{whole[-3:]}(?!\d)", r"8\.3519?\d*e\+?0?4", r"8\.352e\+?0?4"]
    ids = ["[,._ ]?".join((s[:1], s[1:4], s[4:7], s[7:])) for s in (str(SUBJECT), str(STAY))]
    seconds = str(int(np.datetime64(first, "s").astype(np.int64)))
    times = [
        f"{first.year}[-/.](09|10|9)[-/.]",
        rf"(Sep|Oct)\w* {first.year}",
        r"\d\d:43:21",
        rf"{seconds[:5]}\d{{{len(seconds) - 5}}}",  # in this or a finer unit
    ]
    return re.compile("|".join(rf"(?<![\d.]){form}" for form in [*numbers, *ids, *times]))


def _raw(first: Any) -> tuple[bytes, ...]:
    values = (np.float32(NUMBER), np.float64(NUMBER), np.int64(SUBJECT), np.int64(STAY))
    return tuple(v.tobytes() for v in (*values, np.datetime64(first, "us").astype(np.int64)))


@cache
def pieces() -> frozenset[str]:
    """Every piece of the strings, forwards and backwards, as they were planted."""
    both = chain.from_iterable((word, word[::-1]) for word in planted_strings())
    return frozenset(word[i : i + PIECE] for word in both for i in range(len(word) - PIECE + 1))


def shown(text: str) -> list[str]:
    """The pieces that stand in a text, in whatever case."""
    runs = RUN.findall(text.casefold())  # nothing else can hold one
    parts = {run[i : i + PIECE] for run in runs for i in range(len(run) - PIECE + 1)}
    return sorted(parts & pieces())


def state(folder: Path) -> dict[Path, tuple[int, ...]]:
    """The files below a folder, with what says whether they are still the same."""
    files = {p: p.stat() for p in folder.rglob("*") if p.is_file()}
    return {path: (about.st_ino, about.st_mtime_ns, about.st_size) for path, about in files.items()}


def leaks(
    folder: Path, planted: Planted, given: dict[Path, tuple[int, ...]] | None = None
) -> list[tuple[str, list[str]]]:
    """Each file with what is in it of the patient, but for what must be there.

    What was there before, as `state` says, and is the same is left out. Shards and the index of the
    source hold everything, and embeddings, predictions and labels ids and times. They must be
    readable by nobody else: a file of them that others may read is listed. Of a link only its name
    counts: the views of folds link the user's own dataset.
    """
    found: list[tuple[str, list[str]]] = []
    for file, about in sorted(state(folder).items()):
        name = str(file.relative_to(folder))
        if given is not None and given.get(file) == about:
            continue
        if file.is_symlink():
            found += [(name, hits)] if (hits := planted.shown(name)) else []
            continue
        hidden = file.stat().st_mode & 0o077 == 0
        if hidden and set(file.relative_to(folder).parts[:-1]) & set(PRIVATE):
            continue
        seek = shown if hidden and _OF_NODES.search(name) else planted.shown
        hits = sorted(set(chain.from_iterable(map(seek, _texts(file, name)))))
        if seek != shown and file.suffix not in (".parquet", ".safetensors"):
            content = file.read_bytes()
            hits += [f"bytes {raw.hex()}" for raw in planted.raw if raw in content]
        if hits:
            found.append((name, hits))
    return found


def _texts(file: Path, name: str) -> Iterator[str]:
    """What a file says: its name, bytes as text, JSON without escapes, columns of parquet."""
    yield name
    if file.suffix == ".safetensors":
        with safe_open(file, "np") as tensors:  # the numbers of a tensor are no text
            yield json.dumps([tensors.metadata(), sorted(tensors.keys())])
        return
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        yield str(table.schema.metadata) + str(table.schema)
        for column_name, column in zip(table.column_names, table.columns, strict=True):
            if not pa.types.is_nested(column.type):
                yield f"{column_name} {' '.join(map(str, column.unique().to_pylist()))}"
        return
    content = file.read_bytes().decode("latin-1")
    yield content
    if file.suffix == ".json":
        yield json.dumps(json.loads(content), ensure_ascii=False)


TASKS = """
[sets.lab]
prefix = ["LAB//"]
[sets.diagnosis]
prefix = ["DIAGNOSIS//"]
[[tasks]]
name = "again"
kind = "binary"
index = "lab"
which = "first"
offset_hours = [24]
outcome = "diagnosis"
horizon_days = 2
"""


def commands(
    planted: Planted, out: Path, form: str, *, folds: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Each command with its arguments, in the order in which a user calls them.

    Args:
        folds: whether to cross-validate too, for which the twenty patients are too few: it trains
            and judges two runs more, as long as all the other commands together.
    """
    run, task = out / "run", planted.task
    data = f"--data={planted.folder}"
    few = ["--bootstraps=100", f"--labels={task}"]
    small = ["--data.window=256", "--data.vocab_size=700", "--run.threads=1"]
    small += ["--phases.0.steps=2", "--phases.1.steps=2"]
    small += ["--probe.bootstraps=100", "--probe.untrained=1"]
    settings = [f"--data.path={planted.folder}", f"--data.format={form}", f"--run.dir={run}"]
    settings += [*small, f"--probe.labels={task}"]
    words = [f"--path={planted.folder}", f"--out={out / 'prepared'}", "--window=256"]
    words += ["--vocab_size=700", f"--format={form}", "--workers=1", "--bucket=day"]
    final, embeddings = f"--model={run / 'final'}", out / "embeddings.parquet"
    yield "prepare", [*words, "--explain"]
    (out / "tasks.toml").write_text(TASKS)
    yield "tasks", [str(out / "tasks.toml"), data, f"--out={out / 'labels'}"]
    yield "tasks", [f"--check={task}", data]
    yield "check", ["tiny", *settings]
    yield "train", ["tiny", *settings]
    if not planted.is_tiny:  # training has just written it
        yield "report", [f"--run={run}"]
    yield "embed", [final, data, f"--labels={task}", f"--out={embeddings}"]
    yield "embed", [final, data, "--at=last", f"--out={out / 'now.parquet'}"]
    yield "probe", [f"--embeddings={embeddings}", data, *few]
    yield "compare", [f"{run}", f"{run}:bag", f"--out={out / 'compared'}", "--bootstraps=100"]
    shutil.copytree(run, out / "other")
    yield "report", [f"{run}", f"{out / 'other'}", f"--out={out / 'runs.html'}"]
    yield "push", [f"{run / 'final'}", "--to=us/model", "--dry-run"]
    yield "simulate", [f"--out={out / 'cohort'}", "--patients=20"]
    if not folds:
        return
    train = " ".join(["tiny", f"--data.format={form}", *small])
    yield (
        "experiment",
        ["folds", data, f"--work={out / 'work'}", "--folds=2", f"--train={train}", *few],
    )


def patient_page(planted: Planted, out: Path) -> tuple[str, list[str], Path]:
    """The command for the page of the patient, who is asked for by id, and the page."""
    page = out / "patient.html"
    return "report", [f"--run={out / 'run'}", f"--patient={SUBJECT}", f"--out={page}"], page


def said(command: str, words: list[str]) -> str:
    """What a command says that ends well; it is run in this process."""
    status, text = ended(command, words)
    if status and (command, status) != ("tasks", 1):  # labels may leak what is no patient's
        raise SystemExit(f"{command} {words}: {status}\n{text[-2000:]}")
    return text


def ended(command: str, words: list[str]) -> tuple[object, str]:
    """How a command ends, and what it and its children say, through Python or past it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        with _spoken_to(log):
            try:
                importlib.import_module(f"smbfast.{command}").main(words)
                status: object = 0
            except SystemExit as error:
                status = error.code
                if isinstance(status, str):  # as the interpreter does
                    print(status)
            except Exception:
                status = 1
                traceback.print_exc()
        log.seek(0)
        return status, log.read()


@contextlib.contextmanager
def _spoken_to(log: Any) -> Iterator[None]:
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        with (
            open(os.dup(log.fileno()), "w", encoding="utf-8", errors="replace", buffering=1) as own,
            contextlib.redirect_stdout(own),
            contextlib.redirect_stderr(own),
        ):
            yield
    finally:
        for number, handle in zip((1, 2), before, strict=True):
            os.dup2(handle, number)
            os.close(handle)


def shipped(out: Path, planted: Planted) -> list[str]:
    """What of the patient is in the files that `push` would send."""
    from smbfast.run.shipping import shipment_of
    from smbfast.settings import push_arguments

    files = shipment_of(push_arguments([str(out / "run" / "final"), "--to=us/model"])).files
    hits = []
    for name, file in files.items():
        content = file if isinstance(file, bytes) else Path(file).read_bytes()
        hits += [
            f"push sends {name} with {hit}" for hit in planted.shown(content.decode("latin-1"))
        ]
    return hits


def run_all(
    planted: Planted, out: Path, form: str, *, has_page: bool = True, folds: bool = False
) -> tuple[int, list[str]]:
    """Run every command, and return how many, and every place where the patient is shown.

    Args:
        folds: see `commands`.
        has_page: whether the patient may have a page of its own, as those of held_out may not.
    """
    out.mkdir(parents=True, exist_ok=True)
    bad, count = [], 0
    for command, words in commands(planted, out, form, folds=folds):
        text = said(command, words)
        bad += [f"{command} prints {hit}" for hit in planted.shown(text)]
        count += 1
    bad += [f"{file}: {hits[0]} and {len(hits) - 1} more" for file, hits in leaks(out, planted)]
    bad += shipped(out, planted)
    if not has_page:
        return count, bad
    command, words, page = patient_page(planted, out)
    hits = planted.shown(said(command, words).replace(str(page), ""))
    bad += [f"{command} of a patient prints {hit}" for hit in hits if hit != str(SUBJECT)]
    if page.stat().st_mode & 0o777 != 0o600:
        bad.append("the page of a patient may be read by others")
    return count + 1, bad


def main(argv: list[str] | None = None) -> None:
    folder = Path((argv or sys.argv[1:])[0])
    planted, num = plant(folder / "data", 400), 0
    for form in ("codes", "text", "text-paper"):
        _, bad = run_all(planted, folder / form, form, folds=True)
        num += len(bad)
        for line in bad:
            print(f"{form}, {line}")
    print(f"{len(planted_strings())} strings, {len(pieces())} pieces, {num} leaks")
    raise SystemExit(bool(num))


if __name__ == "__main__":
    main()
