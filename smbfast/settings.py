"""All settings of a run, with their defaults and what they mean; presets stand in `configs/`."""

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from smbfast.base.config import Settings, build, read_toml


class DataSettings(Settings):
    """Where the patients come from and how they become tokens."""

    path: str | None = Field(None, description="a MEDS folder; none simulates a cohort")
    prepared: str | None = Field(None, description="token shards; default <run.dir>/prepared")
    window: int = Field(1024, ge=64, description="tokens that one forward sees")
    bucket: Literal["day", "hour", "moment"] = Field(
        "day", description="the span of time serialized together; hour suits intensive care"
    )
    delimiters: Literal["special", "text"] = Field(
        "special", description="tags as single added tokens, or as plain text"
    )
    sections: str | None = Field(None, description="TOML that sends codes to sections")
    values_per_line: int = Field(5, ge=1, description="latest values of a code in a bucket")
    text_chars: int = Field(64, ge=0, description="characters kept of a text value")
    vocab_size: int = Field(4096, ge=400, description="of the BPE of a model made from scratch")
    workers: int = Field(0, ge=0, description="processes that prepare; 0: one per core")


class CohortSettings(Settings):
    """The simulated cohort, when data.path is not given."""

    patients: int = Field(2400, ge=20, description="simulated patients, all splits together")
    seed: int = Field(0, ge=0, description="of the cohort; patient i is the same in any number")


class ModelSettings(Settings):
    """The backbone: one that transformers loads, with LoRA; or a small one made from scratch."""

    path: str | None = Field(
        None, description="folder or hub name of a causal LM; none makes a Qwen3 from scratch"
    )
    adapter: str | None = Field(None, description="a PEFT adapter of model.path to go on from")
    train: Literal["lora", "all"] | None = Field(
        None, description="what is trained; default: lora with model.path, all from scratch"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen base; auto is bfloat16 on a GPU, float32 on a CPU"
    )
    recompute: Literal["none", "mlp", "full"] = Field(
        "none",
        description="what the backward computes again to save memory: nothing, what lies inside "
        "the MLPs, or whole layers",
    )
    hidden: int = Field(128, ge=8, description="width of a model made from scratch")
    layers: int = Field(4, ge=1, description="its layers")
    heads: int = Field(4, ge=1, description="its query heads")
    kv_heads: int = Field(2, ge=1, description="its key and value heads")
    ffn: int = Field(384, ge=8, description="its MLP width")


class LoraSettings(Settings):
    """LoRA, as PEFT makes it."""

    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="the delta is scaled by alpha / r")
    dropout: float = Field(0.0, description="must be 0: the passes of one step would draw twice")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="the linears that get an adapter",
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError("must be 0: SFT and JEPA share one forward, two passes draw twice")
        return value


class ObjectiveSettings(Settings):
    """SFT and JEPA (design: mask, cuts, target)."""

    path: Literal["shared", "reference"] = Field(
        "shared",
        description="one forward for SFT and all cuts, or three padded ones in plain PyTorch: the "
        "same losses and gradients, several times slower",
    )
    self_check: bool = Field(
        True,
        description="before the first step of a phase, compare the shared forward with the "
        "reference on a slice of the batch, and refuse to train on a mismatch",
    )
    mask_ratio: float = Field(0.5, gt=0, le=1, description="share of eligible future tokens masked")
    mask_unit: Literal["token", "event", "span"] = Field(
        "token", description="what is masked as one: a token (the paper), a line, a run of tokens"
    )
    span: int = Field(8, ge=1, description="mean length of a masked span, in tokens")
    cuts: int = Field(1, ge=1, description="cuts (masked futures) per window")
    context: tuple[float, float] = Field(
        (0.25, 0.9), description="share of a window that may be context at a cut"
    )
    min_future: int = Field(16, ge=1, description="no cut where fewer future tokens remain")
    horizon: int | None = Field(None, ge=1, description="future tokens after a cut; none: all")
    sft_labels: Literal["all", "future"] = Field(
        "all", description="all predicted tokens, or only those after the earliest cut"
    )
    target_norm: Literal["layer", "none"] = Field(
        "layer", description="layer norm of targets, or the paper's literal MSE"
    )
    tau: float = Field(0.996, ge=0, le=1, description="EMA decay of the target, per optimizer step")
    tau_end: float | None = Field(
        None, ge=0, le=1, description="tau at the end of the run, reached linearly; none: fixed"
    )
    target_form: Literal["auto", "merged", "tracked"] = Field(
        "auto",
        description="how the target averages adapted linears: merged, exactly, in a second copy of "
        "each; tracked, to low rank over the shared base; auto is tracked with LoRA",
    )
    tracked_rank: int = Field(4, ge=1, description="rank of a tracked target, as times lora.r")
    tracked_every: int = Field(4, ge=1, description="updates between its truncations to that rank")
    predictor_layers: int = Field(2, ge=1, description="linear layers of the predictor")

    @field_validator("context")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError("must be two shares in order, such as 0.25,0.9")
        return value


