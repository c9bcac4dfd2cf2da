"""The microbenchmarks: what they count, what they refuse to claim, and that they run."""

import json
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from smbkernels.attention import visible
from smbkernels.attention.engines import Engine
from smbkernels.registry import OPS
from torch.utils.flop_counter import FlopCounterMode

import bench.__main__ as entry
from bench import cases, measure, records, rivals, timing, tracked
from smbfast.base.runtime import MatmulRate
from tests.ops import varlen_engine

F32, BF16 = torch.float32, torch.bfloat16
BOTTOM_RIGHT = Engine(
    "causal, aligned bottom right",
    lambda *given: varlen_engine.forward(*given[:-2], given[-1]),
    lambda *given: varlen_engine.backward(*given[:-2], given[-1]),
)
BEST = timing.Ceiling(bandwidth=1e10, patterns={"copy": 1e10}, matmul=1e11)


@pytest.fixture(autouse=True)
def _poisoned():
    """Nothing here runs a kernel; a run of the bench is as a user's."""


def attention(**changed) -> cases.Inputs:
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 8} | changed
    return cases.timeline_attention(24, 2, [8, 16], 12, F32, "cpu", **shape)


def averages(**changed) -> cases.Inputs:
    options = {"weight_dtype": BF16, "halves": True, "rank": 4} | changed
    return cases.ema_update_([(12, 8), (8, 16)], "cpu", **options)


def test_bytes_are_those_of_the_floors():
    moved = cases.masked_jepa_mse(64, BF16, "cpu", norm=True, D=32).modes[cases.BOTH][0]
    assert moved == 6 * 64 * 32 + 8 * 64
    moved = averages(adapter=False).modes[cases.UPDATE][0]
    assert moved == 10 * (12 * 8 + 8 * 16)
    factors = 4 * 4 * (12 + 8 + 8 + 16)
    assert averages().modes[cases.UPDATE][0] == moved + factors
    moved = averages(weight_dtype=F32, halves=False, adapter=False).modes[cases.UPDATE][0]
    assert moved == 12 * (12 * 8 + 8 * 16)
    x, w, y = 10 * 8, 12 * 8, 10 * 12
    moved = cases.lora_linear([(12, 8)], 10, BF16, "cpu", rank=4).modes[cases.FORWARD][0]
    assert moved == 2 * (x + w + y) + 4 * 4 * (12 + 8)


def test_operations_are_those_that_torch_counts():
    inputs = cases.lora_linear([(12, 8), (20, 8)], 10, F32, "cpu", rank=4)
    for mode in (cases.FORWARD, cases.BOTH):
        with FlopCounterMode(display=False) as counter:
            inputs.call(OPS["lora_linear"].reference, mode)()
        assert counter.get_total_flops() == inputs.modes[mode][1]
    inputs = attention()
    pairs = int(visible(inputs.args[3]).sum())
    assert inputs.modes[cases.FORWARD][1] == 4 * pairs * 4 * 8
    assert inputs.modes[cases.BOTH][1] == 14 * pairs * 4 * 8


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_names_of_their_own_and_cover_every_operation(device):
    names = [(case.op, case.name) for case in cases.on(device, quick=False)]
    assert len(set(names)) == len(names)
    quick = [(case.op, case.name) for case in cases.on(device, quick=True)]
    assert set(quick) < set(names)
    assert {op for op, _ in quick} == set(entry.measured_ops())


@pytest.mark.parametrize(
    "inputs, op",
    [
        (attention, "timeline_attention"),
        (lambda: averages(weight_dtype=F32, halves=False), "ema_update_"),
        (lambda: averages(weight_dtype=BF16, halves=False, adapter=False), "ema_update_"),
        (lambda: cases.linear(6, 4, 8, F32, "cpu"), "linear"),
        (lambda: cases.add_rms_norm(6, F32, "cpu", D=8), "add_rms_norm"),
        (
            lambda: cases.qk_norm_rope(6, F32, "cpu", kv_heads=2, head_dim=8),
            "qk_norm_rope",
        ),
    ],
)
def test_rivals_compute_the_same(inputs, op):
    inputs = inputs()
    expected = inputs.outcome(OPS[op].reference)
    assert inputs.rivals
    for name, rival in inputs.rivals.items():
        if rival == "tensors are on cpu":
            continue
        assert measure.difference(inputs.outcome(rival), expected) <= inputs.tol, name


