"""The half hour on a GPU, rehearsed: what is run there is what is run here, at tiny sizes."""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from smbkernels.catalog import BACKENDS
from smbkernels.operation import FORCED
from smbkernels.registry import OPS

from bench.gpu import (
    child,
    convergence,
    driver,
    journal,
    ops,
    pairs,
    plan,
    sanitizer,
    suite,
    wheels,
)
from bench.gpu.__main__ import main
from bench.gpu.child import Bench, Item
from bench.gpu.driver import ROOT, Run, chosen, run_stage, run_stages
from bench.gpu.plan import CALLS, INSTALL, STAGES, Stage
from bench.gpu.step import summed
from tests.warm import Warm, start_server

HERE = "tests.test_bench_gpu"
LONG = 600.0  # seconds: longer than any process here
REHEARSED = Bench("ops", "cpu", "cpu", {}, LONG, "")
# stands in for the tool: runs the program, and says that it saw nothing
SANITIZER = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case "$1" in --tool|--target-processes) shift;; esac; shift; done
"$@"
echo "========= ERROR SUMMARY: 0 errors"
"""


def items(bench: Bench) -> list[Item]:
    """Of the stages that this file runs in processes of its own."""

    def figures() -> dict:
        return {"pid": os.getpid(), "forced": dict(FORCED)}

    def broken() -> dict:
        raise ValueError("no such kernel\nlong story")

    def spoiling() -> dict:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def dying() -> dict:
        os.kill(os.getpid(), signal.SIGSEGV)
        return {}

    def hanging() -> dict:
        time.sleep(LONG)
        return {}

    if bench.stage == "fresh":
        return [Item("one", figures), Item("two", figures)]
    return [
        Item("first", figures),
        Item("broken", broken),
        Item("spoiling", spoiling),
        Item("after", figures),
        Item("dying", dying),
        Item("hanging", hanging, 0.5),
        Item("last", figures),
    ]


def stage(name: str, **more) -> Stage:
    return Stage(name, 1, more.pop("cap", LONG), 1, "a stage of this file", module=HERE, **more)


def a_run(folder: Path, seconds: float = LONG, **more) -> Run:
    out = folder / "gpu.jsonl"
    end = time.monotonic() + seconds
    return Run(out, folder / "work", end, "cpu", log=folder / "gpu.log", earlier=[], **more)


def lines(folder: Path) -> list[dict]:
    return [json.loads(x) for x in (folder / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> None:
    """Has imported what the stages import, compiled as in their processes, not interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in a_run(tmp_path_factory.mktemp("server")).environment().items():
            patch.setenv(name, value)
        patch.delenv("TRITON_INTERPRET", raising=False)
        modules = [s.path for s in STAGES if s.name not in ("suite", "sanitizer")]
        start_server([*modules, "bench.step.workloads", HERE])


