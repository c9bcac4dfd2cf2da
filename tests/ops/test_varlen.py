"""Timeline attention in two calls of varlen attention, with an engine that runs on a CPU.

The last test runs the installed library where there is a GPU.
"""

import pytest
import torch
from smbkernels import Segments, timeline_attention
from smbkernels.attention import varlen
from smbkernels.attention.engines import Engine
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.layouts import LAYOUTS, assert_as_good, inputs, outcome, segments
from tests.ops.varlen_engine import EMULATED, assert_exact, backward, forward

pytestmark = pytest.mark.numeric

BOTH = pytest.mark.parametrize("interleaved", [False, True])
MIXED = LAYOUTS["three, none and eight branches"]
emulated = varlen.decomposed("emulated", lambda: EMULATED)


# the longest in one order of the two
@pytest.mark.parametrize(
    ("name", "interleaved"),
    [(name, order) for name in LAYOUTS for order in (False, True) if order or name != "long"],
)
def test_two_calls_are_exact(name, interleaved):
    assert_exact(emulated, segments(LAYOUTS[name], interleaved=interleaved))


@pytest.mark.parametrize("heads", [(3, 3), (6, 1)])
def test_heads(heads):
    assert_exact(emulated, segments(MIXED, interleaved=True), *heads)


def test_in_fp32():
    packed = segments(MIXED)
    assert_as_good(emulated, inputs(packed.tokens), packed)


def test_the_second_call_is_made_where_there_are_branches():
    sizes = []

    def counted(query, *rest):
        sizes.append(len(query))
        return forward(query, *rest)

    counting = Engine("counting", counted, backward)
    function = varlen.decomposed("counting", lambda: counting)
    for timelines in ([(5, []), (7, [])], [(5, [(2, 3)]), (7, [])]):
        packed = segments(timelines)
        function(*inputs(packed.tokens)[:3], packed)
    assert sizes == [12, 12, 3]


@pytest.mark.parametrize("name", LAYOUTS)
@BOTH
def test_plan(name, interleaved):
    packed = segments(LAYOUTS[name], interleaved=interleaved)
    rows = packed.host_S6.tolist()
    plan = varlen.plan_of(rows, lambda x: x)
    branches = [r for r in rows if r[3]]
    if not branches:
        assert plan.branches is None and plan.trunks.rows == slice(0, packed.tokens)
        return
    if not interleaved:
        assert isinstance(plan.trunks.rows, slice) and isinstance(plan.branches.rows, slice)
    copied = [list(range(r[2], r[2] + r[3])) + list(range(r[0], r[0] + r[1])) for r in branches]
    assert plan.copied.tolist() == [row for rows in copied for row in rows]
    everyone = torch.arange(packed.tokens)
    assert torch.equal(plan.copied[plan.own], everyone[plan.branches.rows])
    # every copied key is given back once, and no two at once to the same row
    sources = torch.cat([plan.own, *(source for source, _ in plan.levels)])
    assert torch.equal(sources.sort().values, torch.arange(len(plan.copied)))
    for source, target in plan.levels:
        assert torch.equal(plan.copied[source], target)
        assert len(target.unique()) == len(target)
    assert len(plan.levels) == max(r[5] for r in rows)


def test_the_plan_is_made_once_for_all_layers():
    packed = segments(MIXED)
    device = torch.device("cpu")
    first = varlen._plan(packed.host_S6, device)
    assert varlen._plan(packed.host_S6.clone(), device) is first
    assert varlen._plan(segments(LAYOUTS["long"]).host_S6, device) is not first


def test_the_same_bits_twice():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    first, second = (outcome(emulated, given, packed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tokens():
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    assert [x.shape[0] for x in outcome(emulated, inputs(0), packed)] == [0, 4, 0, 0, 0]


def test_any_strides():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in given]
    for a, b in zip(
        outcome(emulated, turned, packed), outcome(emulated, given, packed), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["trunks alone", "three, none and eight branches"])
def test_an_operation_of_torch(name):
    packed = segments(LAYOUTS[name])
    query, key, value, grad = inputs(packed.tokens)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    arguments = (*leaves, packed.host_S6, 0.25, packed.pairs)
    opcheck(torch.ops.smb.timeline_attention_emulated.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.smb.timeline_attention_emulated(*arguments)
    given = (grad, query.detach(), key.detach(), value.detach(), out, lse, *arguments[3:])
    opcheck(torch.ops.smb.timeline_attention_emulated_bwd.default, given)


def test_compiles_into_one_graph():
    compiled = torch.compile(emulated, fullgraph=True, backend="aot_eager")
    for name in ("three nested branches", "three, none and eight branches"):
        packed = segments(LAYOUTS[name])
        given = inputs(packed.tokens)
        for a, b in zip(
            outcome(compiled, given, packed), outcome(emulated, given, packed), strict=True
        ):
            assert torch.equal(a, b)


def test_flops():
    packed = segments(MIXED)
    with FlopCounterMode(display=False) as counter:
        outcome(emulated, inputs(packed.tokens), packed)
    assert counter.get_total_flops() == (2 + 5) * 2 * packed.pairs * 4 * 16


def test_missing(monkeypatch):
    assert varlen.missing("cpu") == "tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert varlen.missing("cuda") == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert varlen.missing("cuda") == "compute capability must be 8.0 or higher, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(varlen, "engine", lambda: EMULATED)
    assert varlen.missing("cuda") is None
    monkeypatch.setattr(varlen, "engine", lambda: "flash-attn: no; torch: no")
    assert varlen.missing("cuda") == "flash-attn: no; torch: no"


def test_on_a_cpu_it_is_refused():
    packed = segments(MIXED)
    with pytest.raises(ValueError, match="cannot run on varlen: tensors are on cpu"):
        timeline_attention.on("varlen")(*inputs(packed.tokens)[:3], packed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("C", [64, 128])
@BOTH
def test_the_installed_library(name, C, interleaved):
    packed = segments(LAYOUTS[name], interleaved=interleaved)
    given = [x.cuda() for x in inputs(packed.tokens, 8, 2, C, torch.bfloat16)]
    given[0] /= C**0.5
    function = timeline_attention.on("varlen")
    # probabilities are rounded to bf16 before they meet values, as in dense attention
    first = assert_as_good(function, given, packed.to("cuda"), 5 * torch.finfo(torch.bfloat16).eps)
    second = outcome(function, given, packed.to("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
