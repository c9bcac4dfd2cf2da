"""Timeline attention on Triton: interpreted on a CPU, as shipped on a GPU.

T tokens, H query heads, G key heads, C head dim, S segments.
"""

import random

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from smbkernels import Segments, timeline_attention
from smbkernels.attention import attention_flops
from smbkernels.attention import triton as module
from smbkernels.attention.kernels import _load_block, _load_tile, _store_tile
from smbkernels.attention.triton import Launch, Settings
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.layouts import LAYOUTS, assert_as_good, inputs, outcome, segments

on_triton = timeline_attention.on("triton")
NESTED = LAYOUTS["three nested branches"]
CUDA = torch.cuda.is_available()
bf16_only = pytest.mark.skipif(not CUDA, reason="the interpreter computes bf16 wrongly")


def settings(m: int, n: int) -> Settings:
    return Settings(*[Launch(m, n, 4, 1)] * 3)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Interpreted, tiles are small, so that short segments have several."""
    if not CUDA:
        monkeypatch.setattr(module, "_settings", lambda *_: settings(32, 32))


@pytest.fixture
def given(device):
    """Inputs on the device that kernels run on; C is the smaller head dim."""

    def make(tokens: int, H: int = 2, G: int = 1, C: int = 64, dtype=torch.float32):
        return [x.to(device) for x in inputs(tokens, H, G, C, dtype)]

    return make


@pytest.fixture
def pack(device):
    return lambda timelines, **options: segments(timelines, **options).to(device)


# trunks first, or each before its branches: half of the layouts each
@pytest.mark.parametrize(
    ("name", "interleaved"),
    [(name, bool(i % 2)) for i, name in enumerate(LAYOUTS) if name != "long"],
)
def test_values_and_gradients(given, pack, name, interleaved):
    packed = pack(LAYOUTS[name], interleaved=interleaved)
    # interpreted, each head takes as long again; `test_heads` has them
    assert_as_good(on_triton, given(packed.tokens, 2 if CUDA else 1), packed)


# all heads share a key head, none does, a group that is no power of two
@pytest.mark.parametrize(("H", "G"), [(4, 1), (3, 3), (3, 1)])
def test_heads(given, pack, H, G):
    packed = pack([(33, [(20, 5), (33, 40)]), (7, [])])
    assert_as_good(on_triton, given(packed.tokens, H, G), packed, scale=0.3)


@pytest.mark.numeric
def test_the_larger_head_dim(given, pack):
    packed = pack([(33, [(20, 5), (33, 40)]), (7, [])])
    assert_as_good(on_triton, given(packed.tokens, C=128), packed)


# more queries than keys in a block, fewer, and more of both than any segment has
@pytest.mark.parametrize(("m", "n"), [(64, 16), (16, 64), (128, 128)])
def test_blocks(given, pack, monkeypatch, m, n):
    if CUDA and m * n > 1024:
        pytest.skip("too large for registers in fp32")
    monkeypatch.setattr(module, "_settings", lambda *_: settings(m, n))
    # two looks at the table's four rows, and at the three branches
    monkeypatch.setattr(module, "SCAN", 2)
    packed = pack([(65, [(1, 33), (64, 31), (40, 17)])])
    assert_as_good(on_triton, given(packed.tokens), packed)


@pytest.mark.numeric
@pytest.mark.parametrize("seed", [1, 2, 4, 5])
def test_any_table(given, pack, seed):
    draw = random.Random(seed)
    timelines = [(40, [])]
    for _ in range(draw.randint(1, 3)):
        length = draw.choice((1, 15, 16, 17, 33, 48))
        branches = [
            # prefixes in no order, some end on a block's border, some see all
            (
                draw.choice((1, length, draw.randint(1, length), min(16, length))),
                draw.randint(1, 20),
            )
            for _ in range(draw.choice((0, 0, 1, 3, 5)))
        ]
        timelines.append((length, branches))
    packed = pack(timelines, interleaved=seed % 2 == 1)
    assert_as_good(on_triton, given(packed.tokens), packed)


def as_shipped(monkeypatch):
    """Tiles of sm_90, of another form in each kernel."""
    shipped = Settings.of(128, torch.bfloat16, 90)
    if not CUDA:
        monkeypatch.setattr(module, "_settings", lambda *_: shipped)


# no multiple of a block
def test_a_thousand_tokens(given, pack, monkeypatch):
    as_shipped(monkeypatch)
    packed = pack([(1000, [(1000, 65), (1, 63)])])
    assert_as_good(on_triton, given(packed.tokens, 1, 1), packed)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="interpreted, a thousand tokens show the same")
def test_a_long_trunk(given, pack):
    packed = pack([(4097, [(4097, 65)])])
    assert_as_good(on_triton, given(packed.tokens, 1, 1), packed)


@pytest.mark.gpu
@bf16_only
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("C", [64, 128])
def test_bf16(given, pack, name, C):
    packed = pack(LAYOUTS[name])
    # as dense attention is, but at other elements, off by the rounding of the output, of the
    # probabilities and of the scores' gradient: at most 6 eps in a simulation of that rounding
    tol = 8 * torch.finfo(torch.bfloat16).eps
    found = assert_as_good(on_triton, given(packed.tokens, 8, 2, C, torch.bfloat16), packed, tol)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.float32, *[torch.bfloat16] * 3]


@pytest.mark.parametrize(("C", "dtype"), [(64, torch.float32), (128, torch.bfloat16)])
def test_the_same_bits_twice(given, pack, C, dtype):
    packed = pack(NESTED if CUDA else [(33, [(33, 5), (7, 1)])])
    tensors = given(packed.tokens, 2 if CUDA else 1, 1, C, dtype)
    first, second = (outcome(on_triton, tensors, packed) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strides_are_free(given, pack):
    packed = pack([(33, [(20, 5)]), (7, [])])
    tensors = given(packed.tokens)
    expected = outcome(on_triton, tensors, packed)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    # as cut out of a joint projection of queries, keys and values
    joint = list(torch.cat(tensors, 1).split([x.shape[1] for x in tensors], 1))
    scattered = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for strided in (turned, joint, scattered):
        assert not all(x.is_contiguous() for x in strided)
        found = [
            *on_triton(*strided[:3], packed),
            *torch.ops.smb.timeline_attention_triton_bwd(
                strided[3], *strided[:3], *expected[:2], packed.table_S6, 64**-0.5, packed.pairs
            ),
        ]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert all(x.is_contiguous() for x in found)


def test_views_are_not_copied(given, pack):
    joint = given(40, 4, 1)[0]
    for view in (joint[:, 1:3], joint.transpose(0, 1).contiguous().transpose(0, 1)):
        assert module._strided(view) is view
    # an expanded gradient, and offsets within a tile that 32 bits cannot hold
    assert module._strided(torch.ones(()).expand(3, 2, 4)).is_contiguous()
    wide = torch.zeros(2**23 + 1, dtype=torch.int8).as_strided((2, 1, 1), (2**23, 1, 1))
    assert module._strided(wide) is not wide


def test_the_gradient_of_a_sum(given, pack):
    packed = pack([(33, [(20, 5)])])
    query, key, value, grad = given(packed.tokens)
    ones = torch.ones((), device=query.device).expand(grad.shape)
    a, b = (outcome(on_triton, [query, key, value, g], packed) for g in (ones, ones.contiguous()))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_slots_hold_every_tile_once(seed):
    draw = random.Random(seed)
    block = draw.choice((16, 64, 128))
    length = [
        draw.choice((1, block - 1, block, block + 1, 1000)) for _ in range(draw.randint(1, 9))
    ]
    start = [sum(length[:i]) for i in range(len(length))]
    taken = [
        start[i] // block + i + j for i in range(len(length)) for j in range(-(-length[i] // block))
    ]
    assert taken == sorted(set(taken))
    assert taken[-1] < module._slots(sum(length), len(length), block)


@pytest.mark.numeric
def test_no_tokens(given):
    packed = Segments.of(*torch.empty(4, 0, dtype=torch.long))
    found = outcome(on_triton, given(0), packed.to("cuda" if CUDA else "cpu"))
    assert [list(x.shape) for x in found] == [[0, 2, 64], [2, 0], [0, 2, 64], *[[0, 1, 64]] * 2]


@triton.jit
def _copy_kernel(tile_ptr, block_ptr, out_ptr, x_ptr, row, head, stride_xt, stride_xh):
    row = row + tl.program_id(0)
    head = head + tl.program_id(0)
    rows = 16 + tl.program_id(0)
    tile = _load_tile(x_ptr, row, head, stride_xt, stride_xh, rows, 16, 16)
    _store_tile(tile_ptr, tile, tl.program_id(0), tl.program_id(0), 1, rows, 16, 16)
    block = _load_block(x_ptr, row, stride_xt, rows, 16, 16, False)
    _store_tile(block_ptr, block, tl.program_id(0), tl.program_id(0), 1, rows, 16, 16)
    _store_tile(out_ptr, tile, row, head, 2, rows, 16, 16)


@pytest.mark.numeric
@pytest.mark.skipif(CUDA, reason="a file stands in for the memory")
def test_offsets_beyond_32_bits(tmp_path):
    # 2^31 elements and more in a file with holes, of which only what is touched exists
    file = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2**31 + 4096,))
    x = torch.from_numpy(file)
    tile, block = torch.zeros(2, 16, 16)
    far = 2**26
    # a far row: 2^26 rows of 2 heads of 16
    rows = x.as_strided((16, 16), (32, 1), 32 * far)
    rows.copy_(torch.arange(256.0).view(16, 16))
    _copy_kernel[(1,)](tile, block, x, x, far, 0, 32, 16)
    assert torch.equal(tile, rows) and torch.equal(block, rows)
    # a far head, as of [heads, tokens, head dim]; what is stored goes to the second head of a row
    heads = x.as_strided((16, 16), (16, 1), 2**31)
    heads.copy_(-torch.arange(256.0).view(16, 16))
    _copy_kernel[(1,)](tile, block, x, x, 0, 2**11, 16, 2**20)
    assert torch.equal(tile, heads)
    del rows, heads, x, file


def test_as_operations_of_torch(given, pack):
    packed = pack([(9, [(4, 3)])])
    query, key, value, grad = given(packed.tokens)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    arguments = (*leaves, packed.table_S6, 0.25, packed.pairs)
    opcheck(torch.ops.smb.timeline_attention_triton.default, arguments)
    with torch.no_grad():
        out, lse = torch.ops.smb.timeline_attention_triton(*arguments)
    detached = [x.detach() for x in leaves]
    backward = (grad, *detached, out, lse, *arguments[3:])
    opcheck(torch.ops.smb.timeline_attention_triton_bwd.default, backward)


def test_compiles_into_one_graph(given, pack):
    compiled = torch.compile(on_triton, fullgraph=True, backend="aot_eager")
    for timelines in ([(9, [(4, 3)])], [(20, []), (5, [(5, 1), (1, 2)])], [(11, [(1, 3)])]):
        packed = pack(timelines)
        tensors = given(packed.tokens)
        found, expected = (outcome(f, tensors, packed) for f in (compiled, on_triton))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_log_sum_exp_has_no_gradient(given, pack):
    packed = pack([(9, [(4, 3)])])
    query, key, value, _ = given(packed.tokens)
    out, lse = on_triton(query.requires_grad_(), key, value, packed)
    assert out.requires_grad and not lse.requires_grad


def test_flops_are_those_of_visible_pairs(given, pack):
    packed = pack([(33, [(20, 5)]), (7, [])])
    tensors = given(packed.tokens)
    with FlopCounterMode(display=False) as counter:
        outcome(on_triton, tensors, packed)
    forward = attention_flops(packed.pairs, 2, 64)
    assert forward == timeline_attention.flops(*tensors[:3], packed)
    assert counter.get_total_flops() == forward + 5 * forward // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, s: (q[1:], k, v, s), r"query_THC must be \[12, H, C\], got \[11, 2, 64\]"),
        (lambda q, k, v, s: (q, k, v[1:], s), r"value_TGC must be \[12, G, 64\]"),
        (lambda q, k, v, s: (q, k, v, s.to("meta")), "segments must be on .* got meta"),
        (lambda q, k, v, s: (q.double(), k, v, s), "dtype must be fp32 or bf16, got torch.float64"),
        (lambda q, k, v, s: (q[..., :32], k, v, s), "head dim must be 64 or 128, got 32"),
    ],
)
def test_refused(given, pack, change, message):
    packed = pack([(12, [])])
    with pytest.raises(ValueError, match=message):
        on_triton(*change(*given(packed.tokens)[:3], packed))


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_turns_scores_around_is_refused(given, pack, scale):
    packed = pack([(12, [])])
    with pytest.raises(ValueError, match="scale must be positive, got"):
        on_triton(*given(12)[:3], packed, scale=scale)


@pytest.mark.parametrize("C", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_settings(C, dtype):
    for arch in (80, 86, 89, 90, 100, 103, 120):
        launches = vars(Settings.of(C, dtype, arch)).values()
        assert all(min(x.block_m, x.block_n) >= 16 for x in launches)
        # a warpgroup of sm_90 multiplies 64 rows: of queries, and of keys in the last
        if arch == 90 and dtype == torch.bfloat16:
            forward, query, key = launches
            assert min(forward.block_m, query.block_m, key.block_n) >= 16 * forward.num_warps
    assert Settings.of(C, dtype, 120) == Settings.of(C, dtype, 89) == Settings.of(C, dtype, 80)
