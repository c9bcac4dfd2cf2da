"""Runs that ranks train together, and one process alone: how they are made, what they leave.

Functions of this module run in processes that `tests.rank_server` forks.
"""

import hashlib
import os
import re
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import smbfast.train as entry
from smbfast.base.runtime import MatmulRate
from smbfast.batch import FuturePairs, PackedBatch
from smbfast.run import checkpoint, evaluation, loop, open_run, startup
from smbfast.run.folder import data_of, prepared_data
from smbfast.settings import load
from smbfast.simulation.dataset import simulate

BATCH, WINDOW, IDS = 8, 128, 400  # windows of a step, their tokens at most, the vocabulary
FORMATS = ("text", "codes")
COMMON = [
    f"--data.window={WINDOW}",
    f"--optim.batch={BATCH}",
    "--optim.weight_decay=0.1",
    "--model.hidden=16",
    "--model.layers=1",
    "--model.ffn=24",
    "--lora.r=2",
    "--eval.every=1000",
    "--eval.windows=2",
    "--run.log_every=1",
    "--run.save_every=1000",
    "--run.threads=1",
    "--probe.labels=[]",
    "--objective.self_check=false",
    "--objective.tracked_every=3",
    "--objective.tracked_rank=1",
]
# At a rate of 3e-3, 20 steps of horizons drift by 1.4e-5 in fp32. That is rounding: in fp64 two and
# four ranks stay within 9e-13 of one process, but for 3e-7 where the first step of a scale had one
# pair of a horizon: its variance is 0 but for rounding, the root of which meets a floor of 0.01.
PHASE = '[[phases]]\nname = "{}"\nsteps = {}\nw_sft = {}\nw_jepa = {}\nlr = 1e-4\n{}\n'
AHEAD = '[objective]\njepa = "horizon"\nhorizons = ["30d", "365d"]\npositions = 8\n'


def _phases(*phases: tuple, head: str = "") -> str:
    text = 'base = "tiny"\n' + head
    for number, (steps, sft, jepa, *more) in enumerate(phases):
        text += PHASE.format(f"p{number}", steps, float(sft), float(jepa), "\n".join(more))
    return text


OBJECTIVES = {
    # a predictor without gradients before and behind a phase with them: weight decay would show
    "mask": _phases((5, 1, 0), (10, 0.1, 1), (5, 1, 0)),
    "horizon": _phases(
        (3, 1, 0),
        (5, 0, 1, "w_codes = 1.0", 'freeze = "decoder"'),
        (5, 0.1, 1, "w_codes = 0.5"),
        (4, 0.1, 1, 'freeze = "predictor"'),
        (3, 0.1, 1, "sync = true"),
        head=AHEAD,
    ),
    "codes": _phases((6, 1, 0), (14, 0.5, 0, "w_codes = 1.0"), head=AHEAD),
    "curriculum": _phases((8, 1, 0), (12, 0, 1), head="[objective]\ncuts = 2\n"),
    "sparse": _phases(
        (2, 1, 0), (4, 0, 1), head="[objective]\nmin_future = 109\ncontext = [0.01, 0.9]\n"
    ),
    "first": _phases((2, 1, 0)),
}


@dataclass(frozen=True)
class Case:
    """One of the covering: how many ranks, and what they train."""

    world: int
    tokens: int  # of a micro-batch
    objective: str
    format: str
    kind: str  # whole; or LoRA with a merged or a tracked target
    recompute: str

    def __str__(self) -> str:
        return "-".join(str(getattr(self, f.name)) for f in fields(self))


def make_data(folder: str) -> None:
    """Write a cohort, its shards in both formats, and a backbone that reads each."""
    root = Path(folder)
    simulate(root / "cohort", 60, 0)
    for name, text in OBJECTIVES.items():
        (root / f"{name}.toml").write_text(text)
        brief = re.sub(r"steps = (\d+)", lambda m: f"steps = {max(1, int(m[1]) // 4)}", text)
        (root / f"{name}-brief.toml").write_text(brief)
    data = [f"--data.path={root / 'cohort'}", *COMMON]
    for form in FORMATS:
        # a backbone that does not know the section tags: LoRA trains rows for them
        words = [f"--data.format={form}", "--data.delimiters=text", f"--data.vocab_size={IDS}"]
        run(str(root / "first.toml"), *data, *words, f"--run.dir={root / f'backbone-{form}'}")
        for kind in ("whole", "merged"):
            preset, *words = words_of(root, "first", form, kind)
            settings = load(preset, words)
            prepared_data(settings, data_of(settings, root), root)


def words_of(root: Path, objective: str, form: str, kind: str) -> list[str]:
    """Arguments of `smbfast.train` but for the folder of the run."""
    shards = root / f"shards-{form}-{'whole' if kind == 'whole' else 'lora'}"
    words = [str(root / f"{objective}.toml"), f"--data.path={root / 'cohort'}", *COMMON]
    words += [f"--data.format={form}", f"--data.prepared={shards}"]
    if kind == "whole":
        return [*words, f"--data.vocab_size={IDS}"]
    words += [f"--model.path={root / f'backbone-{form}' / 'final'}", "--model.train=lora"]
    return [*words, f"--objective.target_form={kind}"]