def test_flex_attention_is_given_the_same_mask():
    segments = attention().args[3]
    row = torch.arange(segments.tokens)
    mask_TT = rivals.mask_of(segments, "cpu")(0, 0, row[:, None], row[None, :])
    assert torch.equal(mask_TT, visible(segments))


def test_magi_attention_is_given_slices_that_make_the_same_mask(monkeypatch):
    inputs = attention()
    expected = inputs.outcome(OPS["timeline_attention"].reference)

    def slices(query, key, value, *, q_ranges, k_ranges, attn_type_map, softmax_scale):
        mask_TT = torch.zeros(len(query), len(query), dtype=torch.bool)
        ranges = zip(*(x.tolist() for x in (q_ranges, k_ranges, attn_type_map)), strict=True)
        for (q, q_end), (k, k_end), kind in ranges:
            part = torch.ones(q_end - q, k_end - k, dtype=torch.bool)
            mask_TT[q:q_end, k:k_end] |= part.tril() if kind else part
        heads = (x.transpose(0, 1) for x in (query, key, value))
        options = {"attn_mask": mask_TT, "scale": softmax_scale, "enable_gqa": True}
        out = torch.nn.functional.scaled_dot_product_attention(*heads, **options)
        return out.transpose(0, 1), None

    monkeypatch.setitem(sys.modules, "magi_attention", ModuleType("magi_attention"))
    api = SimpleNamespace(flex_flash_attn_func=slices)
    monkeypatch.setitem(sys.modules, "magi_attention.api", api)
    rival = rivals.magi(inputs.args[3], "cpu")
    assert measure.difference(inputs.outcome(rival), expected) <= inputs.tol
    monkeypatch.setitem(sys.modules, "magi_attention.api", None)
    assert rivals.magi(inputs.args[3], "cpu").startswith("not installed: ")


def test_flash_attention_on_copied_prefixes_computes_the_same(monkeypatch):
    monkeypatch.setattr(rivals.flash, "engine", lambda: BOTTOM_RIGHT)
    inputs = attention()
    expected = inputs.outcome(OPS["timeline_attention"].reference)
    assert measure.difference(inputs.outcome(rivals.copied()), expected) <= inputs.tol


def test_a_reference_that_would_hold_all_scores_is_not_run(monkeypatch):
    monkeypatch.setattr(cases, "REFERENCE_SCORES", 1000)
    inputs = attention()
    assert "its scores are [4, 96, 96]" in inputs.rivals["torch"]
    assert inputs.baseline == "SDPA by segment"


def test_the_difference_is_infinite_where_a_value_is_not_finite():
    one = [torch.ones(3)]
    assert measure.difference(one, one) == 0
    assert measure.difference([torch.tensor([1.0, 2.0, 1.0])], one) == pytest.approx(3**-0.5)
    assert measure.difference([torch.tensor([1.0, torch.nan, 1.0])], one) == float("inf")


def a_case(monkeypatch, **backends) -> cases.Case:
    """A small case whose backends are these functions; one that raises cannot run."""
    shape = {"M": 32, "D": 16}
    case = cases.Case(
        "masked_jepa_mse",
        "32x16",
        "cpu",
        F32,
        shape,
        lambda: cases.masked_jepa_mse(32, F32, "cpu", norm=True, D=16),
        quick=True,
        compiled=False,
    )
    reference = OPS["masked_jepa_mse"].reference

    def variants(case, inputs):
        return {"eager": reference, **backends}

    monkeypatch.setattr(measure, "variants", variants)
    monkeypatch.setattr(cases, "on_cpu", lambda: [case])
    monkeypatch.setattr(entry, "ceiling", lambda clock, dtype: BEST)
    return case


