"""Runs proofs in forked processes, on this tree and on copies of it with a mistake.

Libraries are imported once, before the first fork; smbfast is imported by each process, from the
tree that it proves. A process has a group of its own, which is killed at its end with all that it
has started, and the kernel kills it with this one.
"""

import ctypes
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.mutants import ROOT, Mutant, changed
from tests.reliability.proof import MUTANT, Proof, Row, Work

LIBRARIES = (
    "torch",
    "torch.distributed.fsdp",
    "torch.nn.attention.flex_attention",
    "safetensors.torch",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.llama.modeling_llama",
    "peft",
    "tokenizers",
    "pyarrow.parquet",
    "scipy.optimize",
    "scipy.stats",
    "scipy.sparse",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "sklearn.metrics",
    "pydantic",
    "rich.console",
    "jinja2",
    "matplotlib.figure",
    "tensorboardX",
    "meds",
    "hypothesis",
    "hypothesis.extra.numpy",
    "pytest",
)
TAIL = 1500  # characters of what a process printed


@dataclass
class Task:
    """A proof that is to run: a row as it is, or with one of its mistakes."""

    row: Row
    size: str
    mutant: Mutant | None = None
    proof: Proof | None = None
    why: str = ""  # why there is no proof
    hung: bool = False  # whether it was ended at its limit
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """The row, and the mistake."""
        if self.is_control:
            return f"{self.row.id} control"
        return f"{self.row.id} {self.mutant.name}" if self.mutant else self.row.id

    @property
    def is_control(self) -> bool:
        """Whether it looks for mistakes where none is."""
        return self.size == MUTANT and self.mutant is None

    @property
    def holds(self) -> bool:
        """Whether the property holds in as many trials as are asked for."""
        if self.proof is None or self.proof.bad:
            return False
        if self.is_control:
            return True
        return self.proof.count >= self.row.least(self.size)

    @property
    def caught(self) -> bool:
        """Whether a mistake was seen: trials broke, which is more than a proof that fails.

        Nor is it seen by waiting: on a busy machine any proof may come to its limit.
        """
        return self.proof is not None and bool(self.proof.bad) and not self.hung


def import_libraries() -> None:
    """Import what every process would import again; what is not installed is left out."""
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)


@dataclass
class _Child:
    task: Task
    pid: int
    began: float
    log: Path
    answer: Path
    tree: Path


@dataclass
class Runner:
    """Runs tasks, as many at a time as there are `jobs`."""

    jobs: int
    seed: int
    folder: Path
    verbose: bool = False
    _trees: list[Path] = field(default_factory=list)
    _number: int = 0

    def run(self, tasks: list[Task]) -> Iterator[Task]:
        """Yield each task when it is done; a task may be added to the list meanwhile."""
        running: list[_Child] = []
        try:
            while tasks or running:
                while tasks and len(running) < self.jobs:
                    running.append(self._begin(tasks.pop(0)))
                time.sleep(0.01)
                for child in [c for c in running if self._is_over(c)]:
                    running.remove(child)
                    self._end(child)
                    yield child.task
        finally:
            for child in running:
                _kill(child.pid)

    def _begin(self, task: Task) -> _Child:
        self._number += 1
        own = self.folder / f"{self._number}-{task.row.id}"
        own.mkdir()
        tree = ROOT if task.mutant is None else self._mutated(task.mutant)
        sys.stdout.flush()
        child = _Child(task, 0, time.monotonic(), own / "log", own / "answer", tree)
        child.pid = os.fork()
        if not child.pid:
            _be_child(task, tree, own, self.seed, self.verbose)
        with suppress(OSError):  # the child does it too, and may be first
            os.setpgid(child.pid, child.pid)
        return child

    def _is_over(self, child: _Child) -> bool:
        spent = time.monotonic() - child.began
        done, _ = os.waitpid(child.pid, os.WNOHANG)
        if done:
            return True
        if spent < child.task.row.seconds(child.task.size):
            return False
        _kill(child.pid)
        os.waitpid(child.pid, 0)
        child.task.hung = True
        text = f"no end after {spent:.0f} s"
        child.answer.write_text(json.dumps({"count": 0, "unit": "trials", "bad": [text]}))
        return True

    def _end(self, child: _Child) -> None:
        _kill(child.pid)  # what it has left running
        task = child.task
        task.seconds = time.monotonic() - child.began
        try:
            task.proof = Proof(**json.loads(child.answer.read_text()))
        except (OSError, ValueError, TypeError):
            printed = child.log.read_text(errors="replace") if child.log.is_file() else ""
            task.why = printed[-TAIL:]
        if task.mutant is not None:
            _restore(child.tree, task.mutant)
            self._trees.append(child.tree)
        shutil.rmtree(child.log.parent, ignore_errors=True)

    def _mutated(self, mutant: Mutant) -> Path:
        """Return a copy of the tree with the mistake in it."""
        if not self._trees:
            tree = Path(tempfile.mkdtemp(dir=self.folder, prefix="tree-")) / "smbfast"
            _copy(tree)
            with suppress(OSError):
                (tree.parent / "shared").symlink_to((ROOT.parent / "shared").resolve())
            self._trees.append(tree)
        tree = self._trees.pop()
        for file, text in changed(mutant, tree).items():
            file.write_text(text, encoding="utf-8")
            os.utime(file, (0, 0))  # bytecode is known by the second and size of its source
        return tree


