"""The shapes that are measured, with the bytes and operations counted for each.

A case holds inputs and everything that computes the same from them: the reference, what the
registry has beside it, and rivals that are not ours. Shapes are those of Qwen3-8B (width 4096,
32 query and 8 key/value heads of 128, MLP 12288, rank 16, vocabulary 151936): bf16 at the size of a
training step on a GPU; fp32 and fewer tokens on a CPU.

M masked positions, D width, T tokens, N out and K in features, R rank, H heads, G key and value
heads, C head dim, F width of the MLP, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from smbkernels.attention import Segments, attention_flops
from smbkernels.cross_entropy import head_flops
from smbkernels.ema import join
from smbkernels.lora import lora_flops
from smbkernels.registry import OPS, REFERENCE
from torch import Tensor

from bench import rivals

FORWARD, BOTH, UPDATE = "forward", "forward+backward", "update"
HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM, RANK, LAYERS = 4096, 12288, 32, 8, 128, 16, 36
VOCABULARY = 151936
LINEARS = {
    "q": (HIDDEN, HIDDEN),
    "k": (1024, HIDDEN),
    "v": (1024, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (MLP, HIDDEN),
    "up": (MLP, HIDDEN),
    "down": (HIDDEN, MLP),
}
REFERENCE_SCORES = 1 << 27  # bytes of [H, T, T] above which the reference is not run


@dataclass
class Inputs:
    """What a case is measured on.

    `leaves` get gradients; `outputs` picks, from a result, the tensors that `cotangents` belong to
    (None: a scalar loss). `fresh` makes copies of small inputs for an operation that works in
    place, and the tensors to compare after it.
    """

    args: tuple
    kwargs: dict
    modes: dict[str, tuple[int, int]]  # bytes and operations of each mode
    tol: float  # relative (Frobenius) difference from the baseline
    leaves: list[Tensor] = field(default_factory=list)
    outputs: Callable[..., list[Tensor]] = lambda result: [result]
    cotangents: list[Tensor] | None = None
    fresh: Callable[[], tuple[tuple, dict, Callable[[], list[Tensor]]]] | None = None
    rivals: dict[str, Callable | str] = field(default_factory=dict)  # or why it is not run
    baseline: str = "eager"
    unchecked: tuple[str, ...] = ()  # rivals that compute less on purpose
    graph: bool = True  # a CUDA graph may be made of a call

    def call(self, function: Callable, mode: str) -> Callable[[], object]:
        """A call of an implementation, with its backward pass in that mode."""
        if mode == UPDATE:
            return lambda: function(*self.args, **self.kwargs)

        def forward() -> object:
            with torch.no_grad():
                return function(*self.args, **self.kwargs)

        def both() -> object:
            outputs = self.outputs(function(*self.args, **self.kwargs))
            return torch.autograd.grad(outputs, self.leaves, self.cotangents, allow_unused=True)

        return forward if mode == FORWARD else both

    def outcome(self, function: Callable) -> list[Tensor]:
        """Values and gradients, to be compared between implementations."""
        if self.fresh is not None:
            args, kwargs, read = self.fresh()
            function(*args, **kwargs)
            return read()
        outputs = self.outputs(function(*self.args, **self.kwargs))
        grads = torch.autograd.grad(outputs, self.leaves, self.cotangents)
        return [t.detach() for t in (*outputs, *grads)]


@dataclass(frozen=True)
class Case:
    """One operation at one shape."""

    op: str
    name: str
    device: str
    dtype: torch.dtype
    shape: dict[str, int]
    make: Callable[[], Inputs]
    quick: bool = False  # measured with --quick as well
    compiled: bool = True  # torch.compile is measured too: seconds for each shape


def masked_jepa_mse(
    M: int, dtype: torch.dtype, device: str, *, norm: bool, D: int = HIDDEN
) -> Inputs:
    T = 2 * M
    prediction_MD = torch.randn(M, D, device=device, dtype=dtype, requires_grad=True)
    target_TD = torch.randn(T, D, device=device, dtype=dtype)
    row_M = torch.randperm(T, device=device)[:M].sort().values
    weight_D = torch.rand(D, device=device, dtype=dtype) + 0.5 if norm else None
    read = 2 * M * D * dtype.itemsize + 8 * M
    flops = OPS["masked_jepa_mse"].flops(prediction_MD)
    return Inputs(
        (prediction_MD, target_TD, row_M, weight_D),
        {"scale": 1.0 / M},
        {FORWARD: (read, flops), BOTH: (read + M * D * dtype.itemsize, flops)},
        tol=1e-5 if dtype == torch.float32 else 1e-2,
        leaves=[prediction_MD],
    )


def ema_update_(
    shapes: list[tuple[int, int]],
    device: str,
    *,
    weight_dtype: torch.dtype,
    halves: bool,
    adapter: bool = True,
    rank: int = RANK,
) -> Inputs:
    weight, average, remainder, b, a = [], [], [], [], []
    for n, k in shapes:
        weight.append(torch.randn(n, k, device=device, dtype=weight_dtype) * 0.02)
        # a bf16 weight is its own high half with remainder 0; drift comes with the updates
        average.append(weight[-1].to(torch.bfloat16 if halves else torch.float32, copy=True))
        if halves:
            remainder.append(torch.zeros(n, k, device=device, dtype=torch.int16))
        if adapter:
            b.append(torch.randn(n, rank, device=device) * 0.02)
            a.append(torch.randn(rank, k, device=device) * 0.02)
    scale = [2.0] * len(shapes)
    pair = (b, a) if adapter else (None, None)
    kwargs = {"remainder": remainder if halves else None, "scale": scale, "tau": 0.996}
    moved = sum(w.numel() * (8 + weight_dtype.itemsize) for w in weight)
    moved += sum(t.numel() * t.element_size() for t in (*b, *a))
    few = slice(0, len(LINEARS))

    def fresh() -> tuple[tuple, dict, Callable[[], list[Tensor]]]:
        own = [t.clone() for t in average[few]]
        low = [t.clone() for t in remainder[few]]
        args = (own, weight[few], *(p[few] if p else None for p in pair))
        options = {**kwargs, "remainder": low if halves else None, "scale": scale[few]}
        read = lambda: [join(*t) for t in zip(own, low, strict=True)] if halves else own  # noqa: E731
        return args, options, read

    return Inputs(
        (average, weight, *pair),
        kwargs,
        {UPDATE: (moved, OPS["ema_update_"].flops(average, weight, *pair))},
        tol=1e-6,
        fresh=fresh,
        rivals=rivals.averages(halves=halves),
        graph=False,  # addresses of the matrices are copied from the host
        # with halves the rivals keep a master of their own
        unchecked=(rivals.ADDMM_LERP, rivals.FOREACH_LERP) if halves else (),
    )


def timeline_attention(
    S: int,
    timelines: int,
    prefixes: list[int],
    branch: int,
    dtype: torch.dtype,
    device: str,
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> Inputs:
    """`timelines` trunks of S tokens, each with a branch of the same length per prefix."""
    start, length, trunk_start, prefix, row = [], [], [], [], 0
    for _ in range(timelines):
        trunk = row
        for size, seen in [(S, 0), *((branch, p) for p in prefixes)]:
            start.append(row)
            length.append(size)
            trunk_start.append(trunk)
            prefix.append(seen)
            row += size
    segments = Segments.of(*(torch.tensor(c) for c in (start, length, trunk_start, prefix)))

    def normal(num_heads: int) -> Tensor:
        return torch.randn(row, num_heads, head_dim, device=device, dtype=dtype)

    query, key, value = (normal(n).requires_grad_() for n in (heads, kv_heads, kv_heads))
    q_bytes, kv_bytes = (t.numel() * dtype.itemsize for t in (query, key))
    read = 2 * q_bytes + 2 * kv_bytes + 4 * heads * row  # q, out; k, v; lse
    both = read + 4 * q_bytes + 4 * kv_bytes + 4 * heads * row  # q, out, d out, dq; k, v, dk, dv
    forward_flops = attention_flops(segments.pairs, heads, head_dim)
    backward_flops = attention_flops(segments.pairs, heads, head_dim, backward=True)
    scores = 4 * heads * row**2
    dense = scores <= REFERENCE_SCORES
    others = rivals.attentions(segments, device)
    if not dense:
        others[REFERENCE] = f"its scores are [{heads}, {row}, {row}], {scores / 2**30:.1f} GiB each"
    return Inputs(
        (query, key, value, segments.to(device)),
        {},
        {FORWARD: (read, forward_flops), BOTH: (both, forward_flops + backward_flops)},
        tol=1e-4 if dtype == torch.float32 else 2e-2,
        leaves=[query, key, value],
        outputs=lambda result: [result[0]],
        cotangents=[normal(heads)],
        rivals=others,
        baseline="eager" if dense else rivals.BY_SEGMENT,
    )


def lora_linear(
    shapes: list[tuple[int, int]], T: int, dtype: torch.dtype, device: str, *, rank: int = RANK
) -> Inputs:
    K = shapes[0][1]
    x_TK = torch.randn(T, K, device=device, dtype=dtype, requires_grad=True)
    weight = [torch.randn(n, k, device=device, dtype=dtype) * k**-0.5 for n, k in shapes]
    b = [(torch.randn(n, rank, device=device) * 0.02).requires_grad_() for n, _ in shapes]
    a = [(torch.randn(rank, k, device=device) * k**-0.5).requires_grad_() for _, k in shapes]
    outputs = sum(n for n, _ in shapes)
    frozen = sum(n * k for n, k in shapes)
    low = 4 * sum(rank * (n + k) for n, k in shapes)
    read = dtype.itemsize * (T * K + frozen + T * outputs) + low
    flops = [lora_flops(T, shapes, [rank] * len(shapes), backward=back) for back in (False, True)]
    return Inputs(
        (x_TK, weight, b, a),
        {"scale": [2.0] * len(shapes)},
        # backward reads x, d y and the weights, and writes d x, d a and d b
        {FORWARD: (read, flops[0]), BOTH: (2 * read + dtype.itemsize * T * K + low, sum(flops))},
        tol=1e-4 if dtype == torch.float32 else 2e-2,
        leaves=[x_TK, *b, *a],
        outputs=list,
        cotangents=[torch.randn(T, n, device=device, dtype=dtype) for n, _ in shapes],
        rivals={"base GEMM alone": rivals.base_alone},
        unchecked=("base GEMM alone",),
    )


def linear(T: int, N: int, K: int, dtype: torch.dtype, device: str) -> Inputs:
    x_TK = torch.randn(T, K, device=device, dtype=dtype, requires_grad=True)
    weight_NK = (torch.randn(N, K, device=device, dtype=dtype) * K**-0.5).requires_grad_()
    nbytes, flops = dtype.itemsize * (T * K + N * K + T * N), 2 * T * N * K
    return Inputs(
        (x_TK, weight_NK),
        {},
        # backward reads d y, and x and W again, and writes a gradient of each
        {FORWARD: (nbytes, flops), BOTH: (3 * nbytes, 3 * flops)},
        tol=1e-5 if dtype == torch.float32 else 1e-2,
        leaves=[x_TK, weight_NK],
        cotangents=[torch.randn(T, N, device=device, dtype=dtype)],
        rivals=rivals.linears(device),
    )


def linear_cross_entropy(
    T: int, D: int, V: int, dtype: torch.dtype, device: str, *, trained: bool
) -> Inputs:
    hidden_TD = torch.randn(T, D, device=device, dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(V, D, device=device, dtype=dtype) * D**-0.5
    weight_VD.requires_grad_(trained)
    label_T = torch.randint(V, (T,), device=device)
    read = dtype.itemsize * (T * D + V * D) + 8 * T
    written = dtype.itemsize * (T * D + trained * V * D)
    flops = [
        head_flops(T, D, V, hidden=g, weight=g and trained, tokens=False) for g in (False, True)
    ]
    return Inputs(
        (hidden_TD, weight_VD, label_T),
        {"scale": 1.0 / T},
        {FORWARD: (read, flops[0]), BOTH: (read + written, flops[1])},
        tol=1e-5 if dtype == torch.float32 else 1e-2,
        leaves=[hidden_TD, weight_VD] if trained else [hidden_TD],
        rivals=rivals.heads(device),
    )


def add_rms_norm(T: int, dtype: torch.dtype, device: str, *, D: int = HIDDEN) -> Inputs:
    x_TD, residual_TD, *cotangents = (
        torch.randn(T, D, device=device, dtype=dtype) for _ in range(4)
    )
    args = (x_TD.requires_grad_(), residual_TD.requires_grad_(), _norm_weight(D, dtype, device))
    nbytes = T * D * dtype.itemsize
    flops = OPS["add_rms_norm"].flops(*args)
    return Inputs(
        args,
        {"eps": 1e-6},
        # reads and writes two; backward reads both gradients and the sum, writes one gradient
        {FORWARD: (4 * nbytes, flops), BOTH: (8 * nbytes, flops + 8 * T * D)},
        tol=1e-5 if dtype == torch.float32 else 1e-2,
        leaves=[x_TD, residual_TD],
        outputs=list,
        cotangents=cotangents,
        rivals=rivals.norms(device),
    )


def qk_norm_rope(
    T: int,
    dtype: torch.dtype,
    device: str,
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
) -> Inputs:
    def normal(num_heads: int) -> Tensor:
        return torch.randn(T, num_heads, head_dim, device=device, dtype=dtype)

    q_THC, k_TGC = normal(heads).requires_grad_(), normal(kv_heads).requires_grad_()
    angle_TC = torch.randn(T, head_dim // 2, device=device).repeat(1, 2)
    weights = [_norm_weight(head_dim, dtype, device) for _ in range(2)]
    args = (q_THC, k_TGC, *weights, angle_TC.cos().to(dtype), angle_TC.sin().to(dtype))
    elements = q_THC.numel() + k_TGC.numel()
    angles = 2 * angle_TC.numel() * dtype.itemsize
    flops = OPS["qk_norm_rope"].flops(*args)
    moved = 2 * elements * dtype.itemsize + angles
    return Inputs(
        args,
        {},
        # backward reads gradients and what was normed, writes gradients
        {
            FORWARD: (moved, flops),
            BOTH: (2 * moved + elements * dtype.itemsize, flops + 12 * elements),
        },
        tol=1e-5 if dtype == torch.float32 else 1e-2,
        leaves=[q_THC, k_TGC],
        outputs=list,
        cotangents=[normal(heads), normal(kv_heads)],
        rivals=rivals.turned_heads(device),
    )


def swiglu(T: int, dtype: torch.dtype, device: str, *, F: int = MLP) -> Inputs:
    gate_TF, up_TF, grad_TF = (torch.randn(T, F, device=device, dtype=dtype) for _ in range(3))
    nbytes = T * F * dtype.itemsize
    flops = OPS["swiglu"].flops(gate_TF, up_TF)
    return Inputs(
        (gate_TF.requires_grad_(), up_TF.requires_grad_()),
        {},
        # reads two, writes one; backward reads three, writes two
        {FORWARD: (3 * nbytes, flops), BOTH: (8 * nbytes, flops + 7 * T * F)},
        tol=1e-5 if dtype == torch.float32 else 1e-2,
        leaves=[gate_TF, up_TF],
        cotangents=[grad_TF],
        rivals=rivals.gated(device),
    )


def _norm_weight(size: int, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.rand(size, device=device) + 0.5).to(dtype)  # frozen


def on_cpu() -> list[Case]:
    """fp32, at sizes two cores do in seconds."""
    device, dtype = "cpu", torch.float32
    cases = []
    for M, norm in ((1024, True), (8192, True), (8192, False)):
        name = f"{M}x{HIDDEN}" + ("" if norm else " normed before")
        cases.append(
            Case(
                "masked_jepa_mse",
                name,
                device,
                dtype,
                {"M": M, "D": HIDDEN},
                partial(masked_jepa_mse, M, dtype, device, norm=norm),
                quick=M == 8192 and norm,
            )
        )
    for name in ("q", "k", "gate", "down"):
        n, k = LINEARS[name]
        make = partial(ema_update_, [(n, k)], device, weight_dtype=dtype, halves=False)
        shape = {"N": n, "K": k, "R": RANK}
        quick = name == "gate"
        cases.append(
            Case("ema_update_", f"{name} {n}x{k} fp32", device, dtype, shape, make, quick, quick)
        )
    half = torch.bfloat16
    for name, shapes in (("gate 12288x4096", [LINEARS["gate"]]), ("layer", [*LINEARS.values()])):
        make = partial(ema_update_, shapes, device, weight_dtype=half, halves=True)
        shape = {"matrices": len(shapes), "R": RANK}
        cases.append(Case("ema_update_", f"{name} halves", device, half, shape, make, False, False))
    make = partial(
        ema_update_, [LINEARS["gate"]], device, weight_dtype=dtype, halves=False, adapter=False
    )
    shape = {"N": MLP, "K": HIDDEN, "R": 0}
    cases.append(
        Case("ema_update_", "no adapter 12288x4096 fp32", device, dtype, shape, make, False, False)
    )
    for S, context, K in ((512, 0.5, 1), (1024, 0.5, 1), (1024, None, 8), (2048, 0.75, 1)):
        cases.append(_attention_case(S, 1, context, K, dtype, device, quick=S == 512))
    for name, shapes in _linears():
        quick = name in ("q", "q+k+v")
        make = partial(lora_linear, shapes, 128, dtype, device)
        shape = {"T": 128, "linears": len(shapes), "R": RANK}
        cases.append(Case("lora_linear", name, device, dtype, shape, make, quick, quick))
    cases += [_head_case(1024, 512, 8192, dtype, device, trained=t) for t in (False, True)]
    cases += [_linear_case(2000, N, K, dtype, device) for N, K in ((256, 96), (1536, 512))]
    return cases + _layer_cases(1024, dtype, device)


def on_cuda() -> list[Case]:
    """bf16, at the sizes of a training step of 32k tokens."""
    device, dtype = "cuda", torch.bfloat16
    cases = []
    for M in (1024, 4096, 8192, 16384, 65536):
        make = partial(masked_jepa_mse, M, dtype, device, norm=True)
        shape = {"M": M, "D": HIDDEN}
        cases.append(
            Case("masked_jepa_mse", f"{M}x{HIDDEN}", device, dtype, shape, make, quick=M == 8192)
        )
    distinct = ("q", "k", "gate", "down")
    groups = {f"{n} {r}x{c}": [(r, c)] for n, (r, c) in LINEARS.items() if n in distinct}
    groups["layer"] = [*LINEARS.values()]
    groups["model"] = [*LINEARS.values()] * LAYERS
    for name, shapes in groups.items():
        make = partial(ema_update_, shapes, device, weight_dtype=dtype, halves=True)
        shape = {"matrices": len(shapes), "R": RANK}
        cases.append(
            Case(
                "ema_update_",
                f"{name} halves",
                device,
                dtype,
                shape,
                make,
                quick=name == "layer",
                compiled=name != "model",  # the graph of 252 matrices takes minutes
            )
        )
    for S in (512, 2048, 4096, 8192, 32768):
        for context, K in ((0.5, 1), (0.75, 1), (None, 8)):
            quick = S == 4096 and context != 0.75
            cases.append(_attention_case(S, 32768 // S, context, K, dtype, device, quick=quick))
    for name, shapes in _linears():
        make = partial(lora_linear, shapes, 32768, dtype, device)
        shape = {"T": 32768, "linears": len(shapes), "R": RANK}
        quick = name in ("q", "gate+up")
        cases.append(Case("lora_linear", name, device, dtype, shape, make, quick))
    for T, trained in ((4096, False), (8192, False), (8192, True)):
        cases.append(_head_case(T, HIDDEN, VOCABULARY, dtype, device, trained=trained))
    cases.append(_linear_case(8192, HIDDEN, HIDDEN, dtype, device, quick=True))
    cases.append(_linear_case(8192, MLP, HIDDEN, dtype, device))
    return cases + _layer_cases(8192, dtype, device)


def on(device: str, *, quick: bool) -> list[Case]:
    """The cases of a kind of device; with `quick` a shape or two of each operation."""
    return [c for c in (on_cuda() if device == "cuda" else on_cpu()) if c.quick or not quick]


def _layer_cases(T: int, dtype: torch.dtype, device: str) -> list[Case]:
    """The element-wise work of a layer."""
    heads = {"H": HEADS, "G": KV_HEADS, "C": HEAD_DIM}
    return [
        Case(name, f"{T}x{size}", device, dtype, {"T": T, **shape}, make, quick=True)
        for name, size, shape, make in (
            ("add_rms_norm", HIDDEN, {"D": HIDDEN}, partial(add_rms_norm, T, dtype, device)),
            ("qk_norm_rope", HIDDEN, heads, partial(qk_norm_rope, T, dtype, device)),
            ("swiglu", MLP, {"F": MLP}, partial(swiglu, T, dtype, device)),
        )
    ]


def _attention_case(
    S: int,
    timelines: int,
    context: float | None,
    K: int,
    dtype: torch.dtype,
    device: str,
    *,
    quick: bool,
) -> Case:
    if context is not None:
        prefixes, branch = [int(S * context)], S - int(S * context)
        name = f"{timelines}x{S} c={context}"
    else:  # cuts over the whole timeline, each with a horizon of one eighth of it
        branch = S // K
        prefixes = [S // 4 + i * (S - S // 4 - branch) // (K - 1) for i in range(K)]
        name = f"{timelines}x{S} K={K}"
    tokens = timelines * (S + K * branch)
    shape = {"T": tokens, "S": S, "K": K, "H": HEADS, "G": KV_HEADS, "C": HEAD_DIM}
    make = partial(timeline_attention, S, timelines, prefixes, branch, dtype, device)
    # the reference holds a mask of all tokens, so that compiling it shows nothing
    return Case("timeline_attention", name, device, dtype, shape, make, quick, compiled=False)


def _head_case(T: int, D: int, V: int, dtype: torch.dtype, device: str, *, trained: bool) -> Case:
    make = partial(linear_cross_entropy, T, D, V, dtype, device, trained=trained)
    name = f"{T}x{D} V={V}" + (" trained" if trained else "")
    shape = {"T": T, "D": D, "V": V}
    quick = not trained and T != 4096
    return Case("linear_cross_entropy", name, device, dtype, shape, make, quick, compiled=quick)


def _linear_case(
    T: int, N: int, K: int, dtype: torch.dtype, device: str, *, quick: bool = False
) -> Case:
    make = partial(linear, T, N, K, dtype, device)
    shape = {"T": T, "N": N, "K": K}
    quick = quick or K == 96
    return Case("linear", f"{T}x{K} to {N}", device, dtype, shape, make, quick, compiled=quick)


def _linears() -> list[tuple[str, list[tuple[int, int]]]]:
    groups = [(name, [shape]) for name, shape in LINEARS.items()]
    groups.append(("q+k+v", [LINEARS[n] for n in "qkv"]))
    groups.append(("gate+up", [LINEARS["gate"], LINEARS["up"]]))
    return groups
