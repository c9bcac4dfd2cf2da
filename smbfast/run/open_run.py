"""Opens a run: data, windows, model, optimizer, newest checkpoint, and the size of micro-batches.

Training and its preflight open a run by the same call, so the preflight predicts what training
does, for a new run and for one that resumes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch

from smbfast.base.config import to_toml
from smbfast.base.digests import hub_commit
from smbfast.base.entry import own_folder
from smbfast.base.files import legal, write_text
from smbfast.base.parts import is_part
from smbfast.base.runtime import GIB, choose_device, held_memory, versions
from smbfast.data.labels import Labels
from smbfast.data.loader import Step, make_step
from smbfast.data.pairs import prevalence
from smbfast.data.prepared import Prepared
from smbfast.data.windows import WindowSet
from smbfast.model.backbone import PatientEncoder, make_encoder, parameter_counts
from smbfast.model.flops import ModelShape
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.reporting.signals import Watch
from smbfast.run import checkpoint
from smbfast.run.agreement import require_same_state
from smbfast.run.background import Buffer, Writer
from smbfast.run.checkpoint import Checkpoint, Snapshot
from smbfast.run.data_card import DataCard, data_card
from smbfast.run.epochs import as_asked, resolved
from smbfast.run.folder import (
    check_windows,
    data_of,
    prepared_data,
    read_tasks,
    settings_of_ranks,
    write_status,
)
from smbfast.run.identity import Identity, newest_checkpoint, shards_digest
from smbfast.run.matmul import Matmul, agreed_matmul
from smbfast.run.model_card import model_card
from smbfast.run.optim import make_optimizer, place, total_steps
from smbfast.run.ranks import ALONE, Ranks
from smbfast.run.startup import copied_bytes, micro_tokens
from smbfast.settings import DataSettings, TrainSettings

SAMPLE = 1000  # windows in which the prevalence of codes to come is counted: our choice
Report = Callable[[str, str], None]  # called with the name of a stage and a text about it


@dataclass
class Progress:
    """How far a run is; a checkpoint records this beside its tensors."""

    step: int = 0  # number of steps done
    metrics_offset: int = 0  # bytes of metrics.jsonl that were written by then
    best: dict[str, dict] = field(default_factory=dict)  # per phase: loss and step
    entry: dict = field(default_factory=dict)  # measures of the evaluation when the phase began
    seconds: float = 0.0  # time spent training
    micro_tokens: int | None = None  # tokens of a micro-batch, chosen when the run began
    matmul: str | None = None  # backend of `smbkernels.linear`, chosen when it began on a CPU
    tokens: int = 0  # of the trunks of all steps
    flops: int = 0  # of the matrix products of the main rank
    watch: Watch = field(default_factory=Watch)  # whether the phase trains anything

    @classmethod
    def of(cls, record: dict) -> "Progress":
        """Read it from a checkpoint's record; a key that an older record lacks has its default."""
        values = {f.name: record[f.name] for f in fields(cls) if f.name in record}
        known = values.pop("watch", {})
        watch = Watch(**{f.name: known[f.name] for f in fields(Watch) if f.name in known})
        return cls(**values, watch=watch)


