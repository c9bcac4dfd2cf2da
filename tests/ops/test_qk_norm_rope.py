"""Norms of heads and RoPE: each backend against the reference, values and gradients.

T tokens, H query and G key heads, C head dim.
"""

import pytest
import torch
from smbkernels import qk_norm_rope
from smbkernels.registry import OPS
from smbkernels.rope import triton as kernels
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from tests.ops.differentiated import assert_saved_bytes, compare, outcome, runnable
from tests.ops.tolerance import rounding

pytestmark = pytest.mark.numeric
F32, BF16 = torch.float32, torch.bfloat16
OP = OPS["qk_norm_rope"]
EPS = 1e-5
REFERENCE = lambda *args: qk_norm_rope.reference(*args, eps=EPS)  # noqa: E731


@pytest.fixture(autouse=True)
def _few_tokens(request, monkeypatch):
    """Interpreted, a program passes through all tokens that it may have; one test has them all."""
    if not torch.cuda.is_available() and "several_blocks" not in request.node.name:
        monkeypatch.setattr(kernels, "TOKENS", 4)


@pytest.fixture(params=[b.name for b in OP.backends])
def backend(request, device):
    runnable(OP, request.param, device)
    return request.param


@pytest.fixture
def on(backend):
    return lambda *args: qk_norm_rope.on(backend)(*args, eps=EPS)


@pytest.fixture
def place(backend, device):
    return "cpu" if backend == "cpp" else device


def tolerance(T: int, heads: int, C: int, dtype: torch.dtype) -> list[float]:
    """Of queries, keys and the gradients.

    At least 64 lanes share the sum of a head; heads of 64 tokens the first sum of a weight's
    gradient; a dozen other roundings come to each. In bf16 a normed value that lies between two
    numbers may become either, then its product with the weight, then the result.
    """
    if dtype == BF16:
        return [2**-6]
    head = rounding(12 + C / 64)
    return [head] * 4 + [rounding(12 + C / 64, 64 * heads + T / 64)]


def inputs(T, H, G, C, dtype=F32, device="cpu", *, norm=True, trained=True):
    def normal(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    weights = [
        (torch.rand(C, device=device) + 0.5).to(dtype).requires_grad_(trained) if norm else None
        for _ in range(2)
    ]
    # any cosines and sines, so that each half of a head is held to its own
    given = [normal(T, H, C).requires_grad_(), normal(T, G, C).requires_grad_(), *weights]
    return [*given, normal(T, C), normal(T, C)], [normal(T, H, C), normal(T, G, C)]


SIZES = [
    (1, 1, 1, 2),
    # no block of heads or of a half is full; half a head is no vector
    (3, 3, 1, 6),
    # the heads of the preset `default`
    (5, 2, 1, 48),
    # the heads of 8B models, and wide ones, which share a token among programs
    (2, 32, 8, 128),
    (2, 10, 2, 256),
]


@pytest.mark.parametrize("norm", ["trained", "frozen", "none"])
@pytest.mark.parametrize(("T", "H", "G", "C"), SIZES)
def test_values_and_gradients(on, place, T, H, G, C, norm):
    options = {"norm": norm != "none", "trained": norm == "trained"}
    given, grads = inputs(T, H, G, C, device=place, **options)
    compare(on, REFERENCE, given, grads, tolerance(T, H, C, F32))


def test_several_blocks_of_tokens_have_a_share_of_the_weights_gradients(on, backend, place):
    T = 133 if backend == "cpp" else kernels.TOKENS + 5
    given, grads = inputs(T, 2, 1, 16, device=place)
    compare(on, REFERENCE, given, grads, tolerance(T, 2, 16, F32))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("T", "H", "G", "C"), [(3, 3, 1, 6), (70, 4, 2, 64)])
def test_bf16(on, backend, place, T, H, G, C, norm):
    if backend == "triton" and place == "cpu":
        pytest.skip("the interpreter rounds to bf16 wrongly")
    given, grads = inputs(T, H, G, C, BF16, place, norm=norm)
    compare(on, REFERENCE, given, grads, tolerance(T, H, C, BF16))


@pytest.mark.parametrize("read", [0, 1])
def test_queries_or_keys_alone_are_read(on, place, read):
    given, grads = inputs(4, 3, 2, 8, device=place, trained=False)
    given[1 - read] = given[1 - read].detach()
    grads[1 - read] = None
    compare(on, REFERENCE, given, grads, tolerance(4, 3, 8, F32))


