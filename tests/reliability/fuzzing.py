"""Changes files at random, reads them, and says what came of it: nothing, a refusal, or a defect.

A case is JSON: the name of a base, and edits of it. So a case is small whatever the file, mutates
into its like, and is stored in `corpus/`, one a line: those that were the first to reach a pair of
(exception, line that raised it). A reader makes cases and reads them.

Fine are: what reads, and a refusal in words, a plain ValueError (OSError with a file's name) that
shows no cell. Anything else is a defect, as is what takes too long or reads as what it is not.
"""

import io
import json
import linecache
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

CORPUS = Path(__file__).with_name("corpus")
PATIENCE = 20  # seconds that a refusal may take
NASTY: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    127,
    (1 << 31) - 1,
    1 << 31,
    (1 << 63) - 1,
    -(1 << 63),
    1 << 64,
    10**30,
    0.5,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "\0",
    "\ud800",
    "é" * 300,
    "<i4",
    "|O",
    "O8",
    [],
    [0],
    [None],
    [1, 2, 3],
    {},
    {"x": 1},
]
Case = dict[str, Any]


class Wrong(Exception):
    """What was read is not what was written."""


class Reader(Protocol):
    """One of the five; `name` is that of its corpus."""

    name: str

    def draw(self, dice: random.Random) -> Case:
        """Return a new case."""

    def more(self, case: Case, dice: random.Random) -> Case:
        """Return a case that differs from one of the corpus."""

    def read(self, case: Case) -> None:
        """Make the file of a case and read it all.

        Raises:
            Wrong: it was read as what it is not.
        """


@dataclass
class Seen:
    """What came of the cases of a reader."""

    count: int = 0
    read: int = 0  # without an error
    slowest: float = 0.0
    pairs: Counter = field(default_factory=Counter)
    new: list[tuple[str, Case]] = field(default_factory=list)  # pairs that the corpus lacks
    bad: list[str] = field(default_factory=list)


class _TooLong(BaseException):
    pass


def run(reader: Reader, num: int, seed: int, known: set[str], stored: list[Case]) -> Seen:
    """Read `num` cases: first those that are stored, then new ones and mutants of all of these."""
    seen, dice = Seen(), random.Random(f"{reader.name} {seed}")
    pool = list(stored)
    for turn in range(num):
        if turn < len(stored):
            case = stored[turn]
        elif pool and dice.random() < 0.3:
            case = reader.more(dice.choice(pool), dice)
        else:
            case = reader.draw(dice)
        pair, problem, seconds = tried(reader, case)
        seen.count += 1
        seen.slowest = max(seen.slowest, seconds)
        seen.read += not pair
        if pair:
            seen.pairs[pair] += 1
            if pair not in known:
                known.add(pair)
                pool.append(case)
                seen.new.append((pair, case))
        if problem:
            seen.bad.append(f"{reader.name}: {problem}: {json.dumps(case)[:300]}")
    return seen


def tried(reader: Reader, case: Case) -> tuple[str, str, float]:
    """Read a case; return the pair that it reached or "", a defect in words or "", and seconds."""
    began = time.perf_counter()
    out = io.StringIO()
    pair = problem = ""
    try:
        with _limit(PATIENCE), redirect_stderr(out), redirect_stdout(out):
            reader.read(case)
    except _TooLong:
        problem = f"takes more than {PATIENCE} s"
    except Wrong as error:
        problem = f"silent: {error}"
    except (Exception, SystemExit) as error:
        pair = pair_of(error)
        problem = unfit(error)
        problem = problem and f"{problem} ({pair})"
    return pair, problem, time.perf_counter() - began


def unfit(error: BaseException) -> str:
    """Return why an error is no refusal in words; "" if it is one."""
    from tests.refusal import CANARY, CANARY_SUBJECT

    kind, words = type(error), str(error)
    plain = kind in (ValueError, SystemExit) or kind.__name__ == "ForeignFormat"
    if isinstance(error, OSError) and kind.__module__ == "builtins":
        plain = error.filename is not None  # a command says it in words
    if not plain:
        return f"{kind.__name__} in place of a refusal: {words[:80]}"
    if CANARY in words or str(CANARY_SUBJECT) in words:
        return "the refusal shows a cell"
    if len(words) < 12 or "Traceback" in words:
        return f"a refusal without words: {words!r}"
    return ""


