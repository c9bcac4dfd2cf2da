"""The plan of a run on GPUs that need not be here: FLOPs and bytes counted, rates assumed.

A sample of windows stands for all: each is packed as a step packs it; its FLOPs and bytes follow in
closed form (`smbfast.model.flops`, `smbfast.model.traffic`). Memory is traced as a run traces it
(`smbfast.model.memory`), on two models of few layers, because it is a line in their number. Nothing
is prepared, loaded or trained.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np
import torch
from smbkernels.attention import attention_flops

from smbfast.data.masking import needs_cuts
from smbfast.data.packing import online_cost, plan_micro_batches
from smbfast.model.backbone import HfModule, PatientEncoder
from smbfast.model.flops import Flops, ModelShape, online_flops, step_flops
from smbfast.model.memory import MOST, Memory, choose_micro_tokens
from smbfast.model.shapes import ON_GPU, backbone_config, encoder_on_meta
from smbfast.model.target import TargetForm
from smbfast.model.traffic import Traffic
from smbfast.run.epochs import with_steps
from smbfast.run.plan_data import DataFacts, Sample, sampled
from smbfast.run.startup import Kind, heaviest, largest_window, peak_memory
from smbfast.settings import PhaseSettings, PlanSettings, TrainSettings
from smbfast.settings.plan import Gpu, gpu_of

FEW = (2, 4)  # layers of the models whose memory is traced
CONTEXT = 1.5 * 2**30  # bytes of CUDA's context, libraries and workspaces: assumed
# shares of nominal figures, those of bench/rates.toml over an H200's: assumed
PRODUCTS, ATTENTION = 0.73, (0.42, 0.22)
ELEMENTS, NARROW = 0.75, 0.54
KERNELS, GAP = 153, 1.5e-6  # kernels of a layer in a micro-batch, counted; seconds between: assumed
HOST = 4e-3  # seconds in which Python launches a layer of a micro-batch, all passes: assumed
MESSAGE = 1e-3  # seconds of the host message of a step between ranks: assumed
EVALUATED = 0.5  # cost of a window in an evaluation over its cost in training: assumed
DRAWS = 4  # steps whose rows are dealt to ranks
WINDOWS_A_GPU = 8  # where optim.batch has fewer windows than there are GPUs: our choice


@dataclass(frozen=True)
class Rates:
    """What a GPU reaches, in FLOP/s and bytes/s."""

    products: float
    attention_forward: float
    attention_backward: float
    elements: float
    narrow: float

    @classmethod
    def of(cls, gpu: Gpu, plan: PlanSettings, dtype: torch.dtype) -> "Rates":
        """Nominal figures times shares; products in fp32 run in TF32, at half the rate of bf16."""
        nominal = gpu.flops * (1.0 if dtype.itemsize == 2 else 0.5)
        forward, backward = plan.attention or ATTENTION
        share = plan.bandwidth or ELEMENTS
        return cls(
            nominal * (plan.products or PRODUCTS),
            nominal * forward,
            nominal * backward,
            gpu.bandwidth * share,
            gpu.bandwidth * share * NARROW / ELEMENTS,
        )


@dataclass(frozen=True)
class PhasePlan:
    """What a step of a phase costs one GPU."""

    phase: PhaseSettings
    seconds: dict[str, float]  # by what they are for; their sum is a step
    flops: Flops  # of all windows of a step, all GPUs together
    read: float  # tokens of the windows of a step
    micro_batches: float  # of one GPU
    balance: float  # cost of the slowest GPU over the mean
    exchanged: dict[str, int]  # bytes of gradients by what they belong to

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU at the peak of a step."""

    tokens: int  # of a micro-batch
    parts: dict[str, float]
    fits: bool
    sharded: bool  # whether layers are divided among the GPUs (model.fsdp)
    layer: float  # bytes of the frozen weights of a layer

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Planned:
    """A run as a plan sees it."""

    settings: TrainSettings
    plan: PlanSettings
    facts: DataFacts
    config: HfModule

    @cached_property
    def gpu(self) -> Gpu:
        """The GPU of the plan."""
        return gpu_of(self.plan.gpu)

    @cached_property
    def encoder(self) -> PatientEncoder:
        """The encoder, on meta."""
        return self.encoder_of(None)

    def encoder_of(self, layers: int | None, device: torch.device = ON_GPU) -> PatientEncoder:
        """Return the encoder with so many layers, as it would be on a device."""
        facts = self.facts
        return encoder_on_meta(
            self.settings,
            self.config,
            new_rows=facts.new_rows if self.settings.trains == "lora" else 0,
            num_horizons=facts.num_horizons,
            num_classes=facts.num_classes,
            device=device,
            layers=layers,
        )

    @cached_property
    def form(self) -> TargetForm:
        """The form of the target encoder."""
        return TargetForm.of(self.settings.objective).resolved(self.encoder)

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes from which FLOPs follow."""
        return ModelShape.of(
            self.encoder, tracked=self.form if self.form.name == "tracked" else None
        )

    @cached_property
    def batch(self) -> int:
        """Windows of a step, all GPUs together."""
        least, given = self.plan.gpus, self.plan.batch or self.settings.optim.batch
        return given if given >= least else WINDOWS_A_GPU * least

    @cached_property
    def memory(self) -> MemoryPlan:
        """Memory of one GPU, with the size of micro-batches."""
        return memory_of(self)

    @cached_property
    def phases(self) -> list[PhasePlan]:
        """The cost of a step of each phase."""
        return [phase_plan(self, phase) for phase in self.settings.phases]

    def traffic(self, phase: PhaseSettings) -> Traffic:
        """The sizes from which the bytes of a phase follow."""
        tracked, averages = self.form.name == "tracked", phase.w_jepa > 0
        return Traffic.of(self.encoder, tracked=tracked, averages=averages)

    @property
    def steps(self) -> int:
        """Steps of the run as its settings have them."""
        return sum(phase.steps for phase in self.settings.phases)

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step, each phase as often as in the settings."""
        return sum(p.total * p.phase.steps for p in self.phases) / self.steps

    @property
    def step_read(self) -> float:
        """Mean tokens of the windows of a step."""
        return sum(p.read * p.phase.steps for p in self.phases) / self.steps

    @property
    def checkpoint(self) -> float:
        """Bytes of a checkpoint: what is trained with both moments, and the target's averages."""
        parts = self.memory.parts
        return parts["trained weights"] + parts["moments"] + parts["target"]


