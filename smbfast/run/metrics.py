"""metrics.jsonl, TensorBoard events and the step line of a run."""

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from smbfast.base.files import legal
from smbfast.base.progress import duration
from smbfast.base.runtime import GIB, MatmulRate, peak_memory_gib
from smbfast.data.loader import Step
from smbfast.run import alarms, console
from smbfast.run.board import Board
from smbfast.run.open_run import OpenRun, Progress
from smbfast.run.optim import place, total_steps
from smbfast.run.outlook import Outlook
from smbfast.run.recomputed import Recomputed
from smbfast.run.step import StepLosses
from smbfast.run.trackers import Tracker, close_trackers, numbers, open_trackers
from smbfast.settings import PhaseSettings

COLUMNS = 100  # of a line of the log: what terminals and the logs of clusters show unbroken
PHASE = 10  # letters of the name of a phase in such a line
WAITS = 0.05  # share of the time from which a line says that the loop waits for data: our choice


class MetricsLog:
    """Appends records to `metrics.jsonl` and TensorBoard, and gives their numbers to trackers.

    A checkpoint saves `offset`, and a resumed run truncates the file there.
    """

    def __init__(
        self, run: Path, offset: int = 0, step: int = 0, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._path = run / "metrics.jsonl"
        self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self.again = Recomputed.of(self._path, offset)
        os.truncate(self._path, min(offset, self._path.stat().st_size))
        self._board, self._trackers = Board(run / "tensorboard", step + 1), trackers
        self._is_done = False

    @property
    def offset(self) -> int:
        """The number of bytes written so far."""
        return self._path.stat().st_size

    def write(self, kind: str, **values: object) -> None:
        """Write one line; numbers of steps and evaluations also become TensorBoard scalars.

        Raises:
            OSError: if the line cannot be written; it names the file.
        """
        with self._named():
            self._file.write(json.dumps(legal({"kind": kind, **values}), allow_nan=False) + "\n")
            self._file.flush()
        step, self._is_done = values.get("step"), kind == "end"
        if kind in ("step", "eval", "end") and isinstance(step, int):
            for tracker in self._trackers:
                tracker.add(numbers(kind, values), step)
        for name, value in values.items():
            if kind not in ("step", "eval") or not isinstance(step, int):
                continue
            if isinstance(value, float) and math.isfinite(value):  # others TensorBoard grumbles at
                self._board.add(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close all, once; trackers hear of the end though a file cannot be written."""
        trackers, self._trackers = self._trackers, ()
        try:
            with self._named():  # writes again what a full disk has refused
                self._file.close()
            self._board.close()
        finally:
            close_trackers(trackers, done=self._is_done)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Let an error of the file name it."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


class NoLog(MetricsLog):
    """The log of a rank that does not write."""

    offset = 0

    def __init__(self) -> None:
        self.again = Recomputed()

    def write(self, kind: str, **values: object) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Nothing is open."""


class Meter:
    """Measures how fast a run is, how long it waits for data, and the time left."""

    def __init__(
        self,
        total_steps: int,
        progress: Progress,
        ceiling: MatmulRate,
        outlook: Outlook | None = None,
    ) -> None:
        """Start to measure.

        Args:
            total_steps: steps of the run.
            progress: how far it is; tokens and FLOPs of each step are added to its own.
            ceiling: of a large matrix product on this device.
            outlook: what the steps and stages to come cost; None takes every step for as long, and
                nothing for what follows the last one.
        """
        self._progress = progress
        self._total, self._first, self._begin = total_steps, progress.step, time.monotonic()
        self._ceiling, self._mark, self._outlook = ceiling.flops, self._begin, outlook
        self._tokens = self._masked = self._flops = self._all_flops = 0
        self._waited, self._paced_from = 0.0, self._begin
        self.pace: float | None = None  # seconds of a FLOP, with evaluations and all else

    def waits(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Yield the steps, and add up the time that the loop waits for each."""
        steps = iter(steps)
        while True:
            asked = time.monotonic()
            step = next(steps, None)
            if step is None:
                return
            self._waited += time.monotonic() - asked
            yield step

    def add(self, step: Step, flops: int) -> None:
        """Count a step that was done, with the FLOPs of its matrix products."""
        self._tokens += step.num_tokens
        self._masked += step.num_masked
        self._flops += flops
        self._progress.tokens += step.num_tokens
        self._progress.flops += flops
        self._all_flops += flops

    def begin_stages(self) -> None:
        """Say what follows the last step, and let lines of progress count it in."""
        if self._outlook is not None:
            self._outlook.begin(self.pace)

    def read(self, step: int) -> dict[str, float]:
        """Return the speed since the last call, and `eta`, the seconds left after `step` steps.

        These are of the whole run, with embeddings, probes and report, where there is an outlook.
        `tokens_per_s` counts trunks, each once. `matmul` is the share of the ceiling that matrix
        products reach, and `wait` is the share of time spent waiting for data.
        """
        now = time.monotonic()
        spent = max(now - self._mark, 1e-9)
        if self._all_flops:
            self.pace = (now - self._paced_from) / self._all_flops
        left = (now - self._begin) / max(step - self._first, 1) * (self._total - step)
        if self._outlook is not None and self.pace is not None:
            left = self._outlook.seconds_after(step, self.pace)
        if step == self._first + 1:  # the first step allocates and compiles, the others do not
            self._paced_from, self._all_flops = now, 0
        values = {
            "tokens_per_s": self._tokens / spent,
            "masked_per_s": self._masked / spent,
            "matmul": self._flops / spent / self._ceiling,
            "wait": self._waited / spent,
            "eta": left,
        }
        self._mark, self._tokens, self._masked, self._flops, self._waited = now, 0, 0, 0, 0.0
        return values


def open_log(run: OpenRun) -> MetricsLog:
    """Open the log of a run and print the header; a new run also writes `config.toml`."""
    progress = run.progress
    if not run.ranks.is_main:
        return NoLog()
    if not progress.step:
        run.begin()
    run.own()
    trackers = open_trackers(run.settings, run.identity.run)
    log = MetricsLog(run.folder, progress.metrics_offset, progress.step, trackers)
    header = console.header(run)
    if not progress.step:
        log.write("header", **header, **_known_before(run))
    return log


def _known_before(run: OpenRun) -> dict[str, object]:
    """Return what the report needs and no line of the console says: digests and memory in GiB."""
    identity, peak = run.identity, run.predicted_peak
    return {
        "run": {"id": identity.run, "ranks": run.ranks.world},
        "digests": {
            "data": identity.data,
            "shards": identity.shards,
            "backbone": identity.backbone,
        },
        "memory": {"before": run.bytes_before / GIB, "predicted": peak / GIB if peak else None},
    }


def log_step(
    log: MetricsLog,
    run: OpenRun,
    step: Step,
    summed: StepLosses,
    *,
    lr: float,
    grad_norm: float | None,
    pace: dict[str, float],
) -> None:
    """Log and print an optimizer step, with its unweighted mean losses.

    `tokens` counts the tokens of trunks since the first step of the run, `epochs` is that over the
    tokens of the training windows, `flops` counts what this rank computed, and `counts` has how
    many steps of the phase there were, and how many of them lacked what they could learn from.

    Args:
        summed: the weighted losses of the step; reading them waits for the device.
        grad_norm: None if the step was skipped.
        pace: from `Meter.read`.
    """
    phase = place(run.settings, step.index).phase
    record = {
        "step": step.index + 1,
        "phase": phase.name,
        "sft": float(summed.sft) / phase.w_sft if phase.w_sft > 0 else None,
        "jepa": float(summed.jepa) / phase.w_jepa if step.num_masked else None,
        "codes": float(summed.codes) / phase.w_codes if step.num_pairs and phase.w_codes else None,
        "grad_norm": grad_norm,
        "lr": lr,
        **pace,
        "memory_gib": peak_memory_gib(run.device),
        "masked": step.num_masked,
        "labels": step.num_labels,
        "pairs": step.num_pairs,
        "tokens": run.progress.tokens,
        "epochs": run.progress.tokens / max(run.windows.num_tokens, 1),
        "flops": run.progress.flops,
        "counts": {name: n for name, n in run.progress.watch.counts.items() if n},
    }
    log.write("step", **record)
    alarms.hear(run, phase, "step", record)
    print(step_line(record, total_steps(run.settings)), flush=True)
    if words := log.again.add(record):
        print(words, flush=True)


def log_evaluation(
    log: MetricsLog, run: OpenRun, step: int, phase: PhaseSettings, health: dict
) -> None:
    """Log and print an evaluation after `step` steps, from `smbfast.run.evaluation.evaluate`."""
    record = {"step": step, "phase": phase.name, **health}
    log.write("eval", **record)
    alarms.hear(run, phase, "eval", record)
    best = run.progress.best.get(phase.name)
    print(evaluation_line(record, total_steps(run.settings), best), flush=True)


def log_end(log: MetricsLog, run: OpenRun, seconds: float) -> None:
    """Log that a run is over: its time, best steps and counts, and the memory with its probes."""
    done = run.progress
    log.write(
        "end",
        step=total_steps(run.settings),
        seconds=seconds,
        best=done.best,
        tokens=done.tokens,
        flops=done.flops,
        memory_gib=peak_memory_gib(run.device),
    )


def step_line(record: dict, total: int) -> str:
    """Return a step as one plain line of at most `COLUMNS`, which suits the log of a job.

    The header says what its words mean. What does not fit is left out, the learning rate and the
    memory before the rest; all of it is in `metrics.jsonl`.
    """
    norm = "skipped" if record["grad_norm"] is None else f"{record['grad_norm']:.3g}"
    line = _beginning("step", record, total)
    for name in ("sft", "jepa", "codes"):
        if record[name] is not None:
            line += f"  {name} {_number(record[name])}"
    line, last = f"{line}  grad {norm}", f"  {duration(record['eta'])} left"
    speed = [f"  {record['tokens_per_s'] / 1e3:.1f}k tok/s"]
    speed += [f"  waits {record['wait']:.0%}"] if record["wait"] >= WAITS else []
    for more in (*speed, f"  lr {record['lr']:.1e}", f"  {record['memory_gib']:.1f} GiB"):
        if len(line + more + last) <= COLUMNS:
            line += more
    return line + last


def _beginning(word: str, record: dict, total: int) -> str:
    """Return which step of how many it is, and the phase by its first letters."""
    number = f"{record['step']:>{len(str(total))}}"
    return f"{word} {number}/{total} {record['phase'][:PHASE]:<4}"


def evaluation_line(record: dict, total: int, best: dict | None = None) -> str:
    """Return an evaluation in plain lines of at most `COLUMNS`.

    Args:
        best: loss and step of the best evaluation of the phase before this one; None without one.
    """
    parts = [_beginning("eval", record, total), _judged(record.get("loss"), best)]
    for name in ("sft", "jepa"):
        if record.get(name) is not None:
            parts.append(f"{name} {_number(record[name])}")
    if record.get("codes") is not None:
        parts.append(f"codes {_number(record['codes'])} (gain {record['codes_gain']:.4f})")
    ranks = [
        f"{word} {record[key]:.1f}"
        for word, key in (
            ("online", "online_rank"),
            ("nodes", "embedding_rank"),
            ("target", "target_rank"),
        )
        if record.get(key) is not None
    ]
    parts += [f"rank {' '.join(ranks)}"] if ranks else []
    if record.get("ratio") is not None:
        parts.append(f"of trivial {record['ratio']:.2f}")
    if record.get("r2") is not None:
        parts.append(f"r2 {record['r2']:.3f} (copy {record['r2_copy']:.3f})")
    if record.get("probe_auroc") is not None:
        parts.append(f"{record['probe_task']} auroc {record['probe_auroc']:.3f}")
    for word in ("grad", "cos"):
        values = {k: v for k, v in record.items() if k.startswith(f"{word}_") and v is not None}
        if values:
            names = (
                f"{k.removeprefix(word + '_').replace('_', '/')} {v:.2f}" for k, v in values.items()
            )
            parts.append(f"{word} {' '.join(names)}")
    return _wrapped(parts)


def _judged(loss: float | None, best: dict | None) -> str:
    """Say what the loss of the phase is beside the best one so far."""
    if loss is None:
        return "loss -"
    if best is None:
        return f"loss {_number(loss)}"
    if loss < best["loss"]:
        return f"loss {_number(loss)}, the best so far"
    return f"loss {_number(loss)}, best {_number(best['loss'])} at step {best['step']}"


def _wrapped(parts: list[str]) -> str:
    """Return parts in lines of at most `COLUMNS`, two spaces apart; later lines are indented."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + 2 + len(part) <= COLUMNS:
            lines[-1] += f"  {part}"
        else:
            lines.append(f"     {part}")
    return "\n".join(lines)


def _number(loss: float) -> str:
    return f"{loss:.4g}"