def _restore(tree: Path, mutant: Mutant) -> None:
    for name, _, _ in mutant.edits:
        shutil.copy2(ROOT / name, tree / name)


def _copy(tree: Path) -> None:
    """Copy the files of this tree that git does not ignore, with what is compiled of them."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source, target = ROOT / name, tree / name
        if not source.is_file():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
        for compiled in (source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"):
            (target.parent / "__pycache__").mkdir(exist_ok=True)
            shutil.copy2(compiled, target.parent / "__pycache__")


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _be_child(task: Task, tree: Path, own: Path, seed: int, verbose: bool) -> None:
    """Prove a row in a forked process, which ends here."""
    parent, code = os.getppid(), 1
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        if not verbose:
            file = os.open(own / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            os.dup2(file, 1)
            os.dup2(file, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        enter(tree)
        (own / "work").mkdir()
        prove = _prover(task.row.id)
        proof = prove(Work(task.size, own / "work", seed))
        (own / "answer.new").write_text(json.dumps(asdict(proof)))
        os.rename(own / "answer.new", own / "answer")
        code = 0
    except BaseException:  # whatever it is, this process must not go on as its parent would
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def enter(tree: Path) -> None:
    """Let smbfast and the tests be those of a tree, in this process and in those it starts."""
    import matplotlib

    matplotlib.use("Agg")
    paths = [str(tree), str(tree / "kernels")]
    theirs = [p for p in sys.path if p not in ("", str(ROOT), str(ROOT / "kernels"))]
    sys.path[:] = paths + theirs
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    if tree != ROOT:
        sys.dont_write_bytecode = True
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.chdir(tree)
    for name in [n for n in sys.modules if n.partition(".")[0] in ("tests", "smbfast")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _prover(row: str) -> Callable[[Work], Proof]:
    card = importlib.import_module("tests.reliability.card")
    own = importlib.import_module("tests.reliability.proof")
    prove = next(r.prove for r in card.rows() if r.id == row)

    def proven(work: Work) -> Proof:
        return prove(own.Work(work.size, work.folder, work.seed))

    return proven


def tasks_of(rows: list[Row], size: str, first: tuple[str, ...]) -> list[Task]:
    """The proofs of rows as they are, those named in `first` before the others."""
    order = sorted(rows, key=lambda row: first.index(row.id) if row.id in first else len(first))
    return [Task(row, size) for row in order]


def mutants_of(row: Row, size: str) -> list[Task]:
    """The mistakes of a row that are tried at a size: at push the first, else all of them.

    Beyond a push the same proof also runs where no mistake is, and must find nothing there.
    """
    if size == "push":
        return [Task(row, MUTANT, mutant) for mutant in row.mutants[:1]]
    return [Task(row, MUTANT), *(Task(row, MUTANT, mutant) for mutant in row.mutants)]