def planned(settings: TrainSettings, plan: PlanSettings) -> Planned:
    """Read what a plan needs, and count.

    Raises:
        ValueError: the settings contradict each other, the backbone has no config.json, or neither
            prepared data nor the plan say how many events there are.
    """
    facts = DataFacts.of(settings, plan)
    config = backbone_config(settings, facts.vocabulary)
    run = Planned(settings, plan, facts, config)
    epoch = facts.events * facts.tokens_an_event / facts.window  # windows, in every phase

    def num_windows(phase: PhaseSettings) -> int:
        cuts = needs_cuts(settings.objective, jepa=phase.w_jepa > 0)
        return round(epoch * (facts.with_cut if cuts else 1.0))

    return replace(run, settings=with_steps(settings, num_windows, run.batch))


def phase_plan(run: Planned, phase: PhaseSettings) -> PhasePlan:
    """Return what a step of a phase costs one of the GPUs."""
    sample = sampled(run.settings, phase, run.facts)
    windows = run.batch / len(sample.batches)  # times that the sample is in a step
    again = 1 if run.settings.model.recompute == "full" else 0
    moving, codes = phase.freeze != "decoder", phase.w_codes > 0
    traffic = run.traffic(phase)
    rates = Rates.of(run.gpu, run.plan, run.encoder.dtype)
    own = [step_flops(run.shape, b, codes=codes, freeze=phase.freeze) for b in sample.batches]
    flops = sum(own, Flops())
    seconds = _computing(run, sample, flops, rates, moving=moving)
    elements = sum(traffic.elements(b, backward=moving, again=again) for b in sample.batches)
    elements -= (len(sample.batches) - 1) * (1 + again + 2 * moving) * traffic.casts
    seconds["norms, activations"] = elements / rates.elements
    narrow = sum(traffic.low_rank(b, backward=moving, again=again) for b in sample.batches)
    seconds["LoRA"] = max(narrow / rates.narrow, flops.lora / rates.products)
    micro_batches, balance = _dealt(run, sample)
    scale = windows / run.plan.gpus * balance
    seconds = {name: value * scale for name, value in seconds.items()}
    calls = micro_batches * run.shape.layers
    seconds["gaps between kernels"] = calls * KERNELS * GAP
    seconds["waiting for Python"] = max(calls * HOST - sum(seconds.values()), 0.0)
    seconds["optimizer, target"] = traffic.update / rates.elements
    exchanged = _exchanged(run.encoder, phase)
    ranks = run.plan.gpus
    ring = 2 * (ranks - 1) / ranks * sum(exchanged.values()) / (run.plan.network * 1e9)
    seconds["all-reduce"] = ring + (MESSAGE if ranks > 1 else 0.0)
    if run.memory.sharded:
        passes = 2 + (phase.w_jepa > 0)
        gathered = micro_batches * passes * run.memory.layer * run.shape.layers
        moved = gathered * (ranks - 1) / ranks / (run.plan.network * 1e9)
        seconds["waiting for weights"] = max(moved - sum(seconds.values()), 0.0)
    total = Flops(*(round(windows * value) for value in vars(flops).values()))
    read = sample.read * windows
    return PhasePlan(phase, seconds, total, read, micro_batches, balance, exchanged)


