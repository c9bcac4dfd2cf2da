"""python -m bench.cubin: compile shipped Triton kernels without a GPU and read the machine code.

Run by `bench.aot` in a process of its own: a kernel is either compiled or, with TRITON_INTERPRET=1,
interpreted, and which is settled when it is decorated. Prints one JSON object.
"""

import argparse
import collections
import hashlib
import importlib
import inspect
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from smbkernels.registry import OPS

ARCHS = (80, 90, 100)
# `/*0a10*/  @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;`
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
# the tensor memory engine moves whole tiles
_BULK_LOADS, _BULK_STORES = ("UTMALDG", "UBLKCP"), ("UTMASTG", "UTMAREDG")


def shipped() -> list[str]:
    """The modules of smbkernels that are the backend `triton` of an operation."""
    backends = [b for operation in OPS.values() for b in operation.backends]
    return [f"smbkernels.{b.module}" for b in backends if b.name == "triton"]


def collect(modules: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Builds by name, and what is wrong with their lists."""
    import triton

    builds, problems, kernels, built = {}, [], set(), set()
    for module_name in modules:
        module = importlib.import_module(module_name)
        for name, value in vars(module).items():
            # helpers that kernels call have no build of their own
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                kernels.add(value)
        for build in module.builds() if hasattr(module, "builds") else []:
            if build.name in builds:
                problems.append(f"{build.name}: two builds have this name")
            builds[build.name] = build
            built.add(build.kernel)
    for kernel in sorted(kernels - built, key=lambda k: k.__name__):
        problems.append(f"{kernel.__module__.rpartition('.')[2]}: no build of {kernel.__name__}")
    return builds, problems


def source_of(build: Any) -> str:
    """A short hash of what a build is compiled from: its settings, and its kernel's source files.

    These are the file of the kernel and those of the functions on Triton that it can name.
    """
    settings = {k: str(v) for k, v in vars(build).items() if k not in ("kernel", "archs")}
    named = [build.kernel, *build.kernel.fn.__globals__.values()]
    functions = [x.fn for x in named if inspect.isfunction(getattr(x, "fn", None))]
    files = {inspect.getfile(function) for function in functions}
    texts = sorted(Path(f).read_text(encoding="utf-8") for f in files)
    parts = [texts, build.kernel.__name__, settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read_usage(text: str) -> dict[str, int]:
    """Registers of a thread and bytes of local memory, from `cuobjdump -res-usage`."""
    usages = [tuple(map(int, match)) for match in _USAGE.findall(text)]
    if not usages:
        raise ValueError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    # one entry per function: the kernel, and what it calls
    return {
        "registers": max(registers for registers, _, _ in usages),
        "spill_bytes": sum(stack + local for _, stack, local in usages),
    }


def read_code(text: str) -> dict[str, Any]:
    """Counts of the instructions that matter, from a disassembly."""
    times_by_code = collections.Counter(_INSTRUCTION.findall(text))
    if not times_by_code:
        raise ValueError(f"the disassembly holds no instruction: {text[:200]!r}")

    def total(*heads: str, wide: bool | None = None) -> int:
        num_instructions = 0
        for code, times in times_by_code.items():
            head, *parts = code.split(".")
            # blackwell also has 32-byte accesses; the cache hint LTC128B is another part
            is_wide = "128" in parts or "256" in parts
            num_instructions += times if head in heads and wide in (None, is_wide) else 0
        return num_instructions

    matrix: collections.Counter[str] = collections.Counter()
    for code, times in times_by_code.items():
        head = code.split(".")[0]
        if head.endswith("MMA"):
            matrix[head] += times
    return {
        "spill_moves": total("LDL", "STL"),
        "wide_loads": total("LDG", "LDGSTS", wide=True) + total(*_BULK_LOADS),
        "narrow_loads": total("LDG", "LDGSTS", wide=False),
        "wide_stores": total("STG", wide=True) + total(*_BULK_STORES),
        "narrow_stores": total("STG", wide=False),
        "matrix": dict(sorted(matrix.items())),
    }


def compile_and_read(build: Any, arch: int) -> dict[str, Any]:
    """What one build needs on one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(build.signature)
    if names != build.kernel.arg_names:
        raise ValueError(f"signature must name {build.kernel.arg_names}, got {names}")
    constant = {name for name, kind in build.signature.items() if kind == "constexpr"}
    if constant != set(build.constexprs):
        raise ValueError(f"constexprs must be {sorted(constant)}, got {sorted(build.constexprs)}")
    # as a launch finds them: without these, vector loads are lost
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(build.signature.items())
        if kind.startswith("*") or name in build.aligned
    }
    source = ASTSource(build.kernel, build.signature, build.constexprs, aligned)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    began = time.perf_counter()
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.perf_counter() - began
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        # cuobjdump disassembles with the nvdisasm beside it
        command = [str(tool), "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {
        **read_usage(done.stdout),
        "shared": kernel.metadata.shared,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        **read_code(done.stdout),
        "seconds": round(seconds, 2),
    }


_BUILDS: dict[str, Any] = {}  # filled before processes are forked


def _report(job: tuple[str, int]) -> dict[str, Any]:
    name, arch = job
    build = _BUILDS[name]
    about = {
        "build": name,
        "arch": arch,
        "expects_wide_loads": build.wide_loads,
        "expects_tensor_cores": build.tensor_cores,
        "source": source_of(build),
    }
    try:
        return {**about, **compile_and_read(build, arch)}
    except Exception as error:  # a kernel that does not compile is a result
        return {**about, "error": f"{type(error).__name__}: {error}"[:500]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cubin", description=__doc__)
    parser.add_argument("modules", nargs="*", help="default: all that smbkernels ships")
    parser.add_argument("--only", default="", help="builds whose name holds this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--rows",
        type=Path,
        help="a table of budgets; what has a row of the same source is left out",
    )
    settings = parser.parse_args(argv)
    import triton

    builds, problems = collect(settings.modules or shipped())
    _BUILDS.update(builds)
    # matrix kernels take longest: first, so that no process is left alone with one
    order = sorted(builds, key=lambda name: not builds[name].tensor_cores)
    jobs = [(n, a) for n in order if settings.only in n for a in builds[n].archs]
    table = json.loads(settings.rows.read_text(encoding="utf-8")) if settings.rows else {}
    rows = table.get(triton.__version__, {})
    source = {n: source_of(builds[n]) for n in order}
    unchanged = [(n, a) for n, a in jobs if rows.get(f"{n} sm_{a}", {}).get("source") == source[n]]
    jobs = [job for job in jobs if job not in set(unchanged)]
    context = multiprocessing.get_context("fork")  # the imports above are paid for once
    with ProcessPoolExecutor(settings.processes, mp_context=context) as pool:
        reports = list(pool.map(_report, jobs))
    reports.sort(key=lambda r: (r["build"], r["arch"]))
    result = {"triton": triton.__version__, "problems": problems, "reports": reports}
    result["unchanged"] = [f"{n} sm_{a}" for n, a in unchanged]
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
