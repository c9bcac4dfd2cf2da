"""The plan as text: one table over multiples of the events, one of memory, one of a step, and what
all of them rest on."""

from collections.abc import Iterator
from dataclasses import dataclass

from smbfast.run import planner
from smbfast.run.plan_data import DEMOS, PREPARED, TOKENS
from smbfast.run.planner import Planned
from smbfast.settings import PlanSettings, TrainSettings
from smbfast.settings.plan import GPUS

# seconds of one core for each window of the table, which is made once: 10,000,000 windows
TABLE, TABLE_SOURCE = 5.8e-6, "measured: bench/results/start_windows.jsonl, AMD EPYC"
PLANNING = 0.25e-3  # seconds of a thread for each window of a step, on each rank
PLANNING_SOURCE = "measured: 0.11 to 0.27 ms, AMD EPYC, loaded"
COPIED = 20e9  # bytes a second from a GPU into memory of its host that is pinned: assumed
IMPORTS = 15.0  # seconds before a run reads anything: assumed
DAY, HOUR = 86400.0, 3600.0
PREPARED_SOURCE = "measured: eICU demo, AMD EPYC, bench/results/prepare.jsonl"
NO_GPU = "assumed, bench/rates.toml; nothing was measured on a GPU"
Row = list[str]


@dataclass(frozen=True)
class Column:
    """The run at a multiple of the events."""

    events: float
    subjects: float
    tokens: float  # that training reads
    windows: float  # of an epoch
    steps: float
    training: float  # seconds
    evaluating: float
    saving: float
    shards: float  # bytes
    preparing: float  # seconds of one core

    @classmethod
    def of(cls, run: Planned, times: float) -> "Column":
        """Extend the plan to a multiple of the events."""
        facts, settings = run.facts, run.settings
        epoch = times * facts.events * facts.tokens_an_event
        steps = epoch * run.plan.epochs / run.step_read
        window = run.step_seconds * run.plan.gpus / run.batch
        evaluation = settings.eval.windows * window * planner.EVALUATED
        rate = run.plan.prepared_events or PREPARED[facts.format]
        return cls(
            events=times * facts.events,
            subjects=times * facts.subjects,
            tokens=epoch * run.plan.epochs,
            windows=epoch / facts.window,
            steps=steps,
            training=steps * run.step_seconds,
            evaluating=steps / settings.eval.every * evaluation,
            saving=steps / settings.run.save_every * _stopped(run),
            shards=times * facts.events * facts.bytes_an_event,
            preparing=times * facts.events / rate,
        )

    @property
    def total(self) -> float:
        """Seconds from the first step to the last."""
        return self.training + self.evaluating + self.saving


def show(settings: TrainSettings, plan: PlanSettings, command: str) -> None:
    """Print the plan of a run.

    Args:
        command: what would start that run.

    Raises:
        ValueError: see `smbfast.run.planner.planned`.
    """
    run = planner.planned(settings, plan)
    print("\n\n".join(_blocks(run, command)), flush=True)


def _blocks(run: Planned, command: str) -> list[str]:
    name = run.settings.model.path or "a model made from scratch"
    trained = "LoRA on " if run.encoder.is_lora else "all weights of "
    head = (
        f"{run.settings.preset}: {trained}{name}, format {run.facts.format}, on "
        f"{run.plan.gpus:,} x {run.gpu.name}\npredicted from counted FLOPs and bytes at assumed "
        "rates; nothing was measured on a GPU"
    )
    sizes = [Column.of(run, times) for times in run.plan.times]
    blocks = [head, columns(_run_rows(run, sizes)), columns(_memory_rows(run))]
    blocks += [columns(_step_rows(run)), columns(_known_rows(run))]
    notes = list(_notes(run, sizes[0]))
    return [*blocks, "\n".join(notes), f"command: {command}"]