@pytest.mark.parametrize(("T", "H", "G"), [(0, 3, 1), (2, 0, 1), (2, 3, 0)])
def test_no_token_and_no_head(on, place, T, H, G):
    given, grads = inputs(T, H, G, 8, device=place)
    compare(on, REFERENCE, given, grads, tolerance(2, 3, 8, F32))


def theirs(q_THC, k_TGC, cos_TC, sin_TC, q_norm=None, k_norm=None):
    """By the modules of transformers."""
    if q_norm is not None:
        q_THC, k_TGC = q_norm(q_THC), k_norm(k_TGC)
    return apply_rotary_pos_emb(q_THC, k_TGC, cos_TC, sin_TC, unsqueeze_dim=1)


def norms(C, dtype=F32):
    made = [Qwen3RMSNorm(C, eps=EPS).to(dtype) for _ in range(2)]
    for norm in made:
        norm.weight.data.copy_(torch.rand(C) + 0.5)
    return made


@pytest.mark.parametrize("dtype", [F32, BF16])
@torch.no_grad()
def test_the_reference_has_the_bits_of_transformers(dtype):
    (q_THC, k_TGC, _, _, *angles), _ = inputs(9, 4, 2, 16, dtype)
    pair = norms(16, dtype)
    expected = theirs(q_THC, k_TGC, *angles, *pair)
    found = REFERENCE(q_THC, k_TGC, *(n.weight for n in pair), *angles)
    assert all(map(torch.equal, found, expected)) and found[0].dtype == dtype
    expected = theirs(q_THC, k_TGC, *angles)
    assert all(map(torch.equal, REFERENCE(q_THC, k_TGC, None, None, *angles), expected))


@torch.no_grad()
def test_mixed_dtypes_are_promoted_as_by_transformers():
    """As under autocast, where linears return bf16 and norms and cosines are fp32."""
    (q_THC, k_TGC, _, _, *angles), _ = inputs(9, 4, 2, 16)
    q_THC, k_TGC, pair = q_THC.bfloat16(), k_TGC.bfloat16(), norms(16)
    for modules in (pair, []):
        expected = theirs(q_THC, k_TGC, *angles, *modules)
        weights = [n.weight for n in modules] or [None, None]
        found = qk_norm_rope(q_THC, k_TGC, *weights, *angles, eps=EPS)
        assert all(map(torch.equal, found, expected)) and found[0].dtype == F32


def test_autocast_changes_nothing(on, place):
    given, grads = inputs(4, 3, 2, 8, device=place)
    expected = outcome(on, given, grads)
    with torch.autocast(place, torch.bfloat16):
        found = outcome(on, given, grads)
    assert all(map(torch.equal, found, expected))


def test_views_of_wider_tensors_are_read_as_they_are(on, place):
    """Of one product for queries, keys and values; and of any layout, by a copy."""
    given, grads = inputs(5, 4, 2, 8, device=place)
    expected = outcome(on, given, grads)
    wide_TNC = torch.cat([x.detach() for x in (*given[:2], given[1])], 1)
    parts = wide_TNC.flatten(1).requires_grad_()
    q_THC, k_TGC = parts.unflatten(-1, (-1, 8)).split([4, 4], 1)
    cos_TC, sin_TC = torch.cat(given[4:], 1).split(8, 1)
    outputs = on(q_THC, k_TGC[:, :2], *given[2:4], cos_TC, sin_TC)
    padded = [torch.nn.functional.pad(g, (0, 8))[..., :8] for g in grads]
    (grad,) = torch.autograd.grad(outputs, parts, padded)
    assert all(map(torch.equal, outputs, expected[:2]))
    q_grad, k_grad = grad.unflatten(-1, (-1, 8)).split([4, 4], 1)
    assert torch.equal(q_grad, expected[2]) and torch.equal(k_grad[:, :2], expected[3])
    across = [x.detach().transpose(0, 2).contiguous().transpose(0, 2) for x in given[:2]]
    assert all(map(torch.equal, on(*across, *given[2:]), expected[:2]))


def test_inputs_are_left_as_they_are(on, place):
    given, grads = inputs(5, 4, 2, 8, device=place)
    before = [x.detach().clone() for x in (*given, *grads)]
    outputs = on(*given)
    torch.autograd.backward(outputs, grads)
    assert all(map(torch.equal, before, (*given, *grads)))
    assert all(y.is_contiguous() for y in (*outputs, given[0].grad, given[1].grad))


