"""python -m tests.reliability: which promises hold, in how many trials, and what they would catch.

Each row is a property with a count of trials. It holds if none of them broke it, there were as many
as its bar asks for, and its mistakes were caught: changes of one line of the program, made in a
copy of it, on which the same proof must find something. Rows run in processes of their own.

    python -m tests.reliability                        # the size of a push: two minutes
    python -m tests.reliability --row=R1,R2 --verbose
    python -m tests.reliability --size=recorded --save # hours; into tests/reliability/record.json

At push the first mistake of each row is tried, at other sizes all, and the proof that looks for
them also runs where none is and must find nothing. Exit code 1 if a row does not
hold. --save writes what was seen, with commit and versions, and leaves other rows as they are.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants import ROOT
from tests.reliability import card
from tests.reliability.proof import SIZES, Row
from tests.reliability.running import Runner, Task, import_libraries, mutants_of, tasks_of

RECORD = Path(__file__).with_name("record.json")
WIDE = 160  # columns of the table


def main() -> None:
    """Prove rows, print them, and exit with 1 if one does not hold."""
    words = _words()
    every = card.rows()
    asked = words.row.split(",") if words.row else [row.id for row in every]
    unknown = sorted(set(asked) - {row.id for row in every})
    if unknown:
        known = ", ".join(row.id for row in every)
        raise SystemExit(f"--row must name rows of {known}, got {', '.join(unknown)}")
    rows = [row for row in every if row.id in asked]
    if words.list:
        print(listed(rows))
        return
    import_libraries()
    seen = _run(rows, words)
    recorded = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if words.save:
        for row in rows:
            recorded[row.id] = _as_record(seen[row.id], words)
        RECORD.write_text(json.dumps(dict(sorted(recorded.items())), indent=1) + "\n")
    held = [_print_row(seen[row.id], recorded.get(row.id)) for row in rows]
    print(f"\n{sum(held)} of {len(held)} rows hold")
    raise SystemExit(0 if all(held) else 1)


def listed(rows: list[Row]) -> str:
    """The rows as lines of a table: property, least trials at push and recorded, mistakes."""
    return "\n".join(
        f"| {row.id} | {row.property} | {row.least('push'):,} | {row.least('recorded'):,} | "
        f"{'; '.join(mutant.breaks for mutant in row.mutants)} |"
        for row in rows
    )


def _words() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("tests.reliability", description=__doc__, formatter_class=form)
    parser.add_argument("--size", choices=SIZES, default="push", help="how many trials (push)")
    parser.add_argument("--row", metavar="IDS", help="these rows alone, such as R1,R2")
    parser.add_argument("--no-mutants", action="store_true", help="prove the rows alone")
    parser.add_argument("--save", action="store_true", help="write tests/reliability/record.json")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="proofs at a time (2)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument("--list", action="store_true", help="print the rows, as docs have them")
    parser.add_argument("--verbose", action="store_true", help="show what proofs print")
    return parser.parse_args()


def _run(rows: list[Row], words: argparse.Namespace) -> dict[str, list[Task]]:
    """Prove rows, then their mistakes; what came of it, by row."""
    seen: dict[str, list[Task]] = {row.id: [] for row in rows}
    first = card.LONGEST if words.size == "push" else ()
    tasks, began, done = tasks_of(rows, words.size, first), time.monotonic(), 0
    total = len(tasks)
    if not words.no_mutants:
        total += sum(len(mutants_of(row, words.size)) for row in rows)
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder:
        runner = Runner(max(1, words.jobs), words.seed, Path(folder), words.verbose)
        for task in runner.run(tasks):
            done += 1
            seen[task.row.id].append(task)
            if task.size == words.size and task.holds and not words.no_mutants:
                tasks += mutants_of(task.row, words.size)
            elif task.size == words.size and not words.no_mutants:
                total -= len(mutants_of(task.row, words.size))  # nothing to see on a broken row
            spent = time.monotonic() - began
            left = spent / done * (total - done)
            print(f"[{done}/{total}, {left:.0f} s left] {_outcome(task)}", flush=True)
    return seen


def _outcome(task: Task) -> str:
    """A task in a line; of what went wrong, more."""
    time_ = f"{task.seconds:.1f} s"
    if task.proof is None:
        return f"{task.name}: NOT SHOWN ({time_})\n{task.why}"
    bad = task.proof.bad
    if task.mutant is not None:
        outcome = "caught" if task.caught else "NOT CAUGHT" if bad else "SURVIVED"
        return f"{task.name}: {': '.join([outcome, *(text[:90] for text in bad[:1])])} ({time_})"
    said = f"{task.proof.count:,} {task.proof.unit}"
    if task.holds:
        return f"{task.name}: {said} ({time_})"
    few = "" if bad else f", {task.row.least(task.size):,} are asked for"
    return "\n".join([f"{task.name}: BROKEN, {said}{few} ({time_})", *(f"  {b}" for b in bad[:8])])


def _print_row(tasks: list[Task], recorded: dict | None) -> bool:
    """Print a row of the card; return whether it holds."""
    row, own, mutants = tasks[0].row, tasks[0], [task for task in tasks if task.mutant]
    survived = [task.name.split()[1] for task in mutants if not task.caught]
    blind = [task for task in tasks if task.is_control and not task.holds]
    holds = own.holds and not survived and not blind
    count = f"{own.proof.count:,} {own.proof.unit}" if own.proof else "not shown"
    parts = [f"{row.id:<3} {'holds' if holds else 'BROKEN':<6} {count}"]
    if own.proof and own.proof.bad:
        parts.append(f"{len(own.proof.bad)} bad: {own.proof.bad[0]}")
    if own.proof and own.proof.figure:
        parts.append(own.proof.figure)
    if recorded and recorded["size"] != own.size:
        parts.append(f"{recorded['size']}: {recorded['count']:,} at {recorded['commit']}")
    caught = [task.name.split()[1] for task in mutants if task.caught]
    parts += [f"catches {', '.join(caught)}"] if caught else []
    parts += ["SEES MISTAKES WHERE NONE IS"] if blind else []
    parts += [f"DOES NOT CATCH {', '.join(survived)}"] if survived else []
    print(f"{'; '.join(parts)}\n    {row.property}"[: 4 * WIDE])
    return holds


def _as_record(tasks: list[Task], words: argparse.Namespace) -> dict:
    """A row for the record."""
    import torch

    proof, mutants = tasks[0].proof, [task for task in tasks if task.mutant]
    controls = [task for task in tasks if task.is_control]
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "size": words.size,
        "holds": all(task.caught if task.mutant else task.holds for task in tasks),
        "count": proof.count if proof else 0,
        "unit": proof.unit if proof else "",
        "figure": proof.figure if proof else "",
        "bad": len(proof.bad) if proof else None,
        "caught": [task.mutant.name for task in mutants if task.mutant and task.caught],
        "survived": [task.mutant.name for task in mutants if task.mutant and not task.caught],
        "control": all(task.holds for task in controls) if controls else None,
        "seconds": round(sum(task.seconds for task in tasks)),
        "seed": words.seed,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }


if __name__ == "__main__":
    sys.exit(main())
