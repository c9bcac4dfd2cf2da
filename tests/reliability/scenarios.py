"""Runs that train nothing, or badly, and what each must say: for the row of the alarm."""

import datetime as dt
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.training import CLEAN, replaced

SFT, JEPA = "--phases=sft", "--phases=jepa"
FAILS, ENDS = 1, 0
SOON = 50  # steps within which a run says that it learns nothing
BLAMED = ("kernel", "shared forward")  # what a message must not name
Patches = Callable[[], list[AbstractContextManager]]


@dataclass(frozen=True)
class Scenario:
    """A run that goes wrong."""

    name: str
    words: tuple[str, ...]
    says: tuple[str, ...]  # on stderr: one of them
    code: int = FAILS
    patches: Patches = list
    data: Callable[[Path], list[str]] | None = None  # words that name its own data


def _losses(change: Callable[[Any, int], Any]) -> Patches:
    """Change the losses of every micro-batch; `change` is given them and how many came before."""

    def make(real: Any) -> Any:
        calls = [0]

        def losses_of(settings: Any) -> Any:
            def changed(*args: Any, **more: Any) -> Any:
                calls[0] += 1
                return change(real(settings)(*args, **more), calls[0] - 1)

            return changed

        return losses_of

    return lambda: [replaced("smbfast.run.loop:losses_of", make)]


def _each(terms: Any, change: Callable[[Any], Any]) -> Any:
    return type(terms)(*(None if term is None else change(term) for term in terms))


def _zero(terms: Any, _number: int) -> Any:
    return _each(terms, lambda term: term * 0.0)


def _dies(terms: Any, number: int) -> Any:
    return _each(terms, lambda term: term * float(number < 2))


def _grows(terms: Any, number: int) -> Any:
    return _each(terms, lambda term: term * (3.0 if number >= 2 else 1.0))


def _frozen(terms: Any, _number: int) -> Any:
    return _each(terms, lambda term: term.detach().requires_grad_())


def _steps(every: int = 1, **flags: bool) -> Patches:
    """Let each `every`-th step, from the first, be drawn as if `flags` were asked for."""

    def make(real: Any) -> Any:
        def make_step(windows: Any, objective: Any, index: int, **more: Any) -> Any:
            return real(windows, objective, index, **more | (flags if index % every == 0 else {}))

        return make_step

    return lambda: [replaced("smbfast.run.open_run:make_step", make)]


def _nan_weights() -> list[AbstractContextManager]:
    def make(real: Any) -> Any:
        def make_encoder(*args: Any, **more: Any) -> Any:
            import torch

            encoder = real(*args, **more)
            with torch.no_grad():
                next(encoder.decoder.parameters())[3] = float("nan")
            return encoder

        return make_encoder

    return [replaced("smbfast.run.open_run:make_encoder", make)]


