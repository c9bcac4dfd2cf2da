"""python -m bench.memorisation: can a secret of one patient be drawn from a model of SFT?

A canary is a patient who is added to the training split of a simulated cohort: a few events that
anybody might have, then a secret, one of R orders of codes that is drawn at random. The trained
model gives each of the R orders its next-token loss behind the same events. The exposure (Carlini
et al. 2019, "The Secret Sharer") is log2 R - log2 rank of the secret: log2 R if the secret is the
likeliest of all, 1.44 on average if the model knows nothing of it. Ties have their mean rank.

A secret of codes that many patients have is one of order alone. A secret of codes that nobody else
has is what the rule of ten patients behind a token is against: in codes all of them have the token
of their section, so that all orders read the same. In text such a code is spelled in letters.

Legend: R orders, T tokens.
"""

import contextlib
import datetime as dt
import io
import itertools
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field

from bench import records
from smbfast.base.config import Settings, command_line

CODES = 8  # that a place of the secret chooses from
PATIENTS = 10  # who must have a code that anybody might have
FIRST = dt.datetime(2031, 5, 3, 9)
APART = dt.timedelta(days=7)
_AT_ONCE = 256  # orders in a forward
_ODD = ("VISIT//", "MEDS_", "GENDER//", "LAB//", "VITAL//")  # events that are no choice of a place
Format = Literal["codes", "text"]


class MemorisationBench(Settings):
    """Plant canaries in a simulated cohort, train, and measure the exposure of their secret."""

    epilog: ClassVar[str] = """Examples

  The published figures (about ten minutes on one core):
    python -m bench.memorisation --save"""

    formats: list[Format] = Field(["codes", "text"], description="Formats of the records.")
    patients: int = Field(100, ge=60, description="Simulated patients beside the canaries.")
    length: int = Field(3, ge=2, le=5, description="Events of a secret: each is one of 8 codes.")
    steps: list[int] = Field([30, 300], description="Optimizer steps of 16 windows.")
    carriers: list[int] = Field([0, 1, 10], description="Patients who have the secret.")
    seeds: list[int] = Field([0, 1, 2], description="Of secrets and training.")
    save: bool = Field(False, description="Append the results to bench/results/memorisation.jsonl.")


class Plan(NamedTuple):
    """How many patients carry a secret, and whether its codes are of nobody else."""

    carriers: int
    rare: bool = False


class Canary(NamedTuple):
    """A secret, and what may stand in its place."""

    before: tuple[str, ...]  # codes of the events before it
    choices: tuple[str, ...]
    secret: tuple[str, ...]

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """All that might be the secret, R of them."""
        return list(itertools.product(self.choices, repeat=len(self.secret)))


def canary_of(cohort: Path, *, length: int, seed: int, rare: bool = False) -> Canary:
    """Draw a secret of codes that patients of a cohort have, or, if `rare`, of codes that none has.

    Raises:
        ValueError: if not enough codes have ten patients.
    """
    people: Counter[str] = Counter()
    for file in sorted((cohort / "data" / "train").glob("*.parquet")):
        table = pq.read_table(file, columns=["subject_id", "code"]).group_by(["subject_id", "code"])
        people.update(table.aggregate([])["code"].to_pylist())
    usual = [c for c, n in people.most_common() if n >= PATIENTS and not c.startswith(_ODD)]
    if len(usual) < CODES:
        raise ValueError(f"{CODES} codes must have {PATIENTS} patients, got {len(usual)}")
    random = np.random.default_rng(seed)
    choices = [f"DIAGNOSIS//{n}" for n in random.permutation(90_000)[:CODES]] if rare else usual
    choices = tuple(choices[:CODES])
    before = tuple(random.choice(usual[:CODES], 3).tolist())
    return Canary(before, choices, tuple(random.choice(choices, length).tolist()))


def _events(subject: int, codes: Sequence[str]) -> list[dict[str, Any]]:
    """The record of a patient: a birth, and an event a week."""
    times = [dt.datetime(1960, 1, 1), *(FIRST + i * APART for i in range(len(codes)))]
    return [
        {"subject_id": subject, "time": time, "code": code, "numeric_value": None}
        for time, code in zip(times, ["MEDS_BIRTH", *codes], strict=True)
    ]


def plant(cohort: Path, canary: Canary, carriers: int) -> None:
    """Add patients with the secret to the training split of a cohort."""
    splits = cohort / "metadata" / "subject_splits.parquet"
    known = pq.read_table(splits)
    first = max(known["subject_id"].to_pylist()) + 1
    subjects = list(range(first, first + carriers))
    more = pa.table({"subject_id": subjects, "split": ["train"] * carriers}).cast(known.schema)
    pq.write_table(pa.concat_tables([known, more]), splits)
    events = [e for s in subjects for e in _events(s, [*canary.before, *canary.secret])]
    file = sorted((cohort / "data" / "train").glob("*.parquet"))[-1]
    table = pq.read_table(file)
    columns = {n: [event.get(n) for event in events] for n in table.schema.names}
    more = pa.table({n: pa.array(v, table.schema.field(n).type) for n, v in columns.items()})
    pq.write_table(pa.concat_tables([table, more.cast(table.schema)]), file)


