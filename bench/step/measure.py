"""One workload: each variant compared with the reference, counted, timed in turn, and its memory.

`python -m bench.step.measure WORKLOAD VARIANT cpu` prints the MiB that a step takes; with `quick`
in the place of `cpu`, those of a tiny one.
"""

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from smbkernels import registry
from smbkernels.attention import attention_flops
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.measure import difference
from bench.step.nodes import Nodes, NodesReference
from bench.step.rivals import Packed, Padded
from bench.step.variants import Reference, Smbfast, Variant, twin, untimed
from bench.step.workloads import Workload, workloads
from bench.timing import MIB, peak_mib

ROOT = Path(__file__).resolve().parents[2]
OURS = "B4"
RIVALS = ("B0", "B0c", "B1", "B1c", "B2", "B3", "B3'")
CHECKED_TOKENS = 4096  # longer windows are compared at this length: the reference keeps much
# relative, in the Frobenius norm: of losses and hidden states, and of gradients (of all adapters
# together, and of all else)
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}
PLAIN_OPS = ("lora_linear", "linear_cross_entropy", "masked_jepa_mse")
Make = Callable[..., Variant]
Advance = Callable[[int], None]  # counts tokens of trunks as done


@dataclass
class Result:
    """A variant on a workload."""

    workload: Workload
    variant: str
    tolerance: tuple[float, float]
    reason: str = ""  # why it was not measured
    errors: dict[str, float] = field(default_factory=dict)  # from the reference, relative
    flops: int = 0  # of a step, counted
    first_s: float = 0.0  # the first step and the comparison: compilation is in them
    times: list[dict[str, float]] = field(default_factory=list)  # ms of each part, by round
    held_mib: float = 0.0  # weights, averages and moments
    step_mib: float | None = None  # what a step takes above them at its peak

    def quantile(self, q: float, part: str | None = None) -> float:
        """Milliseconds of a step, or of a part of it, over rounds."""
        taken = [t.get(part, 0.0) if part else sum(t.values()) for t in self.times]
        return float(torch.tensor(taken, dtype=torch.float64).quantile(q))

    @property
    def bad(self) -> bool:
        """It should have been measured, and could not be."""
        return self.reason.startswith(("wrong", "failed"))

    @property
    def wrong(self) -> str:
        """What is further from the reference than is tolerated; empty: nothing."""
        loss, gradient = self.tolerance
        return ", ".join(
            f"{name} off by {error:.1e}"
            for name, error in self.errors.items()
            if not error <= (gradient if "gradients" in name else loss)
        )


class Parts:
    """Milliseconds of the parts of a step; a part within another is not counted in that one."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.names = ["other"]
        self.marks: list[tuple[str, Any]] = []
        self._mark()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A part of the step."""
        self.names.append(name)
        self._mark()
        try:
            yield
        finally:
            self.names.pop()
            self._mark()

    def _mark(self) -> None:
        if self.gpu:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((self.names[-1], now))

    def read(self) -> dict[str, float]:
        """By name; to be called once, at the end."""
        self._mark()
        if self.gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (name, start), (_, end) in zip(self.marks, self.marks[1:], strict=False):
            ms = start.elapsed_time(end) if self.gpu else 1e3 * (end - start)
            spent[name] = spent.get(name, 0.0) + ms
        return spent


def variants(workload: Workload, device: str, *, ablate: bool) -> dict[str, Make | str]:
    """Everything that can compute a workload, or why it cannot here."""
    gpu = device == "cuda"
    if workload.nodes:
        return {"B1": partial(Nodes, shared=False), OURS: partial(Nodes, shared=True)}
    flex = partial(Packed, shared=True, compiled=True, flex=True)
    makes: dict[str, Make | str] = {
        "B0": Padded,
        "B0c": partial(Padded, checkpoint=True),
        "B1": Packed,
        "B1c": partial(Packed, checkpoint=True),
        "B2": partial(Packed, compiled=True),
        "B3": flex if gpu else "FlexAttention has no backward on a CPU",
        "B3'": partial(Packed, shared=True, compiled=gpu),
        OURS: Smbfast,
    }
    if ablate:
        makes[f"{OURS} merged target"] = partial(Smbfast, form="merged")
        for what in ("mlp", "full"):
            makes[f"{OURS} recompute {what}"] = partial(Smbfast, recompute=what)
        for op in PLAIN_OPS:
            makes[f"{OURS} torch {op}"] = partial(Smbfast, plain=(op,))
        merged = partial(Smbfast, form="merged", plain=("ema_update_",))
        makes[f"{OURS} merged target, torch ema_update_"] = merged
        makes[f"{OURS} torch timeline_attention"] = "its reference holds the scores of all pairs"
    return makes


