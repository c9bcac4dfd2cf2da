"""The quick cases of `python -m bench`, through pytest-benchmark.

pytest bench -n 0 --benchmark-enable --benchmark-only    times each implementation that runs here
pytest bench                                            runs each once, untimed, and compares it
"""

import pytest
from smbkernels.registry import OPS

from bench import cases
from bench.measure import EAGER, compared, set_up
from bench.timing import finished
from smbfast.base.runtime import choose_device

pytestmark = pytest.mark.slow
DEVICE = choose_device("auto").type
VARIANTS = [
    pytest.param(case, variant, id=f"{case.op} {case.name} {variant}")
    for case in cases.on(DEVICE, quick=True)
    for variant in (EAGER, *(backend.name for backend in OPS[case.op].backends))
]


@pytest.mark.parametrize("case, variant", VARIANTS)
def test_kernel(benchmark, case, variant):
    if variant == "triton" and DEVICE == "cpu":
        pytest.skip("on a CPU Triton is interpreted: its time says nothing")
    inputs, functions = set_up(case)
    if isinstance(functions[variant], str):
        pytest.skip(functions[variant])
    pair = {name: functions[name] for name in (inputs.baseline, variant)}
    _, errors, _ = compared(pair, inputs, set())
    assert not isinstance(pair[variant], str), pair[variant]
    assert errors.get(variant, 0.0) <= inputs.tol
    benchmark.group = f"{case.op} {case.name}"
    benchmark(finished(inputs.call(pair[variant], list(inputs.modes)[-1]), DEVICE))
