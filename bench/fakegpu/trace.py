"""A whole training step on the pretended GPU.

The step is that of training: micro-batches through `smbfast.run.step.forward_backward`, clipping,
fused AdamW and the averages of the target through `Updater`. It is traced with few layers, twice,
and extended to all: every count is a line in the number of layers.
"""

import gc
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from smbkernels.attention.op import attention_flops

from bench.fakegpu.device import Memory as Allocated
from bench.fakegpu.device import pretended_gpu, untraced
from bench.fakegpu.launches import Builds, recorded
from bench.fakegpu.ledger import Key, Ledger, Row
from bench.step.rivals import Packed
from bench.step.variants import BACKWARD, EMA, ONLINE, OPTIMIZER, TARGET, TAU, Smbfast, Variant
from bench.step.workloads import Workload
from smbfast import objective
from smbfast.batch import PackedBatch
from smbfast.model import memory
from smbfast.model.averages import Tracked
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import TargetForm
from smbfast.run.step import LossScales

CLIP, ADAMW, TRUNCATION, LOG = "clip", "AdamW", "truncation", "log line"
SETUP = "setup"
UPDATES = (CLIP, ADAMW, EMA, TRUNCATION)  # parts that run once in a step
FEW = (2, 4)  # layers of the two traces that are extended
Make = Callable[[PatientEncoder], Variant]


@dataclass
class Traced:
    """What a step gives a GPU to do."""

    layers: int
    rows: dict[Key, Row]
    work: dict[tuple[str, str], float]  # FLOPs by part and operation of ours
    peak: float  # bytes
    waits: Counter[tuple[str, str, str]]
    copies: Counter[tuple[str, str, str]]
    predicted: float = 0  # bytes, by `smbfast.model.memory.predict_peak`
    builds: Builds = field(default_factory=Builds)

    def extended(self, more: "Traced", layers: int) -> "Traced":
        """The line through this trace and one of more layers, at `layers`."""
        share = (layers - self.layers) / (more.layers - self.layers)

        def line(few: float, many: float) -> float:
            return few + share * (many - few)

        none, rows, work = Row(), self.rows, self.work
        return replace(
            more,
            builds=self.builds,
            layers=layers,
            rows={
                key: Row(*map(line, rows.get(key, none), more.rows.get(key, none)))
                for key in {**rows, **more.rows}
            },
            work={k: line(work.get(k, 0), more.work.get(k, 0)) for k in {**work, **more.work}},
            peak=line(self.peak, more.peak),
            predicted=line(self.predicted, more.predicted),
        )


def traced(
    workload: Workload,
    make: Make = Smbfast,
    *,
    layers: int | None = None,
    compiled: bool = False,
    predicts: bool = False,
) -> Traced:
    """A step of a variant; from two traces of `FEW` layers unless the number is given.

    Args:
        layers: of the model; None: all that it has, extended from few.
        compiled: whether each launched specialisation is compiled.
        predicts: whether the prediction of peak memory is asked for as well.
    """
    if layers is not None:
        return _step(_with_layers(workload, layers), make, compiled=compiled, predicts=predicts)
    few, more = pair(workload, make, compiled=compiled, predicts=predicts)
    return few.extended(more, workload.size.layers)


def pair(
    workload: Workload, make: Make = Smbfast, *, compiled: bool = False, predicts: bool = False
) -> tuple[Traced, Traced]:
    """Traces of `FEW` layers; kernels are compiled in the first alone, since both have the same."""
    few, more = (_with_layers(workload, n) for n in FEW)
    first = _step(few, make, compiled=compiled, predicts=predicts)
    return first, _step(more, make, compiled=False, predicts=predicts)


def _with_layers(workload: Workload, layers: int) -> Workload:
    return replace(workload, size=replace(workload.size, layers=layers))