def pair_of(error: BaseException) -> str:
    """Return the type of an error and the last line of smbfast that it went through."""
    at, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/smbfast/" in file:
            line = linecache.getline(file, trace.tb_lineno).strip()
            if line.endswith("("):  # words of a message, which tell it from others
                line += linecache.getline(file, trace.tb_lineno + 1).strip()
            at = f"{file.rpartition('/smbfast/')[2]}: {line}"
        trace = trace.tb_next
    return f"{type(error).__name__} {at}"


def corpus(name: str) -> dict[str, Case]:
    """Return the cases that are stored for a reader, by their pairs."""
    file = CORPUS / f"{name}.jsonl"
    if not file.is_file():
        return {}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["pair"]: row["case"] for row in rows}


def keep(name: str, new: list[tuple[str, Case]]) -> None:
    """Add cases to a corpus, unless they are long."""
    stored = corpus(name) | {pair: case for pair, case in new if len(json.dumps(case)) < 4000}
    CORPUS.mkdir(exist_ok=True)
    lines = [json.dumps({"pair": p, "case": c}) for p, c in sorted(stored.items())]
    (CORPUS / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def end(*_: object) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def draw_bytes(dice: random.Random, size: int) -> list:
    """Return an edit of bytes."""
    kind = dice.choice(["flip", "flip", "flip", "cut", "grow", "zero", "int", "int", "swap"])
    at = dice.randrange(max(size, 1))
    if dice.random() < 0.3:  # headers and footers are short, and matter most
        at = dice.choice([dice.randrange(64), max(size - 1 - dice.randrange(200), 0)])
    if kind == "int":
        return [kind, at // 8 * 8 if dice.random() < 0.7 else at, dice.choice(INTS)]
    return [kind, at, dice.randrange(8) if kind == "flip" else dice.choice([1, 4, 8, 64, 500])]


INTS = [0, 1, 2, 7, 255, 256, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 62), (1 << 63) - 1, 1 << 63]


def edit_bytes(content: bytes, edits: list[list]) -> bytes:
    """Return bytes after edits as `draw_bytes` makes them."""
    made = bytearray(content)
    for kind, at, how in edits:
        at = min(at, max(len(made) - 1, 0))
        if kind == "flip" and made:
            made[at] ^= 1 << how
        elif kind == "cut":
            del made[at:]
        elif kind == "grow":
            made += bytes(how)
        elif kind == "zero":
            made[at : at + how] = bytes(len(made[at : at + how]))
        elif kind == "int":
            made[at : at + 8] = how.to_bytes(8, "little")[: len(made[at : at + 8])]
        elif kind == "swap":
            made[at : at + 2 * how] = made[at + how : at + 2 * how] + made[at : at + how]
    return bytes(made)


def draw_json(dice: random.Random, content: Any) -> list:
    """Return an edit of JSON: a path to what is changed, and what it becomes."""
    path: list = []
    here = content
    while isinstance(here, dict | list) and here and (not path or dice.random() < 0.75):
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        path.append(dice.choice(keys))
        here = here[path[-1]]
    kind = dice.choice(["put", "put", "put", "put", "del", "add", "deep"])
    if kind == "deep" and dice.random() < 0.7:
        kind = "put"
    return [kind, path, dice.choice(NASTY)]


def edit_json(text: str, edits: list[list]) -> str:
    """Return JSON after edits as `draw_json` makes them; what they do not find they leave."""
    content = json.loads(text)
    deep = False
    for kind, path, value in json.loads(json.dumps(edits)):
        here = content
        for key in path[:-1]:
            try:
                here = here[key]
            except (KeyError, IndexError, TypeError):
                here = None
                break
        if kind == "deep":
            deep = True
            value = "DEEP"
        if not path:
            content = value
            continue
        try:
            if kind == "del":
                del here[path[-1]]
            elif kind == "add" and isinstance(here, dict):
                here[f"{path[-1]}x"] = value
            else:
                here[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    made = json.dumps(content)
    return made.replace('"DEEP"', "[" * 100_000) if deep else made


def changed(edits: list[list], new: list, dice: random.Random) -> list[list]:
    """Return edits with one more, one fewer or another value in one."""
    edits = [list(edit) for edit in edits]
    how = dice.random()
    if edits and how < 0.25:
        edits.pop(dice.randrange(len(edits)))
    elif edits and how < 0.5:
        edit = dice.choice(edits)
        if edit[0] == "int":
            edit[-1] = dice.choice(INTS)
        else:
            edits.append(new)
    else:
        edits.append(new)
    return edits[:8]
