"""Pieces of a step that have rivals within the project, side by side: attention, truncation, g.

M matrices, N out, K in features, Q columns held, D width, T tokens, H heads, C head dim.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from smbkernels import tracked_ema
from smbkernels.attention import attention_flops
from smbkernels.registry import OPS

from bench.gpu.child import Bench, Item, reason_of
from bench.gpu.journal import FAILED
from bench.gpu.sizes import with_layers, workload
from bench.measure import difference
from bench.timing import Clock

Calls = dict[str, Callable[[], object]]


def items(bench: Bench) -> list[Item]:
    """Attention on both workloads, then what is small."""
    return [
        *(Item(f"attention/{w}", partial(_attention, bench, w), 40) for w in ("W1", "W2")),
        Item("truncation", partial(_truncation, bench), 30),
        Item("predictor", partial(_predictor, bench), 30),
    ]


def _attention(bench: Bench, name: str) -> dict[str, Any]:
    """Every engine that is right, forward and with its backward, on the row of a micro-batch."""
    op, (H, G, C) = OPS["timeline_attention"], bench.sizes.heads
    segments = workload(name, bench.device).batches()[0].segments.to(bench.device)
    T, shape = segments.tokens, {"device": bench.device, "dtype": bench.sizes.dtype}
    leaves = [torch.randn(T, n, C, **shape).requires_grad_() for n in (H, G, G)]
    grad_THC = torch.randn(T, H, C, **shape)
    work = {b: attention_flops(segments.pairs, H, C, backward=b) / 1e12 for b in (False, True)}
    calls: Calls = {}
    figures: dict[str, Any] = {"tokens": T, "pairs": segments.pairs, "engines": {}}
    outcomes: dict[str, list[torch.Tensor]] = {}
    for engine, status in op.status(bench.device).items():
        if engine == "torch":
            continue  # it holds the scores of all pairs
        reason = "" if status == "ok" else status
        if engine in bench.refused.get(op.name, []):
            reason = "refused by stage ops"
        function = None if reason else op.on(engine)
        try:
            if function is not None:
                out_THC, _ = function(*leaves, segments)
                outcomes[engine] = [
                    out_THC.detach(),
                    *torch.autograd.grad(out_THC, leaves, grad_THC),
                ]
        except Exception as error:
            reason = reason_of(error)
        if reason or function is None:
            figures["engines"][engine] = {"reason": reason}
            continue
        calls[f"{engine} forward"] = partial(_forward, function, leaves, segments)
        calls[f"{engine} both"] = partial(_both, function, leaves, segments, grad_THC)
    first = next(iter(outcomes.values()), [])
    gaps = {engine: difference(outcome, first) for engine, outcome in outcomes.items()}
    outcomes.clear()
    if not calls:
        return figures | {"state": FAILED, "reason": "no engine runs"}
    times = _timed(bench, calls)
    for engine, gap in gaps.items():
        forward, both = times[f"{engine} forward"], times[f"{engine} both"]
        figures["engines"][engine] = {
            "ms_forward": forward,
            "ms_both": both,
            "tflop_per_s_forward": work[False] / forward * 1e3,
            "tflop_per_s_backward": work[True] / max(both - forward, 1e-6) * 1e3,
            "from_the_first": gap,
        }
    return figures


def _forward(function: Callable, leaves: list, segments: Any) -> object:
    with torch.no_grad():
        return function(*leaves, segments)


def _both(function: Callable, leaves: list, segments: Any, grad_THC: torch.Tensor) -> object:
    return torch.autograd.grad(function(*leaves, segments)[0], leaves, grad_THC)


def _timed(bench: Bench, calls: Calls, seconds: float = 4.0) -> dict[str, float]:
    """Medians in milliseconds, the calls in turn."""
    spent = Clock(bench.device).interleaved(calls, seconds=min(seconds, bench.sizes.seconds * 2))
    return {name: timing.p50 for name, timing in spent.items()}


def _truncation(bench: Bench) -> dict[str, Any]:
    """All matrices of the model, by each way that `tracked_ema` has, and eigenvectors alone."""
    Q, R = bench.sizes.held
    shape = {"device": bench.device}
    groups = [
        (torch.randn(M, N, Q, **shape), torch.randn(M, Q, K, **shape) / K**0.5)
        for M, N, K in bench.sizes.factors
    ]
    gram = torch.cat([(v @ v.mT).double() for _, v in groups])
    calls: Calls = {"eigh alone": lambda: torch.linalg.eigh(gram)}
    ways = {n: f for n, f in vars(tracked_ema).items() if n.startswith("truncate") and callable(f)}
    for name, function in ways.items():
        calls[name] = partial(_truncated, function, groups, R)
    times = _timed(bench, calls)
    return {
        "ms": times,
        "matrices": len(gram),
        "columns": Q,
        "left": R,
        "signatures": {name: str(inspect.signature(function)) for name, function in ways.items()},
    }


def _truncated(function: Callable, groups: list, R: int) -> None:
    """Of copies, since it works in place: a copy is read and written once."""
    for u_MNQ, v_MQK in groups:
        function(u_MNQ.clone(), v_MQK.clone(), R)


def _predictor(bench: Bench) -> dict[str, Any]:
    """Forward and backward in fp32, and with the fewer bits that TF32 has for its products."""
    size = with_layers(workload("W1", bench.device).size, 1)
    g = size.encoder(bench.device).predictor
    x_TD = torch.randn(bench.sizes.predicted, size.width, device=bench.device)
    parameters = list(g.parameters())
    before = torch.get_float32_matmul_precision()

    def both(precision: str) -> list[torch.Tensor]:
        torch.set_float32_matmul_precision(precision)
        try:
            out_TD = g(x_TD)
            return [out_TD.detach(), *torch.autograd.grad(out_TD.square().mean(), parameters)]
        finally:
            torch.set_float32_matmul_precision(before)

    times = _timed(bench, {p: partial(both, p) for p in ("highest", "high")})
    gap = difference(both("high"), both("highest"))
    return {"ms": times, "rows": len(x_TD), "high_from_highest": gap}
