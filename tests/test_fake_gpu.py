"""A training step on a pretended GPU: what it launches, moves, allocates and waits for.

One process counts a step of W1 at the true width of Qwen3-8B, with few layers. Nothing is computed
and nothing is timed; see `bench.fakegpu`.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from smbkernels.cpp_build import CannotBuild, find_compiler

from bench import predict
from bench.fakegpu import budgets, shim
from bench.fakegpu.device import Memory
from bench.fakegpu.ledger import Key, Ledger, Row, _kernels
from bench.fakegpu.rehearse import command
from bench.fakegpu.trace import Traced, divided


@pytest.fixture(scope="module")
def compiler() -> None:
    """Skips where the shim cannot be built, but for CI."""
    try:
        find_compiler()
    except CannotBuild as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have a C++ compiler: {error}")
        pytest.skip(f"the pretended GPU is built by a C++ compiler: {error}")


# each command in a fork, so that torch, transformers and the shim are loaded once for all
PROGRAM = """
import json, os, sys
from pathlib import Path
from bench.fakegpu.__main__ import main

for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
        for stream in (1, 2):
            file = os.open(f"{sys.argv[1]}/{number}.{stream}", os.O_CREAT | os.O_WRONLY)
            os.dup2(file, stream)
        main(arguments)
        sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    Path(f"{sys.argv[1]}/{number}").write_text(str(code))