def slow(*args, **kwargs):
    time.sleep(0.002)
    return OPS["masked_jepa_mse"].reference(*args, **kwargs)


def wrong(*args, **kwargs):
    return 1.01 * OPS["masked_jepa_mse"].reference(*args, **kwargs)


def broken(*args, **kwargs):
    raise RuntimeError("an illegal thing\nwith details")


def run(monkeypatch, capsys, tests: str, *arguments: str) -> tuple[str, int]:
    monkeypatch.setattr(entry, "gate", lambda op, device: (tests, "a summary"))
    status = 0
    try:
        entry.main(["masked_jepa_mse", "--device=cpu", "--seconds=0.01", *arguments])
    except SystemExit as left:
        status = left.code
    return capsys.readouterr().out, status


@pytest.mark.slow
def test_a_run_prints_times_and_speed_ups(monkeypatch, capsys, tmp_path):
    a_case(monkeypatch, cpp=slow, triton="no CUDA device")
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    printed, status = run(monkeypatch, capsys, "green", "--save")
    assert status == 0 and "x eager" in printed
    assert "masked_jepa_mse 32x16 float32, forward+backward: floor " in printed
    assert "triton   not measured: no CUDA device" in printed
    assert "masked_jepa_mse: not measured: no CUDA device (1024x4096, " in printed
    lines = [json.loads(x) for x in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert [(x["variant"], x["mode"]) for x in lines] == [
        ("eager", "forward"),
        ("cpp", "forward"),
        ("eager", "forward+backward"),
        ("cpp", "forward+backward"),
    ]
    record = lines[-1]
    assert record["ms_p20"] <= record["ms_p50"] <= record["ms_p80"]
    assert record["ms_p50"] > 2 and record["rounds"] >= 3 and record["timer"] == "clock"
    assert record["bytes"] == 12 * 32 * 16 + 8 * 32 and record["shape"] == {"M": 32, "D": 16}
    assert record["floor_share"] == pytest.approx(record["floor_ms"] / record["ms_p50"])
    assert record["tests"] == "green" and record["error"] == 0
    assert {"versions", "git", "at", "device_name", "threads", "load"} <= record.keys()


@pytest.mark.parametrize("tests", ["red", "none", "skipped"])
@pytest.mark.slow
def test_no_speed_up_is_printed_without_green_tests(monkeypatch, capsys, tests):
    a_case(monkeypatch, cpp=slow)
    printed, status = run(monkeypatch, capsys, tests)
    assert "no speed-up is printed" in printed and "x eager" not in printed
    assert status == (1 if tests == "red" else 0)


@pytest.mark.slow
def test_the_gate_can_be_left_out(monkeypatch, capsys):
    a_case(monkeypatch, cpp=slow)
    printed, status = run(monkeypatch, capsys, "green", "--no-gate")
    assert "tests skipped (--no-gate)" in printed and "x eager" not in printed and status == 0


@pytest.mark.slow
def test_what_is_wrong_or_fails_gets_no_speed_up_and_ends_red(monkeypatch, capsys):
    a_case(monkeypatch, cpp=wrong, triton=broken)
    printed, status = run(monkeypatch, capsys, "green")
    assert status == 1
    row = next(line for line in printed.splitlines() if line.strip().startswith("cpp"))
    assert row.endswith("WRONG")
    assert "not measured: failed: RuntimeError: an illegal thing" in printed
    assert "masked_jepa_mse 32x16: cpp is wrong" in printed


@pytest.mark.parametrize(
    "body, state", [("assert True", "green"), ("assert False", "red"), (None, "none")]
)
@pytest.mark.slow
def test_the_gate_runs_the_tests_of_the_operation(monkeypatch, tmp_path, body, state):
    folder = tmp_path / "tests" / "ops"
    folder.mkdir(parents=True)
    failing = "def test_it():\n    assert False\n"
    (folder / "test_lora_linear.py").write_text(failing)
    (folder / "test_cpp_build.py").write_text(failing)
    if body:
        (folder / "test_cpp_kernels.py").write_text(f"def test_it():\n    {body}\n")
        (folder / "test_ema_update.py").write_text("def test_it():\n    pass\n")
        # the interpreter is not what is measured on a CPU
        (folder / "test_ema_update_triton.py").write_text(failing)
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    status = {"cpp": "ok", "triton": "ok", "torch": "ok"}
    monkeypatch.setattr(OPS["ema_update_"], "status", lambda device: status)
    outcome, summary = measure.gate("ema_update_", "cpu")
    assert outcome == state
    assert ("2 passed" in summary) == (state == "green")
    assert ("FAILED tests/ops/test_cpp_kernels.py::test_it" in summary) == (state == "red")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["masked_mse"], "masked_jepa_mse"),
        (["--device=gpu"], "must be 'auto', 'cpu' or 'cuda'"),
        (["--secnds=1"], "did you mean `seconds`?"),
    ],
)
def test_a_wrong_argument_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as left:
        entry.main(arguments)
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_every_variant_is_called_in_every_round():
    called = {"a": 0, "b": 0}

    def counted(name):
        def call():
            called[name] += 1

        return call

    clock = timing.Clock("cpu")
    times = clock.interleaved({n: counted(n) for n in called}, seconds=0.0, least=4)
    assert called == {"a": 4, "b": 4}
    assert all(t.rounds == 4 and t.p20 <= t.p50 <= t.p80 for t in times.values())


