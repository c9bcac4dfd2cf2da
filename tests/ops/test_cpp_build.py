"""The builder of the C++ kernels: one library, whole, from whatever happened before.

The logic is tested with a compiler that is a shell script, so that nothing is compiled here.
"""

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from smbkernels import cpp_build as builder
from smbkernels.cpp_build import CannotBuild, Compiler, build, find_compiler, flags, key, missing

KERNELS = Path(builder.__file__).parents[2]
FLAGS = ("-O3",)

# counts its calls, waits while HOLD exists, and writes its output: a line, or a copy of REAL
SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
out=$0.none
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then out=$2; fi; shift; done
echo "$out" >> '{folder}/calls'
{act}
while [ -e '{folder}/hold' ]; do sleep 0.05; done
if [ -e '{folder}/real' ]; then cp '{folder}/real' "$out"; else echo library > "$out"; fi
"""

# an operation by its plain name, and what was logged, from a process of its own
CALL = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="log: %(message)s")
from smbkernels import ema_update_, masked_jepa_mse
from smbkernels.registry import OPS
prediction_MD, target_TD, row_M = torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, 3])
for _ in range(2):
    print(float(masked_jepa_mse(prediction_MD, target_TD, row_M)))
print(OPS["masked_jepa_mse"].status("cpu")["cpp"])
"""