def run(*words: str, stop_after: int | None = None) -> list[list[list[str]]]:
    """Train by the command, without what costs seconds and no rank has a part in.

    Args:
        stop_after: number of steps behind which this process is asked to stop, as by a signal.

    Returns:
        For each step and each micro-batch of this process, the digests of its windows.
    """
    for name in ("probe_run", "write_report"):
        setattr(loop, name, lambda *_words, **_more: None)
    vars(loop)["matmul_rate"] = lambda *_: MatmulRate(1.0, "none")
    vars(startup)["predict_peak"] = lambda *_words, **_more: SimpleNamespace(total=0)
    seen: list[list[list[str]]] = []
    real = loop.forward_backward

    def watched(losses, encoder, target, micro_batches, *rest, **more):
        seen.append([windows_of(batch) for batch in micro_batches])
        return real(losses, encoder, target, micro_batches, *rest, **more)

    vars(loop)["forward_backward"] = watched
    if stop_after is not None:
        vars(loop)["stop_on_signals"] = lambda: nullcontext(Asked(seen, stop_after))
    try:
        entry.main(list(words))
    except SystemExit as end:
        if end.code != entry.STOPPED:
            raise
    return seen


@dataclass(frozen=True)
class Asked:
    """A flag like that of a signal, up once as many steps have been seen."""

    seen: list
    after: int
    name: str = "SIGTERM"

    def __bool__(self) -> bool:
        return len(self.seen) >= self.after


def trained(
    words: list[str],
    on: int | None = None,
    micro_tokens: list[int] | None = None,
    measured: bool = False,
    **unlike: Any,
) -> list[list[list[str]]]:
    """Train as a rank, or alone.

    Args:
        on: the rank that is unlike the others.
        micro_tokens: what fits on each rank.
        measured: whether evaluations measure what every rank measures alike; they always compare
            the weights of ranks.
        unlike: on that rank: words `more` that come behind the others, `stop_after` steps, the
            `seed` of its plan, whether its weights are `moved` behind the first step, or the step
            whose checkpoint is `lost` as the disk is full, before the next step begins.
    """
    rank = int(os.environ.get("RANK", "0"))
    unlike = unlike if rank == on else {}
    if not measured:
        vars(evaluation)["evaluate"] = lambda *_words: {"loss": None}
    if micro_tokens:
        vars(open_run)["micro_tokens"] = lambda *_words: (micro_tokens[rank], 0)
    if "seed" in unlike:
        vars(open_run)["make_step"] = partial(_of_seed, open_run.make_step, unlike["seed"])
    if unlike.get("moved"):
        vars(loop)["forward_backward"] = partial(_moved, loop.forward_backward)
    if "lost" in unlike:
        vars(checkpoint)["write"] = partial(_full, checkpoint.write, unlike["lost"])
        save = open_run.OpenRun.save
        settled = lambda *own, **more: _settled(save, *own, **more)  # noqa: E731
        setattr(open_run.OpenRun, "save", settled)  # noqa: B010
    return run(*words, *unlike.get("more", []), stop_after=unlike.get("stop_after"))


def _of_seed(make: Callable, own: int, *words: Any, seed: int, **more: Any) -> Any:
    return make(*words, seed=own, **more)


def _moved(real: Callable, losses: Any, encoder: Any, *words: Any, **more: Any) -> Any:
    with torch.no_grad():
        encoder.mask_vector[0] += 1e-7
    return real(losses, encoder, *words, **more)


def _full(write: Callable, step: int, run: Path, snapshot: Any, *words: Any) -> Any:
    if snapshot.step == step:
        raise OSError(28, "No space left on device", str(run / "checkpoints"))
    return write(run, snapshot, *words)


def _settled(save: Callable, run: Any, *words: Any, **more: Any) -> None:
    save(run, *words, **more)
    run.writer._idle.wait(60)  # but nobody has asked what became of it


def waits(on: int, killed: bool = False) -> None:
    """Wait for a rank that never comes, or is killed."""
    dist.init_process_group("gloo")
    if dist.get_rank() == on:
        while not killed:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def windows_of(batch: PackedBatch) -> list[str]:
    """A digest of each window of a micro-batch: its tokens, and all that is predicted of it."""
    spans, digests = batch.segment_tuples, []
    masked_id_M = batch.target_ids_U[batch.target_M]
    for start, length, _, prefix in spans:
        if prefix:
            continue
        of_window = [_segment(batch, s, n, p, masked_id_M) for s, n, t, p in spans if t == start]
        if batch.pairs is not None:
            of_window.append(_ahead(batch.pairs, start, start + length))
        digests.append(hashlib.sha256(repr(of_window).encode()).hexdigest()[:16])
    return digests


def _segment(batch: PackedBatch, start: int, length: int, prefix: int, masked_id_M: Tensor) -> list:
    labelled = _inside(batch.labelled_N, start, start + length)
    masked = _inside(batch.masked_M, start, start + length)
    ids = batch.ids_T[start : start + length]
    rows = (batch.labelled_N[labelled] - start, batch.masked_M[masked] - start)
    values = (ids, *rows, batch.label_N[labelled], masked_id_M[masked])
    return [prefix, *(value.tolist() for value in values)]


def _ahead(pairs: FuturePairs, start: int, end: int) -> list:
    own_P = _inside(pairs.row_N, start, end)[pairs.position_P]
    row_P, is_latent_P = pairs.row_N[pairs.position_P] - start, torch.zeros_like(own_P)
    is_latent_P[pairs.latent_Q] = True
    own_Z, place_P = own_P[pairs.pair_Z], own_P.cumsum(0) - 1
    values = (row_P[own_P], pairs.horizon_P[own_P], is_latent_P[own_P])
    codes = (place_P[pairs.pair_Z[own_Z]], pairs.class_Z[own_Z])
    return [value.tolist() for value in (*values, *codes)]


def _inside(rows: Tensor, start: int, end: int) -> Tensor:
    return (rows >= start) & (rows < end)
