"""Two hundred steps of ours and of a rival from the same weights on the same batches.

Tokens are drawn from few, so that the loss falls far within so few steps.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.gpu.child import Bench, Item
from bench.gpu.journal import WRONG
from bench.gpu.sizes import workload

RIVAL = "B1"  # Hugging Face's code and PEFT's linears, not compiled
LR = 3e-4
DRAWN = 256  # ids
WINDOWS, TOKENS = 4, 512
TAU = 0.996
TAIL = 10  # steps at the end, whose mean is compared
# both round to bf16 in other places; curves that learn the same differ by less, step by step
APART = 0.02


def items(bench: Bench) -> list[Item]:
    """One item: a curve alone says little."""
    return [Item("0.6B", partial(_curves, bench), 140)]


def _curves(bench: Bench) -> dict[str, Any]:
    from bench.step.measure import OURS, variants
    from bench.step.variants import twin

    load = _narrow(bench)
    encoder = load.size.encoder(bench.device)
    makes = variants(load, bench.device, ablate=False)
    curves = {n: _curve(bench, makes[n](twin(encoder)), load) for n in (OURS, RIVAL)}
    ours, rival = (curves[n]["SFT loss"] for n in (OURS, RIVAL))
    return {"curves": curves, "lr": LR, "tokens": load.num_tokens, **judged(ours, rival)}


def judged(ours: list[float], rival: list[float]) -> dict[str, Any]:
    """What is wrong with our curve; empty: it falls, and ends where the rival's does."""
    tail = min(TAIL, len(ours))
    ends = [sum(curve[-tail:]) / tail for curve in (ours, rival)]
    if not abs(ends[0] - ends[1]) <= APART * ends[1]:  # NaN fails
        return {"state": WRONG, "reason": f"losses end at {ends[0]:.4g} and {ends[1]:.4g}"}
    if not ends[0] < ours[0]:
        return {"state": WRONG, "reason": f"the loss went from {ours[0]:.4g} to {ends[0]:.4g}"}
    return {}


def _curve(bench: Bench, variant: Any, load: Any) -> dict[str, list[float]]:
    """Both losses of every step; they are read at the end, so that no step waits for them."""
    from bench.step.variants import untimed

    variant.take(load)
    variant.ready()
    losses = []
    for _ in range(bench.sizes.steps):
        losses.append(variant.accumulate(untimed))
        variant.updater.step(LR)
        variant.update(TAU)
    sft, jepa = zip(*losses, strict=True)
    return {"SFT loss": [float(x) for x in sft], "JEPA loss": [float(x) for x in jepa]}


def _narrow(bench: Bench) -> Any:
    """The smallest model's widths, on windows of few different tokens."""
    from bench.step.workloads import Workload, window

    gpu = bench.device == "cuda"
    size = workload("W6-0.6B" if gpu else "W6", bench.device).size
    tokens = TOKENS if gpu else TOKENS // 8

    @dataclass(frozen=True)
    class Narrow(Workload):
        def windows(self) -> list:
            return [window(i, n, min(DRAWN, size.vocabulary)) for i, n in enumerate(self.lengths)]

    narrow = Narrow("convergence", size, (tokens,) * WINDOWS, (0.5, 0.5), WINDOWS)
    return replace(narrow)
