"""Every backend of every operation against fp64, at small odd shapes, in poisoned memory.

M masked positions, T tokens, D width, V vocabulary, N rows, R new tokens.
"""

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from smbkernels.attention import Segments
from smbkernels.ema import join
from smbkernels.registry import OPS
from torch import Tensor

from bench import cases
from bench.cases import Inputs
from bench.gpu.child import Bench, Item
from bench.gpu.journal import ABSENT, WRONG
from bench.measure import difference

# a row of a result may be further off than all rows together are: there is less to average over
ROW = 4.0
MADE_BY, ODD = ("T", "dtype", "device"), 77
Makes = dict[str, Callable[[], Inputs]]


def items(bench: Bench) -> list[Item]:
    """Each backend of each operation, those of a call without a choice first."""
    pairs = [(name, b.name) for name, entry in OPS.items() for b in entry.backends]
    return [
        Item(f"{op}/{backend}", partial(_compared, bench, op, backend), 60) for op, backend in pairs
    ]


def _compared(bench: Bench, op: str, backend: str) -> dict[str, Any]:
    """A backend in every case that it can take."""
    reason = OPS[op].status(bench.device)[backend]
    if reason != "ok":
        return {"state": ABSENT, "reason": reason}
    rows = []
    for name, make in small(op, bench.device).items():
        torch.manual_seed(0)
        inputs = make()
        fits = next(b.fits for b in OPS[op].backends if b.name == backend)
        refusal = fits(*inputs.args, **inputs.kwargs)
        rows.append(
            {"case": name, "refused": refusal} if refusal else _case(bench, op, backend, inputs)
        )
        rows[-1]["case"] = name
    judged = [row for row in rows if "right" in row]
    if not judged:
        return {"state": ABSENT, "reason": "it takes none of the cases", "cases": rows}
    bad = [row["case"] for row in judged if not row["right"]]
    wrong = {"state": WRONG, "reason": f"wrong in {', '.join(bad)}"} if bad else {}
    return {"cases": rows, **wrong}


def _case(bench: Bench, op: str, backend: str, inputs: Inputs) -> dict[str, Any]:
    exact = truth(op, inputs)
    eager = inputs.outcome(OPS[op].reference)
    poison(bench.sizes.poison, bench.device)
    fast = inputs.outcome(OPS[op].on(backend))
    bench.wait()
    error, allowed = difference(fast, exact), difference(eager, exact)
    row, row_allowed = worst_row(fast, exact), worst_row(eager, exact)
    # written so that a NaN is not right; the reference of the same dtype rounds as well
    right = error <= allowed + inputs.tol and row <= row_allowed + ROW * inputs.tol
    figures = {"error": error, "reference": allowed, "row": row, "reference_row": row_allowed}
    return {**figures, "tolerance": inputs.tol, "right": right}


def truth(op: str, inputs: Inputs) -> list[Tensor]:
    """Values and gradients of the reference in fp64, of the same inputs."""
    if inputs.fresh is not None:
        args, kwargs, _ = inputs.fresh()
        remainder = kwargs.get("remainder")
        average = (
            args[0]
            if remainder is None
            else [join(*t) for t in zip(args[0], remainder, strict=True)]
        )
        args = wide((average, *args[1:]), {})
        OPS[op].reference(*args, **{**kwargs, "remainder": None})
        return list(args[0])
    made: dict[int, Tensor] = {}
    exact = replace(
        inputs,
        args=wide(inputs.args, made),
        kwargs=wide(inputs.kwargs, made),
        leaves=[made[id(t)] for t in inputs.leaves],
        cotangents=wide(inputs.cotangents, made),
    )
    return exact.outcome(OPS[op].reference)


def wide(value: Any, made: dict[int, Tensor]) -> Any:
    """Copies in fp64 of the floating tensors in a value; `made` has them by the id of theirs."""
    if isinstance(value, Tensor) and value.is_floating_point():
        if id(value) not in made:
            made[id(value)] = value.detach().double().clone().requires_grad_(value.requires_grad)
        return made[id(value)]
    if isinstance(value, dict):
        return {name: wide(x, made) for name, x in value.items()}
    if type(value) in (list, tuple):
        return type(value)(wide(x, made) for x in value)
    return value