def test_peak_memory_of_a_call():
    held = torch.ones(8 << 20)  # 32 MiB

    def call():
        return (held + 1).sum() + (held * 2).sum()

    peak = timing.peak_mib(call, "cpu")
    if peak is None:
        pytest.skip("this system does not let the high-water mark be reset")
    assert 30 <= peak <= 50


def test_the_ceiling_has_the_matmul_rate_that_training_logs(monkeypatch):
    monkeypatch.setattr(timing, "MIB", 1 << 10)
    monkeypatch.setattr(
        timing, "matmul_rate", lambda device, dtype, **_: MatmulRate((device.type, dtype), "oneDNN")
    )
    best = timing.ceiling(timing.Clock("cpu"), F32, seconds=0.0)
    assert (best.matmul, best.library) == (("cpu", F32), "oneDNN")
    assert best.bandwidth == max(best.patterns.values()) > 0


def test_both_forms_of_the_target_are_updated(monkeypatch):
    """Each call once and untimed, on linears that are as many and small."""
    monkeypatch.setattr(tracked, "LINEARS", dict.fromkeys(tracked.LINEARS, (96, 64)))

    def untimed(calls, between, rounds):
        for call in calls.values():
            between()
            call()
        return {name: [(8.0, 8.0)] * rounds for name in calls}

    monkeypatch.setattr(tracked, "timed", untimed)
    settings = tracked.TrackedBench(r=2, rank=4, every=4)
    rows = tracked.measure(settings, "cpu")
    assert rows.keys() > {"merged, fp32", "tracked", "tracked, truncation alone"}
    assert rows["tracked"]["ms"] == 2.0  # of four updates, one of which truncates
    counts = tracked.counted(settings)
    assert counts["merged"]["held_gb"] == 4 * 7 * 36 * 96 * 64 / 1e9


def test_rows_are_aligned_and_may_end_in_a_reason():
    rows = [["variant", "ms", "x"], ["eager", "1.5", ""], ["triton", "not measured: no GPU"]]
    assert records.columns(rows).splitlines() == [
        "variant  ms   x",
        "eager    1.5",
        "triton   not measured: no GPU",
    ]
