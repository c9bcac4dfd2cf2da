"""Timeline attention in two varlen calls with top-left masks, with an engine that runs on a CPU.

The last test runs torch's flash attention where there is a GPU.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from smbkernels import Segments, timeline_attention
from smbkernels.attention import flash, two_calls
from smbkernels.attention.engines import Engine, differs
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.layouts import LAYOUTS, Timelines, assert_as_good, inputs, outcome, segments
from tests.ops.two_call_engines import RAGGED, ragged_backward, ragged_forward
from tests.ops.varlen_engine import assert_exact

pytestmark = pytest.mark.numeric

BOTH = pytest.mark.parametrize("interleaved", [False, True])
MIXED = LAYOUTS["three, none and eight branches"]
# what the other layouts have not: prefixes that lie apart, and branches of one trunk side by side
# that see the same
SPREAD: dict[str, Timelines] = {
    "a branch to a trunk": [(65, [(40, 25)]), (64, []), (63, [(63, 1)]), (7, [(2, 3)])],
    "the same prefix twice": [(65, [(40, 25), (40, 3), (41, 2)]), (64, [(10, 9), (10, 7)])],
}
ALL = {**LAYOUTS, **SPREAD}
ragged = two_calls.decomposed("ragged", lambda: RAGGED)


# the longest in one order of the two
@pytest.mark.parametrize(
    ("name", "interleaved"),
    [(name, order) for name in ALL for order in (False, True) if order or name != "long"],
)
def test_two_calls_are_exact(name, interleaved):
    assert_exact(ragged, segments(ALL[name], interleaved=interleaved))


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("C", [64, 80, 128])
def test_heads(heads, C):
    assert_exact(ragged, segments([(33, [(1, 1), (33, 17), (9, 5)]), (5, [])]), *heads, C)


def test_in_fp32():
    packed = segments(MIXED)
    assert_as_good(ragged, inputs(packed.tokens), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    packed = segments(MIXED)
    given = inputs(packed.tokens, dtype=dtype)
    given[0] /= 3
    # out is rounded for each call, for the weighted first and for their sum, by half an eps each,
    # and backward starts from it: grad_out . out carries its error over C terms
    fast = assert_as_good(ragged, given, packed, 6 * torch.finfo(dtype).eps)
    assert [x.dtype for x in fast] == [dtype, torch.float32, dtype, dtype, dtype]


def calls(packed):
    """Queries, keys and mask of each call of a forward and a backward."""
    seen = []

    def counted(run, at):
        def call(*args):
            seen.append((len(args[at]), len(args[at + 1]), args[-2]))
            return run(*args)

        return call

    engine = Engine("counting", counted(ragged_forward, 0), counted(ragged_backward, 1))
    outcome(two_calls.decomposed("counting_calls", lambda: engine), inputs(packed.tokens), packed)
    return seen


def test_the_second_call_is_made_where_there_are_branches():
    assert calls(segments([(5, []), (7, [])])) == [(12, 12, True)] * 2
    # one prefix: in place in both directions
    assert calls(segments([(5, [(2, 3)]), (7, [])])) == [(15, 15, True), (3, 2, False)] * 2


def test_keys_are_copied_in_forward_only_where_they_are_shared():
    spread = segments(SPREAD["a branch to a trunk"])
    everything = (spread.tokens, spread.tokens, True)
    # rows 0 to 65 + 64 + 63 + 2 are given to the forward in place, 40 + 63 + 2 of them to backward
    assert calls(spread) == [everything, (29, 194, False), everything, (29, 105, False)]
    shared = segments(SPREAD["the same prefix twice"])
    everything = (shared.tokens, shared.tokens, True)
    assert calls(shared) == [everything, (46, 91, False)] * 2


@pytest.mark.parametrize("name", ALL)
@BOTH
def test_plan(name, interleaved):
    packed = segments(ALL[name], interleaved=interleaved)
    rows = packed.host_S6.tolist()
    plan = two_calls.plan_of(rows, lambda x: x)
    assert plan.own.cu_q.diff().tolist() == plan.own.cu_k.diff().tolist() == [r[1] for r in rows]
    branches = [r for r in rows if r[3]]
    if not branches:
        assert (plan.far, plan.copied, plan.in_place) == ((), None, None)
        return
    # every branch sees its prefix, in the order of its rows
    seen = [(row, f.key) for f in plan.far for row in range(f.query.start, f.query.stop)]
    expected = [(r[0] + j, slice(r[2], r[2] + r[3])) for r in branches for j in range(r[1])]
    assert seen == expected
    if not interleaved:
        assert len(plan.queries) == 1
    everyone = torch.arange(packed.tokens)
    assert torch.equal(
        two_calls.gathered(everyone, plan.queries), torch.tensor([r for r, _ in seen])
    )
    shared = any(len({r[3] for r in branches if r[2] == own[2]}) > 1 for own in branches)
    assert not shared or plan.in_place is None


def test_branches_with_one_prefix_are_one_sequence():
    packed = segments(SPREAD["the same prefix twice"])
    plan = two_calls.plan_of(packed.host_S6.tolist(), lambda x: x)
    assert [(f.query.stop - f.query.start, f.key.stop) for f in plan.far] == [
        (28, 40),
        (2, 41),
        (16, 65 + 10),
    ]


def test_parts_that_share_rows_are_added_in_order_and_rounded_once():
    whole = torch.ones(4, 1, 1, dtype=torch.bfloat16)
    ranges = [slice(0, 2), slice(0, 3), slice(3, 4)]
    # each alone is lost against 1, the sum of two is not
    part = torch.full((4, 1, 1), 2.0**-8, dtype=torch.bfloat16)
    parts = [part[:2], part[:3], part[:1]]
    total = two_calls.added(whole, ranges, parts)
    assert total.dtype == torch.bfloat16
    assert total.flatten().tolist() == [1 + 2.0**-7, 1 + 2.0**-7, 1.0, 1.0]


def test_the_plan_is_made_once_for_all_layers():
    packed = segments(MIXED)
    device = torch.device("cpu")
    first = two_calls._plan(packed.host_S6, device)
    assert two_calls._plan(packed.host_S6.clone(), device) is first
    assert two_calls._plan(segments(LAYOUTS["long"]).host_S6, device) is not first


def test_no_tokens():
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    assert [x.shape[0] for x in outcome(ragged, inputs(0), packed)] == [0, 4, 0, 0, 0]


def test_any_strides():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in given]
    across = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    expected = outcome(ragged, given, packed)
    for strided in (turned, across):
        for a, b in zip(outcome(ragged, strided, packed), expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["trunks alone", "three, none and eight branches"])
def test_an_operation_of_torch(name):
    packed = segments(LAYOUTS[name])
    query, key, value, grad = inputs(packed.tokens)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    arguments = (*leaves, packed.host_S6, 0.25, packed.pairs)
    opcheck(torch.ops.smb.timeline_attention_ragged.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.smb.timeline_attention_ragged(*arguments)
    given = (grad, query.detach(), key.detach(), value.detach(), out, lse, *arguments[3:])
    opcheck(torch.ops.smb.timeline_attention_ragged_bwd.default, given)


def test_compiles_into_one_graph():
    compiled = torch.compile(ragged, fullgraph=True, backend="aot_eager")
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    for a, b in zip(outcome(compiled, given, packed), outcome(ragged, given, packed), strict=True):
        assert torch.equal(a, b)


def test_flops():
    packed = segments(MIXED)
    with FlopCounterMode(display=False) as counter:
        outcome(ragged, inputs(packed.tokens), packed)
    assert counter.get_total_flops() == (2 + 5) * 2 * packed.pairs * 4 * 16


def test_missing(monkeypatch):
    assert flash.missing("cpu") == "tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flash.missing("cuda") == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert flash.missing("cuda") == "compute capability must be 8.0 or higher, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert flash.missing("cuda") is None
    monkeypatch.setattr(flash, "engine", lambda: "another signature")
    assert flash.missing("cuda") == "another signature"


def test_it_runs_only_where_it_is_asked_for():
    for name in ("flash", "cudnn"):
        assert next(b for b in timeline_attention.backends if b.name == name).devices == ()
    packed = segments(MIXED)
    given = inputs(packed.tokens)[:3]
    with pytest.raises(ValueError, match="cannot run on flash: tensors are on cpu"):
        timeline_attention.on("flash")(*given, packed)


def test_this_torch_takes_the_calls():
    engine = flash.engine()
    assert isinstance(engine, Engine), engine
    with FakeTensorMode():
        half = {"dtype": torch.bfloat16, "device": "cuda"}
        query, grad = (torch.empty(10, 4, 64, **half) for _ in range(2))
        key, value = (torch.empty(12, 2, 64, **half) for _ in range(2))
        cu_q, cu_k = (torch.empty(3, dtype=torch.int32, device="cuda") for _ in range(2))
        bounds = (cu_q, cu_k, 6, 8, False, 0.125)
        out, lse = engine.forward(query, key, value, *bounds)
        assert out.shape == query.shape and lse.shape == (4, 10) and lse.dtype == torch.float32
        grads = engine.backward(grad, query, key, value, out, lse, *bounds)
        assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]


class Bytes(TorchDispatchMode):
    """Bytes of the results of each operation that is not a view, and how often it is called."""

    def __init__(self):
        super().__init__()
        self.written, self.calls = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        views = func.is_view or name in ("new_empty", "detach")
        if isinstance(result, torch.Tensor) and not views:
            self.written[name] += result.numel() * result.element_size()
            self.calls[name] += 1
        return result


def test_keys_are_copied_once_and_in_backward_alone():
    """At the size of a training step: 2 trunks of 4096, of which branches of 2048 see half."""
    H, G, C, S = 32, 8, 128, 4096
    packed = segments([(S, [(S // 2, S // 2)])] * 2)
    fake = FakeTensorMode()
    with fake:
        sizes = (H, G, G, H)
        tensors = [torch.empty(packed.tokens, n, C, dtype=torch.bfloat16) for n in sizes]
    rows = packed.host_S6.tolist()
    plan = two_calls.plan_of(rows, fake.from_tensor)
    with fake, Bytes() as forward:
        out, lse = two_calls.run_forward(flash.engine(), plan, tensors[:3], 0.1)
    with fake, Bytes() as backward:
        given = [*tensors[:3], out, lse]
        two_calls.run_backward(flash.engine(), plan, tensors[3], given, 0.1)
    assert {"cat", "clone", "index_select", "_to_copy"}.isdisjoint(forward.written)
    assert forward.written["mul_"] == forward.written["addcmul_"] == 2 * S * H * C
    # keys and values of two prefixes, and the log-sum-exp of two branches
    assert backward.written["cat"] == 2 * 2 * S * G * C + 4 * S * H
    assert {"clone", "index_select", "_to_copy", "copy_"}.isdisjoint(backward.written)


def test_single_queries_are_not_a_layout_of_their_own(monkeypatch):
    asked = []

    class Aten:
        @staticmethod
        def _flash_attention_forward(*args, **_):
            asked.append(args[5])
            return args[0], None

    monkeypatch.setattr(torch.ops, "aten", Aten)
    for longest in (1, 7):
        flash._forward(*(torch.ones(1),) * 5, longest, 9, False, 1.0)
    assert asked == [2, 7]


OLDER = (
    "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, \
SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, \
SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, \
Tensor? alibi_slopes=None"
)


@pytest.mark.parametrize("newer", ["", ", Tensor? block_table=None, int? num_splits=None"])
def test_signatures_of_torch_2_11_to_2_13(newer):
    text = f"aten::_flash_attention_forward({OLDER}{newer}) -> (Tensor, Tensor)"
    overload = SimpleNamespace(_schema=torch._C.parse_schema(text))
    assert differs(SimpleNamespace(default=overload), flash.FORWARD, "scale") is None


def test_another_signature_is_a_reason():
    forward = torch.ops.aten._flash_attention_forward
    assert differs(forward, flash.FORWARD, "scale") is None
    reason = differs(forward, ("key", "query"), "scale")
    assert reason == "arguments must be key, query, got query, key"
    assert differs(forward, flash.FORWARD, "page") == "no argument page"
    reason = differs(forward, flash.FORWARD[:8], "scale")
    assert reason == "argument is_causal, return_debug_mask is not known here"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("C", [64, 128])
@BOTH
def test_flash_attention_of_torch(name, C, interleaved):
    packed = segments(ALL[name], interleaved=interleaved)
    given = [x.cuda() for x in inputs(packed.tokens, 8, 2, C, torch.bfloat16)]
    given[0] /= C**0.5
    # probabilities are rounded to bf16 before they meet values, as in dense attention
    tol = 6 * torch.finfo(torch.bfloat16).eps
    assert_as_good(timeline_attention.on("flash"), given, packed.to("cuda"), tol)
