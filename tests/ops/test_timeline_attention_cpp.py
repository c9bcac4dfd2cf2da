"""Timeline attention in C++ on a CPU: values, gradients, any strides, any number of threads.

T tokens, H query heads, G key heads, C head dim, S segments.
"""

import pytest
import torch
from smbkernels import Segments, timeline_attention
from smbkernels.attention import cpp
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.layouts import LAYOUTS, assert_as_good, inputs, outcome, segments

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.skipif(cpp.missing("cpu") is not None, reason=str(cpp.missing("cpu"))),
]

MIXED = LAYOUTS["three, none and eight branches"]
ours = timeline_attention.on("cpp")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_values_and_gradients(name, interleaved):
    packed = segments(LAYOUTS[name], interleaved=interleaved)
    assert_as_good(ours, inputs(packed.tokens), packed)


@pytest.mark.parametrize("heads", [(3, 3), (6, 1), (1, 1)])  # no sharing, one for all, one
@pytest.mark.parametrize("C", [1, 8, 20, 33])  # within a vector, and a rest beyond whole ones
def test_heads(heads, C):
    packed = segments(MIXED)
    assert_as_good(ours, inputs(packed.tokens, *heads, C), packed, scale=0.3)


@pytest.mark.parametrize("C", [64, 80, 128])  # whole groups of vectors, and two and one more
def test_head_dims_of_backbones(C):
    packed = segments([(97, [(97, 31), (64, 100)])])  # around a block of queries
    assert_as_good(ours, inputs(packed.tokens, 2, 1, C), packed, scale=C**-0.5 / 3)


def test_a_long_trunk():
    packed = segments([(2049, [(2049, 65), (1, 1)])])
    assert_as_good(ours, inputs(packed.tokens, 1, 1, 8), packed)


def test_bf16_is_rounded_once():
    packed = segments(MIXED)
    given = inputs(packed.tokens, dtype=torch.bfloat16)
    given[0] /= 3
    # as of the other backends: backward starts from the rounded output, grad_out . out carries its
    # error over C terms
    fast = assert_as_good(ours, given, packed, 5 * torch.finfo(torch.bfloat16).eps)
    narrow = torch.bfloat16
    assert [x.dtype for x in fast] == [narrow, torch.float32, narrow, narrow, narrow]
    wide = outcome(ours, [x.float() for x in given], packed)
    assert torch.equal(fast[0], wide[0].bfloat16()) and torch.equal(fast[1], wide[1])


def test_large_scores_do_not_overflow():
    packed = segments([(130, [(65, 70)])])
    query, key, value, grad = inputs(packed.tokens, 1, 1, 16)
    assert_as_good(ours, [100 * query, key, value, grad], packed)


def test_what_is_not_finite_stays_in_its_timeline():
    packed = segments([(70, [(33, 5)]), (40, [])])
    given = inputs(packed.tokens)
    clean = outcome(ours, given, packed)
    given[1][3, 0, 0] = torch.nan  # a key of the first trunk
    broken = outcome(ours, given, packed)
    other = slice(70, 110)
    assert broken[0][:70].isnan().any() and broken[3][:70].isnan().any()
    for one, before in zip(broken[2:] + broken[:1], clean[2:] + clean[:1], strict=True):
        assert torch.equal(one[other], before[other])


def test_no_tokens():
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    assert [x.shape[0] for x in outcome(ours, inputs(0), packed)] == [0, 4, 0, 0, 0]


def test_any_strides():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in given]
    across = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    one_grad = [*given[:3], torch.ones(()).expand(given[0].shape)]
    for strided in (turned, across, one_grad):
        dense = [x.contiguous() for x in strided]
        for a, b in zip(outcome(ours, strided, packed), outcome(ours, dense, packed), strict=True):
            assert torch.equal(a, b)


def test_the_same_bits_on_any_number_of_threads(threads):
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    results = []
    for number in (1, 2, 3, 1):
        threads(number)
        results.append(outcome(ours, given, packed))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_cpu_chooses_it():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    for a, b in zip(
        outcome(timeline_attention, given, packed), outcome(ours, given, packed), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"dtype must be fp32 or bf16, got torch\.float64"):
        ours(*(x.double() for x in given[:3]), packed)


def test_a_cpu_without_wide_vectors_is_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "must have AVX2 or AVX-512" in cpp.missing("cpu")
    assert cpp.missing("cuda") == "tensors are on cuda"


def test_as_operations_of_torch():
    packed = segments(MIXED)
    query, key, value, grad = inputs(packed.tokens)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    arguments = (*leaves, packed.host_S6, 0.25, packed.pairs)
    opcheck(torch.ops.smb.timeline_attention_cpp.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.smb.timeline_attention_cpp(*arguments)
    given = (grad, query.detach(), key.detach(), value.detach(), out, lse, *arguments[3:])
    opcheck(torch.ops.smb.timeline_attention_cpp_bwd.default, given)


def test_compiles_into_one_graph():
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for name in ("three nested branches", "long"):
        packed = segments(LAYOUTS[name])
        given = inputs(packed.tokens)
        for a, b in zip(
            outcome(compiled, given, packed), outcome(ours, given, packed), strict=True
        ):
            assert torch.equal(a, b)


def test_flops_are_those_of_visible_pairs():
    packed = segments(MIXED)
    given = inputs(packed.tokens, 4, 2, 16)
    with FlopCounterMode(display=False) as counter:
        outcome(ours, given, packed)
    # scores and outputs; backward computes the scores again and has four products of its own
    assert counter.get_total_flops() == (2 + 5) * 2 * packed.pairs * 4 * 16