def _step(workload: Workload, make: Make, *, compiled: bool, predicts: bool) -> Traced:
    batches = workload.batches()
    gc.collect()  # a model refers to itself: the one that was traced before
    ledger, builds = Ledger(), Builds()
    with ExitStack() as stack:
        mode = stack.enter_context(pretended_gpu())
        stack.enter_context(recorded(ledger, builds if compiled else None))
        with ledger, ledger.part(SETUP), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # said by transformers to itself
            variant = make(workload.size.encoder("cuda"))
            if isinstance(variant, Smbfast):
                given(variant, batches)
            else:
                variant.take(workload)
            with untraced():
                steps(variant, ledger)
        predicted = 0
        if predicts:
            for parameter in variant.parameters:
                parameter.grad = None
            predicted = predicted_peak(variant, batches, mode)
    return Traced(
        workload.size.layers,
        divided(ledger.rows, truncates_every(variant)),
        dict(ledger.work) | attention_of(variant, workload),
        Allocated.peak,
        ledger.waits,
        ledger.copies,
        predicted,
        builds,
    )


def attention_of(variant: Variant, workload: Workload) -> dict[tuple[str, str], float]:
    """FLOPs of visible pairs by part, of a rival whose attention is no operation of ours."""
    if not isinstance(variant, Packed):
        return {}
    heads = (workload.size.heads, workload.size.head_dim)
    online = sum(one.segments.pairs for passes in variant.passes for one in passes)
    target = sum(batch.target_segments.pairs for batch in variant.batches)
    work = {
        (ONLINE, ""): attention_flops(online, *heads),
        (BACKWARD, ""): attention_flops(online, *heads, backward=True),
        (TARGET, ""): attention_flops(target, *heads),
    }
    return {key: float(workload.size.layers * flops) for key, flops in work.items()}


def given(variant: Variant, batches: list[PackedBatch]) -> None:
    """Micro-batches as a loader hands them over: in pinned memory, not yet on the device."""
    labels, masked = sum(b.num_labels for b in batches), sum(b.num_masked for b in batches)
    variant.scales = LossScales.of(1.0, 1.0, labels, masked)
    variant.batches = [b.pinned() for b in batches]


def steps(variant: Variant, ledger: Ledger) -> None:
    """A step as it is after others, and updates until the target has truncated once."""
    for parameter in variant.parameters:
        parameter.grad = torch.zeros_like(parameter)
    variant.updater.step()  # so that moments are there
    variant.update(TAU)
    ledger.forget()
    variant.step(ledger.part)
    every = truncates_every(variant)
    if every > 1:
        with ledger.part(SETUP):
            for _ in range(every - 3):
                variant.update(TAU)
        with ledger.part(TRUNCATION):
            variant.update(TAU)
    with ledger.part(LOG):
        variant.updater.report_skips(1, "pretended")


def truncates_every(variant: Variant) -> int:
    """Updates from one truncation to the next; 0 where there is none."""
    parts = variant.target.parts if isinstance(variant, Smbfast) else []
    return next((part.every for part in parts if isinstance(part, Tracked)), 0)


def divided(rows: dict[Key, Row], every: int) -> dict[Key, Row]:
    """Rows of one step: the optimizer in two parts, and of a truncation what is more than an
    average, over the steps from one to the next."""
    step: dict[Key, Row] = {}

    def add(key: Key, part: str, row: Row, factor: float = 1.0) -> None:
        key = key._replace(part=part)
        step[key] = step.get(key, Row()).plus(row, factor)

    for key, row in rows.items():
        if key.part == OPTIMIZER:
            add(key, ADAMW if key.op.startswith("_fused") else CLIP, row)
        elif key.part == TRUNCATION:
            add(key, TRUNCATION, row, 1 / every)
        elif key.part == EMA:
            add(key, EMA, row)
            if every:
                add(key, TRUNCATION, row, -1 / every)
        elif key.part not in (SETUP, LOG):
            add(key, key.part, row)
    return step


def predicted_peak(variant: Variant, batches: list[PackedBatch], mode: Any) -> float:
    """`smbfast.model.memory.predict_peak` of the heaviest micro-batch, as training asks for it."""
    assert isinstance(variant, Smbfast)
    heaviest = max(batches, key=lambda b: b.segments.tokens)
    run = partial(objective.losses, **variant.scales._asdict(), normalize=True)
    form = TargetForm(variant.target.form)
    # the encoder has no memory already, and both traces must be of one mode
    with mock.patch.object(memory, "FakeTensorMode", lambda **_: mode):
        with mock.patch.object(memory, "_faked", lambda encoder, *_: encoder):
            return memory.predict_peak(variant.encoder, heaviest, run, target=form).total