def num_runnable(makes: dict[str, Make | str]) -> int:
    """Variants that are built and compared; the others are the reason why not."""
    return sum(not isinstance(make, str) for make in makes.values())


def measure(
    workload: Workload,
    device: str,
    makes: dict[str, Make | str],
    rounds: int,
    advance: Advance = lambda num_tokens: None,
) -> list[Result]:
    """All variants of a workload. What is wrong is not timed.

    Args:
        advance: is called with the workload's tokens for each variant that was compared, and with
            those of all of them after each round.
    """
    registry.load(device)  # with the formulas that count what they compute
    encoder = workload.size.encoder(device)
    tolerance = TOLERANCE[encoder.head_VD.dtype]
    reference = (NodesReference if workload.nodes else Reference)(twin(encoder))
    expected = outcome(reference, workload)
    del reference
    results, ready, teacher = [], {}, None
    for name, make in makes.items():
        result = Result(workload, name, tolerance)
        results.append(result)
        if isinstance(make, str):
            result.reason = make
            continue
        lent = {"teacher": teacher} if name in RIVALS and not workload.nodes else {}
        try:
            variant = make(twin(encoder), **lent)
            teacher = variant.teacher if lent else teacher
            _prepare(variant, workload, result, expected)
            ready[name] = variant
        except torch.OutOfMemoryError:
            result.reason = "not enough memory"
        except Exception as error:  # what one rival cannot do must not end the run of all others
            first = str(error).strip().partition("\n")[0]
            result.reason = f"failed: {type(error).__name__}: {first[:160]}"
        if result.wrong:
            ready.pop(name, None)
            result.reason = f"wrong: {result.wrong}"
        advance(workload.num_tokens)
    order, draw = list(ready), random.Random(0)
    by_name = {r.variant: r for r in results}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            gc.collect()
            parts = Parts(device)
            ready[name].step(parts)
            by_name[name].times.append(parts.read())
        advance(workload.num_tokens * num_runnable(makes))
    for name, variant in ready.items():
        by_name[name].held_mib = variant.held() / MIB
        if device == "cuda":
            by_name[name].step_mib = peak_mib(variant.step, device)
    torch._dynamo.reset()
    return results


def outcome(variant: Variant, workload: Workload) -> dict[str, Tensor]:
    """Of a slice of the workload, with a target that the online encoder has moved away from."""
    variant.update(0.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in variant.encoder.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    variant.take(workload.slice(CHECKED_TOKENS))
    return variant.outcome()


def counted(variant: Variant) -> int:
    """Operations of a step's matrix products; those of attention over visible pairs alone."""
    with FlopCounterMode(display=False, custom_mapping=causal_formulas()) as counter:
        variant.accumulate(untimed)
        variant.update(1.0)
    variant.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def causal_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of SDPA that count what a causal call sees; torch's count all pairs, or nothing."""
    formulas: dict[Any, Any] = {}
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention"):
        for end in ("", "_backward"):
            packet = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{end}")
            names = [a.name for a in packet.default._schema.arguments]
            formulas[packet] = partial(_sdpa_flops, names, bool(end))
            formulas[packet]._get_raw = True
    return formulas


def memory(workload: str, variant: str, *, quick: bool) -> float | None:
    """MiB that a step takes above what is held, in a process of its own, on a CPU."""
    command = [sys.executable, "-m", "bench.step.measure", workload, variant]
    command.append("quick" if quick else "cpu")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _prepare(
    variant: Variant, workload: Workload, result: Result, expected: dict[str, Tensor]
) -> None:
    """Count, compile, compare, warm up."""
    variant.take(workload)
    result.flops = counted(variant)  # before compilation, which hides products from the counter
    variant.ready()
    began = time.perf_counter()
    computed = outcome(variant, workload)
    result.errors = {name: difference([computed[name]], [expected[name]]) for name in expected}
    if result.wrong:
        return
    variant.take(workload)
    variant.step()
    result.first_s = time.perf_counter() - began


def _sdpa_flops(names: list[str], backward: bool, *args: Any, **kwargs: Any) -> int:
    given = dict(zip(names, args, strict=False)) | kwargs
    batch, heads, queries, head_dim = given["query"].shape
    keys = given["key"].shape[2]
    seen = queries * (queries + 1) // 2 if given.get("is_causal") else queries * keys
    return attention_flops(batch * seen, heads, head_dim, backward=backward)


def main(argv: list[str]) -> None:
    name, variant, kind = argv
    workload = workloads("cpu", quick=kind == "quick")[name]
    made = variants(workload, "cpu", ablate=True)[variant](workload.size.encoder("cpu"))
    made.take(workload)
    made.ready()
    made.step()
    print(json.dumps(peak_mib(made.step, "cpu")))


if __name__ == "__main__":
    main(sys.argv[1:])
