"""Settings of a training run: its phases, the optimizer, evaluation, probes and the run folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from smbkernels.catalog import check_choice

from smbfast.base.config import Settings
from smbfast.base.devices import known_device
from smbfast.base.nearest import Foreign
from smbfast.settings import names
from smbfast.settings.data import CohortSettings, DataSettings
from smbfast.settings.model import LoraSettings, ModelSettings, ObjectiveSettings
from smbfast.settings.pools import Pool, RunPool

Freeze = Literal["none", "decoder", "predictor"]


class PhaseSettings(Settings):
    """The phases of training, in order: each has a length and its own weights of the losses.

    The loss of a phase is w_sft * SFT + w_jepa * JEPA + w_codes * codes to come. SFT is the mean
    over all predicted tokens of the step, JEPA the mean over all its masked positions (or, with
    objective.jepa=horizon, pairs of position and horizon). The usual curriculum is SFT alone, then
    JEPA with a small weight of SFT. A phase begins with the last weights and the optimizer's state
    of the phase before it. The first phase with JEPA, and any that follows one without,
    starts its EMA teacher as a copy of the online encoder; through consecutive phases with JEPA the
    same teacher goes on, unless a phase asks for a new copy by `sync`.

    On the command line a key of a phase is changed by the phase's name, --phases.sft.steps=500, or
    by its number, counted from 0: --phases.0.steps=500. --phases=sft leaves that phase alone, and
    --phases=ahead,sft puts it behind another. For phases of your own, write a TOML file with the
    line base = "default" and one [[phases]] table for each; these tables replace those of the
    preset.
    """

    model_config = ConfigDict(
        json_schema_extra={"anyOf": [{"required": ["steps"]}, {"required": ["epochs"]}]}
    )
    instead: ClassVar[Mapping[str, str]] = {"steps": "epochs", "epochs": "steps"}

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Name of the phase in the log, and of the folder best/<name> that receives its "
        "best model, the one whose loss on the tuning split, with the weights of the phase, was "
        "lowest. It consists of letters, digits, _ and -, and differs from the other names.",
    )
    steps: int = Field(
        0,
        ge=0,
        description="Number of optimizer steps of the phase. After the warm-up, the decay of the "
        "learning rate is stretched over the steps that are left. One of steps and epochs must be "
        "given; 0 is for a phase with epochs.",
    )
    epochs: float | None = Field(
        None,
        gt=0,
        description="Length of the phase in place of steps: how often it reads the training "
        "windows, such as 2 or 0.5. They become steps, rounded up, when the data are known, by "
        "optim.batch windows a step; only windows that the phase trains on count. Check and the "
        "header of a run say how many steps they are. On the command line, either of the two "
        "takes the place of the other.",
    )
    w_sft: float = Field(
        ge=0,
        description="Weight of SFT, the next-token loss, beside w_jepa. At 0 the phase has no SFT. "
        "JEPA alone can collapse, which means that all patients get the same embedding; a small "
        "weight such as 0.1 is safer. One of w_sft, w_jepa and w_codes must be above 0.",
    )
    w_jepa: float = Field(
        ge=0,
        description="Weight of JEPA, the loss in latent space, beside w_sft; objective.jepa says "
        "what it predicts. At 0 the phase has neither masked futures nor an EMA teacher and needs "
        "less time and memory.",
    )
    w_codes: float = Field(
        0.0,
        ge=0,
        description="Weight of the loss of codes to come, beside w_sft: which codes follow a "
        "position within each of objective.horizons, also those past the window. It is the binary "
        "cross-entropy summed over codes, over 10, and its mean over pairs of position and "
        "horizon. At 0 the phase is without it.",
    )
    lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Peak learning rate, reached after the warm-up; from there it falls along a "
        "cosine to optim.min_lr times the peak at the end of the phase. A table that leaves it "
        "out (`none`) gets 2e-4 with LoRA and 1e-3 for a model trained whole.",
    )
    warmup: int = Field(
        20,
        ge=0,
        description="Number of steps at the start of the phase in which the learning rate rises "
        "linearly to its peak; 0 starts at the peak. It is cut to one step less than the phase "
        "has.",
    )
    freeze: Freeze = Field(
        "none",
        description="What the phase leaves as it is. `decoder` trains only the JEPA predictor and "
        "the head of w_codes on the states of a frozen model, a predictor warm-up; it needs w_sft "
        "0. `predictor` trains only the model. The weights of the others stay to the bit.",
    )
    sync: bool = Field(
        False,
        description="Whether the EMA teacher becomes a copy of the online encoder when the phase "
        "begins, though the phase before it had a teacher; without effect where w_jepa is 0.",
    )

    @model_validator(mode="after")
    def _has_a_loss(self) -> "PhaseSettings":
        if self.w_sft == self.w_jepa == self.w_codes == 0:
            raise ValueError("one of w_sft, w_jepa and w_codes must be above 0")
        if self.epochs is not None and self.steps:
            raise ValueError(
                f"one of steps and epochs must be given, got steps {self.steps} and epochs "
                f"{self.epochs:g}"
            )
        if self.epochs is None and not self.steps:
            raise ValueError("steps must be at least 1, or epochs be given in its place")
        if self.freeze == "decoder" and self.w_sft > 0:
            raise ValueError("freeze=decoder needs w_sft 0, as SFT trains nothing but the decoder")
        return self


class OptimSettings(Settings):
    """The optimizer, AdamW, and the size of a step.

    The windows of one optimizer step are packed into rows of limited length (sequence packing).
    Each row is a micro-batch with its own forward and backward pass, and the gradients of all rows
    are summed before the weights change (gradient accumulation). Means are taken over the whole
    step, so how it is divided into micro-batches has no effect on the result beyond rounding.
    """

    betas: tuple[float, float] = Field(
        (0.9, 0.95),
        description="Decay rates of AdamW's two running averages, of the gradient and of its "
        "square, each from 0 to below 1. A value b averages over about 1 / (1 - b) steps: larger "
        "values make updates smoother and slower to adapt, which suits small batches and noisy "
        "gradients. The defaults rarely need a change.",
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Strength with which AdamW pulls weights towards 0. It applies to matrices "
        "that are trained whole, such as those of a model made from scratch and of the JEPA "
        "predictor, and never to LoRA adapters, norms, the mask vector or added token rows; 0 "
        "turns it off.",
    )
    clip: float = Field(
        1.0,
        gt=0,
        description="Gradient clipping: a gradient whose norm, over all trained weights, is larger "
        "than this is scaled down to it. A smaller value limits what a single unusual step can do; "
        "a very large one turns clipping off.",
    )
    batch: int = Field(
        16,
        ge=1,
        description="Batch size: the number of windows in one optimizer step, all micro-batches "
        "together. More windows make the gradient steadier and the step longer; through gradient "
        "accumulation the memory does not grow with it.",
    )
    micro_tokens: int | Literal["auto"] = Field(
        "auto",
        description="Size of a micro-batch: the largest number of tokens in one forward, trunks "
        "and branches together, at least 64. Smaller rows need less memory. `auto` predicts the "
        "memory of a step before training and takes as many as fit, up to 32,768 on a GPU and "
        "4,096 on a CPU. A window that is longer by itself has a row of its own.",
    )
    min_lr: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Learning rate at the last step of each phase, as a share of the phase's peak "
        "(not a rate itself). After the warm-up the rate falls to it along a cosine. At 1 it "
        "stays at the peak; at 0 it falls to zero. All phases have the same share; a phase not "
        "longer than its warm-up ends at its peak.",
    )

    @field_validator("micro_tokens")
    @classmethod
    def _auto_or_large_enough(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 64:
            raise ValueError("must be auto, or at least 64")
        return value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("must be two numbers from 0 to below 1")
        return value


class EvalSettings(Settings):
    """Evaluation during training: losses on the tuning split, and signs of a collapse.

    Windows, cuts and masks are the same each time, so that evaluations of one run can be compared.
    The model with the lowest loss of each phase is stored under best/<name of the phase>.
    """

    every: int = Field(
        20,
        ge=1,
        description="Number of optimizer steps from one evaluation to the next; the end of each "
        "phase is evaluated as well. A smaller number shows more and slows training down.",
    )
    windows: int = Field(
        32,
        ge=1,
        description="Number of windows of the tuning split that are evaluated, spread evenly over "
        "the split, or all if there are fewer. More windows make the losses less noisy and "
        "evaluations slower.",
    )
    nodes: int = Field(
        0,
        ge=0,
        description="Number of decision nodes of the first yes-or-no task of the probes, in train "
        "and again in tuning, that each evaluation embeds; 0 embeds none. A probe fitted on those "
        "of train gives `probe_auroc` on those of tuning, and the rank of the embeddings shows a "
        "collapse that losses hide. Up to half of the nodes are positive. They are the same at "
        "each evaluation, and each costs a forward pass of its window.",
    )
    stop_on_collapse: bool = Field(
        False,
        description="`true` ends the run at the evaluation that calls it collapsed: the states of "
        "the encoder, the embeddings at decision nodes or the states of the EMA teacher are nearly "
        "constant, or their effective rank is below a tenth of its value when the phase began. "
        "The exit status is 1, and checkpoints before that evaluation stay. `false` only warns.",
    )


class ProbeSettings(Settings):
    """Probes at the end of a run: what a linear model reads about outcomes from frozen embeddings.

    A decision node is a patient and a time at which a prediction is asked for, one for each row of
    the labels. Its embedding sees the buckets that were complete by then and a tail: the events of
    the current bucket up to that time. Probes are fitted on the split train, and their
    regularization is chosen on tuning, where they are measured too; on held_out only with --final.
    The same is done for the backbone before any training and for plain counts of codes, to compare
    with.
    """

    labels: list[str] | None = Field(
        None,
        description="Prediction tasks to probe: folders of MEDS label files, or names of folders "
        "under <data.path>/labels. `none` probes every task of a simulated cohort and nothing on "
        "data of your own; an empty value (--probe.labels=) turns probes off.",
    )
    competing: list[str] = Field(
        [],
        description="Competing events of time-to-event tasks, as TASK=OTHER_TASK: an event of "
        "OTHER_TASK at the same node is one after which that of TASK cannot happen, such as a "
        "discharge alive for a death in hospital. Labels with a column `competing` need none.",
    )
    encoder: Literal["online", "target"] = Field(
        "online",
        description="Which encoder gives the embeddings that are probed: `online`, the one in "
        "training, or `target`, the EMA teacher, whose weights are a moving average of the online "
        "encoder's. Both are taken as they are after the last step. The folder `final` holds the "
        "online encoder and, if the last phase has JEPA, the teacher beside it, whatever is "
        "chosen here. `target` is refused unless the last phase has JEPA.",
    )
    pool: RunPool = Field(
        "last",
        description="How the hidden states of a decision node become one embedding: `last` takes "
        "the state at its last token; `mean` the average over all tokens of its window; `layers` "
        "that average after every layer, side by side; `spread` the state at the last token beside "
        "average, maximum and standard deviation over the tokens. `auto` makes all four in one "
        "forward and takes the one whose probes have the least mean log loss on tuning over the "
        "binary tasks (of time-to-event tasks alone, the best C-index); pools of more than 16,384 "
        "numbers do not take part, and without a task it is `last`. The choice is printed and "
        "recorded in probe.json and in the model, so that embedding does the same.",
    )
    final: bool = Field(
        False,
        description="Whether the probes are judged on held_out instead of tuning. It is for the "
        "end: who chooses anything by held-out figures needs other patients to judge by. Without "
        "it held-out patients are neither embedded nor judged. The same command with --final, "
        "which is short for it, judges a finished run; nothing is trained again. The file "
        "held_out.json of the run records when and by which command it was asked for.",
    )
    untrained: int = Field(
        5,
        ge=1,
        description="Number of sets of first weights of a backbone made from scratch, from seeds "
        "of their own, that stand for the backbone before training; the first is that of the run. "
        "Each has the read-out that tuning chooses for it, and figures are means over them. A "
        "pretrained backbone has one.",
    )
    tokens: int = Field(
        16384,
        ge=64,
        description="Largest number of tokens in one forward when embeddings are computed, with "
        "the nodes of many windows packed together; on a CPU never more than 1,024, which stay in "
        "its cache. Lower it if memory runs out at the end of a run; it has no effect on training "
        "or, beyond rounding, on the embeddings.",
    )
    bootstraps: int = Field(
        1000,
        ge=100,
        description="Number of times the judged patients are resampled for the 95 % intervals of "
        "AUROC, AUPRC and Brier score. More resamples make the limits of the intervals steadier "
        "and take longer. Of time-to-event tasks the primary figure takes as many, and the other "
        "metrics 200.",
    )
    few_shot: bool = Field(
        False,
        description="Whether binary tasks are also fitted to few rows: to 8, 16, 32, 64 and 128 of "
        "each class of train, and as many of tuning for choices, five times each, for the trained "
        "model, code counts, and boosted trees on counts and values.",
    )

    @property
    def settled_pool(self) -> Pool:
        """The pool where none has been chosen: that of the settings, and for `auto` the last."""
        return "last" if self.pool == "auto" else self.pool


class RunSettings(Settings):
    """Where the run is stored, its random seed and device, and how it is logged and resumed.

    The same command, given again, continues a run from its newest checkpoint.
    """

    dir: str | None = Field(
        None,
        description="Folder of the run, with checkpoints, logs, the final model and the report; "
        "`none` means runs/<preset>. A folder that holds a run with other settings is refused; "
        "settings that do not change the weights, such as run.log_every or probe.pool, may "
        "differ. They do not make a finished run probe again.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed of the run: of new weights, the order of windows, cuts, masks "
        "and the probes' resamples. Each draw follows from the seed, the step and the "
        "patient, so that micro-batches and restarts do not change it. Use other seeds to "
        "see how much of a result is chance.",
    )
    device: str = Field(
        "auto",
        description="Device that computes: `cpu`, `cuda`, or one GPU of several by its number, "
        "such as `cuda:1`. `auto` is the first GPU, or the CPU if there is none; under "
        "torchrun each process has a GPU of its own.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Number of CPU threads that PyTorch computes with; 0 leaves the choice to "
        "PyTorch, usually one for each core. Lower it on a machine that others use too.",
    )
    log_every: int = Field(
        10,
        ge=1,
        description="Number of optimizer steps from one line of the log to the next, on the "
        "console and in metrics.jsonl. A line shows losses, learning rate and gradient norm of "
        "its own step, the speed since the last line, and the peak of memory since the program "
        "started; the first step and the end of a phase have one in any case. Evaluations are "
        "lines of their own in metrics.jsonl. The program waits for a GPU at each line, so very "
        "frequent lines slow training down. The result does not depend on it.",
    )
    save_every: int = Field(
        50,
        ge=1,
        description="Number of optimizer steps from one checkpoint to the next. A smaller number "
        "loses less work in a crash and writes to disk more often; the end of a phase and a stop "
        "by Ctrl-C or SIGTERM are saved in any case.",
    )
    keep: int = Field(
        2,
        ge=1,
        description="Number of newest checkpoints that stay on disk for resuming; older ones are "
        "deleted. With two or more, a run can go on from an older one if the newest is damaged. "
        "The best model of each phase and the final model are stored beside them.",
    )
    profile: int = Field(
        0,
        ge=0,
        description="Number of steps of each phase whose time is taken part by part: norms, "
        "projections, attention, MLP, losses, target, optimizer, waiting for data. They are the "
        "steps after the first that this process makes, which also allocates and compiles. The "
        "folder profile/<phase> gets a table, profile.txt and profile.json, and trace.json.gz for "
        "chrome://tracing; they hold names of operations, times, and the name of the machine, "
        "nothing of patients. The steps are slower while it lasts, their results the same; a run "
        "that is stopped during them writes no profile. With objective.path=reference most of "
        "the time has no part. --profile=3 is short for it; 0 takes no profile.",
    )
    export: Literal["none", "merged"] = Field(
        "none",
        description="`merged` also writes the folder `merged` at the end: a plain Hugging Face "
        "model with the LoRA adapters added into its weights. It works for a finished run too, by "
        "the same command with --export=merged, which is short for this key.",
    )
    track: list[Literal["wandb", "mlflow"]] = Field(
        [],
        description="Trackers that get the numbers of metrics.jsonl and the settings, beside "
        "TensorBoard: `wandb`, `mlflow` or both, each of an extra of its name (pip install "
        "'smbfast[wandb]'). They write into the folders wandb and mlruns of the run. Of a path "
        "they get the last part, of patients nothing. One that fails or is slow is left, and the "
        "run goes on; a resumed run goes on in the same run of the tracker.",
    )
    track_online: bool = Field(
        False,
        description="Whether trackers send what they get to their servers: `wandb` to the account "
        "of `wandb login`, `mlflow` to MLFLOW_TRACKING_URI. `false` writes files only, which "
        "`wandb sync` may send later.",
    )
    share: bool = Field(
        False,
        description="Whether others may read what this run writes from now on that holds no row of "
        "a patient: its folder, log, report, checkpoints, best and final model then have the modes "
        "of your umask. Token shards, embeddings, predictions, probe.json and what is known of "
        "held-out patients stay readable by you alone, as everything is without it.",
    )
    resume: Literal["auto", "never", "restart"] = Field(
        "auto",
        description="What happens if the run folder already holds a run. `auto` continues it, or "
        "says that it is finished; `never` stops with an error. A run is continued only from an "
        "intact checkpoint of its own, with the data, the token shards, the tokenizer and the "
        "backbone that it was made with; anything else is refused by name. `restart` does as "
        "`auto`, but where no checkpoint can be used it renames them all, so that they begin "
        "with `unused`, and trains from step 0 again. Other settings are refused in any case. "
        "--resume=never is short for it.",
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        return known_device(value)


class TrainSettings(Settings):
    """Train a patient world model on electronic health records in MEDS format.

    A run trains a language model on records written as text, in phases of SFT (next-token
    prediction) and JEPA (prediction of a masked future in latent space). At the end it embeds
    patients at the prediction times of labelled tasks, probes the embeddings and writes a report.
    """

    foreign: ClassVar[Mapping[str, Foreign]] = names.TRAIN

    preset: str = Field(
        "default",
        description="Name of this configuration: it is written to the log, and the run folder is "
        "runs/<preset> unless run.dir is given. It is set by the preset or TOML file that a "
        "command names first; giving it as a key changes the name alone.",
    )
    run: RunSettings = RunSettings()
    data: DataSettings = DataSettings()
    cohort: CohortSettings = CohortSettings()
    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    optim: OptimSettings = OptimSettings()
    eval: EvalSettings = EvalSettings()
    probe: ProbeSettings = ProbeSettings()
    phases: list[PhaseSettings] = Field(
        [],
        description="The phases of training, in order, one [[phases]] table for each in a TOML "
        "file.",
    )
    kernels: str = Field(
        "auto",
        description="Which implementation of each computing operation (kernel) is used. `auto` "
        "takes the fastest that runs on this machine; `torch` takes the plain PyTorch reference of "
        "all; pairs such as timeline_attention:sdpa,lora_linear:torch choose for single "
        "operations. `python -m smbkernels` lists them. On a CPU a new run measures which library "
        "multiplies fp32 matrices faster, and goes on with it when it resumes; linear:torch (MKL), "
        "linear:onednn and linear:onednn_rows choose it instead. Use `torch` to see whether a "
        "kernel is the cause of a problem; results differ by rounding only.",
    )

    @field_validator("kernels")
    @classmethod
    def _known_kernels(cls, value: str) -> str:
        check_choice(*kernel_choice(value))
        return value

    @property
    def trains(self) -> Literal["lora", "all"]:
        """What is trained."""
        return self.model.train or ("lora" if self.model.path else "all")

    @property
    def reads_ahead(self) -> bool:
        """Whether a phase predicts what lies within horizons of time: horizon JEPA or codes."""
        horizon = self.objective.jepa == "horizon"
        return any(p.w_codes > 0 or (horizon and p.w_jepa > 0) for p in self.phases)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.preset}")

    @property
    def _not_shared_out(self) -> str | None:
        """What must be otherwise for ranks to share the backbone."""
        if self.trains == "all":
            return "LoRA (model.path and model.train=lora)"
        if self.objective.target_form == "merged":  # a second copy of every adapted weight
            return "objective.target_form=tracked, as a merged target copies every weight"
        if self.objective.path == "reference":
            return "objective.path=shared, which runs as many forwards on every GPU"
        if self.run.export == "merged":  # one process would load the whole backbone at the end
            return (
                "run.export=none; once it is done, the same command with run.export=merged, "
                "model.fsdp=false and without torchrun exports it where the backbone fits"
            )
        return None

    @model_validator(mode="after")
    def _consistent(self) -> "TrainSettings":
        if not self.phases:
            raise ValueError("phases must name at least one phase, got none")
        names = [p.name for p in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"phases must differ in their names, got {', '.join(names)}")
        if self.probe.final and not (
            self.probe.labels or (self.probe.labels is None and self.data.path is None)
        ):
            raise ValueError("probe.final needs tasks to judge, in probe.labels; there are none")
        if self.probe.encoder == "target" and self.phases[-1].w_jepa == 0:
            raise ValueError("probe.encoder=target needs a last phase with w_jepa above 0")
        if self.objective.path == "reference" and self.model.recompute != "none":
            raise ValueError("model.recompute=mlp and full need objective.path=shared")
        if self.model.adapter and not self.model.path:
            raise ValueError("model.adapter needs model.path, the backbone it was trained on")
        if self.model.train == "lora" and not self.model.path:
            raise ValueError("model.train=lora needs model.path, the backbone to adapt")
        if self.objective.target_form == "tracked" and self.trains == "all":
            raise ValueError("objective.target_form=tracked needs LoRA (model.train=lora)")
        if self.model.fsdp and (way_out := self._not_shared_out):
            raise ValueError(f"model.fsdp shares out a frozen backbone, so it needs {way_out}")
        if self.model.adapter and self.trains == "all":
            raise ValueError("model.adapter needs LoRA (model.train=lora)")
        if self.model.hidden % (2 * self.model.heads) or self.model.heads % self.model.kv_heads:
            raise ValueError(
                "model.hidden must be a multiple of twice model.heads (rotary embeddings need an "
                "even width of each head), and model.heads a multiple of model.kv_heads, got "
                f"{self.model.hidden}, {self.model.heads} and {self.model.kv_heads}"
            )
        return self


def kernel_choice(text: str) -> tuple[str | None, dict[str, str]]:
    """A backend for all operations or None, and backends by operation, for `smbkernels.use`.

    Raises:
        ValueError: words that are neither a backend nor `operation:backend`.
    """
    everywhere, by_op = None, {}
    for word in text.split(","):
        name, colon, backend = word.strip().partition(":")
        if not name or bool(colon) != bool(backend):
            raise ValueError(
                "must be auto, torch or pairs operation:backend, with commas between them"
            )
        if colon and name in by_op:
            raise ValueError(f"must name one backend for {name}, got {text}")
        if colon:
            by_op[name] = backend
        elif everywhere:
            raise ValueError(f"must name one backend for all operations, got {text}")
        else:
            everywhere = name
    return everywhere, by_op
