"""python -m tests.reliability.covered: which branches of the readers the fuzzed cases take.

It needs the package coverage. Of the modules that read what is fuzzed, the functions that write,
name or show are left out; of the others it prints the share of branches that are taken, and those
that are not. Each reader runs the cases of its corpus and as many new ones as --cases shares out;
--keep adds the first of them to reach a pair of exception and line to the corpus.
"""

import argparse
import json
import tempfile
from pathlib import Path

# functions and classes that read nothing of what is fuzzed
OTHERS = {
    "base/config.py": ("command_line", "Settings._home"),
    "data/labels.py": (
        *("find_tasks", "with_splits", "with_competing", "_places", "require_splits"),
        *("splits_read", "without_held_out", "Labels.take", "Labels.counts", "Labels.positives"),
    ),
    "data/meds.py": (
        *("MedsDataset.of_table", "MedsDataset.state", "MedsDataset.where", "MedsDataset.again"),
        *("MedsDataset.file_batches", "EventBatch", "MedsDataset.without_split"),
    ),
    "data/columns.py": (),
    "data/parquet.py": ("parquet_buffer",),
    "data/code_table.py": ("CodeTable.of_table", "CodeTable.digest", "_Column.__len__"),
    "data/array_file.py": ("ArrayWriter", "make_private", "OpenMaps"),
    "data/shards.py": ("ShardWriter", "_Columns", "Block.of"),
    "data/verified.py": ("note_verified", "_write"),
    "data/prepare_record.py": (),
    "data/window_index.py": ("stored_pairs", "_write", "_counted", "_sort_by_length"),
    "run/model_record.py": ("shared_record",),
    "run/checkpoint.py": (
        *("save", "save_final", "amend_final", "write_card", "leave_behind", "_free", "set_aside"),
        *("were_damaged", "export_merged", "_optimizer_state", "_refuse_non_finite", "_contiguous"),
        *("taken", "write", "rotate", "_in_order"),
    ),
}


def main() -> None:
    """Print a line a module, and one a branch that is not taken."""
    parser = argparse.ArgumentParser("tests.reliability.covered", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="of all readers (20000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add new refusals to the corpus")
    words = parser.parse_args()
    import coverage

    import smbfast

    root = Path(smbfast.__file__).parent
    meter = coverage.Coverage(branch=True, data_file=None, include=[str(root / n) for n in OTHERS])
    with tempfile.TemporaryDirectory() as folder:
        meter.start()
        _run(words.cases, words.seed, Path(folder), words.keep)
        meter.stop()
        report = Path(folder) / "report.json"
        meter.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    taken = there = 0
    for name, content in sorted(files.items()):
        module = str(Path(name).resolve().relative_to(root))
        own = _own(module, content["functions"])
        one = sum(f["summary"]["covered_branches"] for f in own.values())
        all_ = sum(f["summary"]["num_branches"] for f in own.values())
        taken, there = taken + one, there + all_
        print(f"{module}: {one} of {all_} branches")
        for function, said in own.items():
            for first, last in said["missing_branches"]:
                print(f"    {function}: line {first} to {last}")
    print(f"{taken} of {there} branches, {taken / max(there, 1):.1%}")


def _own(module: str, functions: dict) -> dict:
    others = OTHERS[module]
    return {
        name: content
        for name, content in functions.items()
        if not any(name == other or name.startswith(f"{other}.") for other in others)
    }


def _run(cases: int, seed: int, folder: Path, keep: bool) -> None:
    from tests.reliability import fuzzing
    from tests.reliability.rows.fuzz import SHARES, reader_of

    for name, share in SHARES.items():
        reader = reader_of(name, folder)
        stored = fuzzing.corpus(name)
        seen = fuzzing.run(reader, int(cases * share), seed, set(stored), [*stored.values()])
        if keep:
            fuzzing.keep(name, seen.new)


if __name__ == "__main__":
    main()
