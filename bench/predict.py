"""python -m bench.predict: the milliseconds that a training step would take on an H200.

Every kernel, product and byte of the step is counted on a pretended GPU (`bench.fakegpu`), and each
takes the longer of its FLOPs and its bytes at a rate that is assumed in `bench/rates.toml`. Nothing
is measured on a GPU: the figures rank changes and say where time would go.
"""

import sys
import time
import tomllib
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator
from smbkernels.catalog import BACKENDS
from smbkernels.registry import use

from bench import records
from bench.fakegpu import shim
from bench.fakegpu.device import MEMORY
from bench.fakegpu.ledger import PRODUCTS, Key, Row
from bench.fakegpu.trace import ADAMW, CLIP, LOG, TRUNCATION, Make, Traced, traced
from bench.step.rivals import Packed
from bench.step.variants import BACKWARD, EMA, LOSSES, ONLINE, TARGET, Smbfast
from bench.step.workloads import Workload, on_cuda
from smbfast.base.config import Settings, command_line
from smbfast.base.runtime import git_state, versions

SAID = "predicted from assumed rates; nothing was measured on a GPU"
RATES = Path(__file__).parent / "rates.toml"
NARROW = 384  # the smallest side of a product of rank r: three tracked adapters of 128 in one
ATTENTION = "timeline_attention"
COPIES = {"clone", "copy_", "select_backward", "slice_backward", "cat", "_to_copy", "index_copy_"}
VARIANTS: dict[str, Make] = {
    "B4": Smbfast,
    "B2": Packed,
    "B3'": partial(Packed, shared=True),
}
COMPILED = ("B2", "B3'")
KINDS = (
    "base GEMM",
    "head",
    "rest of losses",
    "attention forward",
    "attention backward",
    "rank-r products",
    "element-wise",
    "copies",
    "fp32 products",
    "clip, AdamW, EMA",
    "truncation",
    "kernel gaps",
)