def _computing(
    run: Planned, sample: Sample, flops: Flops, rates: Rates, *, moving: bool
) -> dict[str, float]:
    """Return seconds of the products and of attention of a sample on one GPU."""
    shape, recompute = run.shape, run.settings.model.recompute
    sizes = shape.heads, shape.head_dim
    ahead = sum(b.segments.pairs + b.target_segments.pairs for b in sample.batches)
    forward = shape.layers * attention_flops(ahead, *sizes)
    backward, base = flops.attention - forward, flops.base
    if recompute == "full" and moving:
        for batch in sample.batches:
            tokens, pairs = batch.segments.tokens, batch.segments.pairs
            more = online_flops(shape, tokens, pairs, masked=True, backward=False)
            base, forward = base + more.base, forward + more.attention
    elif recompute == "mlp" and moving:
        tokens = sum(b.segments.tokens for b in sample.batches)
        inner = run.encoder.base.config.intermediate_size
        base += 4 * tokens * shape.layers * shape.width * inner
    others = flops.predictor + flops.codes + flops.means  # in TF32
    return {
        "products": base / rates.products,
        "attention": forward / rates.attention_forward + backward / rates.attention_backward,
        "head, losses": flops.head / rates.products + 2 * others / rates.products,
    }


def _dealt(run: Planned, sample: Sample) -> tuple[float, float]:
    """Return micro-batches of a GPU, and the cost of the slowest GPU over the mean."""
    tokens = np.array([b.segments.tokens for b in sample.batches])
    pairs = np.array([b.segments.pairs for b in sample.batches])
    cost = online_cost(tokens, pairs, run.shape.attention_ratio)
    ranks, random = run.plan.gpus, np.random.default_rng(0)
    counts, balances = [], []
    for _ in range(DRAWS):
        drawn = random.integers(0, len(tokens), run.batch)
        rows = plan_micro_batches(tokens[drawn], cost[drawn], run.memory.tokens, ranks)
        by_rank = [sum(cost[drawn][row].sum() for row in rows[r::ranks]) for r in range(ranks)]
        counts.append(max(len(rows[r::ranks]) for r in range(ranks)))
        balances.append(max(by_rank) * ranks / sum(by_rank))
    return float(np.mean(counts)), float(np.mean(balances))


