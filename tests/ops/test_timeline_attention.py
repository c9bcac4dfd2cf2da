"""Segments, the reference of timeline attention, and its engine on the CPU.

T tokens, H query heads, G key heads, C head dim, S segments.
"""

import pytest
import torch
from smbkernels import Segments, timeline_attention
from smbkernels.attention import attention_flops, sdpa, visible
from smbkernels.attention.op import Inputs
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from smbfast.data.loader import make_batch
from smbfast.settings import ObjectiveSettings
from tests.ops.layouts import LAYOUTS, assert_as_good, columns, inputs, outcome, segments
from tests.tiny import random_window

pytestmark = pytest.mark.numeric

BOTH = pytest.mark.parametrize("interleaved", [False, True])
LAYOUT = pytest.mark.parametrize("name", LAYOUTS)
MIXED = LAYOUTS["three, none and eight branches"]
on_cpu = timeline_attention.on("sdpa")


@LAYOUT
@BOTH
def test_segments_count_what_the_rule_says(name, interleaved):
    packed = segments(LAYOUTS[name], interleaved=interleaved)
    start_S, length_S, trunk_start_S, prefix_S = columns(LAYOUTS[name], interleaved=interleaved)
    T = int(length_S.sum())
    seen_TT = torch.zeros(T, T, dtype=torch.bool)
    for start, length, trunk, prefix in zip(
        start_S.tolist(), length_S.tolist(), trunk_start_S.tolist(), prefix_S.tolist(), strict=True
    ):
        for j in range(length):
            seen_TT[start + j, trunk : trunk + prefix] = True
            seen_TT[start + j, start : start + j + 1] = True
    assert torch.equal(visible(packed), seen_TT)
    assert packed.pairs == int(seen_TT.sum())
    assert packed.tokens == T and packed.longest == int(length_S.max())


@pytest.mark.parametrize(
    ("interleaved", "rows"),
    [
        # start, length, trunk start, prefix, first branch, branches
        (
            False,
            [
                (0, 5, 0, 0, 0, 0),
                (5, 9, 5, 0, 3, 1),
                (14, 3, 14, 0, 4, 3),
                (17, 2, 5, 9, 0, 0),
                (19, 1, 14, 1, 0, 0),
                (20, 4, 14, 3, 0, 0),
                (24, 1, 14, 2, 0, 0),
            ],
        ),
        (
            True,
            [
                (0, 5, 0, 0, 0, 0),
                (5, 9, 5, 0, 2, 1),
                (14, 2, 5, 9, 0, 0),
                (16, 3, 16, 0, 4, 3),
                (19, 1, 16, 1, 0, 0),
                (20, 4, 16, 3, 0, 0),
                (24, 1, 16, 2, 0, 0),
            ],
        ),
    ],
)
def test_table(interleaved, rows):
    timelines = [(5, []), (9, [(9, 2)]), (3, [(1, 1), (3, 4), (2, 1)])]
    packed = segments(timelines, interleaved=interleaved)
    assert packed.table_S6.dtype == torch.int32
    assert packed.table_S6.tolist() == [list(r) for r in rows]


@BOTH
@pytest.mark.parametrize("branches", [0, 1, 3, 8])
def test_a_trunk_names_its_branches(interleaved, branches):
    timelines = [(4, [(2, 1)]), (9, [(i + 1, i + 2) for i in range(branches)]), (2, [(2, 2)])]
    table = segments(timelines, interleaved=interleaved).table_S6.tolist()
    trunk = next(row for row in table if row[1] == 9 and not row[3])
    assert trunk[5] == branches
    assert [row[3] for row in table[trunk[4] : trunk[4] + branches]] == list(range(1, branches + 1))
    assert all(row[2] == trunk[0] for row in table[trunk[4] : trunk[4] + branches])


def test_segments_of_an_empty_batch():
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    assert packed.table_S6.shape == (0, 6) and packed.tokens == packed.pairs == packed.longest == 0


def test_the_table_stays_on_the_cpu_too():
    packed = segments(MIXED)
    moved = packed.to("meta")
    assert moved.table_S6.device.type == "meta" and moved.host_S6.device.type == "cpu"
    assert moved.to("meta").host_S6 is packed.host_S6 and moved.pairs == packed.pairs