@pytest.fixture
def warm(server, monkeypatch) -> None:
    """The processes of stages begin where the imports are done; `rehearsed` has a real one too."""
    stand_in = SimpleNamespace(Popen=Warm, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(driver, "subprocess", stand_in)


def rehearsed(folder: Path, call: int, real: str = "") -> dict[str, dict]:
    """The records of a call's stages, which all end well; asked for again, none has work left.

    Stage `real` is run by the command in a process of its own, which starts another.
    """
    tools, out = folder / "tools", folder / "gpu.jsonl"
    tools.mkdir()
    (tools / "compute-sanitizer").write_text(SANITIZER)
    (tools / "compute-sanitizer").chmod(0o755)
    names = [s.name for s in STAGES if s.call == call]
    given = ["--rehearse=cpu", f"--out={out}", f"--work={folder / 'work'}", "--git=abc1234"]
    given += ["--slack=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
        patch.setenv("OMP_NUM_THREADS", "1")
        if real:
            command = [sys.executable, "-m", "bench.gpu", f"--only={real}", *given]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + (folder / "gpu.log").read_text()[-3000:]
        code, said = ended([*given, f"--only={','.join(names)}"])
        log = (folder / "gpu.log").read_text()
        assert code == 0 and said.count("done before") == bool(real), said + log[-3000:]
        records = journal.read([out], "cpu")
        assert [k for k in records if "/" not in k] == names
        assert all(r["git"] == "abc1234" for r in records.values())
        done_or_not = (r["state"] == "done" or k.startswith("ops/") for k, r in records.items())
        assert all(done_or_not), (records, log[-3000:])
        code, said = ended([*given, f"--only={','.join(names)}"])
        assert said.count("done before") == len(names) and code == 0
    return records


def ended(argv: list[str]) -> tuple[int, str]:
    """The exit status of the command, run in this process, and what it printed."""
    before, said = signal.getsignal(signal.SIGTERM), io.StringIO()
    try:
        with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(said):
            main(argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    return stop.value.code, said.getvalue()


def ops_states(records: dict[str, dict]) -> dict[str, str]:
    return {k: r["state"] for k, r in records.items() if k.startswith("ops/")}


def expected_states() -> dict[str, str]:
    """Of stage `ops` on a CPU, where Triton is not interpreted as it is in this process."""

    def runs(op: str, backend: str) -> bool:
        return backend != "triton" and OPS[op].status("cpu")[backend] == "ok"

    return {
        f"ops/{op}/{backend}": "done" if runs(op, backend) else "not here"
        for op, backends in BACKENDS.items()
        for backend in backends
    }


@pytest.mark.slow
def test_the_first_call_is_rehearsed(tmp_path, warm):
    records = rehearsed(tmp_path, 1, real="rates")
    assert ops_states(records) == expected_states()
    assert records["suite/tests"]["counts"]["passed"] > 0
    for name in ("W1", "W2"):
        assert records[f"engines/attention/{name}"]["engines"]["sdpa"]["ms_forward"] > 0
    assert records["engines/truncation"]["ms"]["truncate_"] > 0
    assert records["step/W1"]["tokens_per_s"] > 0
    assert records["step/W1/kernels"]["kernels"][0]["us"] > 0
    assert records["check/2 layers"]["differences"]["gradients"] < 1e-5


@pytest.mark.slow
def test_the_second_call_is_rehearsed(tmp_path, warm):
    records = rehearsed(tmp_path, 2)
    for name in ("W1", "W2"):
        pair = next(r for k, r in records.items() if k.startswith(f"pairs/{name}/"))
        assert pair["ours_is_faster_by"] > 0 and len(pair["variants"]) == 2


@pytest.mark.slow
def test_the_third_call_is_rehearsed(tmp_path, warm):
    records = rehearsed(tmp_path, 3)
    assert records["sanitizer/memcheck"]["covered"] == expected_states()
    assert records["memory/W1/2 windows"]["predicted"] > 0
    assert len(records["convergence/0.6B"]["curves"]) == 2


@pytest.mark.slow
def test_what_hangs_or_crashes_costs_one_item(tmp_path, warm):
    wrong = {"key": "ops/masked_jepa_mse/cpp", "state": "wrong", "rehearsal": "cpu"}
    journal.append(tmp_path / "gpu.jsonl", wrong)
    mark = run_stage(a_run(tmp_path), stage("odd"))
    assert mark["state"] == "done"
    records = journal.read([tmp_path / "gpu.jsonl"], "cpu")
    reasons = {k.removeprefix("odd/"): (r["state"], r.get("reason")) for k, r in records.items()}
    assert reasons["broken"] == ("failed", "ValueError: no such kernel")
    assert reasons["spoiling"][0] == "failed" and "illegal memory" in reasons["spoiling"][1]
    assert reasons["dying"][0] == "failed" and "signal 11" in reasons["dying"][1]
    assert reasons["hanging"] == ("killed", "over its 0.5 s")
    first, after, last = (records[f"odd/{name}"] for name in ("first", "after", "last"))
    assert first["state"] == after["state"] == last["state"] == "done"
    # what failed with an error of CUDA ended its process, as what crashed and what was killed did
    assert len({record["pid"] for record in (first, after, last)}) == 3
    # the wrong backend is not used, and the record says so
    expected = (
        {"masked_jepa_mse": "torch"} if OPS["masked_jepa_mse"].status("cpu")["cpp"] == "ok" else {}
    )
    assert first["use"] == first["forced"] == expected

    # a later run has nothing left to do, but what it is asked to repeat
    before = len(lines(tmp_path))
    assert run_stages(a_run(tmp_path), [stage("odd")]) and len(lines(tmp_path)) == before
    run_stage(a_run(tmp_path, again=["odd/last"]), stage("odd"))
    assert [r["key"] for r in lines(tmp_path)[before:]] == ["odd/last", "odd"]


@pytest.mark.slow
def test_each_item_of_a_fresh_stage_has_a_process(tmp_path, warm):
    run_stage(a_run(tmp_path), stage("fresh", fresh=True))
    one, two, mark = lines(tmp_path)
    assert one["pid"] != two["pid"] and mark["state"] == "done"


def test_a_stage_that_runs_over_is_killed_and_continued(tmp_path):
    mark = run_stage(a_run(tmp_path), stage("odd", cap=0.2))
    assert (mark["state"], mark["reason"]) == ("killed", "over its 0.2 s")
    assert [r["key"] for r in lines(tmp_path)] == ["odd"]  # no item is blamed
    run = a_run(tmp_path)
    assert run.latest["odd"]["state"] == "killed"  # and so it is begun again


def test_no_stage_begins_that_does_not_fit(tmp_path, capsys):
    run = a_run(tmp_path, seconds=driver.MARGIN + 5)
    late = Stage("late", 1, 60, 30, "", module=HERE)
    assert not run_stages(run, [late])
    assert "late: not begun" in capsys.readouterr().out and not run.out.exists()


def test_a_process_that_hangs_is_killed_with_all_that_it_started(tmp_path):
    script = (
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    inner = int(process.stdout.readline())
    late = time.monotonic() + 0.2
    assert driver._watched(process, tmp_path / "at.json", late, 1) == (None, 0.0)
    driver._kill(process)
    assert process.returncode == -signal.SIGKILL
    until = time.monotonic() + 60  # its parent is gone: whoever adopts it takes a moment
    while not is_over(inner) and time.monotonic() < until:
        time.sleep(0.05)
    assert is_over(inner)


def is_over(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_an_item_over_its_own_limit_is_named(tmp_path):
    at = tmp_path / "at.json"
    at.write_text(json.dumps({"key": "ops/a/b", "limit": 0.1}))
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    try:
        assert driver._watched(process, at, time.monotonic() + 30, 1) == (None, 0.1)
    finally:
        process.kill()
        process.wait()


def test_lines_are_whole_after_a_kill(tmp_path):
    path = tmp_path / "gpu.jsonl"
    script = (
        "import sys; from pathlib import Path; from bench.gpu import journal\n"
        "n = 0\n"
        "while True:\n"
        "    journal.append(Path(sys.argv[1]), {'key': f's/{n}', 'text': 'x' * 5000}); n += 1\n"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", script, str(path)], cwd=ROOT)
    while (not path.exists() or path.stat().st_size < 200_000) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) > 10 and all(len(r["text"]) == 5000 for r in records)


def test_a_line_that_was_cut_off_is_left_behind(tmp_path):
    path = tmp_path / "gpu.jsonl"
    journal.append(path, {"key": "a/1", "state": "done"})
    with open(path, "a") as file:
        file.write('{"key": "a/2", "sta')
    journal.append(path, {"key": "a/3", "state": "done"})
    assert list(journal.read([path], "")) == ["a/1", "a/3"]
    journal.append(path, {"key": "a/1", "state": "done", "rehearsal": "cpu"})
    assert "rehearsal" not in journal.read([path], "")["a/1"]  # is no record of a GPU


def test_keys_are_forgotten_with_all_below_them():
    keys = ("ops", "ops/a/x", "ops/ab/y", "step", "step/W1", "step/W1/kernels")
    latest = {key: {"state": "done"} for key in keys}
    assert set(journal.without(latest, ["ops/a"])) == {"ops/ab/y", *keys[3:]}
    assert set(journal.without(latest, ["step/W1"])) == set(keys[:3])
    assert set(journal.without(latest, ["ops"])) == set(keys[3:])


def test_a_refused_backend_gives_way_to_the_next(monkeypatch):
    states = {"a": "done", "b": "wrong", "c": "not here", "d": "killed", "e": "failed"}
    latest = {f"ops/op/{b}": {"state": state} for b, state in states.items()}
    latest["ops"] = latest["step/op/b"] = {"state": "failed"}
    assert journal.refused(latest) == {"op": ["b", "d", "e"]}
    attention = OPS["timeline_attention"]
    monkeypatch.setattr(
        attention, "status", lambda device: dict.fromkeys(BACKENDS[attention.name], "ok")
    )
    on_gpu = [b.name for b in attention.backends if "cuda" in b.devices]
    assert child.choices({attention.name: on_gpu[:1]}, "cuda") == {attention.name: on_gpu[1]}
    assert child.choices({attention.name: on_gpu[1:]}, "cuda").get(attention.name) == on_gpu[0]
    assert child.choices({attention.name: on_gpu}, "cuda") == {attention.name: "torch"}
    assert child.choices({attention.name: ["sdpa"]}, "cuda") == {}  # not among what a GPU takes


@pytest.mark.parametrize("fault", [1.03, float("nan")])
def test_a_wrong_backend_is_seen(monkeypatch, fault):
    """One row of one result: far less than all together."""
    op = OPS["lora_linear"]
    assert "state" not in ops._compared(REHEARSED, "lora_linear", "fused")

    def spoiled(*args, **kwargs):
        first, *rest = op.reference(*args, **kwargs)
        factor = torch.ones(len(first), 1)
        factor[3] = fault if fault != fault else fault * 5
        return [first * factor, *rest]

    monkeypatch.setattr(op, "on", lambda name: spoiled)
    result = ops._compared(REHEARSED, "lora_linear", "fused")
    assert result["state"] == "wrong" and "one float32" in result["reason"]


def test_every_operation_has_cases():
    for op, entry in OPS.items():
        if entry.backends:
            assert ops.small(op, "cpu") or ops.small(op, "cuda"), op


def test_an_operation_of_tomorrow_is_measured_as_the_bench_has_it(monkeypatch):
    monkeypatch.setattr(ops, "OWN", {})
    quick = ops.small("linear_cross_entropy", "cpu")
    assert quick and all(make.keywords["trained"] in (True, False) for make in quick.values())

    def by_tokens(T, dtype, device, *, D=8):
        return ops.cases.linear_cross_entropy(T, D, 11, dtype, device, trained=True)

    monkeypatch.setattr(ops.cases, "lora_linear", by_tokens)
    odd = ops.small("lora_linear", "cpu")
    assert list(odd) == ["77 tokens float32", "77 tokens bfloat16"]
    assert [make().args[0].dtype for make in odd.values()] == [torch.float32, torch.bfloat16]
    assert all(make().args[0].shape == (77, 8) for make in odd.values())


def test_truth_is_in_fp64():
    for op in ("ema_update_", "linear_cross_entropy", "timeline_attention"):
        for make in ops.small(op, "cpu").values():
            assert {t.dtype for t in ops.truth(op, make())} == {torch.float64}


def test_rows_are_judged_one_by_one():
    exact = torch.ones(1000, 4)
    off = exact.clone()
    off[7] = 2
    assert ops.worst_row([off], [exact]) == pytest.approx(1)
    off[7] = torch.nan
    assert ops.worst_row([off], [exact]) == float("inf")


def test_a_call_s_stages_fit_into_it():
    for call, seconds in CALLS.items():
        assert sum(s.cap for s in STAGES if s.call == call) + INSTALL <= seconds
    assert sum(CALLS.values()) <= 30 * 60 - 3 * 120  # a machine's start takes minutes
    assert all(0 < s.least < s.cap for s in STAGES)
    own = [s.name for s in STAGES if s.call == 2]
    assert [s.name for s in chosen(2, [])] == own + [s.name for s in STAGES if s.call == 1]
    assert [s.name for s in chosen(1, ["step"])] == ["step"]
    traced = [s.name for s in chosen(None, [], "fake")]
    assert traced == ["ops", "check", "engines", "step", "memory"]


def test_rivals_are_those_of_the_bench_of_a_step():
    bench = Bench("pairs", "cuda", "fake", {}, LONG, "")
    names = [item.name for item in pairs.items(bench)]
    assert names[:2] == ["W1/B2", "W2/B2"] and names[2].startswith("W1/B3'")
    assert names[4:6] == ["W1/B3", "W2/B3"] and names[2:4] == [
        names[2],
        names[2].replace("1", "2", 1),
    ]
    assert not {"W1/B0", "W1/B1", "W1/B4"} & set(names)


def test_the_plan_needs_nothing_but_python(tmp_path):
    """It is read before the wheels are unpacked."""
    command = [sys.executable, "-S", "-m", "bench.gpu", "--list", "--call=2", f"--work={tmp_path}"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[:3] == ["2", "pairs", "450"]


def test_a_wrong_stage_is_refused(capsys):
    for argument in ("--only=stepp", "--again=stepp/W1"):
        assert ended([argument])[0] == 2
        assert "a stage must be one of rates, ops" in capsys.readouterr().err


def plain(name: str) -> str:
    return re.split(r"[^\w.-]", name, maxsplit=1)[0].lower().replace("_", "-")


def test_what_is_needed_is_there_or_carried():
    """By the project, its tests (but for what checks the source or statistics alone), and by each
    wheel."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {plain(n) for n in project["dependencies"]}
    needs |= {plain(n) for n in project["optional-dependencies"]["test"]}
    needs -= {"ruff", "mypy", "scikit-survival", "distributed", "polars"}
    carried, there = {plain(n) for n in wheels.WHEELS}, set(wheels.PRESENT)
    for name in wheels.WHEELS:
        for text in importlib.metadata.requires(name) or []:
            if "extra ==" not in text:
                needs.add(plain(text))
    assert needs <= carried | there, needs - carried - there
    assert not carried & there


def test_the_download_is_pinned_and_never_builds(tmp_path):
    command = wheels.download_command(tmp_path)
    assert "--only-binary=:all:" in command and "--no-deps" in command
    assert (
        "--platform=manylinux_2_28_x86_64" in command and "--platform=manylinux1_x86_64" in command
    )
    packages = command[command.index(str(tmp_path)) + 1 :]
    assert len(packages) == len(wheels.WHEELS)
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", p) for p in packages)


def test_wheels_are_unpacked_once_without_a_network(tmp_path):
    folder, site = tmp_path / "wheels", tmp_path / "site"
    folder.mkdir()
    assert "holds no wheel" in wheels.install(folder, site, LONG)
    about = "carried_thing-1.0.dist-info"
    with zipfile.ZipFile(folder / "carried_thing-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_thing.py", "value = 3\n")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    assert wheels.install(folder, site, LONG) == ""
    assert (site / "carried_thing.py").exists()
    assert wheels.install(tmp_path / "nowhere", site, LONG) == ""  # it is there


def test_compiled_kernels_move_to_the_next_machine(tmp_path):
    run = a_run(tmp_path / "one")
    run.out.parent.mkdir()
    (run.work / "caches" / "triton").mkdir(parents=True)
    (run.work / "caches" / "triton" / "kernel.cubin").write_text("code")
    assert "caches.tar.gz" in driver.pack(run)
    other = a_run(tmp_path / "two")
    driver.restore(other, tmp_path / "one" / "caches.tar.gz")
    assert (other.work / "caches" / "triton" / "kernel.cubin").read_text() == "code"
    assert "not packed" in driver.pack(run, most=10)
    assert not (tmp_path / "one" / "caches.tar.gz").exists()


def test_red_tests_are_named():
    text = (
        "[gw0] [ 10%] PASSED tests/a.py::test_one[x-1]\n"
        "[gw1] [ 20%] FAILED tests/a.py::test_two\n"
        "[gw1] [ 30%] SKIPPED tests/b.py::test_three\n"
        "FAILED tests/a.py::test_two - AssertionError: off by 3\n"
        "=== 1 failed, 1 passed in 3 s ==="
    )
    result = suite.judged(text, 1, 60)
    assert result["state"] == "wrong" and result["counts"] == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
    }
    assert result["red"] == {"tests/a.py::test_two": "AssertionError: off by 3"}
    assert suite.judged(text, None, 60)["state"] == "killed"
    assert "state" not in suite.judged("tests/a.py::test_one PASSED     [100%]", 0, 60)
    assert suite.judged("", 5, 60)["state"] == "failed"


def test_what_the_sanitizer_counts_is_a_result():
    bad = "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 2 errors\n"
    result = sanitizer.judged(bad, 0, {})
    assert (result["state"], result["errors"]) == ("wrong", 2) and len(result["lines"]) == 2
    assert "state" not in sanitizer.judged("========= ERROR SUMMARY: 0 errors", 0, {})
    assert sanitizer.judged("refused", 1, {})["state"] == "failed"
    assert sanitizer.judged("", None, {"ops/a/b": "done"})["state"] == "killed"


def test_kernels_that_overlap_are_busy_once():
    table = summed({"a": [2.0, 3.0], "b": [1.0]}, [(0, 2), (1, 4), (6, 7)])
    assert (table["us"], table["us_busy"], table["calls"]) == (7, 5, 3)
    assert [k["name"] for k in table["kernels"]] == ["a", "b"]
    assert summed({}, [])["us"] == 0


def test_curves_that_part_are_wrong():
    down = [4.0 - 0.1 * i for i in range(20)]
    assert convergence.judged(down, down) == {}
    assert convergence.judged(down, [x + 0.2 for x in down])["state"] == "wrong"
    assert "went from" in convergence.judged([4.0] * 20, [4.0] * 20)["reason"]
    assert convergence.judged([float("nan")] * 20, down)["state"] == "wrong"


def test_stages_have_a_module():
    for one in plan.STAGES:
        assert (
            one.path == f"bench.gpu.{one.name}" and (ROOT / "bench/gpu" / f"{one.name}.py").exists()
        )