def _run_rows(run: Planned, sizes: list[Column]) -> list[Row]:
    cores = run.plan.cores

    def row(name: str, *values: str) -> Row:
        return [name, *values]

    return [
        row("the run", *(f"{times:g}x" for times in run.plan.times)),
        row("events", *(count(c.events) for c in sizes)),
        row("patients", *(count(c.subjects) for c in sizes)),
        row(f"tokens read, {run.plan.epochs:g} epochs", *(count(c.tokens) for c in sizes)),
        row("windows of an epoch", *(count(c.windows) for c in sizes)),
        row(f"steps of {run.batch:,} windows", *(count(c.steps) for c in sizes)),
        row("days", *(f"{c.total / DAY:,.2f}" for c in sizes)),
        row("GPU-hours", *(f"{c.total / HOUR * run.plan.gpus:,.0f}" for c in sizes)),
        row("  of it evaluations", *(f"{c.evaluating / c.total:.1%}" for c in sizes)),
        row("  of it saving", *(f"{c.saving / c.total:.1%}" for c in sizes)),
        row("shards on disk", *(size(c.shards) for c in sizes)),
        row(f"checkpoints on disk, {run.settings.run.keep}", *(_saved(run) for _ in sizes)),
        row("preparing, core-hours", *(f"{c.preparing / HOUR:,.1f}" for c in sizes)),
        row(f"  on {cores:,} cores, hours", *(f"{c.preparing / HOUR / cores:,.2f}" for c in sizes)),
        row("first start, minutes", *(f"{_start(run, c, first=True) / 60:,.1f}" for c in sizes)),
        row("other starts, minutes", *(f"{_start(run, c, first=False) / 60:,.1f}" for c in sizes)),
    ]


def _stopped(run: Planned) -> float:
    """Return the seconds that a step waits for a save: a copy, and for the write before it."""
    written = run.checkpoint / (run.plan.storage * 1e9)
    between = run.settings.run.save_every * run.step_seconds
    return run.checkpoint / COPIED + max(written - between, 0.0)


def _saved(run: Planned) -> str:
    return size(run.settings.run.keep * run.checkpoint)


def _start(run: Planned, column: Column, *, first: bool) -> float:
    """Return seconds from the command to the first step: imports, weights, table of windows."""
    weights = run.memory.parts["frozen weights"] + run.memory.parts["trained weights"]
    return IMPORTS + weights / (run.plan.storage * 1e9) + first * column.windows * TABLE


def _memory_rows(run: Planned) -> list[Row]:
    memory = run.memory
    rows = [["one GPU at its peak", "GB"]]
    rows += [[name, f"{value / 1e9:,.2f}"] for name, value in memory.parts.items() if value]
    rows.append(["sum", f"{memory.total / 1e9:,.2f}"])
    rows.append([f"{run.gpu.name} has", f"{run.gpu.memory / 1e9:,.2f}"])
    rows.append(["tokens of a micro-batch", f"{memory.tokens:,}"])
    rows.append(["its host's copy of a checkpoint", f"{run.checkpoint / 1e9:,.2f}"])
    return rows


def _step_rows(run: Planned) -> list[Row]:
    phases = run.phases
    names = list(dict.fromkeys(name for p in phases for name in p.seconds))
    rows = [["one step, seconds of a GPU", *(p.phase.name for p in phases)]]
    for name in names:
        values = [p.seconds.get(name, 0.0) for p in phases]
        if any(value > 5e-5 for value in values):
            rows.append([f"  {name}", *(f"{value:.4f}" for value in values)])
    gpus, nominal = run.plan.gpus, run.gpu.flops
    speeds = [p.read / p.total for p in phases]
    return [
        *rows,
        ["seconds", *(f"{p.total:.3f}" for p in phases)],
        ["tokens read a second, one GPU", *(f"{s / gpus:,.0f}" for s in speeds)],
        ["tokens read a second, all", *(f"{s:,.0f}" for s in speeds)],
        ["PFLOP of a step, all", *(f"{p.flops.total / 1e15:,.2f}" for p in phases)],
        [
            "share of nominal FLOP/s",
            *(f"{p.flops.total / p.total / gpus / nominal:.1%}" for p in phases),
        ],
        ["micro-batches of a GPU", *(f"{p.micro_batches:.1f}" for p in phases)],
        ["slowest GPU over the mean", *(f"{p.balance:.3f}" for p in phases)],
        ["gradients exchanged, MB", *(f"{sum(p.exchanged.values()) / 1e6:,.1f}" for p in phases)],
        [
            "all-reduce, share of a step",
            *(f"{p.seconds['all-reduce'] / p.total:.2%}" for p in phases),
        ],
    ]