def _exchanged(encoder: PatientEncoder, phase: PhaseSettings) -> dict[str, int]:
    """Return the bytes of the gradients of a phase, which are exchanged in fp32."""
    own = {name: p.numel() for name, p in encoder.named_parameters() if p.requires_grad}
    named = {
        "token rows": sum(n for name, n in own.items() if "trainable_tokens" in name),
        "predictor": sum(n for name, n in own.items() if name.startswith("predictor")),
        "mask vector": own.get("mask_vector", 0),
        "head of codes": sum(n for name, n in own.items() if name.startswith("codes")),
    }
    rest = sum(own.values()) - sum(named.values())
    named = {"LoRA" if encoder.is_lora else "decoder": rest, **named}
    if phase.w_jepa == 0:
        named |= {"predictor": 0, "mask vector": 0}
    if phase.w_codes == 0:
        named["head of codes"] = 0
    if phase.freeze == "decoder":
        named = {n: v for n, v in named.items() if n in ("predictor", "head of codes")}
    return {name: 4 * n for name, n in named.items() if n}


def peaks_of(run: Planned, device: torch.device | None = None) -> Callable[[int], Memory]:
    """Return what gives the memory at the peak of a run's heaviest phase, by tokens.

    Args:
        device: a CPU, where the run trains on one; None for the GPU of the plan.
    """
    layers = run.config.num_hidden_layers
    made_for, traced_on = device or ON_GPU, torch.device("cpu")
    numbers = FEW if layers > FEW[1] else (layers,)
    encoders = [run.encoder_of(n, made_for) for n in numbers]
    kinds = heaviest([Kind.of(phase) for phase in run.settings.phases])

    @cache
    def peak(tokens: int) -> Memory:
        more = (tokens, run.facts.num_horizons, traced_on)
        peaks = [
            _extended([peak_memory(run.settings, e, kind, *more) for e in encoders], layers)
            for kind in kinds
        ]
        highest = max(peaks, key=lambda memory: memory.total)
        return highest if device is not None else replace(highest, holes=0)

    return peak


def _extended(traced: list[Memory], layers: int) -> Memory:
    """Return the memory of a model of `layers`, from that of two of `FEW` layers."""
    if len(traced) == 1:
        return traced[0]
    few, more = (vars(memory) for memory in traced)
    steps = (layers - FEW[0]) / (FEW[1] - FEW[0])
    line = {name: round(few[name] + steps * (more[name] - few[name])) for name in few}
    return Memory(**line | {"holes": more["holes"]})


def memory_of(run: Planned) -> MemoryPlan:
    """Choose micro-batches as a run on that GPU would, and return the memory of a GPU.

    If no micro-batch fits, the frozen layers are divided among the GPUs (model.fsdp); if there is
    one GPU or the backbone is trained whole, nothing fits.
    """
    least = largest_window(run.settings)
    chosen = run.settings.optim.micro_tokens
    frozen = [p for p in run.encoder.decoder.layers.parameters() if not p.requires_grad]
    layers = sum(p.numel() * p.element_size() for p in frozen)
    layer, ranks = layers / run.shape.layers, run.plan.gpus
    peak = peaks_of(run)
    for sharded in (False, True):
        spared = layers * (1 - 1 / ranks) - 2 * layer if sharded else 0.0
        held = peak(least).weights - spared
        free = int(run.gpu.memory - CONTEXT - held)

        def needs(tokens: int, own: float = held + spared) -> int:
            return round(peak(tokens).total - own)

        try:
            if chosen == "auto":
                tokens = choose_micro_tokens(needs, free, least=least, most=MOST)
            else:
                tokens = max(chosen, least)
                if needs(tokens) > free:
                    raise ValueError(tokens)
        except ValueError:
            if not sharded and ranks > 1 and layers:
                continue
            tokens = least if chosen == "auto" else max(chosen, least)
            return _parts(peak(tokens), tokens, spared, fits=False, sharded=sharded, layer=layer)
        return _parts(peak(tokens), tokens, spared, fits=True, sharded=sharded, layer=layer)
    raise AssertionError("one of both returns")


def _parts(
    peak: Memory, tokens: int, spared: float, *, fits: bool, sharded: bool, layer: float
) -> MemoryPlan:
    parts = {
        "frozen weights": peak.weights - peak.gradients - spared,
        "trained weights": peak.gradients,
        "gradients": peak.gradients,
        "moments": peak.moments,
        "target": peak.target,
        "activations, logits": peak.activations,
        "CUDA, workspaces": CONTEXT,
    }
    return MemoryPlan(tokens, parts, fits, sharded, layer)
