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
from bench.step.attention import varlen_formulas
from bench.step.catalog import OURS, Make, variants
from bench.step.nodes import NodesReference
from bench.step.variants import Reference, Variant, twin, untimed
from bench.step.workloads import Workload, workloads
from bench.timing import MIB, peak_mib
from smbfast.model.backbone import PatientEncoder

ROOT = Path(__file__).resolve().parents[2]
CHECKED_TOKENS = 1024  # longer windows are compared at this length: the reference holds much
# relative, in the Frobenius norm: of losses and hidden states, and of gradients (of all adapters
# together, and of all else)
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 1e-1)}
ELEMENTWISE = ("add_rms_norm", "qk_norm_rope", "swiglu")
MEMORY_TIMEOUT = 1800  # seconds of a process that measures memory
Advance = Callable[[int], None]  # counts tokens of trunks as done


@dataclass
class Result:
    """A variant on a workload."""

    workload: Workload
    variant: str
    tolerance: tuple[float, float]
    reason: str = ""  # why it was not measured
    linear: str = "torch"  # the backend that multiplies fp32 matrices on a CPU
    errors: dict[str, float] = field(default_factory=dict)  # from the reference, relative
    flops: int = 0  # of a step, counted
    first_s: float = 0.0  # the first step and the comparison: compilation is in them
    times: list[dict[str, float]] = field(default_factory=list)  # ms of each part, by round
    held_mib: float = 0.0  # weights, averages and moments
    step_mib: float | None = None  # what a step takes above them at its peak
    dtype: torch.dtype = torch.float32  # of its products
    ours: list[dict[str, float]] = field(default_factory=list)  # times of ours in the same rounds

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


Done = Callable[[Result, Result | None], None]


class Parts:
    """Milliseconds of the parts of a step; a part within another is not counted in that one.

    Args:
        cpu_time: of a CPU, the seconds of all its threads instead of those of the clock.
    """

    def __init__(self, device: str, *, cpu_time: bool = False) -> None:
        self.gpu = device == "cuda"
        self.clock = time.process_time if cpu_time else time.perf_counter
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
            now = self.clock()
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


def groups(names: list[str], pairs: bool) -> list[list[str]]:
    """Which variants take turns: all, or with `pairs` ours and one rival after the other."""
    if not pairs:
        return [names] if names else []
    ours, rivals = [n for n in names if n == OURS], [n for n in names if n != OURS]
    return [[*ours, name] for name in rivals] or [ours]


def num_steps(makes: dict[str, Make | str], rounds: int, *, pairs: bool = False) -> int:
    """Comparisons and steps of a workload; what is not built has none."""
    names = [name for name, make in makes.items() if not isinstance(make, str)]
    return len(names) + rounds * sum(len(group) for group in groups(names, pairs))


def measure(
    workload: Workload,
    device: str,
    makes: dict[str, Make | str],
    rounds: int,
    advance: Advance = lambda num_tokens: None,
    *,
    pairs: bool = False,
    cpu_time: bool = False,
    done: Done = lambda result, ours: None,
) -> list[Result]:
    """All variants of a workload. What is wrong is not timed; what fails ends no other variant.

    Args:
        advance: is called with the tokens of each of `num_steps`, in the order of the work.
        pairs: at most two variants are in memory at a time, ours and a rival.
        cpu_time: times are CPU seconds of the process, for a machine that does other work.
        done: is called once for each variant, as soon as there is nothing more to measure of it,
            or of ours beside the first rival; with the result of ours, if there is one.
    """
    registry.load(device)  # with the formulas that count what they compute
    fp32 = TOLERANCE[torch.float32]
    results = {name: Result(workload, name, fp32) for name in makes}
    session = _Session(workload, device, makes, results, rounds, advance)
    session.cpu_time = cpu_time
    names = []
    for name, make in makes.items():
        if isinstance(make, str):
            results[name].reason = make
            done(results[name], None)
        else:
            names.append(name)
    reported: set[str] = set()
    for group in groups(names, pairs):
        session.run(group)
        for name in group:
            if name not in reported:
                done(results[name], results.get(OURS))
        reported.update(group)
        session.free(keep=OURS if pairs else "")
    session.free()
    return list(results.values())


