"""Rows of what nobody else may see: patients, small cells, files, held-out records, the network."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work

if TYPE_CHECKING:
    from tests.canary import Planted

GIVEN = ("meds", "run", "other.parquet", "at.csv")  # what a case of failure begins with
FORMS = ("text", "codes", "text-paper")


def patients_are_nowhere(work: Work) -> Proof:
    """Plant a patient, run every command and what fails, and seek the patient in all of it."""
    from tests import canary

    bad: list[str] = []
    commands = 0
    if work.size == "mutant":
        planted = canary.plant(work.folder / "data")
        bad += _prepared(planted, work.folder / "out", "text", "--vocab_size=4000")
    for number, patients in enumerate(work.pick(push=[], recorded=[120, 400, 1500])):
        for form in FORMS if patients == 400 else FORMS[:2]:
            root = work.folder / f"{patients}-{form}"
            split = ("tuning", "train", "held_out")[number]
            planted = canary.plant(root / "data", patients, split)
            count, own = canary.run_all(planted, root / "out", form)
            commands += count
            bad += [f"{patients} patients, {form}: {line}" for line in own]
            shutil.rmtree(root)
            work.say(f"{patients} patients, {form}: {count} commands, {len(own)} bad")
    shared = work.folder / "shared"
    planted = canary.plant(shared / "meds")
    if work.size != "mutant":
        count, own = canary.run_all(planted, shared / "out", "text")
        commands += count + 2
        bad += own
        for form in FORMS[1:]:
            bad += _prepared(planted, shared / "out" / form, form)
        os.rename(shared / "out" / "run", shared / "run")
        shutil.rmtree(shared / "out")
    count, own = _failures(work, planted, shared)
    sizes = len(canary.planted_strings())
    figure = f"{commands} commands, {count} failures, {sizes} strings and 8 numbers, ids and times"
    return Proof(commands + count, "commands and failures", bad + own, figure)


def _prepared(planted: "Planted", out: Path, form: str, *more: str) -> list[str]:
    """What is shown of the patient where shards are prepared alone."""
    from tests import canary

    command, words = next(canary.commands(planted, out, form))
    bad = [f"prepare prints {hit}" for hit in planted.shown(canary.said(command, [*words, *more]))]
    return bad + [f"{name} holds {hits[0]}" for name, hits in canary.leaks(out, planted)]


def _failures(work: Work, planted: "Planted", shared: Path) -> tuple[int, list[str]]:
    """Run what must fail in copies of the dataset and the run; how many did, and what was shown."""
    from tests import canary
    from tests.reliability.canary_failures import cases

    every = list(cases(every=work.pick(push=False, recorded=True)))
    every = [case for case in every if (shared / "run").is_dir() or case[0].startswith("prepare")]
    if work.size == "recorded":
        every += _mistakes()
    count, bad = 0, []
    for number, (words, make) in enumerate(every):
        with _copied(shared, work.folder / f"case-{number}", words) as here:
            if make is not None:
                make(here)
            command, *argv = shlex.split(words)
            status, text = canary.ended(command, argv)
            count += bool(status)
            hits = planted.shown(text)
            bad += [f"`{words}`, case {number}, prints {hit}" for hit in hits]
            if "Traceback" in text:
                bad.append(f"`{words}`, case {number}, ends with a traceback")
            for name, found in canary.leaks(here, planted, GIVEN):
                bad.append(f"`{words}`, case {number}, leaves {name} with {found[0]}")
    return count, bad


def _mistakes() -> list:
    """The mistakes of `tests.mistakes`, made beside the planted patient."""
    from tests.mistakes.test_mistakes import ALL

    return [(mistake.words, mistake.make) for mistake in ALL]


@contextmanager
def _copied(shared: Path, here: Path, words: str) -> Iterator[Path]:
    """Stand in a folder of its own with a copy of what a case reads."""
    here.mkdir()
    for name in ("meds", "run"):
        if (shared / name).is_dir() and name in words:
            shutil.copytree(shared / name, here / name)
    before = Path.cwd()
    os.chdir(here)
    try:
        yield here
    finally:
        os.chdir(before)
        shutil.rmtree(here)


ROWS: tuple[Row, ...] = (
    Row(
        id="P1",
        property="Nothing of a patient is in a log, an error, a report or a model: codes, texts, "
        "values, ids, times, descriptions, labels.",
        bar={"push": 15 + 60, "recorded": 110 + 300},
        prove=patients_are_nowhere,
        mutants=(
            mutant(
                "tokens-by-occurrence",
                "a word that one patient has often becomes a token",
                "smbfast/data/tokens.py",
                "if num_texts[word] >= MIN_SUBJECTS",
                "if uses[word] >= MIN_SUBJECTS",
            ),
            mutant(
                "id-in-an-error",
                "an error names the patient whose rows are wrong",
                "smbfast/data/source_index.py",
                "{file}: the subject of row {row} must",
                "{file}: subject {subject}, row {row}, must",
            ),
        ),
        limit={"push": 300},
    ),
)