class PhaseSettings(Settings):
    """A stretch of training with its own weights of the two losses."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="in the log; best/<name>")
    steps: int = Field(ge=1, description="optimizer steps")
    w_sft: float = Field(ge=0, description="weight of the next-token loss")
    w_jepa: float = Field(ge=0, description="weight of the JEPA loss")
    lr: float | None = Field(None, gt=0, description="peak; default 2e-4 LoRA, 1e-3 whole model")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")

    @model_validator(mode="after")
    def _some_loss(self) -> "PhaseSettings":
        if self.w_sft == 0 and self.w_jepa == 0:
            raise ValueError("one of w_sft and w_jepa must be above 0")
        return self


class OptimSettings(Settings):
    """AdamW."""

    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's")
    weight_decay: float = Field(
        0.01, ge=0, description="of matrices trained whole; 0 on LoRA, norms and mask vector"
    )
    clip: float = Field(1.0, gt=0, description="gradient norm is clipped to this")
    batch: int = Field(16, ge=1, description="windows of an optimizer step")
    micro_tokens: int | Literal["auto"] = Field(
        "auto",
        description="tokens of one forward, trunks and branches together; no effect on the result; "
        "auto: what fits in memory, found before the first step",
    )
    min_lr: float = Field(0.1, ge=0, le=1, description="cosine ends at this share of the peak")

    @field_validator("micro_tokens")
    @classmethod
    def _some_tokens(cls, value: int | str) -> int | str:
        if value != "auto" and value < 64:
            raise ValueError("must be auto, or at least 64")
        return value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers from 0 to below 1")
        return value


class EvalSettings(Settings):
    """Losses and collapse diagnostics on fixed positions of the tuning split."""

    every: int = Field(20, ge=1, description="steps between evaluations")
    windows: int = Field(32, ge=1, description="tuning windows evaluated")


class ProbeSettings(Settings):
    """Frozen embeddings at decision nodes, probed at the end of a run."""

    labels: list[str] | None = Field(
        None,
        description="task folders, or names under <data.path>/labels; none: the cohort's own, or "
        "no probe; an empty list: no probe",
    )
    encoder: Literal["online", "target"] = Field("online", description="which one is embedded")
    pool: Literal["last", "mean"] = Field("last", description="last token, or mean of the window")
    tokens: int = Field(16384, ge=64, description="tokens of one forward, nodes of many windows")
    bootstraps: int = Field(1000, ge=100, description="resamples of patients for the intervals")


class RunSettings(Settings):
    """Where a run lives and how it goes on."""

    dir: str | None = Field(None, description="default runs/<preset>; the same command resumes")
    seed: int = Field(0, ge=0, description="of every draw, by identity of step, subject and cut")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's choice")
    log_every: int = Field(10, ge=1, description="steps between step lines")
    save_every: int = Field(50, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept, beside the best of each phase")
    export: Literal["none", "merged"] = Field(
        "none", description="merged: also write a plain Hugging Face model"
    )
    resume: Literal["auto", "never"] = Field("auto", description="never refuses a used folder")


class TrainSettings(Settings):
    """Train a patient world model: SFT, then JEPA; embed, probe and report."""

    preset: str = Field("default", description="name of this configuration")
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    cohort: CohortSettings = CohortSettings()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optim: OptimSettings = OptimSettings()
    eval: EvalSettings = EvalSettings()
    probe: ProbeSettings = ProbeSettings()
    phases: list[PhaseSettings] = Field([], description="in order; [[phases]] tables in TOML")
    kernels: str = Field(
        "auto",
        description="auto: the fastest that runs here; torch: references alone; or by operation, "
        "`timeline_attention:sdpa,lora_linear:torch` (python -m smbkernels lists them)",
    )

    @field_validator("kernels")
    @classmethod
    def _known_kernels(cls, value: str) -> str:
        from smbkernels import use  # needs torch, which --help need not wait for

        everywhere, by_op = kernel_choice(value)
        with use(everywhere, **by_op):  # names what does not exist
            return value

    @property
    def trains(self) -> Literal["lora", "all"]:
        """What is trained."""
        return self.model.train or ("lora" if self.model.path else "all")

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.preset}")

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if not self.phases:
            raise ValueError("phases must name at least one phase")
        names = [p.name for p in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases must have names of their own, got {', '.join(names)}")
        if self.probe.encoder == "target" and self.phases[-1].w_jepa == 0:
            raise ValueError("probe.encoder=target needs a last phase with w_jepa above 0")
        if self.objective.path == "reference" and self.model.recompute != "none":
            raise ValueError("model.recompute goes with objective.path=shared")
        if self.model.adapter and not self.model.path:
            raise ValueError("model.adapter needs model.path, the backbone it was trained on")
        if self.model.train == "lora" and not self.model.path:
            raise ValueError("model.train=lora needs model.path, the backbone to adapt")
        if self.objective.target_form == "tracked" and self.trains == "all":
            raise ValueError("objective.target_form=tracked goes with model.train=lora")
        if self.model.adapter and self.trains == "all":
            raise ValueError("model.adapter goes with model.train=lora")
        if self.model.hidden % (2 * self.model.heads) or self.model.heads % self.model.kv_heads:
            raise ValueError(
                "model.hidden must divide by twice model.heads (rotary pairs), heads by kv_heads"
            )
        return self


class ProbeConfig(Settings):
    """Probe frozen embeddings: what can a linear model read from them about later outcomes?

    Binary tasks (subject_id, prediction_time, boolean_value): features scaled by their largest
    absolute value on train, L2 logistic regression, penalty chosen by tuning AUROC, fitted on train
    alone; AUROC, AUPRC and Brier score on held_out. Time to event (subject_id, prediction_time,
    duration_days, event): Cox regression on principal components fitted on train; Harrell's C.
    Intervals (95 %) resample patients, not rows; differences between models use the same resamples.
    Two baselines stand beside: the same backbone untrained, and age, sex and counts of codes."""

    embeddings: Path = Field(description="parquet of the trained model, from smbfast.embed")
    data: Path = Field(description="folder of the MEDS dataset the labels belong to")
    untrained: Path | None = Field(
        None, description="parquet of the same backbone untrained; none: without this baseline"
    )
    labels: list[str] = Field(
        [], description="task folders, or names under <data>/labels; empty: all that are there"
    )
    out: Path | None = Field(
        None, description="folder for probe.json and predictions/; none: beside the embeddings"
    )
    bootstraps: int = Field(1000, ge=0, description="resamples of patients for the intervals")
    cox_bootstraps: int = Field(200, ge=0, description="the same for the C-index, which is slower")
    seed: int = Field(0, ge=0, description="of the resamples and of the components")
    cox_components: int = Field(
        10, ge=1, description="components for Cox; fewer where train has under 5 events for each"
    )
    small_cells: int = Field(
        10, ge=0, description="counts from 1 to this are printed as <=N; 0 prints every count"
    )


def kernel_choice(text: str) -> tuple[str | None, dict[str, str]]:
    """A backend for all operations or None, and backends by operation, for `smbkernels.use`.

    Raises:
        ValueError: words that are neither a backend nor `operation:backend`.
    """
    everywhere, by_op = None, {}
    for word in text.split(","):
        name, colon, backend = word.strip().partition(":")
        if not name or bool(colon) != bool(backend):
            raise ValueError("must be auto, torch, or operation:backend, comma between them")
        if colon and name in by_op:
            raise ValueError(f"must name one backend for {name}, got {text}")
        if colon:
            by_op[name] = backend
        elif everywhere:
            raise ValueError(f"must name one backend for all operations, got {text}")
        else:
            everywhere = name
    return everywhere, by_op


def presets() -> list[str]:
    """The names of the shipped configurations."""
    names = (
        Path(str(f)).stem for f in files("smbfast.configs").iterdir() if f.name.endswith(".toml")
    )
    return sorted(n for n in names if n != "sections")


def run_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """The preset or file that a command line names, and its overrides in their long form."""
    words = list(argv)
    named = words and "=" not in words[0] and not words[0].startswith("-")
    name = words.pop(0) if named else "default"
    for short in ("export", "resume"):  # `--export merged`, `--export=merged`
        words = [f"--run.{a[2:]}" if a.startswith(f"--{short}=") else a for a in words]
        if f"--{short}" in words[:-1]:
            at = words.index(f"--{short}")
            words[at : at + 2] = [f"--run.{short}={words[at + 1]}"]
    return name, words


def load(name: str, overrides: list[str]) -> TrainSettings:
    """A preset or TOML file with dotted overrides laid over it.

    A file may begin from a preset with `base = "default"`.

    Raises:
        ValueError: no such preset or file, an unknown key, a wrong type, a value out of range.
    """
    values: dict[str, Any]
    if name.endswith(".toml"):
        values = {"preset": Path(name).stem, **read_toml(Path(name))}
    elif name in presets():
        values = {"preset": name, **read_toml(Path(str(files("smbfast.configs") / f"{name}.toml")))}
    else:
        raise ValueError(
            f"`{name}` must be a preset ({', '.join(presets())}), a .toml file or --key=value"
        )
    while "base" in values:
        base = values.pop("base")
        if base not in presets():
            raise ValueError(f"`base` must be a preset ({', '.join(presets())}), got {base!r}")
        values = _over(read_toml(Path(str(files("smbfast.configs") / f"{base}.toml"))), values)
    return build(TrainSettings, values, overrides)


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _over(below[key], value) if both else value
    return merged