@dataclass
class OpenRun:
    """A run that is ready for its next step: everything that `train` works on."""

    settings: TrainSettings
    device: torch.device
    data: DataSettings  # with its path filled in if the cohort is simulated
    prepared: Prepared
    windows: WindowSet
    tuning: WindowSet
    identity: Identity  # recorded by checkpoints and models
    card: DataCard  # of the data, made before the model
    tasks: list[tuple[Path, Labels]]  # probed at the end, but read now to find mistakes early
    encoder: PatientEncoder
    optimizer: torch.optim.Optimizer
    target: TargetEncoder | None  # from the checkpoint, if it has one; see `take_target`
    progress: Progress
    matmul: Matmul  # which library multiplies fp32 matrices
    micro_tokens: int  # online tokens of a micro-batch
    predicted_peak: int  # bytes, or 0 if it is not predicted
    bytes_before: int  # memory of the process before the model was made
    start_time: float  # time.monotonic() when the run was opened
    ranks: Ranks
    writer: Writer | None = None  # of checkpoints while steps go on; see `saves_in_background`

    @classmethod
    def open(
        cls,
        settings: TrainSettings,
        ranks: Ranks = ALONE,
        *,
        set_aside: bool = True,
        verify: Literal["once", "all"] = "once",
        report: Report = lambda _name, _text: None,
        show: Callable[[DataCard], None] = DataCard.warn,
    ) -> "OpenRun":
        """Prepare the data, make the model, and load the newest checkpoint if there is one.

        Args:
            ranks: those that train together. The main one makes and checks what the others read.
            set_aside: whether to rename damaged checkpoints; otherwise they are only skipped.
            verify: whether token shards are read whole again; see `Prepared.open`.
            report: called after each stage.
            show: called with the data card, before the model is loaded.

        Raises:
            ValueError: if data are bad, or the model or a checkpoint does not load.
        """
        start_time, device = time.monotonic(), choose_device(settings.run.device)
        if settings.run.threads:
            torch.set_num_threads(settings.run.threads)
        with ranks.main_first():
            opened = _open_data(settings, ranks, verify, report, show)
        settings = opened.settings  # with the steps of every phase, from here on
        prepared = opened.prepared  # and the checkpoint, before a large model is loaded
        identity, newest = _begin_or_resume(settings, ranks, prepared, set_aside=set_aside)
        bytes_before = held_memory(device)
        encoder = make_encoder_of(settings, prepared, opened.windows, device)
        if ranks.is_main:
            identity = identity.with_backbone(settings)  # of the hub: it is here only now
        optimizer = make_optimizer(encoder, settings.optim)
        target, progress = _restored(newest, identity, encoder, optimizer)
        report("model", _model_text(encoder, len(prepared.tokenizer), progress.step))
        matmul = agreed_matmul(settings, encoder, progress.matmul, progress.step, ranks)
        progress.matmul = matmul.saved
        report("kernels", matmul.kernels(device.type))
        num_horizons = len(opened.windows.horizons or ())
        tokens, peak = micro_tokens(settings, encoder, progress.micro_tokens, num_horizons)
        tokens = ranks.least(tokens)  # every rank plans the same step
        report("memory", _memory_text(tokens, peak, copied_bytes(settings, encoder), device))
        return cls(
            device=device,
            **opened._asdict(),
            identity=identity,
            encoder=encoder,
            optimizer=optimizer,
            target=target,
            progress=progress,
            matmul=matmul,
            micro_tokens=tokens,
            predicted_peak=peak,
            bytes_before=bytes_before,
            start_time=start_time,
            ranks=ranks,
        )

    def take_target(self) -> TargetEncoder | None:
        """Hand over the checkpoint's target encoder, so that the caller alone decides its life."""
        target, self.target = self.target, None
        return target

    def begin(self) -> None:
        """Write the id and the settings of a new run: from here on the folder is this run's."""
        self.identity.write(self.folder)
        write_text(self.folder / "config.toml", to_toml(as_asked(self.settings)))

    def own(self) -> None:
        """Let the folder be this user's alone, or shared, whatever an earlier process made it."""
        goes_on = ("config.toml", "run.json", "metrics.jsonl", "checkpoints", "best", "tensorboard")
        own_folder(self.folder, shared=self.settings.run.share, entries=goes_on)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.settings.folder

    @cached_property
    def target_form(self) -> TargetForm:
        """The form of the target encoder: merged or tracked."""
        return TargetForm.of(self.settings.objective).resolved(self.encoder)

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes from which the FLOPs of a step follow."""
        form = self.target_form
        return ModelShape.of(self.encoder, tracked=form if form.name == "tracked" else None)

    def make_step(self, index: int) -> Step:
        """Draw optimizer step `index` (from 0, over all phases); pack what this rank has of it."""
        phase = place(self.settings, index).phase
        return make_step(
            self.windows,
            self.settings.objective,
            index,
            batch=self.settings.optim.batch,
            tokens=self.micro_tokens,
            seed=self.settings.run.seed,
            sft=phase.w_sft > 0,
            jepa=phase.w_jepa > 0,
            codes=phase.w_codes > 0,
            ratio=self.shape.attention_ratio,
            rank=self.ranks.rank,
            ranks=self.ranks.world,
            even=self.settings.model.fsdp,
        )

    def steps_to_do(self) -> Iterator[Callable[[], Step]]:
        """Yield a function for each step that is left, in order, which makes that step."""
        for index in range(self.progress.step, total_steps(self.settings)):
            yield partial(self.make_step, index)

    def seconds(self) -> float:
        """Return the seconds spent on this run, by earlier processes and by this one."""
        return self.progress.seconds + time.monotonic() - self.start_time

    @contextmanager
    def saves_in_background(self) -> Iterator[None]:
        """Let `save` return once the state is copied, in the block; at its end all is saved.

        Raises:
            ValueError: a tensor was not finite; that and what else keeps a checkpoint from being
                written is raised by the next `save` or `settle`, or at the end of the block.
        """
        if not self.ranks.is_main:
            yield
            self.settle()
            return
        with Writer(Buffer(copied_bytes(self.settings, self.encoder), self.device)) as self.writer:
            try:
                yield
                self.settle()
            finally:
                self.writer = None

    @property
    def lost_a_checkpoint(self) -> bool:
        """Whether a checkpoint could not be written, which `settle` and `save` raise."""
        return self.writer is not None and self.writer.has_failed

    def settle(self) -> None:
        """Wait until all that was saved is on the disk; if it cannot be, all ranks end."""
        with self.ranks.main_first():
            if self.writer is not None:
                self.writer.wait()

    @is_part("checkpoint")
    def save(
        self,
        target: TargetEncoder | None,
        step: int,
        offset: int,
        command: str,
        *,
        skipped: bool = False,
    ) -> None:
        """Write a checkpoint after `step` steps, when metrics.jsonl has `offset` bytes.

        In `saves_in_background` it is copied, once the one before is on the disk, and written while
        steps go on. `status.json` says the step then.

        Args:
            skipped: whether the last of the steps was, after which nothing is written. One rank
                alone skips a step if a number went wrong in it, so all compare their state first.

        Raises:
            RunFailed: if a rank's state is not that of the others. Then nothing is written.
        """
        require_same_state(self.ranks, self.encoder, self.optimizer, target)
        if skipped:
            return
        self.progress.step = step
        with self.ranks.main_first():  # the others must not be inside a layer if this fails
            if not self.ranks.is_main:
                return
            record = {
                **self.identity.record(),
                "metrics_offset": offset,
                "best": self.progress.best,
                "entry": legal(self.progress.entry),
                "micro_tokens": self.micro_tokens,
                "matmul": self.progress.matmul,
                "seconds": self.seconds(),
                "tokens": self.progress.tokens,
                "flops": self.progress.flops,
                "watch": asdict(self.progress.watch),
            }
            state = (step, self.encoder, target, self.optimizer, record)
            if self.writer is None:
                checkpoint.save(self.folder, *state, self.settings.run.keep)
                write_status(self.folder, "running", step, command)
                return
            self.writer.wait()  # it reads the buffer
            snapshot = checkpoint.taken(*state, self.writer.buffer)
            self.writer.begin(partial(self._write, snapshot, command))

    def _write(self, snapshot: Snapshot, command: str) -> None:
        """Write a checkpoint, and then that it is there."""
        checkpoint.write(self.folder, snapshot, self.settings.run.keep)
        write_status(self.folder, "running", snapshot.step, command)

    def write_status(self, state: str, step: int, command: str) -> None:
        """Write `status.json`, if this is the main rank."""
        if self.ranks.is_main:
            write_status(self.folder, state, step, command)

    def save_model(self, folder: Path, target: TargetEncoder | None, step: int) -> None:
        """Write the model after `step` steps, in the format that transformers and PEFT load.

        It is written while nothing else is: the loop waits for it, and for a checkpoint before it.
        """
        with self.ranks.main_first():
            if not self.ranks.is_main:
                return
            if self.writer is not None:
                self.writer.wait()
            record, prepared, best = _model_record(self, step), self.prepared, self.progress.best
            has_target = target is not None
            card = model_card(
                record, folder, prepared.record, best, self.settings, target=has_target
            )
            tokenizer, vocabulary = prepared.tokenizer, prepared.vocabulary_file
            checkpoint.save_final(folder, self.encoder, target, tokenizer, record, vocabulary, card)


def _restored(
    newest: Checkpoint | None,
    identity: Identity,
    encoder: PatientEncoder,
    optimizer: torch.optim.Optimizer,
) -> tuple[TargetEncoder | None, Progress]:
    """Load a checkpoint of this run, if there is one; return its target encoder and progress."""
    if newest is None:
        return None, Progress()
    identity.require(newest)
    return checkpoint.load(newest, encoder, optimizer), Progress.of(newest.record)


def _begin_or_resume(
    settings: TrainSettings, ranks: Ranks, prepared: Prepared, *, set_aside: bool
) -> tuple[Identity, Checkpoint | None]:
    """Return what the main rank has of `newest_checkpoint`, if all ranks read the same data.

    The folder of the run must be one that every rank can read.
    """

    def decided() -> tuple:
        identity, newest = newest_checkpoint(settings, prepared, set_aside=set_aside)
        return asdict(identity), newest and (str(newest.folder), newest.record)

    values, newest = ranks.decide(decided)
    ranks.require_same(
        {
            "token shards": shards_digest(prepared),
            "settings": settings_of_ranks(settings),
            "versions": {n: v for n, v in versions().items() if n != "gpu"},
        }
    )
    return Identity(**values), Checkpoint(Path(newest[0]), newest[1]) if newest else None


class _OpenData(NamedTuple):
    """What a run reads, and its settings with the steps that follow from it."""

    settings: TrainSettings
    data: DataSettings
    prepared: Prepared
    windows: WindowSet
    tuning: WindowSet
    card: DataCard
    tasks: list[tuple[Path, Labels]]


def _open_data(
    settings: TrainSettings,
    ranks: Ranks,
    verify: Literal["once", "all"],
    report: Report,
    show: Callable[[DataCard], None],
) -> _OpenData:
    """Prepare the data of a run, and refuse them if training would learn nothing from them."""
    if settings.optim.batch < ranks.world:
        raise ValueError(
            f"optim.batch must be at least {ranks.world}, a window for each of the ranks, got "
            f"{settings.optim.batch}; raise it, or start fewer processes with torchrun "
            f"--nproc-per-node={settings.optim.batch}"
        )
    data = data_of(settings, settings.folder)
    tasks, facts = read_tasks(settings, data)
    prepared = prepared_data(settings, data, settings.folder, verify, ranks)
    windows, tuning = _windows(settings, data, prepared)
    settings = resolved(settings, windows)
    card = data_card(settings, prepared, windows, tuning, facts)
    card.require()
    report("data", card.summary)
    show(card)
    return _OpenData(settings, data, prepared, windows, tuning, card, tasks)


def _windows(
    settings: TrainSettings, data: DataSettings, prepared: Prepared
) -> tuple[WindowSet, WindowSet]:
    """Return the windows of train and tuning, which overlap only if a stride says so."""
    form, horizons, classes = settings.objective, None, None
    if settings.reads_ahead:
        horizons = prepared.horizons(form)
    if any(phase.w_codes > 0 for phase in settings.phases):
        classes = prepared.classes()
    windows, tuning = (
        prepared.windows(split, data.window, form, data.stride, horizons, classes)
        for split in ("train", "tuning")
    )
    check_windows(windows, tuning, data.path)
    return windows, tuning


def make_encoder_of(
    settings: TrainSettings, prepared: Prepared, windows: WindowSet, device: torch.device
) -> PatientEncoder:
    """Return the encoder of a run at the start of training, with the heads that its phases train.

    Args:
        windows: of train; the head of codes to come begins at the prevalence in some of them.
    """
    horizons, classes, prevalence_HK = windows.horizons, windows.classes, None
    is_latent = settings.objective.jepa == "horizon" and any(p.w_jepa > 0 for p in settings.phases)
    if horizons is not None and classes is not None:
        places = np.linspace(0, windows.num_with_pair - 1, min(windows.num_with_pair, SAMPLE))
        prevalence_HK = prevalence(
            [windows[int(windows.with_pair_C[i])] for i in places.astype(np.int64)],
            horizons,
            classes.num_classes,
            positions=settings.objective.positions,
            seed=settings.run.seed,
        )
    return make_encoder(
        settings,
        prepared.tokenizer,
        device,
        prepared.new_tokens,
        num_horizons=len(horizons) if horizons is not None and is_latent else 0,
        prevalence_HK=prevalence_HK,
    )


def _model_record(run: OpenRun, step: int) -> dict:
    """Return what loading the model needs beside its tensors."""
    settings, prepared = run.settings, run.prepared
    return {
        "trains": settings.trains,
        "backbone": _lasting(settings.model.path),
        "backbone_revision": hub_commit(settings.model.path) if settings.model.path else None,
        "dtype": str(next(run.encoder.decoder.parameters()).dtype).removeprefix("torch."),
        "compute": str(run.encoder.dtype).removeprefix("torch."),
        "vocabulary": len(prepared.tokenizer),
        "predictor_layers": settings.objective.predictor_layers,
        "window": run.data.window,
        "pool": settings.probe.settled_pool,
        "data_format": prepared.record["data_format"],
        "delimiters": prepared.record["delimiters"],
        "format": prepared.record["format"],
        "encoder": prepared.record["encoder"],
        "split": prepared.record.get("split"),
        "section_rules": prepared.record["section_rules"],
        "options": prepared.options,
        "matmul": run.progress.matmul,
        "step": step,
        **run.identity.of_model(),
    }


def _lasting(path: str | None) -> str | None:
    """Return a local folder as an absolute path, which is valid in any working directory."""
    return str(Path(path).resolve()) if path and Path(path).is_dir() else path


def _memory_text(tokens: int, peak: int, copied: int, device: torch.device) -> str:
    where = "of it a" if device.type == "cpu" else "and of the host a"
    return (
        f"up to {tokens:,} tokens a micro-batch, {peak / GIB:.2f} GiB at the peak predicted, "
        f"{where} copy of a checkpoint, {copied / GIB:.2f}"
    )


def _model_text(encoder: PatientEncoder, num_ids: int, step: int) -> str:
    trained, parameters = parameter_counts(encoder)
    text = f"{trained:,} of {parameters:,} parameters trained, {num_ids:,} ids"
    return f"{text}, as checkpoint {step} has them" if step else text