# each process is a fork of one that has imported torch, as `CALL` would, with variables of its own
FORKS = """
import json, os, sys, torch, triton
code, children = sys.stdin.read(), []
for number, variables in enumerate(json.loads(sys.argv[1])):
    children.append(os.fork())
    if not children[-1]:
        file = os.open(f"{sys.argv[2]}/{number}", os.O_CREAT | os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.environ.update(variables)
        exec(code, {})
        sys.exit()
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


class Fake:
    """A compiler that is a script."""

    def __init__(self, folder: Path, act: str = ""):
        self.folder, self.path = folder, folder / "fake-c++"
        self.path.write_text(SCRIPT.format(folder=folder, act=act))
        self.path.chmod(0o755)
        self.compiler = Compiler((str(self.path),), "fake 1.0\n")

    def links(self) -> int:
        """How many libraries it was asked for."""
        calls = self.folder / "calls"
        return calls.read_text().count("kernels.so") if calls.exists() else 0

    def calls(self) -> int:
        calls = self.folder / "calls"
        return len(calls.read_text().splitlines()) if calls.exists() else 0


@pytest.fixture
def fake(tmp_path):
    return Fake(tmp_path)


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "src"
    folder.mkdir()
    for name in ("one.cpp", "two.cpp", "shared.h"):
        (folder / name).write_text(name)
    return sorted(folder.iterdir())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def until(happened) -> None:
    limit = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < limit, "nothing happened in 120 s"
        time.sleep(0.02)


def forked(*args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=build, args=args)
    process.start()
    return process


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> SimpleNamespace:
    """The lines that `CALL` prints: `without` a compiler, and `at_once` in two processes.

    The compiler of those hands out the library that is already built.
    """
    folder = tmp_path_factory.mktemp("said")
    (folder / "without").mkdir()
    (folder / "outputs").mkdir()
    cases = [{"PATH": "", "XDG_CACHE_HOME": str(folder / "without")}]
    fake = Fake(folder)
    if not missing("cpu"):
        real = build(builder._cache(), find_compiler(), builder._sources(), flags())
        (folder / "real").write_bytes(real.read_bytes())
        cases += [{"CXX": str(fake.path), "XDG_CACHE_HOME": str(folder / "cache")}] * 2
    left = {k: v for k, v in os.environ.items() if k not in ("CXX", "XDG_CACHE_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(cases), str(folder / "outputs")],
        env={**left, "PYTHONPATH": str(KERNELS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        input=CALL,
        timeout=120,
    )
    outputs = [file.read_text() for file in sorted((folder / "outputs").iterdir())]
    assert done.returncode == 0 and len(outputs) == len(cases), (done.stdout, outputs)
    without, *at_once = [output.splitlines() for output in outputs]
    return SimpleNamespace(folder=folder, fake=fake, without=without, at_once=at_once)


def test_the_key_depends_on_all_that_goes_into_a_library(fake, sources):
    keys = [key(fake.compiler, sources, FLAGS)]
    assert keys[0] == key(fake.compiler, sources[::-1], FLAGS)
    keys.append(key(fake.compiler, sources, ("-O2",)))
    keys.append(key(Compiler(fake.compiler.command, "fake 1.1\n"), sources, FLAGS))
    keys.append(key(Compiler(("ccache", *fake.compiler.command), "fake 1.0\n"), sources, FLAGS))
    for source in sources:
        source.write_text("changed")
        keys.append(key(fake.compiler, sources, FLAGS))
    assert len(set(keys)) == len(keys)


def test_flags_follow_the_vector_instructions_that_torch_uses(monkeypatch):
    def of(capability):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        return flags()

    assert {"-DCPU_CAPABILITY=AVX512", "-mavx512f", "-mfma"} <= set(of("AVX512"))
    assert {"-DCPU_CAPABILITY=AVX2", "-mavx2", "-mfma"} <= set(of("AVX2"))
    # no instruction set but the one every machine of the kind has
    other = [f for f in of("SVE256") if f.startswith("-m")]
    assert other == [] and "-DCPU_CAPABILITY=DEFAULT" in flags()
    assert all("-ffp-contract=off" in of(c) for c in ("AVX512", "AVX2", "DEFAULT"))


def test_a_library_is_built_once_and_says_so(fake, cache, sources, caplog):
    first = build(cache, fake.compiler, sources, FLAGS)
    assert first.read_text() == "library\n"
    assert fake.calls() == 3  # two sources and the link
    assert build(cache, fake.compiler, sources, FLAGS) == first
    assert fake.calls() == 3
    assert [r.message for r in caplog.records] == ["building the CPU kernels once, about 20 s"]
    assert sorted(p.name for p in first.parent.iterdir()) == ["kernels.json", "kernels.so", "lock"]
    assert build(cache, fake.compiler, sources, ("-O2",)) != first


def cut(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-1])


def flip(library: Path) -> None:
    library.write_bytes(b"L" + library.read_bytes()[1:])


def garble(library: Path) -> None:
    library.with_suffix(".json").write_text('{"bytes": 8')


@pytest.mark.parametrize(
    "damage", [cut, flip, garble, Path.unlink, lambda p: p.with_suffix(".json").unlink()]
)
def test_a_damaged_library_is_built_again(fake, cache, sources, damage):
    library = build(cache, fake.compiler, sources, FLAGS)
    damage(library)
    assert build(cache, fake.compiler, sources, FLAGS) == library
    assert library.read_text() == "library\n"
    assert fake.links() == 2


def test_a_killed_build_leaves_nothing_and_stops_nobody(fake, cache, sources):
    hold = fake.folder / "hold"
    hold.touch()
    process = forked(cache, fake.compiler, sources, FLAGS)
    until(lambda: fake.calls() == 2)  # both compilations are under way, the lock is held
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (folder,) = cache.iterdir()
    assert [p.name for p in folder.glob("kernels.*")] == []
    assert len(list(folder.glob("build-*"))) == 1
    hold.unlink()
    library = build(cache, fake.compiler, sources, FLAGS)
    assert library.read_text() == "library\n"
    assert list(folder.glob("build-*")) == []


def test_a_second_process_waits_for_the_first(fake, cache, sources):
    hold = fake.folder / "hold"
    hold.touch()
    processes = [forked(cache, fake.compiler, sources, FLAGS)]
    until(lambda: fake.calls() == 2)
    processes += [forked(cache, fake.compiler, sources, FLAGS) for _ in range(2)]
    time.sleep(0.3)
    assert fake.calls() == 2 and all(p.is_alive() for p in processes)
    hold.unlink()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert fake.links() == 1


def test_a_failing_compiler_is_one_line_and_its_output_is_for_debugging(
    tmp_path, cache, sources, caplog
):
    fake = Fake(tmp_path, act="echo 'one.cpp:1: no such thing'; exit 3")
    with caplog.at_level(logging.DEBUG, "smbkernels"), pytest.raises(CannotBuild) as caught:
        build(cache, fake.compiler, sources, FLAGS)
    assert str(caught.value).startswith(f"{fake.path} failed with status 3")
    assert "\n" not in str(caught.value) and "no such thing" not in str(caught.value)
    levels = {r.levelno for r in caplog.records if "no such thing" in r.getMessage()}
    assert levels == {logging.DEBUG}
    (folder,) = cache.iterdir()
    assert [p.name for p in folder.iterdir()] == ["lock"]


def test_a_cache_that_cannot_be_written(fake, tmp_path, sources, monkeypatch):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    with pytest.raises(CannotBuild, match=f"cannot write {in_the_way}.*Not a directory"):
        build(in_the_way, fake.compiler, sources, FLAGS)
    # as an operation meets it: a reason, and no exception
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    monkeypatch.setenv("CXX", str(fake.path))
    reason = builder._load.__wrapped__()
    assert reason.startswith(f"cannot write {in_the_way}") and "\n" not in reason
    assert fake.calls() == 0


def test_a_library_that_is_none(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(fake.path))
    reason = builder._load.__wrapped__()
    assert reason.startswith("the built library cannot be loaded") and "\n" not in reason


@pytest.mark.parametrize(
    ("chosen", "reason"),
    [
        ("nowhere-c++", "no C[+][+] compiler: nowhere-c[+][+] not found"),
        ("'open", 'CXX must be a command, got "\'open"'),
        ("sh -c 'exit 7'", "failed with status 7"),
    ],
)
def test_a_compiler_of_the_environment_that_cannot_be_used(monkeypatch, chosen, reason):
    monkeypatch.setenv("CXX", chosen)
    with pytest.raises(CannotBuild, match=reason):
        find_compiler()


def test_a_compiler_of_the_environment_comes_before_those_on_the_path(monkeypatch, fake):
    on_path = fake.folder / "g++"
    on_path.symlink_to(fake.path)
    monkeypatch.setenv("PATH", str(fake.folder))
    monkeypatch.setenv("CXX", f"{fake.path} -v")
    monkeypatch.setattr(builder, "_run", lambda command: f"of {command}")
    assert find_compiler().command == (str(fake.path), "-v")
    monkeypatch.delenv("CXX")
    path = str(on_path)
    assert find_compiler() == Compiler((path,), f"of {[path, '--version']}")


def test_they_are_for_cpus():
    assert missing("cuda") == "tensors are on cuda"


@pytest.mark.slow
def test_without_a_compiler_an_operation_runs_on_torch_and_says_so_once(said):
    reason = "no C++ compiler: c++, g++, clang++ not found"
    line = f"log: masked_jepa_mse: cpp is not used on cpu: {reason}"
    assert said.without == [line, "2.0", "2.0", reason]
    assert list((said.folder / "without").iterdir()) == []


def test_where_there_is_a_compiler_the_kernels_build_and_load():
    """Other tests of C++ skip where it cannot run; sources that do not compile must not pass so."""
    try:
        find_compiler()
    except CannotBuild as error:
        pytest.skip(str(error))
    assert missing("cpu") is None


@pytest.mark.slow
def test_two_processes_at_once_use_one_library(said):
    if missing("cpu"):
        pytest.skip(missing("cpu"))
    runs = said.at_once
    line = f"log: building the CPU kernels once, about {builder.SECONDS} s"
    assert sorted(len(r) for r in runs) == [3, 4]
    assert [one for run in runs for one in run if one.startswith("log: ")] == [line]
    assert all(run[-3:] == ["2.0", "2.0", "ok"] for run in runs)
    assert said.fake.links() == 1


@pytest.mark.parametrize("capability", ["DEFAULT", "AVX2", "AVX512"])
def test_the_shared_header_compiles_for_every_kind_of_vector(capability, monkeypatch, tmp_path):
    """This machine builds for one kind alone; the order of torch's headers matters for others."""
    if capability == torch.backends.cpu.get_cpu_capability() and not missing("cpu"):
        pytest.skip("the library was built for it, header and all")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    try:
        compiler = find_compiler()
    except CannotBuild as error:
        pytest.skip(str(error))
    if not any(f.startswith("-m") for f in flags()) and capability != "DEFAULT":
        pytest.skip("no flags for it")
    header = next(s for s in builder._sources() if s.name == "lanes.h")
    source = tmp_path / "one.cpp"
    source.write_text(f'#include "{header}"\n')
    command = [*compiler.command, *flags(), "-fsyntax-only", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