@pytest.mark.parametrize("norm", [True, False])
def test_what_is_saved_is_queries_and_keys_or_less(on, place, norm):
    given, _ = inputs(6, 4, 2, 8, device=place, norm=norm)
    heads = 6 * 6 * 8 + 2 * 8 if norm else 0
    assert_saved_bytes(lambda: on(*given), 4 * (heads + 2 * 6 * 8))


@pytest.mark.parametrize("count", [2, 5])
def test_nothing_depends_on_the_number_of_threads(count):
    runnable(OP, "cpp", "cpu")
    given, grads = inputs(1000, 3, 2, 16)
    function = lambda *args: qk_norm_rope.on("cpp")(*args, eps=EPS)  # noqa: E731
    torch.set_num_threads(1)
    expected = outcome(function, given, grads)
    torch.set_num_threads(count)
    assert all(map(torch.equal, outcome(function, given, grads), expected))


def test_a_nan_stays_in_its_head(on, place):
    given, grads = inputs(4, 3, 2, 8, device=place, trained=False)
    given[0].data[2, 1, 5] = torch.nan
    q_THC, k_TGC, dq_THC, dk_TGC = outcome(on, given, grads)
    for x in (q_THC, dq_THC):
        assert x[2, 1].isnan().all() and x.isnan().sum() == 8
    assert k_TGC.isfinite().all() and dk_TGC.isfinite().all()


def test_backward_twice_and_no_second_derivative(on, place):
    given, grads = inputs(3, 2, 1, 8, device=place)
    outputs, leaves = on(*given), given[:4]
    first = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    again = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
    assert all(map(torch.equal, first, again))
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.autograd.grad(again[0].sum(), given[0])


@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(backend, place, norm):
    given, grads = inputs(3, 2, 1, 8, device=place, norm=norm)
    op = getattr(torch.ops.smb, f"qk_norm_rope_{backend}").default
    opcheck(op, (*given, EPS))
    op = getattr(torch.ops.smb, f"qk_norm_rope_{backend}_bwd").default
    saved = [None if x is None else x.detach() for x in given]
    saved = saved if norm else [None] * 4 + saved[4:]
    opcheck(op, (*grads, *saved, EPS, norm))


def test_compiles_into_one_graph(on, place):
    given, grads = inputs(3, 2, 1, 8, device=place)
    compiled = torch.compile(on, fullgraph=True, backend="aot_eager")
    expected = outcome(on, given, grads)
    assert all(map(torch.equal, outcome(compiled, given, grads), expected))


@pytest.mark.parametrize("norm", [True, False])
def test_flops_are_counted(backend, place, norm):
    given, grads = inputs(3, 2, 1, 8, device=place, norm=norm)
    with FlopCounterMode(display=False) as counter:
        outputs = qk_norm_rope.on(backend)(*given, eps=EPS)
    elements = 3 * 3 * 8
    forward = counter.get_total_flops()
    assert forward == qk_norm_rope.flops(*given) == (7 if norm else 3) * elements
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(outputs, grads)
    assert counter.get_total_flops() == (15 if norm else 3) * elements


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, *r: (q[0], k, *r), r"q_THC must be \[T, H, C\] with an even C, got \[2, 8\]"),
        (lambda q, k, *r: (q[..., :7], k, *r), r"even C, got \[3, 2, 7\]"),
        (lambda q, k, *r: (q, k[:2], *r), r"k_TGC must be \[3, G, 8\], got \[2, 1, 8\]"),
        (lambda q, k, w, v, *r: (q, k, w, None, *r), "must both be given, got that of q"),
        (lambda q, k, w, v, *r: (q, k, w, v[:3], *r), r"k_weight_C must be \[8\], got \[3\]"),
        (lambda q, k, w, v, c, s: (q, k, w, v, c, s[:, :4]), r"sin_TC must be \[3, 8\]"),
        (lambda q, k, w, v, c, s: (q, k, w, v, c.to("meta"), s), "cos_TC must be on .*, got meta"),
        (
            lambda q, k, *r: (q.bfloat16(), k, *r),
            "must be one of float32 or bfloat16, got",
        ),
    ],
)
def test_bad_input_is_refused(on, place, change, message):
    given, _ = inputs(3, 2, 1, 8, device=place)
    with pytest.raises(ValueError, match=message):
        on(*change(*given))
