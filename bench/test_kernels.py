"""The quick cases of `python -m bench`, through pytest-benchmark.

pytest bench -n 0 --benchmark-enable --benchmark-only    times each implementation that runs here
pytest bench                                            compares them with each other, untimed
"""

import pytest
from smbkernels.registry import OPS

from bench import cases
from bench.measure import EAGER, compared, set_up
from bench.timing import finished
from smbfast.base.runtime import choose_device

pytestmark = pytest.mark.slow
DEVICE = choose_device("auto").type
CASES = cases.on(DEVICE, quick=True)
VARIANTS = [
    pytest.param(case, variant, id=f"{case.op} {case.name} {variant}")
    for case in CASES
    for variant in (EAGER, *(backend.name for backend in OPS[case.op].backends))
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.name}")
def test_implementations_agree(case):
    inputs, functions = set_up(case)
    names = [EAGER, *(backend.name for backend in OPS[case.op].backends)]
    if DEVICE == "cpu":  # interpreted, the shapes of a bench take minutes
        names = [name for name in names if name != "triton"]
    own = {name: functions[name] for name in {inputs.baseline, *names}}
    here = {name for name, function in own.items() if not isinstance(function, str)}
    _, errors, _ = compared(own, inputs, set())
    assert not {name: own[name] for name in here if isinstance(own[name], str)}
    assert set(errors) == here - {inputs.baseline}
    assert all(error <= inputs.tol for error in errors.values()), errors


@pytest.mark.parametrize("case, variant", VARIANTS)
def test_kernel(benchmark, case, variant):
    if not benchmark.enabled:
        pytest.skip("timed with --benchmark-enable alone")
    if variant == "triton" and DEVICE == "cpu":
        pytest.skip("on a CPU Triton is interpreted: its time says nothing")
    inputs, functions = set_up(case)
    if isinstance(functions[variant], str):
        pytest.skip(functions[variant])
    benchmark.group = f"{case.op} {case.name}"
    benchmark(finished(inputs.call(functions[variant], list(inputs.modes)[-1]), DEVICE))