def test_segments_of_the_loader():
    windows = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 4), (3, 9))]
    for cuts in (1, 3):
        batch = make_batch(windows, ObjectiveSettings(min_future=4, cuts=cuts), 0, 5, jepa=True)
        packed = batch.segments
        assert packed.tokens == len(batch.ids_T)
        columns = packed.host_S6[:, :4].unbind(1)
        assert torch.equal(Segments.of(*columns).host_S6, packed.host_S6)
        # every token sees as many as stand before it in its timeline, and itself
        assert torch.equal(visible(packed).sum(1), batch.position_T + 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": [0, 5, 8, 11]}, "segment 1 must begin at row 4 .* got start 5, length 4"),
        ({"start": [0, 3, 8, 11]}, "segment 1 must begin at row 4 .* got start 3"),
        ({"start": [1, 4, 8, 11]}, "segment 0 must begin at row 0"),
        ({"length": [4, 4, 3, 0]}, "at least one token, got start 11, length 0"),
        ({"length": [4, 4, 3, -1]}, "at least one token, got start 11, length -1"),
        ({"trunk_start": [0, 0, 0, 0]}, "trunk_start of trunk 1 must be its start 4, got 0"),
        ({"trunk_start": [0, 4, 8, 0]}, "branch 2 must see .* got prefix 2 of the trunk at row 8"),
        ({"trunk_start": [0, 4, 1, 0]}, "branch 2 must see .* got prefix 2 of the trunk at row 1"),
        ({"prefix": [0, 0, 5, 1]}, "branch 2 must see .* got prefix 5 of the trunk at row 0"),
        ({"prefix": [0, 0, -1, 1]}, "branch 2 must see 1 or more tokens .* got prefix -1"),
        (
            {"prefix": [0, 0, 2]},
            r"prefix_S must be 4 integers on the CPU, got torch.int64 of \[3\]",
        ),
        ({"prefix": [0.0, 0.0, 2.0, 1.0]}, "prefix_S must be 4 integers .* got torch.float32"),
        ({"length": [[4], [4], [3], [2]]}, r"length_S must be 4 integers .* of \[4, 1\]"),
    ],
)
def test_segments_refuse(change, message):
    good = {
        "start": [0, 4, 8, 11],
        "length": [4, 4, 3, 2],
        "trunk_start": [0, 4, 0, 0],
        "prefix": [0, 0, 2, 1],
    }
    Segments.of(*(torch.tensor(c) for c in good.values()))
    with pytest.raises(ValueError, match=message):
        Segments.of(*(torch.tensor(c) for c in {**good, **change}.values()))


def test_segments_refuse_scattered_branches_and_another_device():
    rows = torch.tensor([[0, 4, 0, 0], [4, 4, 4, 0], [8, 1, 0, 2], [9, 1, 4, 1], [10, 1, 0, 3]])
    with pytest.raises(ValueError, match="branches of the trunk at 0 must be consecutive"):
        Segments.of(*rows.T)
    with pytest.raises(ValueError, match=r"start_S must be 4 integers on the CPU, got .* on meta"):
        Segments.of(*rows[:4].T.to("meta"))


@pytest.mark.parametrize("scale", [None, 0.7])
@BOTH
def test_reference_is_a_softmax_over_what_is_seen(interleaved, scale):
    packed = segments([(5, [(3, 2), (5, 4)]), (3, [])], interleaved=interleaved)
    H, G, C = 4, 2, 3
    query, key, value, _ = inputs(packed.tokens, H, G, C, torch.float64)
    out, lse = timeline_attention.reference(query, key, value, packed, scale=scale)
    for t in range(packed.tokens):
        seen = visible(packed)[t].nonzero().flatten().tolist()
        for h in range(H):
            g = h // (H // G)
            z = [float(query[t, h] @ key[s, g]) * (scale or C**-0.5) for s in seen]
            total = sum(torch.exp(torch.tensor(z, dtype=torch.float64)).tolist())
            p = [float(torch.exp(torch.tensor(x, dtype=torch.float64))) / total for x in z]
            expected = sum(w * value[s, g] for w, s in zip(p, seen, strict=True))
            torch.testing.assert_close(out[t, h], expected)
            torch.testing.assert_close(float(lse[h, t]), float(torch.tensor(total).log()))