class _Session:
    """The variants of a workload that are in memory, and what is measured of them."""

    def __init__(
        self,
        workload: Workload,
        device: str,
        makes: dict[str, Make | str],
        results: dict[str, Result],
        rounds: int,
        advance: Advance,
    ) -> None:
        self.workload, self.device, self.makes, self.results = workload, device, makes, results
        self.rounds, self.advance = rounds, advance
        self.cpu_time = False
        self.ready: dict[str, Variant] = {}
        self.tried: set[str] = set()
        self.encoder: PatientEncoder | None = None
        self.expected: dict[str, Tensor] = {}
        self.no_reference = ""  # why there is none

    def run(self, group: list[str]) -> None:
        """Compare, count and warm up what is new in a group, then all its rounds."""
        for name in group:
            if name not in self.tried:
                self.tried.add(name)
                self._prepare(name)
                self.advance(self.workload.num_tokens)
        ours = self.results.get(OURS)
        before = len(ours.times) if ours else 0
        order, draw = list(group), random.Random(0)
        for _ in range(self.rounds):
            draw.shuffle(order)
            for name in order:
                if name in self.ready:
                    self._step(name)
            self.advance(self.workload.num_tokens * len(group))
        for name in group:
            result = self.results[name]
            if ours and name != OURS:
                result.ours = ours.times[before:]
            if name in self.ready and not result.held_mib:
                self._weigh(name)

    def free(self, *, keep: str = "") -> None:
        """Give back what all variants but one hold."""
        for name in [n for n in self.ready if n != keep]:
            del self.ready[name]
        torch._dynamo.reset()  # compiled layers hold their weights
        self._collect()

    def _collect(self) -> None:
        """Also what a variant that failed has left behind."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, name: str) -> None:
        self._collect()
        result = self.results[name]
        with self._guarded(name):
            self._compare_with()
            variant = self.makes[name](twin(self.encoder))  # type: ignore[operator]
            result.dtype, result.tolerance = variant.dtype, TOLERANCE[variant.dtype]
            result.linear = getattr(variant, "backends", {}).get("linear", result.linear)
            with variant.arithmetic():
                _prepare(variant, self.workload, result, self.expected)
            if result.wrong:
                result.reason = f"wrong: {result.wrong}"
            else:
                self.ready[name] = variant

    def _compare_with(self) -> None:
        """The encoder of the workload, and what every variant has to reproduce; computed once.

        Raises:
            RuntimeError: there is no reference here, now or when it was first asked for.
        """
        if self.no_reference:
            raise RuntimeError(self.no_reference)
        if self.expected:
            return
        try:
            self.encoder = self.workload.size.encoder(self.device)
            kind = NodesReference if self.workload.nodes else Reference
            checked = self.workload.slice(CHECKED_TOKENS, micro=1)  # the reference holds much
            self.expected = outcome(kind(twin(self.encoder)), checked)
        except Exception as error:
            self.no_reference = f"no reference: {_first_line(error)}"
            raise RuntimeError(self.no_reference) from None
        finally:
            self._collect()

    def _step(self, name: str) -> None:
        with self._guarded(name), self.ready[name].arithmetic():
            gc.collect()
            parts = Parts(self.device, cpu_time=self.cpu_time)
            self.ready[name].step(parts)
            self.results[name].times.append(parts.read())

    def _weigh(self, name: str) -> None:
        result, variant = self.results[name], self.ready[name]
        with self._guarded(name), variant.arithmetic():
            result.held_mib = variant.held() / MIB
            if self.device == "cuda":
                result.step_mib = peak_mib(variant.step, self.device)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """What a variant cannot do becomes its reason: it must not end the run of all others."""
        try:
            yield
            return
        except torch.OutOfMemoryError:
            # of a rival this is a result; ours has to fit
            reason = "failed: not enough memory" if name == OURS else "not enough memory"
        except Exception as error:
            reason = f"failed: {_first_line(error)}"
        result = self.results[name]
        if result.times:
            reason += f", after {len(result.times)} rounds"
        result.reason, result.times = reason, []
        self.ready.pop(name, None)


def _first_line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:160]}"


def outcome(variant: Variant, workload: Workload) -> dict[str, Tensor]:
    """Of a small workload, with a target that the online encoder has moved away from."""
    variant.update(0.0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in variant.encoder.named_parameters():
            if parameter.requires_grad and name.startswith("lm."):
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    variant.take(workload)
    return variant.outcome()


def counted(variant: Variant) -> int:
    """Operations of a step's matrix products; those of attention over visible pairs alone."""
    formulas = {**causal_formulas(), **_no_formulas()}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        variant.accumulate(untimed)
        variant.update(1.0)
    variant.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def causal_formulas() -> dict[Any, Callable[..., int]]:
    """Formulas of attention that count what a causal call sees; torch's count all, or nothing."""
    formulas: dict[Any, Any] = varlen_formulas()
    for kind in ("flash_attention_for_cpu", "flash_attention", "efficient_attention"):
        for end in ("", "_backward"):
            packet = getattr(torch.ops.aten, f"_scaled_dot_product_{kind}{end}")
            names = [a.name for a in packet.default._schema.arguments]
            formulas[packet] = partial(_sdpa_flops, names, bool(end))
            formulas[packet]._get_raw = True
    return formulas


def _no_formulas() -> dict[Any, Callable[..., int]]:
    """Of our operations that multiply no matrices: what others write for them is not counted."""
    formulas: dict[Any, Any] = {}
    for name, op in registry.OPS.items():
        if name not in ELEMENTWISE:
            continue
        for backend in op.backends:
            for end in ("", "_bwd"):
                packet = getattr(torch.ops.smb, f"{name}_{backend.name}{end}", None)
                if packet is not None:
                    formulas[packet] = lambda *_args, **_kwargs: 0
    return formulas


def memory(workload: str, variant: str, *, quick: bool) -> float | None:
    """MiB that a step takes above what is held, in a process of its own, on a CPU."""
    command = [sys.executable, "-m", "bench.step.measure", workload, variant]
    command.append("quick" if quick else "cpu")
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=MEMORY_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _prepare(
    variant: Variant, workload: Workload, result: Result, expected: dict[str, Tensor]
) -> None:
    """Count, compile, compare, warm up."""
    variant.take(workload)
    result.flops = counted(variant)  # before compilation, which hides products from the counter
    variant.ready()
    began = time.perf_counter()
    computed = outcome(variant, workload.slice(CHECKED_TOKENS, micro=workload.micro))
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
    with made.arithmetic():
        made.take(workload)
        made.ready()
        made.step()
        print(json.dumps(peak_mib(made.step, "cpu")))


if __name__ == "__main__":
    main(sys.argv[1:])