def _written(folder: Path, code_of: Callable[[int, int], str]) -> list[str]:
    """A dataset of sixty patients with forty events each, of codes that are made."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = dt.datetime(2020, 1, 1)
    for split, subjects in (("train", range(40)), ("tuning", range(40, 60))):
        rows = [(s, i) for s in subjects for i in range(40)]
        table = {
            "subject_id": pa.array([s for s, _ in rows], pa.int64()),
            "time": pa.array([first + dt.timedelta(days=i) for _, i in rows], pa.timestamp("us")),
            "code": pa.array([code_of(s, i) for s, i in rows], pa.string()),
            "numeric_value": pa.array([None] * len(rows), pa.float32()),
        }
        (folder / "data" / split).mkdir(parents=True)
        pq.write_table(pa.table(table), folder / "data" / split / "0.parquet")
    return [f"--data.path={folder}"]


def _one_event(folder: Path) -> list[str]:
    return _written(folder / "one", lambda _s, _i: "LAB//ONE")


def _one_token(folder: Path) -> list[str]:
    """Codes that nobody shares have the token of their section, and it is the same for all."""
    return _written(folder / "rare", lambda s, i: f"LAB//OF{s}X{i}")


SCENARIOS: Sequence[Scenario] = (
    Scenario(
        "gradient 0 in all steps",
        (SFT, CLEAN, "--phases.sft.steps=4"),
        ("exactly 0",),
        patches=_losses(_zero),
    ),
    Scenario(
        "gradient 0 from the third step",
        (SFT, CLEAN, "--phases.sft.steps=5"),
        ("exactly 0",),
        ENDS,
        _losses(_dies),
    ),
    Scenario(
        "all weights frozen",
        (SFT, CLEAN, "--phases.sft.steps=4"),
        ("exactly 0",),
        patches=_losses(_frozen),
    ),
    Scenario(
        "loss three times of its start",
        (SFT, CLEAN, "--phases.sft.steps=8"),
        ("diverges",),
        ENDS,
        _losses(_grows),
    ),
    Scenario(
        "weights that hardly move",
        (SFT, CLEAN, "--phases.sft.steps=22", "--phases.sft.lr=1e-12", "--eval.every=11"),
        ("stood at",),
        ENDS,
    ),
    Scenario(
        "largest rate, no clipping",
        (
            *(SFT, CLEAN, "--phases.sft.steps=20", "--phases.sft.lr=1", "--phases.sft.warmup=0"),
            *("--optim.clip=1e9", "--optim.min_lr=1", "--eval.every=10"),
        ),
        ("diverges", "exactly 0", "not finite"),
        ENDS,
    ),
    Scenario(
        "rate of 1000",
        (SFT, "--phases.sft.lr=1000"),
        ("less than or equal to 1", "at most 1"),
    ),
    Scenario(
        "weight of a loss far too large",
        (SFT, CLEAN, "--phases.sft.steps=5", "--phases.sft.w_sft=1e38"),
        ("not finite in 3 steps in a row",),
    ),
    Scenario(
        "weights that are NaN",
        (SFT, "--phases.sft.steps=4"),
        ("hold NaN",),
        patches=_nan_weights,
    ),
    Scenario(
        "weights that are NaN, in JEPA",
        (JEPA, "--phases.jepa.steps=4"),
        ("hold NaN",),
        patches=_nan_weights,
    ),
    Scenario(
        "weights that are NaN, unchecked",
        (SFT, CLEAN, "--phases.sft.steps=5"),
        ("not finite in 3 steps in a row",),
        patches=_nan_weights,
    ),
    Scenario(
        "no label",
        (SFT, CLEAN, "--phases.sft.steps=4"),
        ("no token that SFT predicts",),
        patches=_steps(sft=False),
    ),
    Scenario(
        "no mask",
        (JEPA, CLEAN, "--phases.jepa.steps=4", "--phases.jepa.w_sft=0"),
        ("no masked token",),
        patches=_steps(jepa=False),
    ),
    Scenario(
        "no mask in every second step of JEPA alone",
        (JEPA, CLEAN, "--phases.jepa.steps=4", "--phases.jepa.w_sft=0"),
        ("no masked token",),
        ENDS,
        _steps(2, jepa=False),
    ),
    Scenario(
        "no pair",
        (
            *(SFT, CLEAN, "--phases.sft.steps=4", "--phases.sft.w_sft=0"),
            "--phases.sft.w_codes=1",
        ),
        ("no pair",),
        patches=_steps(codes=False),
    ),
    Scenario(
        "a target that never moves",
        (JEPA, CLEAN, "--phases.jepa.steps=2", "--objective.tau=1"),
        ("never moves",),
        ENDS,
    ),
    Scenario(
        "one event again and again",
        (SFT, CLEAN, "--phases.sft.steps=2"),
        ("read the same",),
        ENDS,
        data=_one_event,
    ),
    Scenario(
        "one token for all codes",
        (SFT, CLEAN, "--phases.sft.steps=2"),
        ("have only the token of their family or section",),
        data=_one_token,
    ),
    Scenario(
        "one event again and again, as text",
        (SFT, CLEAN, "--phases.sft.steps=2", "--data.format=text"),
        ("read the same",),
        ENDS,
        data=_one_event,
    ),
    Scenario(
        "a phase checked behind one that diverged",
        (
            *("--phases.sft.steps=20", "--phases.sft.lr=1", "--phases.sft.warmup=0"),
            *("--optim.clip=1e9", "--optim.min_lr=1", "--phases.jepa.steps=2"),
        ),
        ("diverges", "exactly 0", "not finite", "must be finite"),
        ENDS,
    ),
    Scenario(
        "a phase checked behind one that died",
        ("--phases.sft.steps=6", "--phases.jepa.steps=2"),
        ("exactly 0",),
        patches=_losses(_dies),
    ),
)