def worst_row(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a row, relative to its norm or the mean one; infinite if not finite."""
    worst = 0.0
    for x, y in zip(actual, expected, strict=True):
        if not y.dim() or not y.numel():
            continue
        gap, norm = ((t.double().reshape(len(y), -1)).norm(dim=1) for t in (x.double() - y, y))
        error = float((gap / norm.clamp_min(norm.square().mean().sqrt()).clamp_min(1e-300)).max())
        worst = max(worst, error) if error == error else float("inf")
    return worst


def poison(nbytes: int, device: str) -> None:
    """Fill memory with NaN and give it back, so that what is allocated next and not written shows.

    Blocks of many sizes, since allocators hand out what fits best.
    """
    blocks, size = [], 1 << 12
    while size <= nbytes:
        times = max(1, min(256, nbytes // (16 * size)))
        blocks += [torch.full((size // 4,), torch.nan, device=device) for _ in range(times)]
        size *= 4
    del blocks


def small(op: str, device: str) -> Makes:
    """Cases of an operation: those below, or what `bench.cases` has for it.

    There, inputs made by `<operation>(T, dtype, device)` can be of an odd number of tokens; others
    are of the shapes of the quick cases.
    """
    if op in OWN:
        return OWN[op](device)
    make = getattr(cases, op, None)
    first = list(inspect.signature(make).parameters)[: len(MADE_BY)] if make else []
    if make and first == list(MADE_BY):
        return _both(f"{ODD} tokens", lambda dtype: make(ODD, dtype, device))
    return {c.name: c.make for c in cases.on(device, quick=True) if c.op == op}


def _both(name: str, make: Callable[[torch.dtype], Inputs]) -> Makes:
    """In fp32 and in bf16."""
    return {
        f"{name} {str(dtype).removeprefix('torch.')}": partial(make, dtype)
        for dtype in (torch.float32, torch.bfloat16)
    }


def _averages(device: str) -> Makes:
    shapes = [(33, 65), (129, 17), (1, 300)]
    make = partial(cases.ema_update_, shapes, device)
    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "halves": partial(make, weight_dtype=bf16, halves=True),
        "fp32": partial(make, weight_dtype=fp32, halves=False),
        "no adapter": partial(make, weight_dtype=bf16, halves=True, adapter=False),
    }


def _heads(device: str) -> Makes:
    def trained(dtype: torch.dtype) -> Inputs:
        return cases.linear_cross_entropy(77, 104, 1003, dtype, device, trained=True)

    def frozen(dtype: torch.dtype) -> Inputs:
        return cases.linear_cross_entropy(131, 72, 517, dtype, device, trained=False)

    def tokens(dtype: torch.dtype) -> Inputs:
        """New tokens that are trained beside a frozen head."""
        given = frozen(dtype)
        hidden_ND, weight_VD, label_N = given.args
        token_R = torch.tensor([0, 3, 516], device=device)
        own_RD = weight_VD[token_R].detach().float() * 0.5
        args = (hidden_ND, weight_VD, label_N, token_R, own_RD.requires_grad_())
        return replace(given, args=args, leaves=[hidden_ND, args[-1]])

    return {**_both("trained", trained), **_both("frozen", frozen), **_both("new tokens", tokens)}


def _linears(device: str) -> Makes:
    def one(dtype: torch.dtype) -> Inputs:
        return cases.lora_linear([(136, 264)], 77, dtype, device)

    def three(dtype: torch.dtype) -> Inputs:
        return cases.lora_linear([(264, 520), (72, 520), (72, 520)], 129, dtype, device)

    return {**_both("one", one), **_both("three", three)}


def _errors(device: str) -> Makes:
    def normed(dtype: torch.dtype) -> Inputs:
        return cases.masked_jepa_mse(77, dtype, device, norm=True, D=260)

    def plain(dtype: torch.dtype) -> Inputs:
        return cases.masked_jepa_mse(3, dtype, device, norm=False, D=1031)

    return {**_both("normed", normed), **_both("plain", plain)}


def _attentions(device: str) -> Makes:
    def make(shape: tuple[int, int, list[int], int], head_dim: int, dtype: torch.dtype) -> Inputs:
        heads, kv_heads = (8, 2) if device == "cuda" else (2, 1)  # fewer where a CPU rehearses
        of = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        return cases.timeline_attention(*shape, dtype, device, **of)

    def ragged(dtype: torch.dtype) -> Inputs:
        """Trunks of several lengths, with three branches, one and none."""
        trunks: list[tuple[int, list[tuple[int, int]]]] = [
            *((65, [(65, 63), (1, 1), (64, 5)]), (64, []), (1, [(1, 1)])),
            *((200, [(130, 129)]), (7, [])),
        ]
        columns, at = [], 0
        for length, branches in trunks:
            trunk = at
            for prefix, own in [(0, length), *branches]:
                columns.append((at, own, trunk, prefix))
                at += own
        segments = Segments.of(*torch.tensor(columns).T)
        given = make((at, 1, [], 1), 128, dtype)
        return replace(given, args=(*given.args[:3], segments.to(device)))

    short, long = (65, 3, [64, 1, 33], 63), (301, 1, [301, 150], 130)
    return {
        **_both("short", partial(make, short, 64)),
        **_both("long", partial(make, long, 128)),
        **_both("ragged", ragged),
    }


OWN: dict[str, Callable[[str], Makes]] = {
    "ema_update_": _averages,
    "linear_cross_entropy": _heads,
    "lora_linear": _linears,
    "masked_jepa_mse": _errors,
    "timeline_attention": _attentions,
}
