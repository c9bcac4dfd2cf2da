"""Timeline attention in dense calls, with an engine that runs on a CPU.

The last test runs cuDNN where there is a GPU.
"""

import pytest
import torch
from smbkernels import Segments, timeline_attention
from smbkernels.attention import cudnn
from smbkernels.attention.engines import Engine, differs
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.layouts import LAYOUTS, Timelines, assert_as_good, inputs, outcome, segments
from tests.ops.two_call_engines import DENSE, dense_backward, dense_forward
from tests.ops.varlen_engine import assert_exact

pytestmark = pytest.mark.numeric

BOTH = pytest.mark.parametrize("interleaved", [False, True])
MIXED = LAYOUTS["three, none and eight branches"]
EQUAL: dict[str, Timelines] = {
    "runs of one length": [(64, [(32, 17)]), (64, [(32, 17)]), (64, [(64, 17), (64, 5)])],
    "runs of single tokens": [(5, []), (1, []), (1, []), (1, [(1, 1)])],
}
ALL = {**LAYOUTS, **EQUAL}
dense = cudnn.decomposed("dense", lambda: DENSE)


# the longest in one order of the two
@pytest.mark.parametrize(
    ("name", "interleaved"),
    [(name, order) for name in ALL for order in (False, True) if order or name != "long"],
)
def test_dense_calls_are_exact(name, interleaved):
    assert_exact(dense, segments(ALL[name], interleaved=interleaved))


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("C", [64, 80, 128])
def test_heads(heads, C):
    assert_exact(dense, segments([(33, [(1, 1), (33, 17), (9, 5)]), (5, [])]), *heads, C)


def test_in_fp32():
    packed = segments(MIXED)
    assert_as_good(dense, inputs(packed.tokens), packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    packed = segments(MIXED)
    given = inputs(packed.tokens, dtype=dtype)
    given[0] /= 3
    # out is rounded for each call, for the weighted first and for their sum, by half an eps each,
    # and backward starts from it: grad_out . out carries its error over C terms
    fast = assert_as_good(dense, given, packed, 6 * torch.finfo(dtype).eps)
    assert [x.dtype for x in fast] == [dtype, torch.float32, dtype, dtype, dtype]


def test_segments_of_one_length_are_one_call():
    shapes = []

    def counted(run, at):
        def call(*args):
            shapes.append((*args[at].shape[::2], args[at + 1].shape[2], args[-2]))
            return run(*args)

        return call

    engine = Engine("counting", counted(dense_forward, 0), counted(dense_backward, 1))
    packed = segments(EQUAL["runs of one length"])
    outcome(cudnn.decomposed("counting_dense", lambda: engine), inputs(packed.tokens), packed)
    # sequences, queries, keys; the last trunk's branches see the same prefix and are one far call
    once = [(3, 64, 64, True), (3, 17, 17, True), (1, 5, 5, True)]
    once += [(1, 17, 32, False)] * 2 + [(1, 22, 64, False)]
    assert shapes == once * 2


def test_no_tokens():
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    assert [x.shape[0] for x in outcome(dense, inputs(0), packed)] == [0, 4, 0, 0, 0]


def test_any_strides():
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in given]
    for a, b in zip(outcome(dense, turned, packed), outcome(dense, given, packed), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["trunks alone", "three, none and eight branches"])
def test_an_operation_of_torch(name):
    packed = segments(LAYOUTS[name])
    query, key, value, grad = inputs(packed.tokens)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    arguments = (*leaves, packed.host_S6, 0.25, packed.pairs)
    opcheck(torch.ops.smb.timeline_attention_dense.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.smb.timeline_attention_dense(*arguments)
    given = (grad, query.detach(), key.detach(), value.detach(), out, lse, *arguments[3:])
    opcheck(torch.ops.smb.timeline_attention_dense_bwd.default, given)


def test_compiles_into_one_graph():
    compiled = torch.compile(dense, fullgraph=True, backend="aot_eager")
    packed = segments(MIXED)
    given = inputs(packed.tokens)
    for a, b in zip(outcome(compiled, given, packed), outcome(dense, given, packed), strict=True):
        assert torch.equal(a, b)


def test_flops():
    packed = segments(MIXED)
    with FlopCounterMode(display=False) as counter:
        outcome(dense, inputs(packed.tokens), packed)
    assert counter.get_total_flops() == (2 + 5) * 2 * packed.pairs * 4 * 16


def test_missing(monkeypatch):
    assert cudnn.missing("cpu") == "tensors are on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cudnn.missing("cuda") == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert cudnn.missing("cuda") == "compute capability must be 8.0 or higher, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert cudnn.missing("cuda") == "cuDNN must be 90501 or newer, got 0"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert cudnn.missing("cuda") is None
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert "TORCH_CUDNN_SDPA_AVOID_RECOMPILE is set" in cudnn.missing("cuda")
    monkeypatch.delenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE")
    monkeypatch.setattr(cudnn, "engine", lambda: "another signature")
    assert cudnn.missing("cuda") == "another signature"


def test_what_it_cannot_take():
    fits = next(b for b in timeline_attention.backends if b.name == "cudnn").fits
    assert fits(torch.empty(1, 1, 128, dtype=torch.bfloat16)) is None
    for C in (20, 136):
        reason = fits(torch.empty(1, 1, C, dtype=torch.bfloat16))
        assert reason.startswith("head dim must be a multiple of 8") and reason.endswith(f"got {C}")
    assert fits(torch.empty(1, 1, 64)) == "dtype must be bf16 or fp16, got torch.float32"


def test_this_torch_takes_the_calls():
    engine = cudnn.engine()
    assert isinstance(engine, Engine), engine
    with FakeTensorMode():
        query, grad = (
            torch.empty(2, 6, 4, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for _ in range(2)
        )
        key, value = (
            torch.empty(2, 8, 2, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
            for _ in range(2)
        )
        out, lse = engine.forward(query, key, value, False, 0.125)
        # the layout that plans are cached for
        assert out.shape == query.shape and out.stride() == query.stride()
        assert lse.shape == (2, 4, 6) and lse.dtype == torch.float32
        grads = engine.backward(grad, query, key, value, out, lse, False, 0.125)
        for x, y in zip(grads, (query, key, value), strict=True):
            assert x.shape == y.shape and x.stride() == y.stride()
    reason = differs(torch.ops.aten._scaled_dot_product_cudnn_attention, ("query", "keys"))
    assert reason == "arguments must be query, keys, got query, key"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("C", [64, 128])
@BOTH
def test_cudnn_of_torch(name, C, interleaved):
    packed = segments(ALL[name], interleaved=interleaved)
    given = [x.cuda() for x in inputs(packed.tokens, 8, 2, C, torch.bfloat16)]
    given[0] /= C**0.5
    # probabilities are rounded to bf16 before they meet values, as in dense attention
    tol = 6 * torch.finfo(torch.bfloat16).eps
    assert_as_good(timeline_attention.on("cudnn"), given, packed.to("cuda"), tol)