def _known_rows(run: Planned) -> list[Row]:
    """What the plan rests on: the figure, its source, and the key that changes it."""
    facts, cut = run.facts, _from_data(run)
    phases = ", ".join(f"{p.phase.steps / run.steps:.0%} {p.phase.name}" for p in run.phases)
    tokens, own = f"{facts.tokens_an_event:.3f}", facts.tokens_source
    return [
        ["what this rests on", "figure", "source", "key"],
        ["tokens an event", tokens, own, "--tokens_an_event"],
        ["bytes of shards an event", f"{facts.bytes_an_event:.1f}", facts.bytes_source, ""],
        ["mean window", f"{facts.window:,.0f} tokens", cut, "--data.window, --subjects"],
        ["tokens in windows with a cut", f"{facts.with_cut:.1%}", cut, ""],
        ["phases", phases, "steps of the settings", "--phases.0.steps"],
        *_rates_known(run),
        *_machine_known(run),
    ]


def _rates_known(run: Planned) -> list[Row]:
    """Of the GPU."""
    plan, gpu = run.plan, run.gpu
    forward, backward = plan.attention or planner.ATTENTION
    share = plan.bandwidth or planner.ELEMENTS
    narrow = share * planner.NARROW / planner.ELEMENTS
    nominal = f"{gpu.flops / 1e12:,.0f} TFLOP/s, {gpu.bandwidth / 1e9:,.0f} GB/s"
    rates = [
        ("products", f"{plan.products or planner.PRODUCTS:.0%} of nominal", "products"),
        ("attention", f"{forward:.0%}, {backward:.0%} of nominal", "attention"),
        ("norms, activations", f"{share:.0%} of bandwidth", "bandwidth"),
        ("products of rank r", f"{narrow:.0%} of bandwidth", "bandwidth"),
    ]
    gaps = f"{planner.KERNELS} a layer, {1e6 * planner.GAP:g} us between"
    return [
        ["nominal, bf16", nominal, "data sheet" if gpu.name in GPUS else "given", "--gpu"],
        *([name, text, _source(plan, key, NO_GPU), f"--{key}"] for name, text, key in rates),
        ["Python", f"{1e3 * planner.HOST:g} ms a layer and micro-batch", "assumed", ""],
        ["kernels", gaps, "counted; assumed", ""],
        ["CUDA, workspaces", size(planner.CONTEXT), "assumed", ""],
    ]


def _machine_known(run: Planned) -> list[Row]:
    """Of the machines around it."""
    plan, rate = run.plan, run.plan.prepared_events or PREPARED[run.facts.format]
    network = f"{plan.network:g} GB/s, {1e3 * planner.MESSAGE:g} ms a message"
    evaluation = f"{planner.EVALUATED:g} of training its windows"
    prepared = _source(plan, "prepared_events", PREPARED_SOURCE)
    return [
        ["an evaluation", evaluation, "assumed", "--eval.windows"],
        ["network of a GPU", network, _source(plan, "network", "assumed"), "--network"],
        ["storage", f"{plan.storage:g} GB/s", _source(plan, "storage", "assumed"), "--storage"],
        ["copy of a checkpoint", f"{COPIED / 1e9:g} GB/s to the host", "assumed", ""],
        ["preparing", f"{rate:,.0f} events/s a core", prepared, "--prepared_events"],
        ["table of windows", f"{1e6 * TABLE:g} us a window", TABLE_SOURCE, ""],
        ["planning a step", f"{1e3 * PLANNING:g} ms a window, each rank", PLANNING_SOURCE, ""],
        ["imports", f"{IMPORTS:g} s", "assumed", ""],
    ]


