"""pytest-benchmark cases: every operation at a small shape, on each implementation that runs here.

pytest bench --benchmark-enable --benchmark-only    times
pytest bench                                        each once, and right
"""

import pytest
import torch
from smbkernels.registry import OPS, REFERENCE

from bench import cases
from bench.measure import difference

pytestmark = pytest.mark.numeric

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32 = torch.float32
SMALL = {
    "masked_jepa_mse": lambda: cases.masked_jepa_mse(64, F32, DEVICE, norm=True, D=256),
    "ema_update_": lambda: cases.ema_update_(
        [(96, 128), (128, 64)], DEVICE, weight_dtype=torch.bfloat16, halves=True
    ),
    "timeline_attention": lambda: cases.timeline_attention(
        96, 2, [32, 64], 48, F32, DEVICE, heads=4, kv_heads=2, head_dim=64
    ),
    "lora_linear": lambda: cases.lora_linear([(96, 64), (32, 64)], 80, F32, DEVICE),
    "linear_cross_entropy": lambda: cases.linear_cross_entropy(
        80, 64, 300, F32, DEVICE, trained=True
    ),
}
NAMES = [(op, name) for op in SMALL for name in (REFERENCE, *(b.name for b in OPS[op].backends))]


@pytest.mark.parametrize("op, name", NAMES)
def test_kernel(benchmark, op, name):
    entry, inputs = OPS[op], SMALL[op]()
    if name == "triton" and DEVICE == "cpu":
        pytest.skip("interpreted on a CPU: its time says nothing")
    reason = entry.status(DEVICE)[name]
    if reason == "ok" and name != REFERENCE:
        backend = next(b for b in entry.backends if b.name == name)
        reason = backend.fits(*inputs.args, **inputs.kwargs) or "ok"
    if reason != "ok":
        pytest.skip(reason)
    function = entry.on(name)
    expected = inputs.outcome(entry.reference)
    assert difference(inputs.outcome(function), expected) <= inputs.tol
    call = inputs.call(function, list(inputs.modes)[-1])

    def timed() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op
    benchmark(timed)


def test_every_operation_has_a_case():
    assert {name for name, entry in OPS.items() if entry.backends} == set(SMALL)