"""
STEP, SCRIPT, HORIZONS = "step", "script", "horizons"
MISTAKES = ("mixed", "large")


@pytest.fixture(scope="module")
def done(compiler, tmp_path_factory) -> dict[str, subprocess.CompletedProcess[str]]:
    """What a step, the script and its mistakes said, from a process that has the shim."""
    folder = tmp_path_factory.mktemp("commands")
    commands = {STEP: ["-m", "bench.fakegpu", "--check"], SCRIPT: command("tests.gpu_script", [])}
    commands |= {mistake: command("tests.gpu_script", [mistake]) for mistake in MISTAKES}
    commands[HORIZONS] = command("tests.gpu_horizons", [])
    assert all(given[:2] == ["-m", "bench.fakegpu"] for given in commands.values())
    whole = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env=shim.environment(),
        cwd=shim.ROOT,
        input=json.dumps([given[2:] for given in commands.values()]),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert whole.returncode == 0, whole.stderr[-3000:]
    said = {}
    for number, (name, given) in enumerate(commands.items()):
        code, out, err = ((folder / f"{number}{x}").read_text() for x in ("", ".1", ".2"))
        said[name] = subprocess.CompletedProcess(given, int(code), out, err)
    return said


@pytest.fixture(scope="module")
def step(done) -> dict:
    """The report of a step."""
    assert done[STEP].returncode == 0, done[STEP].stderr[-3000:]
    return json.loads(done[STEP].stdout.splitlines()[-1])


@pytest.mark.slow
def test_nothing_but_log_lines_waits_for_the_gpu(step):
    assert step["waits"] == []


@pytest.mark.slow
def test_no_copy_to_the_gpu_waits(step):
    assert step["copies"] == []


@pytest.mark.slow
def test_losses_that_look_ahead_wait_for_nothing(done):
    assert done[HORIZONS].returncode == 0, done[HORIZONS].stderr[-3000:]
    read = json.loads(done[HORIZONS].stdout.splitlines()[-1])
    assert read["kernels"] > 500 and read["waits"] == []
    assert {how for _, how, _ in read["copies"]} == {"asynchronous"}


@pytest.mark.slow
def test_kernels_and_bytes_are_within_budget(step):
    assert budgets.over_budget(step["rows"], budgets.read_table()) == []


@pytest.mark.slow
def test_predicted_memory_is_what_a_step_allocates(step):
    # the prediction is a trace of the same allocations without what is inside our operations, which
    # it estimates as the size of their results
    assert step["predicted"] == pytest.approx(step["peak"], rel=budgets.PEAK)


@pytest.mark.slow
def test_what_is_launched_compiles_for_sm_90_without_spills(step):
    assert budgets.bad_builds(step["builds"]) == []
    launched = {build["kernel"] for build in step["builds"]}
    ours = {"fwd", "bwd_rows", "bwd_query", "bwd_key"}
    assert {f"_timeline_attention_{name}_kernel" for name in ours} <= launched


@pytest.mark.slow
def test_a_script_is_rehearsed(done):
    script = done[SCRIPT]
    assert script.returncode == 0, script.stderr[-3000:]
    read = json.loads(script.stdout.splitlines()[-1])
    # x and its gradient, the index and the truth values of a moment: blocks of 512 bytes
    allocated = read.pop("allocated")
    assert 2 * 64 * 32 * 4 + 512 <= allocated <= 2 * 64 * 32 * 4 + 8 * 512
    assert read == {
        "name": "pretended H200",
        "grad": "cuda",
        "even": [0, 2, 4, 6],
        "host": [1, 2, 3],
        "loss": 1e-6,
        "copied": [64, 32],
        "ms": 1.0,
        "waits": "called a synchronizing CUDA operation: _local_scalar_dense",
        "pinned": True,
    }
    assert "rehearsed tests.gpu_script: " in script.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mistake", "message"),
    [("mixed", "x_TD + torch.ones(64, 32)"), ("large", "must hold at most 141 GiB, got")],
)
def test_a_rehearsal_finds_a_mistake(done, mistake, message):
    assert done[mistake].returncode and message in done[mistake].stderr, done[mistake].stderr[
        -3000:
    ]


def test_budgets_are_as_they_are_written():
    table = budgets.read_table()
    assert table and budgets.as_text(table) == budgets.TABLE.read_text()


def test_what_is_above_its_budget_is_named():
    table = {"W1 EMA": {"kernels_beside": 20.0}, "W1 clip": {"kernels_beside": 9.0}}
    rows = {"W1 EMA": {"kernels_beside": 20.5}, "W1 losses": {"kernels_beside": 1.0}}
    assert budgets.over_budget(rows, table) == [
        "W1 clip: a row without a part",
        "W1 EMA: kernels_beside 20.5 is above 20.0",
        "W1 losses: no row; `python -m bench.fakegpu --write` makes it",
    ]
    spilled = {"kernel": "k", "spill_bytes": 8, "shared": 0}
    assert budgets.bad_builds([spilled]) == ["k: 8 bytes spilled, 0 bytes of shared memory"]


def test_a_kernel_with_a_tensor_on_the_cpu_is_refused():
    from bench.fakegpu.launches import _check  # imports Triton

    with pytest.raises(ValueError, match=r"k: x_ptr must be on cuda, got a tensor \[3\] on cpu"):
        _check("k", {"x_ptr": torch.ones(3)}, (1,))
    with pytest.raises(ValueError, match="k: a grid must be within"):
        _check("k", {}, (1, 65536))
    _check("k", {"BLOCK": 4}, lambda given: (given["BLOCK"], 65535))


def test_launches_of_many_tensors():
    small, large = torch.empty(8), torch.empty(65536 * 320)
    assert _kernels("_foreach_mul_", ([small] * 110, 2.0), []) == 1
    assert _kernels("_foreach_mul_", ([small] * 111, 2.0), []) == 2
    assert _kernels("_foreach_copy_", ([small] * 128, [small] * 128), []) == 2
    assert _kernels("_foreach_mul_", ([large] * 3, 2.0), []) == 3
    assert _kernels("mul", (small, 2.0), [small]) == 1


def test_what_an_earlier_ledger_held_does_not_count_when_it_is_freed():
    earlier = Ledger()
    earlier._held[1] = 512
    later = Ledger()
    later._held[2] = 512
    Memory.count(512)
    earlier._drop(1)
    assert Memory.live == 512
    later._drop(2)
    assert Memory.live == 0 and Memory.peak == 512


def key(part: str, op: str = "add", dtype: str = "bfloat16", sizes=(), inside: str = "") -> Key:
    return Key(part, inside, op, dtype, sizes)


def traced(layers: int, rows: dict[Key, Row], work=None, waits=None) -> Traced:
    return Traced(layers, rows, work or {}, 10.0 * layers, waits or {}, {})


def test_a_count_is_a_line_in_the_number_of_layers():
    few = traced(2, {key("a"): Row(5, 50, 0), key("b"): Row(1, 1, 1)}, {("a", "op"): 2.0})
    more = traced(4, {key("a"): Row(9, 90, 0), key("b"): Row(1, 1, 1)}, {("a", "op"): 4.0})
    whole = few.extended(more, 36)
    assert whole.rows == {key("a"): Row(73, 730, 0), key("b"): Row(1, 1, 1)}
    assert whole.peak == 360 and whole.work == {("a", "op"): 36.0}


def test_a_truncation_is_spread_over_the_steps_between_two():
    rows = {
        key("EMA"): Row(2, 20, 0),
        key("truncation"): Row(2, 20, 0),
        key("truncation", "eigh"): Row(8, 4, 0),
        key("optimizer", "_fused_adamw_"): Row(3, 1, 0),
        key("optimizer", "_foreach_norm"): Row(1, 1, 0),
        key("setup"): Row(99, 99, 0),
        key("log line"): Row(99, 99, 0),
    }
    assert divided(rows, 4) == {
        key("EMA"): Row(2, 20, 0),
        key("truncation"): Row(0, 0, 0),
        key("truncation", "eigh"): Row(2, 1, 0),
        key("AdamW", "_fused_adamw_"): Row(3, 1, 0),
        key("clip", "_foreach_norm"): Row(1, 1, 0),
    }


RATES = predict.read_rates()


def test_every_rate_says_what_it_rests_on():
    for name, about in RATES.items():
        for values in about.values() if name == "attention" else [about]:
            assert len(values["ground"]) > 10, name


def test_a_product_takes_the_longer_of_its_flops_and_its_bytes():
    wide = key("backward", "mm", sizes=(1, 8192, 4096, 4096))
    assert predict.seconds_of(wide, Row(1, 1.0, 7.2e14), RATES) == pytest.approx(1.0)
    narrow = key("backward", "mm", sizes=(1, 8192, 16, 4096))
    assert predict.seconds_of(narrow, Row(1, 2.6e12, 1.0), RATES) == pytest.approx(1.0)
    single = key("losses", "mm", "float32", (1, 8192, 4096, 4096))
    assert predict.seconds_of(single, Row(1, 1.0, 4.5e13), RATES) == pytest.approx(1.0)
    solver = key("truncation", "_linalg_eigh", "float64", (4, 128))
    assert predict.seconds_of(solver, Row(4, 1.0), RATES) == pytest.approx(4 * 3e-3)
    assert predict.seconds_of(key("backward"), Row(9, 3.6e12), RATES) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (key("online forward", "mm", sizes=(1, 8192, 4096, 4096)), "base GEMM"),
        (key("losses", "mm", sizes=(1, 512, 1000, 4096)), "head"),
        (key("backward", "addmm_", sizes=(1, 16, 4096, 8192)), "rank-r products"),
        (key("target forward", "mm", sizes=(1, 8189, 384, 4096)), "rank-r products"),
        (key("losses", "addmm", "float32", (1, 1792, 4096, 4096)), "fp32 products"),
        (key("losses", "exp"), "rest of losses"),
        (key("backward", "clone"), "copies"),
        (key("backward", "triton::_a_new_kernel"), "element-wise"),
        (key("backward", "zeros", inside="timeline_attention_new_bwd"), "attention backward"),
        (key("truncation", "bmm", "float64", (4, 128, 128, 128)), "truncation"),
        (key("AdamW", "_fused_adamw_", "float32"), "clip, AdamW, EMA"),
    ],
)
def test_kinds(row, kind):
    assert predict.kind_of(row, vocabulary=1000) == kind


def test_the_rate_of_attention_is_that_of_the_engine_that_ran():
    def engine(*ops: str) -> str:
        return predict.engine_of(list(ops), RATES)

    assert engine("zeros", "triton::_timeline_attention_fwd_kernel") == "triton"
    assert engine("torch_attn::_varlen_attn", "index_select") == "flash"
    assert engine("torch_attn::_varlen_attn_backward deterministic") == "flash_deterministic"
    assert engine("_cudnn_attention_forward") == "cudnn"
    with pytest.raises(ValueError, match=r"must run a kernel that has a rate .* got triton::_new"):
        engine("triton::_new_kernel")


def test_a_prediction_is_made_of_its_parts():
    rows = {
        key("online forward", "mm", sizes=(1, 8192, 4096, 4096)): Row(10, 1.0, 7.2e14),
        key("online forward", inside="timeline_attention_x", op="_cudnn_attention_forward"): Row(5),
    }
    step = traced(36, rows, {("online forward", "timeline_attention_x"): 5.8e14})
    found = predict.predicted("B4", step, predict.known()["W1"], RATES)
    assert found.seconds["base GEMM"] == pytest.approx(1.0)
    assert found.seconds["attention forward"] == pytest.approx(1.0)
    assert found.seconds["kernel gaps"] == pytest.approx(15 * 1.5e-6)
    assert found.total == pytest.approx(sum(found.seconds.values()))
    assert found.engines == ("cudnn",) and found.kernels == 15
    with pytest.raises(ValueError, match="B4: kernels of attention ran whose work is not counted"):
        predict.predicted("B4", traced(36, rows), predict.known()["W1"], RATES)


def test_rates_that_lack_a_section_are_refused(tmp_path):
    file = tmp_path / "rates.toml"
    file.write_text("[gap]\nseconds = 1.0\n")
    with pytest.raises(ValueError, match="missing: attention, base_products"):
        predict.read_rates(file)
    with pytest.raises(ValueError, match="rates must be a TOML file"):
        predict.read_rates(tmp_path / "absent.toml")