def test_reference_gradients():
    packed = segments([(3, [(2, 2), (3, 1)])])
    leaves = [x.requires_grad_() for x in inputs(packed.tokens, 4, 2, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(
        lambda *x: timeline_attention.reference(*x, packed)[0], leaves, fast_mode=True
    )


def test_reference_in_bf16_computes_in_fp32():
    packed = segments(LAYOUTS["three nested branches"])
    given = inputs(packed.tokens, dtype=torch.bfloat16)
    out, lse = timeline_attention.reference(*given[:3], packed)
    wide = timeline_attention.reference(*(x.float() for x in given[:3]), packed)
    assert out.dtype == torch.bfloat16 and torch.equal(out, wide[0].bfloat16())
    assert lse.dtype == torch.float32 and torch.equal(lse, wide[1])


@LAYOUT
@BOTH
def test_sdpa(name, interleaved):
    packed = segments(LAYOUTS[name], interleaved=interleaved)
    assert_as_good(on_cpu, inputs(packed.tokens), packed)


@pytest.mark.parametrize("heads", [(3, 3), (6, 1), (1, 1)])  # no sharing, one for all, one
@pytest.mark.parametrize("C", [8, 20])  # a vector of fp32, and a rest
def test_sdpa_heads(heads, C):
    packed = segments(MIXED)
    assert_as_good(on_cpu, inputs(packed.tokens, *heads, C), packed, scale=0.3)


def test_sdpa_in_fp64_is_exact():
    packed = segments(MIXED, interleaved=True)
    given = inputs(packed.tokens, dtype=torch.float64)
    for ours, exact in zip(
        outcome(on_cpu, given, packed),
        outcome(timeline_attention.reference, given, packed),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sdpa_in_half_precision(dtype):
    packed = segments(MIXED)
    given = inputs(packed.tokens, dtype=dtype)
    given[0] /= 3
    # backward starts from the rounded output: grad_out . out carries its error, over C terms.
    # dense attention is off by as much, at other elements
    fast = assert_as_good(on_cpu, given, packed, 5 * torch.finfo(dtype).eps)
    assert [x.dtype for x in fast] == [dtype, torch.float32, dtype, dtype, dtype]


def test_sdpa_of_one_token():
    packed = segments([(1, [])])
    query, key, value, grad = inputs(1)
    out, lse, *grads = outcome(on_cpu, [query, key, value, grad], packed, scale=0.5)
    heads = [x.repeat_interleave(2, 1) for x in (key, value)]
    torch.testing.assert_close(out, heads[1])
    torch.testing.assert_close(lse, 0.5 * (query * heads[0]).sum(-1).T)
    torch.testing.assert_close(grads[2], grad.unflatten(1, (2, 2)).sum(2))
    # a weight that is always 1 has no gradient
    torch.testing.assert_close(grads[0], 0 * query, atol=1e-5, rtol=0)
    torch.testing.assert_close(grads[1], 0 * key, atol=1e-5, rtol=0)


def test_sdpa_of_a_long_trunk():
    packed = segments([(2049, [(2049, 65), (1, 1)])])
    assert_as_good(on_cpu, inputs(packed.tokens, 1, 1, 8), packed)


def test_sdpa_gradients():
    packed = segments([(3, [(2, 2), (3, 1)])])
    leaves = [x.requires_grad_() for x in inputs(packed.tokens, 4, 2, 3, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *x: on_cpu(*x, packed)[0], leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["three, none and eight branches", "long"])
def test_sdpa_without_the_flash_kernel(name, monkeypatch):
    monkeypatch.setattr(sdpa, "part", lambda: sdpa.PLAIN)
    packed = segments(LAYOUTS[name])
    assert_as_good(on_cpu, inputs(packed.tokens), packed)


def test_sdpa_tries_the_flash_kernel(monkeypatch):
    wrong = sdpa.Part(sdpa._flash_forward, lambda *a: [2 * x for x in sdpa._flash_backward(*a)])
    gone = sdpa.Part(lambda *_: torch.ops.aten._no_such_operation(), sdpa._flash_backward)
    for one, expected in ((sdpa.FLASH, None), (wrong, sdpa.PLAIN), (gone, sdpa.PLAIN)):
        monkeypatch.setattr(sdpa, "FLASH", one)
        sdpa.part.cache_clear()
        assert sdpa.part() is (expected or one)
    monkeypatch.undo()
    sdpa.part.cache_clear()
    assert sdpa.part() is sdpa.FLASH, "this torch has the kernel"


class Largest(TorchDispatchMode):
    """The elements of the largest tensor any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, torch.Tensor) and x.stride().count(0) == 0:
                self.elements = max(self.elements, x.numel())
        return found


@pytest.mark.parametrize("part", [sdpa.FLASH, sdpa.PLAIN])
def test_sdpa_holds_no_scores_of_all_tokens(part):
    packed = segments([(1000, [(1000, 40), (700, 600)]), (900, [])])
    query, key, value, grad = inputs(packed.tokens, 2, 1, 8)
    with Largest() as most:
        given = Inputs(query, key, value, packed.host_S6, 0.3)
        out, lse = sdpa.run_forward(part, given)
        sdpa.run_backward(part, grad, out, lse, given)
    # without the flash kernel, the scores of 256 queries of one segment
    held = query.numel() if part is sdpa.FLASH else 2 * 2 * 256 * 1000
    assert most.elements <= held < packed.tokens**2 // 2


def test_sdpa_of_no_tokens():
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    found = outcome(on_cpu, inputs(0), packed)
    assert [x.shape[0] for x in found] == [0, 4, 0, 0, 0]


def test_sdpa_takes_any_strides():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    one_grad = [*given[:3], torch.ones(()).expand(given[0].shape)]
    for strided in (turned, across, one_grad):
        dense = [x.contiguous() for x in strided]
        for a, b in zip(
            outcome(on_cpu, strided, packed), outcome(on_cpu, dense, packed), strict=True
        ):
            assert torch.equal(a, b)


def test_sdpa_gives_the_same_bits_twice():
    packed = segments(LAYOUTS["long"])
    given = inputs(packed.tokens)
    first, second = (outcome(on_cpu, given, packed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_log_sum_exp_has_no_gradient():
    packed = segments(LAYOUTS["three nested branches"])
    for function in (on_cpu, timeline_attention.reference):
        query, key, value, _ = inputs(packed.tokens)
        out, lse = function(query.requires_grad_(), key, value, packed)
        assert out.requires_grad and not lse.requires_grad


def test_the_cpu_chooses_sdpa_where_cpp_does_not_fit():
    packed = segments(MIXED)
    given = inputs(packed.tokens, dtype=torch.float64)
    for a, b in zip(
        outcome(timeline_attention, given, packed), outcome(on_cpu, given, packed), strict=True
    ):
        assert torch.equal(a, b)
    assert sdpa.missing("cpu") is None and sdpa.missing("cuda") == "tensors are on cuda"


def test_sdpa_as_an_operation_of_torch():
    packed = segments(MIXED)
    query, key, value, grad = inputs(packed.tokens)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    arguments = (*leaves, packed.host_S6, 0.25, packed.pairs)
    opcheck(torch.ops.smb.timeline_attention_sdpa.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.smb.timeline_attention_sdpa(*arguments)
    given = (grad, query.detach(), key.detach(), value.detach(), out, lse, *arguments[3:])
    opcheck(torch.ops.smb.timeline_attention_sdpa_bwd.default, given)


def test_sdpa_compiles_into_one_graph():
    compiled = torch.compile(on_cpu, fullgraph=True, backend="aot_eager")
    for name in ("three nested branches", "three, none and eight branches", "long"):
        packed = segments(LAYOUTS[name])
        given = inputs(packed.tokens)
        for a, b in zip(
            outcome(compiled, given, packed), outcome(on_cpu, given, packed), strict=True
        ):
            assert torch.equal(a, b)


def test_flops_are_those_of_visible_pairs():
    packed = segments(MIXED)
    given = inputs(packed.tokens, 4, 2, 16)
    with FlopCounterMode(display=False) as counter:
        outcome(on_cpu, given, packed)
    product = 2 * packed.pairs * 4 * 16
    # scores and outputs; backward computes the scores again and has four products of its own
    assert attention_flops(packed.pairs, 4, 16) == 2 * product
    assert timeline_attention.flops(*given[:3], packed) == 2 * product
    assert counter.get_total_flops() == (2 + 5) * product


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[1:], k, v), r"query_THC must be \[65, H, C\], got \[64, 4, 16\]"),
        (lambda q, k, v: (q, k[1:], v), r"key_TGC must be \[65, G, 16\] .* got \[64, 2, 16\]"),
        (lambda q, k, v: (q, k, v[:, :1]), r"value_TGC must be \[65, G, 16\] .* got \[65, 1, 16\]"),
        (lambda q, k, v: (q, k[..., :8], v), r"key_TGC must be .* got \[65, 2, 8\]"),
        (lambda q, k, v: (q[:, :3], k, v), "key_TGC must be .* that divides 3"),
        (lambda q, k, v: (q, k.double(), v), "key_TGC must be torch.float32 .* torch.float64"),
        (lambda q, k, v: (q[:, 0], k, v), r"query_THC must be \[65, H, C\]"),
    ],
)
def test_refused(change, message):
    packed = segments([(65, [])])
    with pytest.raises(ValueError, match=message):
        on_cpu(*change(*inputs(packed.tokens)[:3]), packed)
