"""The row of small counts: how many people have an outcome is in no output where they are few."""

from collections.abc import Iterator
from pathlib import Path

from tests.mutants import mutant
from tests.reliability.proof import PATIENT, Proof, Row, Work


def no_small_cell_shows(work: Work) -> Proof:
    """Let 1 to 10 patients have an outcome, or have it not, and read what commands tell."""
    from tests import canary
    from tests.canary import TASKS
    from tests.reliability.small import broken_labels, told, told_by, write_task

    bad, count = [], 0
    every = [(n, rest) for n in range(1, 11) for rest in (False, True)]
    bins = [(15, False)]  # of whom each bin of a curve has few
    few = work.pick(push=every, mutant=every[4:6]) + bins
    by_command = {
        "check": work.pick(push=[few[0], few[-2]], recorded=few, mutant=few[:1]),
        "probe": work.pick(push=[few[0], few[-2]], recorded=few, mutant=[]),
        "compare": work.pick(push=few[::4] + bins, recorded=few, mutant=few),
    }
    for number, rest in few:
        root = work.folder / f"{number}-{rest}"
        data = f"--data={write_task(root / 'meds', number, rest, work.seed + number)}"
        (root / "tasks.toml").write_text(TASKS)
        labels = root / "meds" / "labels" / "rare"
        for name in () if rest or number > 10 else broken_labels(labels, number):
            _, text = canary.ended("tasks", ["--check=rare", data])
            bad += [f"{number} labels {name}: prints `{hit}`" for hit in told(text)]
            count += 1
        asked = [name for name, cases in by_command.items() if (number, rest) in cases]
        for command, words, out in _telling(root, number, rest, asked):
            text = canary.said(command, words)
            own = told_by(text, root / out)
            bad += [f"{command} of {number} patients{' less' * rest}: {hit}" for hit in own]
            count += 1
    return Proof(count, "outputs of commands", bad)


def _telling(
    root: Path, number: int, rest: bool, asked: list[str]
) -> Iterator[tuple[str, list[str], str]]:
    """Commands that count people, with the folder that each writes."""
    from tests.reliability.small import write_predictions

    data = f"--data={root / 'meds'}"
    yield "tasks", [str(root / "tasks.toml"), data, f"--out={root / 'labels'}"], "labels"
    yield "tasks", ["--check=rare", data], "none"
    if "check" in asked:
        words = ["tiny", f"--data.path={root / 'meds'}", f"--run.dir={root / 'run'}"]
        words += ["--data.format=codes", "--data.window=128", "--objective.min_future=1"]
        yield "check", [*words, "--probe.labels=rare", "--run.threads=1"], "run"
    if "probe" in asked:
        words = [f"--embeddings={root / 'meds' / 'online.parquet'}", data]
        yield "probe", [*words, f"--out={root / 'probed'}", "--bootstraps=100"], "probed"
    if "compare" in asked:
        write_predictions(root, number, rest, number)
        words = [f"a={root / 'a.parquet'}", f"b={root / 'b.parquet'}", "--tasks=rare"]
        yield "compare", [*words, f"--out={root / 'compared'}", "--bootstraps=100"], "compared"


ROWS: tuple[Row, ...] = (
    Row(
        id="P2",
        property="a count of 1 to 10 people, or of all but so many, is in no output: console, JSON "
        "or page",
        bar={"push": 45, "recorded": 80},
        prove=no_small_cell_shows,
        limit=PATIENT,
        mutants=(
            mutant(
                "raw-counts",
                "records keep their small counts",
                "smbfast/judging/small_cells.py",
                "    if 0 < count <= small:",
                "    if False:",
            ),
            mutant(
                "rows-in-an-error",
                "an error says how many rows of a patient are there twice",
                "smbfast/data/labels.py",
                "repeats an earlier one ({few(int(again_N.sum()))} rows in all)",
                "repeats an earlier one ({int(again_N.sum())} rows in all)",
            ),
            mutant(
                "positives-in-a-card",
                "the card of the data counts patients with an outcome",
                "smbfast/run/data_card.py",
                'f"{s} {of_whole(number, facts.matched[s])} of {few(facts.matched[s])}"',
                'f"{s} {number} of {few(facts.matched[s])}"',
            ),
            mutant(
                "rest-by-subtraction",
                "what a count leaves of its whole is not looked at",
                "smbfast/base/counts.py",
                'return f"all but {FEW_TEXT}" if 0 < whole - count <= FEW < count else few(count)',
                "return few(count)",
            ),
            mutant(
                "bins-of-few",
                "a bin of a calibration curve tells of one patient",
                "smbfast/statistics/binary.py",
                "any(0 < n <= _FEW for n in people)",
                "any(n < 0 for n in people)",
            ),
        ),
    ),
)
