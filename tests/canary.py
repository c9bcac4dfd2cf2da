"""Strings of letters that no word has, planted in one patient; and whether a piece is elsewhere.

    python -m tests.canary FOLDER

runs every command on such data, in both formats, and prints each file and line with a piece.
"""

import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open

from smbfast.simulation.dataset import simulate
from tests.factory import SCHEMA, write_table

LETTERS = "qxzjkvw"  # no word, name or digest holds four of them in a row
NUM_STRINGS = 40
REPEATS = 30
PIECE = 4
RUN = re.compile(rf"[{LETTERS}]{{{PIECE},}}")
NUMBER = 7654.321


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


def plant(folder: Path, patients: int = 60) -> Path:
    """A cohort of simulated patients; the first of the train split has all of the strings.

    Sixteen are in codes, twelve in texts, six in descriptions and six in names of parents.
    """
    simulate(folder, patients, 0)
    words = planted_strings()
    codes, texts = _codes(words[:16]), words[16:28]
    described, parents = words[28:34], words[34:]
    file = sorted((folder / "data" / "train").glob("*.parquet"))[0]
    table = pq.read_table(file)
    rows = [tuple(row[name] for name in SCHEMA.names if name in row) for row in table.to_pylist()]
    has_text = "text_value" in table.column_names
    rows = [row if has_text else (*row, None) for row in rows]
    subject = rows[0][0]
    common = next(r[2] for r in rows if r[0] != subject and r[3] is not None)
    last = max(r[1] for r in rows if r[0] == subject and r[1] is not None)
    own = [r for r in rows if r[0] == subject]
    for day in range(REPEATS):
        time = np.datetime64(last, "us") + np.timedelta64(day + 1, "D")
        own += [(subject, time, code, None, None) for code in codes]
        own += [(subject, time, codes[i % 16], None, f"{t} {t[::-1]}") for i, t in enumerate(texts)]
        own += [(subject, time, common, NUMBER + day, texts[day % 12])]
    write_table(file, own + [r for r in rows if r[0] != subject])
    _describe(folder / "metadata" / "codes.parquet", codes, described, parents)
    return folder


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


@cache
def pieces() -> list[str]:
    """Every piece of the strings, forwards and backwards, as they were planted."""
    both = chain.from_iterable((word, word[::-1]) for word in planted_strings())
    return sorted({word[i : i + PIECE] for word in both for i in range(len(word) - PIECE + 1)})


def shown(text: str) -> list[str]:
    """The pieces that stand in a text, in whatever case."""
    runs = " ".join(RUN.findall(text.casefold()))  # nothing else can hold one
    return [piece for piece in pieces() if piece in runs]


def leaks(
    folder: Path, private: tuple[str, ...] = ("train", "tuning", "held_out", "source")
) -> list:
    """Each file with the pieces in it, but for folders of shards and of the index.

    Those must be readable by nobody else: a file of them that others may read is in the list.
    """
    found: list[tuple[str, list[str]]] = []
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        hits = sorted(set(chain.from_iterable(shown(text) for text in _texts(file))))
        hidden = any(part in private for part in file.relative_to(folder).parts[:-1])
        if hits and not (hidden and file.stat().st_mode & 0o077 == 0):
            found.append((str(file.relative_to(folder)), hits))
    return found


def _texts(file: Path) -> Iterator[str]:
    """What a file says: its name, bytes as text, JSON without escapes, columns of parquet."""
    yield str(file)
    if file.suffix == ".safetensors":
        with safe_open(file, "np") as tensors:  # the numbers of a tensor are no text
            yield json.dumps([tensors.metadata(), sorted(tensors.keys())])
        return
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        yield str(table.schema.metadata) + str(table.schema)
        for name, column in zip(table.column_names, table.columns, strict=True):
            if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
                yield f"{name} {' '.join(map(str, column.unique().to_pylist()))}"
        return
    content = file.read_bytes().decode("latin-1")
    yield content
    if file.suffix == ".json":
        yield json.dumps(json.loads(content), ensure_ascii=False)


def commands(data: Path, out: Path, form: str) -> Iterator[tuple[str, list[str]]]:
    """Each command with its arguments, in the order in which a user calls them."""
    run = out / "run"
    settings = [f"--data.path={data}", f"--data.format={form}", f"--run.dir={run}"]
    settings += ["--data.window=160", "--data.vocab_size=700", "--run.threads=1"]
    settings += ["--phases.0.steps=2", "--phases.1.steps=2", "--probe.labels=death_1y"]
    settings += ["--probe.bootstraps=100"]
    words = [f"--path={data}", f"--out={out / 'prepared'}", "--window=160", "--vocab_size=700"]
    words += [f"--format={form}", "--workers=1"]
    final, embeddings = f"--model={run / 'final'}", f"--out={out / 'embeddings.parquet'}"
    few = ["--labels=death_1y", "--bootstraps=100"]
    yield "prepare", [*words, "--explain"]
    yield "check", ["tiny", *settings]
    yield "train", ["tiny", *settings]
    yield "report", [f"--run={run}"]
    yield "embed", [final, f"--data={data}", "--labels=death_1y", embeddings]
    yield (
        "probe",
        [embeddings.replace("--out", "--embeddings"), f"--data={data}", *few],
    )


def said(command: str, words: list[str]) -> str:
    """What a command prints, in this process."""
    from importlib import import_module

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            import_module(f"smbfast.{command}").main(words)
        except SystemExit as error:
            if error.code:
                raise SystemExit(f"{command}: {error.code}\n{stream.getvalue()[-2000:]}") from None
    return stream.getvalue()


def main(argv: list[str] | None = None) -> None:
    folder = Path((argv or sys.argv[1:])[0])
    data, num = plant(folder / "data", 400), 0
    for form in ("codes", "text", "text-paper"):
        out = folder / form
        for command, words in commands(data, out, form):
            text = said(command, words)
            for hit in shown(text):
                num += 1
                print(f"{form}, {command} prints {hit}")
        for file, hits in leaks(out):
            num += 1
            print(f"{form}, {file}: {len(hits)} pieces, the first {hits[0]}")
    print(f"{len(planted_strings())} strings, {len(pieces())} pieces, {num} leaks")
    raise SystemExit(bool(num))


if __name__ == "__main__":
    main()