class Predict(Settings):
    """Predict the time of a training step on an H200 from counts and assumed rates.

    Workloads of bench.step (W1 to W6, K8) may be given as plain arguments. For each, a step is run
    on a pretended GPU, where tensors have shapes and no memory, and every kernel, byte and product
    is counted; the rates at which a GPU would do them are assumed, and stand with their grounds in
    bench/rates.toml. The milliseconds are for comparing two states of the code, and nothing of them
    was measured. It needs a C++ compiler, no GPU, and about 20 seconds for a variant of a workload.

    Columns are B4 (smbfast) and the rivals of bench.step that are most like it: B2 (Hugging Face,
    PEFT and Liger, compiled, three forwards) and B3' (the prefix shared by two calls of attention,
    compiled). Rows are what the time goes to: products with the frozen base weights, those of the
    head, the rest of the losses, attention, products of rank r, memory-bound operations, copies and
    casts, products in fp32, the optimizer and the target's average, its truncation (spread over the
    steps between two), and the gaps between kernels. Waits of the host cost more than is said here,
    since a GPU that is waited for has nothing queued.
    """

    epilog: ClassVar[str] = """Examples

  Where the time of a step would go, at the two headline workloads:
    python -m bench.predict W1 W2

  Before and after a change, beside each other in bench/results/predict.jsonl:
    python -m bench.predict W1 --variants=B4 --save

  With attention by cuDNN:
    python -m bench.predict W1 --variants=B4 --backends=timeline_attention:cudnn

  With other rates:
    cp bench/rates.toml mine.toml; python -m bench.predict W1 --rates=mine.toml"""

    variants: list[str] = Field(
        list(VARIANTS),
        description="Variants of bench.step to predict. B2 and B3' are counted as they run "
        "eagerly, and the element-wise part is scaled to what torch.compile leaves of it.",
    )
    backends: list[str] = Field(
        [],
        description="Backends of operations to run B4 on in place of the default, such as "
        "`timeline_attention:cudnn`.",
    )
    workloads: list[str] = Field(
        [],
        description="Workloads to predict, the same as plain arguments. If the list is empty, "
        "these are W1 to W6.",
    )
    rates: Path = Field(
        RATES,
        description="TOML file of the assumed rates, with the keys of bench/rates.toml.",
    )
    layers: int = Field(
        0,
        ge=0,
        description="Layers to trace. 0 traces 2 and 4 layers and extends every count, which is a "
        "line in their number, to the model's own; otherwise the prediction is of such a model.",
    )
    save: bool = Field(False, description="Append the results to bench/results/predict.jsonl.")

    @field_validator("variants")
    @classmethod
    def _variants(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in VARIANTS:
                raise ValueError(f"must be among {', '.join(VARIANTS)}; `{name}` is not")
        return value

    @field_validator("backends")
    @classmethod
    def _backends(cls, value: list[str]) -> list[str]:
        for text in value:
            name, _, backend = text.partition(":")
            if backend not in BACKENDS.get(name, ()):
                raise ValueError(f"must be OPERATION:BACKEND of `python -m smbkernels`, not {text}")
        return value

    @field_validator("workloads")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in known():
                raise ValueError(f"must be among {', '.join(known())}; `{name}` is not")
        return value


def known() -> dict[str, Workload]:
    """Training steps at full size, by name."""
    return {w.name: w for w in on_cuda() if not w.nodes}


def read_rates(path: Path = RATES) -> dict[str, Any]:
    """The assumed rates.

    Raises:
        ValueError: the file is missing or not TOML, or lacks a section of bench/rates.toml.
    """
    try:
        rates = tomllib.loads(path.read_text(encoding="utf-8"))
        needed = tomllib.loads(RATES.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"rates must be a TOML file, got {path}: {error}") from None
    missing = sorted(needed.keys() - rates.keys())
    if missing:
        raise ValueError(f"{path} must have the sections of {RATES}; missing: {', '.join(missing)}")
    return rates


@dataclass(frozen=True)
class Prediction:
    """Of one variant on one workload."""

    variant: str
    seconds: dict[str, float]  # by kind
    kernels: float
    nbytes: float
    peak: float  # bytes
    engines: tuple[str, ...]  # of attention, as its kernels were seen
    waits: int  # of the host for the GPU, outside log lines

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


def predicted(name: str, step: Traced, workload: Workload, rates: dict[str, Any]) -> Prediction:
    """Seconds of a step by kind."""
    seconds: dict[str, float] = defaultdict(float)
    for key, row in step.rows.items():
        seconds[kind_of(key, workload.size.vocabulary)] += seconds_of(key, row, rates)
        seconds["kernel gaps"] += row.kernels * rates["gap"]["seconds"]
    engines = {}
    for (part, inside), flops in step.work.items():
        if inside.startswith(ATTENTION) or not inside:
            engine = engine_of([k.op for k in step.rows if k[:2] == (part, inside)], rates)
            direction = "backward" if part == BACKWARD else "forward"
            seconds[f"attention {direction}"] += flops / rates["attention"][engine][direction]
            engines[engine] = True
    names = engine_kernels(rates)
    if not engines and any(part in key.op for key in step.rows for part in names):
        raise ValueError(f"{name}: kernels of attention ran whose work is not counted")
    return Prediction(
        name,
        {kind: seconds[kind] for kind in KINDS},
        sum(row.kernels for row in step.rows.values()),
        sum(row.nbytes for row in step.rows.values()),
        step.peak,
        tuple(engines),
        sum(n for (part, *_), n in step.waits.items() if part != LOG),
    )


def compiled(step: Traced, rates: dict[str, Any]) -> Traced:
    """An eager step as `torch.compile` of its layers would leave it: by an assumed share."""
    share = rates["compiled"]["share"]

    def left(key: Key, row: Row) -> Row:
        in_layers = key.part in (ONLINE, TARGET, BACKWARD) and not key.inside
        fuses = in_layers and key.op not in PRODUCTS and "::" not in key.op
        return Row(share * row.kernels, share * row.nbytes, row.flops) if fuses else row

    return replace(step, rows={key: left(key, row) for key, row in step.rows.items()})


def kind_of(key: Key, vocabulary: int) -> str:
    """Under which heading a row's time is printed."""
    if key.part in (CLIP, ADAMW, EMA):
        return "clip, AdamW, EMA"
    if key.part == TRUNCATION:
        return "truncation"
    if key.op in PRODUCTS:
        if key.dtype not in ("bfloat16", "float16"):
            return "fp32 products"
        if vocabulary in key.sizes:
            return "head"
        return "rank-r products" if min(key.sizes[1:]) <= NARROW else "base GEMM"
    if key.inside.startswith(ATTENTION):
        return "attention backward" if key.part == BACKWARD else "attention forward"
    if key.part == LOSSES:
        return "rest of losses"
    if key.op.startswith("triton::") and "lora" in key.op:
        return "rank-r products"
    return "copies" if key.op in COPIES else "element-wise"


def seconds_of(key: Key, row: Row, rates: dict[str, Any]) -> float:
    """The longer of a row's products and its bytes; what an engine of attention does is counted by
    the work of visible pairs instead."""
    if any(name in key.op for name in engine_kernels(rates)):
        return 0.0
    if key.op in ("_linalg_eigh", "_linalg_svd"):
        return row.kernels * rates["solver"]["seconds"]
    narrow = key.op in PRODUCTS and min(key.sizes[1:]) <= NARROW
    narrow = narrow or (key.op.startswith("triton::") and "lora" in key.op)
    bandwidth = rates["narrow_products" if narrow else "elements"]["rate"]
    arithmetic = {"float64": "fp64", "float32": "fp32", "tf32": "tf32"}.get(key.dtype, "base")
    return max(row.nbytes / bandwidth, row.flops / rates[f"{arithmetic}_products"]["rate"])


def engine_kernels(rates: dict[str, Any]) -> list[str]:
    """Parts of the names of all kernels that have a rate as attention."""
    return [name for engine in rates["attention"].values() for name in engine["kernels"]]


def engine_of(ops: list[str], rates: dict[str, Any]) -> str:
    """The engine of which a kernel ran; the longest name that fits decides.

    Raises:
        ValueError: no kernel of a known engine is among them.
    """
    fitting = [
        (len(name), engine)
        for engine, about in rates["attention"].items()
        for name in about["kernels"]
        if any(name in op for op in ops)
    ]
    if not fitting:
        raise ValueError(
            "attention must run a kernel that has a rate in the file of rates, under "
            f"[attention.ENGINE], got {', '.join(sorted(set(ops)))}"
        )
    return max(fitting)[1]


def printed(workload: Workload, predictions: list[Prediction]) -> str:
    """A table, with a column for each variant."""
    rows = [[f"{workload.name}, ms of a step", *(p.variant for p in predictions)]]
    for kind in KINDS:
        rows.append([kind, *(f"{1e3 * p.seconds[kind]:.1f}" for p in predictions)])
    rows.append(["sum", *(f"{1e3 * p.total:.0f}" for p in predictions)])
    tokens = workload.num_tokens
    rows.append(["trunk tokens/s", *(f"{tokens / p.total:,.0f}" for p in predictions)])
    rows.append(["kernels", *(f"{p.kernels:,.0f}" for p in predictions)])
    rows.append(["GB read and written", *(f"{p.nbytes / 1e9:,.0f}" for p in predictions)])
    rows.append(["GB allocated at the peak", *(_peak(p.peak) for p in predictions)])
    rows.append(["waits of the host", *(str(p.waits) for p in predictions)])
    rows.append(["attention", *(" ".join(p.engines) for p in predictions)])
    eager = [p.variant for p in predictions if p.variant in COMPILED]
    note = f"{' and '.join(eager)}: counted eagerly, element-wise operations times compiled.share"
    return "\n".join([workload.description, records.columns(rows), *([note] if eager else [])])


def _peak(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f}" + (" does not fit" if nbytes > MEMORY else "")


def figures(rates: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Every assumed rate by name, without its ground."""
    sections = {name: about for name, about in rates.items() if name != "attention"}
    sections |= {f"attention {name}": about for name, about in rates["attention"].items()}
    return {
        name: {key: value for key, value in about.items() if isinstance(value, int | float)}
        for name, about in sections.items()
    }


def printed_rates(rates: dict[str, Any]) -> str:
    """The same as text."""
    rows = [
        [name, ", ".join(f"{key} {value:.3g}" for key, value in values.items())]
        for name, values in figures(rates).items()
    ]
    return f"assumed, in FLOP/s, bytes/s and seconds:\n{records.columns(rows, '  ')}"


def main(argv: list[str] | None = None) -> None:
    """Trace, predict, print."""
    argv = sys.argv[1:] if argv is None else argv
    plain = [a for a in argv if not a.startswith("-") and "=" not in a]
    options = [a for a in argv if a not in plain]
    options += [f"--workloads={','.join(plain)}"] if plain else []
    settings = command_line(Predict, options, prog="python -m bench.predict")
    try:
        rates = read_rates(settings.rates)
    except ValueError as error:
        sys.exit(f"python -m bench.predict: {error}")
    if not shim.is_started():
        shim.restart(["bench.predict", *argv])
    began, lines = time.perf_counter(), []
    print(f"{SAID}\n{printed_rates(rates)}\ntheir grounds: {settings.rates}", flush=True)
    for name in settings.workloads or [n for n in known() if n.startswith("W")]:
        workload = known()[name]
        predictions = []
        for variant in settings.variants:
            with use(**dict(text.split(":") for text in settings.backends)):
                step = traced(workload, VARIANTS[variant], layers=settings.layers or None)
            step = compiled(step, rates) if variant in COMPILED else step
            predictions.append(predicted(variant, step, workload, rates))
        print(f"\n{printed(workload, predictions)}", flush=True)
        about = {"workload": name, "layers": settings.layers or "all"}
        about |= {"backends": settings.backends, "tokens": workload.num_tokens}
        lines += [about | asdict(p) for p in predictions]
    print(f"\n{SAID}; {time.perf_counter() - began:.0f} s")
    if settings.save:
        stamp = {"bench": "predict", "versions": versions(), "git": git_state()}
        stamp |= {"at": time.strftime("%Y-%m-%d"), "said": SAID, "rates": figures(rates)}
        print(f"appended to {records.append('predict', [stamp | line for line in lines])}")


if __name__ == "__main__":
    main()