def _source(plan: PlanSettings, key: str, otherwise: str) -> str:
    """Return where a figure comes from that a key of the plan can give."""
    return "given" if key in plan.model_fields_set else otherwise


def _from_data(run: Planned) -> str:
    if run.facts.windows is not None:
        return f"measured: {run.facts.prepared}"
    return "assumed: records of equal length"


def _notes(run: Planned, first: Column) -> Iterator[str]:
    """Yield what a reader should do or know, a line each."""
    yield from _memory_notes(run)
    phases, plan, optim = run.phases, run.plan, run.settings.optim
    parts = {name: n for p in phases for name, n in p.exchanged.items()}
    if plan.gpus > 1:
        text = ", ".join(f"{name} {n / 1e6:,.2f} MB" for name, n in parts.items())
        yield f"data parallel: one all-reduce a step of {text}, in fp32"
    if run.batch != optim.batch:
        yield (
            f"planned with optim.batch={run.batch}, not {optim.batch}: "
            + ("--batch" if plan.batch == run.batch else f"{plan.gpus} GPUs need as many windows")
        )
    read = run.step_read * run.steps / (first.tokens / plan.epochs)
    yield (
        f"the {run.steps:,} steps of the settings read {read:.2%} of an epoch at "
        f"{plan.times[0]:g}x; an epoch is {first.steps / plan.epochs:,.0f} steps"
    )
    planning = PLANNING * run.batch
    if planning > run.step_seconds:
        yield f"planning a step takes {planning:.2f} s on each rank, longer than a step"
    yield _other_format(run, first)
    if run.facts.prepared is None:
        yield "tokens an event are measured if data.prepared names a prepared folder, of a part too"
    stride = run.settings.data.stride
    yield (
        "windows do not overlap, an epoch reads each token once"
        if stride is None or stride == run.settings.data.window
        else f"windows overlap: data.stride={stride} of {run.settings.data.window} tokens"
    )


def _other_format(run: Planned, first: Column) -> str:
    other = "text" if run.facts.format == "codes" else "codes"
    ratio = TOKENS[other] / run.facts.tokens_an_event
    return (
        f"in the format {other} an event has {TOKENS[other]:g} tokens ({DEMOS}): the same events "
        f"in about {first.total / DAY * ratio:,.2f} days"
    )


def _memory_notes(run: Planned) -> Iterator[str]:
    memory, gpus = run.memory, run.plan.gpus
    held = sum(memory.parts[n] for n in ("frozen weights", "trained weights", "moments", "target"))
    if memory.sharded and memory.fits:
        yield (
            f"one {run.gpu.name} does not hold the backbone with a step: model.fsdp=true divides "
            f"its layers among {gpus:,} GPUs; each then needs {memory.total / 1e9:,.1f} GB "
            f"({held / 1e9:,.1f} without a step)"
        )
    elif not memory.fits:
        ways = "model.recompute=full, a smaller data.window, or GPUs with more memory"
        if gpus == 1 and run.encoder.is_lora:
            ways = f"several GPUs with model.fsdp=true, {ways}"
        elif not run.encoder.is_lora:
            ways = f"LoRA (model.train=lora), {ways}"
        sharded = " even with model.fsdp=true" if memory.sharded else ""
        yield (
            f"does NOT fit{sharded}: {memory.total / 1e9:,.1f} GB on a {run.gpu.name} with "
            f"{run.gpu.memory / 1e9:,.1f}: {ways}"
        )
    if memory.sharded and run.form.name == "merged":
        yield "model.fsdp needs objective.target_form=tracked"


def count(value: float) -> str:
    """Return a count with three digits: 20e9, 4.88e6, 512."""
    for power in (9, 6):
        if value >= 10**power:
            number = value / 10**power
            return f"{number:,.0f}e{power}" if number >= 1000 else f"{number:.3g}e{power}"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Return bytes as GB or TB."""
    return f"{value / 1e12:,.2f} TB" if value >= 1e12 else f"{value / 1e9:,.2f} GB"


def columns(rows: list[Row]) -> str:
    """Return rows of cells, aligned."""
    num = max(len(row) for row in rows)
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(num)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)