def token_rows(model: Path, canary: Canary) -> list[np.ndarray]:
    """Return the tokens that the model reads of a patient with each order: R arrays."""
    import smbfast

    events = [
        event
        for subject, order in enumerate(canary.orders)
        for event in _events(subject, [*canary.before, *order])
    ]
    types = {"subject_id": pa.int64(), "time": pa.timestamp("us"), "code": pa.string()}
    columns = {name: pa.array([e[name] for e in events], kind) for name, kind in types.items()}
    columns["numeric_value"] = pa.nulls(len(events), pa.float32())
    known = pa.table({"code": [], "description": []}).cast(
        pa.schema([("code", pa.string()), ("description", pa.string())])
    )
    with contextlib.redirect_stderr(io.StringIO()):
        table = smbfast.load(model).tokens(pa.table(columns), at="last", codes=known)
    return [row.values.to_numpy() for row in table["token_ids"].combine_chunks()]


@torch.inference_mode()
def losses_of(model: Path, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the summed next-token loss of each row behind what all have in common: float64 [R]."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    shortest = min(map(len, rows))
    same = (np.stack([row[:shortest] for row in rows]) == rows[0][:shortest]).all(0)
    common = int(same.argmin()) if not same.all() else shortest - 1
    losses = []
    for begin in range(0, len(rows), _AT_ONCE):
        own = [torch.from_numpy(row.astype(np.int64)) for row in rows[begin : begin + _AT_ONCE]]
        ids = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in own], True)
        logits = lm(input_ids=ids, attention_mask=real).logits[:, common - 1 : -1].double()
        loss = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, common:], reduction="none"
        )
        losses += (loss * real[:, common:]).sum(1).tolist()
    return np.array(losses)


def exposure(losses: np.ndarray, secret: int) -> float:
    """Return log2 R - log2 rank of the secret among R losses; of equal ones the mean rank."""
    own = losses[secret]
    # what padding does to the last digit makes none of equal orders the better one
    better = int((losses < own - 1e-6).sum())
    equal = int((np.abs(losses - own) <= 1e-6).sum())
    return math.log2(len(losses)) - math.log2(better + (equal + 1) / 2)


def trained(cohort: Path, folder: Path, *, format: Format, steps: int, seed: int, more: Any = ()):
    """Train a tiny model by SFT on a cohort; return the folder of the model."""
    import smbfast.train as entry

    words = ["tiny", "--phases=sft", f"--phases.sft.steps={steps}", "--phases.sft.lr=3e-3"]
    words += [f"--data.path={cohort}", f"--data.format={format}", f"--run.dir={folder}"]
    words += ["--data.window=512" if format == "text" else "--data.window=128", "--optim.batch=16"]
    words += ["--probe.labels=[]", "--eval.every=100000", "--run.save_every=100000"]
    words += ["--run.log_every=100", f"--run.seed={seed}", "--objective.self_check=false", *more]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        entry.main(words)
    return folder / "final"


def measured(
    folder: Path,
    plan: Sequence[Plan],
    *,
    format: Format,
    patients: int,
    length: int,
    steps: int,
    seed: int,
    more: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Plant canaries, each with a secret of its own, train one model, and measure all of them.

    Args:
        folder: an empty one.
        plan: of the canaries.
        more: further words of the command that trains.
    """
    from smbfast.simulation.dataset import simulate

    cohort = folder / "cohort"
    with contextlib.redirect_stderr(io.StringIO()):
        simulate(cohort, patients, 0)
    canaries = [
        canary_of(cohort, length=length, seed=1000 * seed + i, rare=own.rare)
        for i, own in enumerate(plan)
    ]
    for canary, own in zip(canaries, plan, strict=True):
        plant(cohort, canary, own.carriers)
    model = trained(cohort, folder / "run", format=format, steps=steps, seed=seed, more=more)
    said = []
    for canary, own in zip(canaries, plan, strict=True):
        rows = token_rows(model, canary)
        bits = exposure(losses_of(model, rows), canary.orders.index(canary.secret))
        said.append(
            {
                "format": format,
                "codes": "of nobody else" if own.rare else f"of {PATIENTS} patients or more",
                "carriers": own.carriers,
                "steps": steps,
                "seed": seed,
                "orders": len(rows),
                "read_apart": len({row.tobytes() for row in rows}),
                "exposure": round(bits, 2),
                "most": round(math.log2(len(rows)), 2),
            }
        )
    return said


def main(argv: list[str] | None = None) -> None:
    """Measure all that is asked for, and print it as a table."""
    bench = command_line(MemorisationBench, argv, prog="python -m bench.memorisation")
    stamp, rows = records.stamp("memorisation", "cpu"), []
    plan = [*(Plan(carriers) for carriers in bench.carriers), Plan(1, rare=True)]
    for format, steps, seed in itertools.product(bench.formats, bench.steps, bench.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows += measured(
                Path(folder),
                plan,
                format=format,
                patients=bench.patients,
                length=bench.length,
                steps=steps,
                seed=seed,
            )
        print(*rows[-len(plan) :], sep="\n", flush=True)
    keys = list(rows[0])
    print(records.columns([keys, *([str(row[key]) for key in keys] for row in rows)]))
    if bench.save:
        print(records.append("memorisation", [stamp | row for row in rows]))


if __name__ == "__main__":
    main()
