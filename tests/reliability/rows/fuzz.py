"""The row of fuzzing: five readers, whose files are changed at random and with their structure."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.mutants import mutant
from tests.reliability.proof import Proof, Row, Work

SHARES = {"config": 0.5, "labels": 0.2, "shards": 0.175, "events": 0.085, "models": 0.04}
MEMORY = 4 << 30  # bytes that reading may take beside what the process has


def prove(work: Work) -> Proof:
    """Read every reader's cases: those that are stored, then new ones by the seed of the proof."""
    from tests.reliability import fuzzing

    total = work.pick(push=20_000, nightly=100_000, recorded=500_000, mutant=1_500)
    shares = SHARES
    if work.size == "mutant":  # the mistakes are in what reads shards and models
        shares = {"shards": 0.9, "models": 0.1}
    counts, bad, new, slowest = {}, [], 0, 0.0
    with ExitStack() as stack:
        folder = Path(stack.enter_context(_memory(work)))
        _limit_memory()
        for name, share in shares.items():
            reader = reader_of(name, folder)
            stored = fuzzing.corpus(name)
            seen = fuzzing.run(
                reader, int(total * share), work.seed, set(stored), [*stored.values()]
            )
            work.say(f"{name}: {seen.count} cases, {seen.read} were read, {len(seen.pairs)} pairs")
            for pair, _ in seen.new:
                work.say(f"  new: {pair}")
            counts[name], new = seen.count, new + len(seen.new)
            slowest = max(slowest, seen.slowest)
            bad += seen.bad
    figure = (
        f"{new} refusals that the corpus lacks, each in words; the slowest took {slowest:.1f} s"
    )
    return Proof(sum(counts.values()), "cases", bad, figure)


def _memory(work: Work) -> Any:
    """A folder for the files, in memory where there is such a disk: they are written often."""
    disk = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=disk if disk.is_dir() else work.folder)


def reader_of(name: str, folder: Path) -> Any:
    """Return a reader of this name, whose files lie in a folder."""
    from tests.reliability import model_reader, readers, sealed, shard_reader

    made: dict[str, Callable[[], Any]] = {
        "config": lambda: readers.Config(folder),
        "labels": lambda: readers.Labels(folder),
        "events": lambda: readers.Events(folder),
        "shards": lambda: shard_reader.Shards(folder, sealed.make(folder / "of_shards")),
        "models": lambda: model_reader.Models(folder, sealed.make(folder / "of_models")),
    }
    return made[name]()


def _limit_memory() -> None:
    """Let what is read not take more than `MEMORY`; the proof is a process of its own."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").is_dir() else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


FUZZ = Row(
    "M2",
    "A damaged or hostile file of any of the five readers is read as what was written or refused "
    "in words, within 20 s and 4 GB, also where its checksums were made anew.",
    {"push": 20_000, "nightly": 100_000, "recorded": 500_000},
    prove,
    (
        mutant(
            "shard-checksum-off",
            "a shard is not compared with its SHA-256",
            "smbfast/data/array_file.py",
            'if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:',
            'if hashlib.file_digest(file, "sha256").hexdigest() == "":',
        ),
        mutant(
            "shard-bounds-off",
            "offsets of a shard are not compared with the sizes of its arrays",
            "smbfast/data/shards.py",
            "if not 0 <= start <= end <= places[name].num:",
            "if not start <= end:",
        ),
        mutant(
            "width-of-horizons-off",
            "as many horizons are made as the shape of a tensor without bytes claims",
            "smbfast/run/checkpoint.py",
            "if embedding.shape[1:] != (width,) or any(",
            "if any(",
        ),
    ),
    {"push": 600, "recorded": 12 * 3600},
)
ROWS = (FUZZ,)
