"""How the Triton kernel of the averages is launched: kinds, tables on the device, offsets.

N out, K in features, R rank.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from smbkernels import ema_update_
from smbkernels.ema import triton as kernel
from smbkernels.ema.op import Lists
from smbkernels.registry import OPS


@pytest.fixture
def on_triton(device):
    """The operation on Triton, and the device."""
    entry = OPS["ema_update_"]
    reason = entry.missing(next(b for b in entry.backends if b.name == "triton"), device)
    if reason:
        pytest.skip(f"triton: {reason}")
    return ema_update_.on("triton"), device


def test_a_model_is_one_launch_and_its_tables_are_kept(on_triton):
    update, device = on_triton
    kernel._plans.cache_clear()
    average, weight = (list(torch.randn(20, 4, 16, device=device)) for _ in range(2))
    b = list(torch.randn(20, 4, 2, device=device))
    a = list(torch.randn(20, 2, 16, device=device))
    expected = [x.clone() for x in average]
    for step in range(3):
        if step == 2:
            # values change in place; only another storage makes another table
            weight[7].mul_(2)
        update(average, weight, b, a, tau=0.5)
        ema_update_.reference(expected, weight, b, a, tau=0.5)
    info = kernel._plans.cache_info()
    assert (info.misses, info.hits) == (1, 2)
    matrices = tuple(kernel._matrices(Lists(average, [], weight, b, a, [1.0] * 20)))
    (plan,) = kernel._plans(matrices)
    assert plan.matrix_P.tolist() == list(range(20))
    torch.testing.assert_close(average, expected)

    weight[3] = torch.randn(4, 16, device=device)
    update(average, weight, b, a, tau=0.5)
    ema_update_.reference(expected, weight, b, a, tau=0.5)
    assert kernel._plans.cache_info().misses == 2
    torch.testing.assert_close(average, expected)


def test_an_8b_model_is_one_launch():
    """Shapes of Qwen3-8B on the meta device, which have no addresses but all else."""
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(12288, 4096)] * 2 + [(4096, 12288)]

    def like(shapes, dtype):
        return [torch.empty(s, dtype=dtype, device="meta") for s in shapes * 36]

    found = list(
        kernel._matrices(
            Lists(
                like(layer, torch.bfloat16),
                like(layer, torch.int16),
                like(layer, torch.bfloat16),
                like([(n, 16) for n, _ in layer], torch.float32),
                like([(16, k) for _, k in layer], torch.float32),
                [2.0] * 252,
            )
        )
    )
    (kind,) = {m.kind for m in found}
    assert len(found) == 252 and kind.even and kind.aligned


def test_what_is_not_aligned_is_a_kind_of_its_own():
    """On a GPU a 16-byte access to another address is an error; the interpreter sees none."""

    def kind(N, K, offset=0, adapter_offset=0, R=4):
        def one(N, K, offset, dtype=torch.float32):
            return [torch.empty(N * K + offset, dtype=dtype)[offset:].view(N, K)]

        (matrix,) = kernel._matrices(
            Lists(
                one(N, K, 0, torch.bfloat16),
                one(N, K, 0, torch.int16),
                one(N, K, offset),
                one(N, R, 0) if R else [],
                one(R, K, adapter_offset) if R else [],
                [1.0],
            )
        )
        return matrix.kind.aligned, matrix.kind.even

    assert kind(64, 128) == (True, True)
    assert kind(65, 128) == kind(64, 80) == (True, False)
    assert kind(64, 72) == (False, False)
    assert kind(64, 128, offset=1) == kind(64, 128, adapter_offset=2) == (False, False)
    assert kind(64, 128, offset=4) == (True, True)
    # without an adapter a matrix is one row
    assert kind(512, 8, R=0) == (True, True)
    assert kind(2, 8, R=0) == (True, False)
    assert kind(3, 7, R=0) == kind(512, 8, offset=1, R=0) == (False, False)


@triton.jit
def _starts(out_ptr, tile_ptr, width):
    i = tl.program_id(0)
    start_n, start_k = kernel._tile_start(tl.load(tile_ptr + i), width, 64, 64)
    tl.store(out_ptr + i, start_n * width + start_k)


def test_tiles_beyond_2_to_the_31_elements(on_triton):
    """The kernel's own arithmetic, for the last tiles of a matrix of 2^40 elements."""
    _, device = on_triton
    width = 2**17
    tiles = [0, 1, width // 64 - 1, width // 64, 2**28 - 1]
    tile_P = torch.tensor(tiles, dtype=torch.int32, device=device)
    start_P = torch.empty(len(tiles), dtype=torch.int64, device=device)
    # the table holds widths in 64 bits
    _starts[(len(tiles),)](start_P, tile_P, width)
    across = width // 64
    assert start_P.tolist() == [t // across * 64 * width + t % across * 64 for t in tiles]
    assert math.log2(start_P[-1]) > 39
