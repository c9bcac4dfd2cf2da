"""What a run measures during training: losses on fixed tuning windows.

Legend: E ends of buckets, K nodes, M masked tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from smbfast import objective, reference
from smbfast.base.entry import RunFailed
from smbfast.base.parts import is_part
from smbfast.model.backbone import PatientEncoder
from smbfast.model.codes_head import prevalence_sum
from smbfast.model.target import HorizonStates, JepaStates, TargetEncoder
from smbfast.model.terms import Measured
from smbfast.probing.embedding import packed_of
from smbfast.run import console
from smbfast.run.agreement import require_same_state
from smbfast.run.diagnostics import diagnose, diagnose_horizons, spread
from smbfast.run.fixed import Fixed
from smbfast.run.gradients import gradients
from smbfast.run.metrics import MetricsLog, log_evaluation
from smbfast.run.open_run import OpenRun
from smbfast.settings import PhaseSettings, TrainSettings


@is_part("evaluation")
def evaluate(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    fixed: Fixed,
    settings: TrainSettings,
    phase: PhaseSettings,
) -> dict:
    """Return the losses on the fixed batches and what they say of the health of the run.

    - `loss` is the weighted sum of the phase, by which the best step of the phase is chosen. It is
      None if a loss of the phase was not measured, because the tuning windows have no label, or no
      mask: then no step is the best.
    - `online_std` and `online_rank` are the spread of the online encoder's states at the ends of
      buckets, `embedding_std` and `embedding_rank` that of the embeddings at decision nodes (see
      `smbfast.run.diagnostics.spread`), and `probe_auroc` is what a probe of task `probe_task`
      reaches with them.
    - With a target there are its diagnostics and its distance. `codes_gain` is the loss of codes
      to come of a head that knows only how often each comes, less `codes`.
    - `grad_<loss>` is the norm of the gradient of each loss of the phase, without its weight, and
      `cos_<loss>_<loss>` their cosines; see `gradients`.
    """
    values = _losses(encoder, target, fixed, settings, phase)
    values |= _states(encoder, fixed, settings)
    return values | gradients(encoder, target, fixed.gradients[target is not None], settings, phase)


@torch.no_grad()
def _losses(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    fixed: Fixed,
    settings: TrainSettings,
    phase: PhaseSettings,
) -> dict:
    device = encoder.mask_vector.device
    batches = fixed.batches[target is not None]
    num_labels = sum(b.num_labels for b in batches)
    path = objective if settings.objective.path == "shared" else reference
    measured = [path.measure(encoder, target, b.to(device)) for b in batches]
    num_pairs = sum(b.num_pairs for b in batches)
    sft = sum(float(m.sft) for m in measured) / num_labels if num_labels else None
    codes = [float(m.codes) for m in measured if m.codes is not None]
    values: dict = {"sft": sft, "jepa": None}
    values["codes"] = sum(codes) / num_pairs if codes else None
    if encoder.codes is not None and codes:
        own = [b.pairs for b in batches if b.pairs is not None and b.num_pairs]
        ignorant = sum(float(prevalence_sum(encoder.codes, p)) for p in own) / num_pairs
        values["codes_gain"] = ignorant - values["codes"]
    if target is not None:
        values |= _jepa_health(measured, fixed, settings) | target.measures()
        pairs = [b.pairs.num_by_horizon for b in batches if b.pairs is not None]
        numbers = [sum(number) for number in zip(*pairs, strict=True)]
        if target.scale and numbers and target.scale.lacks(numbers):
            # before its first step horizon JEPA has no scale, so neither a loss nor an R²
            values = {k: v for k, v in values.items() if not k.startswith("r2")} | {"jepa": None}
    weights = ((phase.w_sft, "sft"), (phase.w_jepa, "jepa"), (phase.w_codes, "codes"))
    parts = [(weight, values[name]) for weight, name in weights]
    parts = [(weight, loss) for weight, loss in parts if weight > 0]
    measured_all = all(loss is not None for _, loss in parts)
    values["loss"] = sum(weight * loss for weight, loss in parts) if measured_all else None
    return values


def _jepa_health(measured: list[Measured], fixed: Fixed, settings: TrainSettings) -> dict:
    """Return the JEPA loss with what it is compared with; empty where nothing is predicted."""
    masked = [m.masked for m in measured if m.masked is not None]
    if masked:
        normalize = settings.objective.target_norm == "layer"
        return diagnose(JepaStates(**_joined(masked)), normalize=normalize)
    latent = [m.latent for m in measured if m.latent is not None]
    return diagnose_horizons(HorizonStates(**_joined(latent)), fixed.horizons) if latent else {}


def _joined(parts: Sequence[JepaStates] | Sequence[HorizonStates]) -> dict[str, Tensor]:
    """Return the fields of the states of several batches, one behind the other."""
    names = [field.name for field in fields(parts[0])]
    return {name: torch.cat([getattr(part, name) for part in parts]) for name in names}


@torch.inference_mode()
def _states(encoder: PatientEncoder, fixed: Fixed, settings: TrainSettings) -> dict:
    """Measure the online states at the ends of buckets, and the embeddings at decision nodes."""
    packed = packed_of(encoder, None, "online", settings.objective.path)
    device = encoder.mask_vector.device
    values: dict = {}
    if fixed.ends:
        state_ED = torch.cat([ends.states(packed, device) for ends in fixed.ends])
        values |= {f"online_{key}": value for key, value in spread(state_ED).items()}
    if nodes := fixed.nodes:
        embedding_KD = nodes.embedded(packed, settings.probe.settled_pool, device)
        tuning_KD = torch.from_numpy(embedding_KD[nodes.tuning_K])
        values |= {f"embedding_{key}": value for key, value in spread(tuning_KD).items()}
        values |= {"probe_task": nodes.task, "probe_auroc": nodes.auroc(embedding_KD)}
    return values


def evaluate_entry(
    run: OpenRun,
    target: TargetEncoder | None,
    fixed: Fixed,
    phase: PhaseSettings,
    step: int,
    log: MetricsLog,
) -> dict:
    """Evaluate at the beginning of a phase, after `step` steps, and log it.

    Returns:
        The measures, as from `evaluate`; `untrained` is true where weights are random still.
    """
    own = evaluate(run.encoder, target, fixed, run.settings, phase)
    health = _as_main_has(run, target, own)
    if step == 0 and run.settings.model.path is None:
        health["untrained"] = True
    log_evaluation(log, run, step, phase, health)
    run.progress.entry = health
    return health


def _as_main_has(run: OpenRun, target: TargetEncoder | None, health: dict) -> dict:
    """Return the measures of the main rank, once all ranks have proved to have its state.

    Each rank evaluates all of the few fixed windows, and all stop or go on by the same figures.
    """
    require_same_state(run.ranks, run.encoder, run.optimizer, target)
    return run.ranks.tell(health)


def evaluate_step(
    run: OpenRun,
    target: TargetEncoder | None,
    fixed: Fixed,
    phase: PhaseSettings,
    step: int,
    log: MetricsLog,
) -> dict:
    """Evaluate after `step` steps, log it, warn, and save the model if it is the phase's best.

    Warnings compare with the evaluation with which the phase began. A model that has collapsed is
    never the best one: constant states are easy to predict.

    Returns:
        The measures, as from `evaluate`.

    Raises:
        RunFailed: if the run has collapsed and `eval.stop_on_collapse` asks to stop then, or the
            states of ranks differ.
    """
    settings, progress = run.settings, run.progress
    own = evaluate(run.encoder, target, fixed, settings, phase)
    health = _as_main_has(run, target, own)
    log_evaluation(log, run, step, phase, health)
    collapsed = console.warn(health, progress.entry, phase)
    if collapsed and settings.eval.stop_on_collapse:
        raise RunFailed(
            f"stopped after step {step} of phase `{phase.name}`, {collapsed.text} Checkpoints and "
            f"best models from before it stay in {run.folder}. Begin again in another --run.dir, "
            "or go on here with --eval.stop_on_collapse=false"
        )
    if progress.entry.get("untrained"):
        progress.entry = health
    elif progress.entry.get("r2") is None:  # see `_losses`: it is first measured after a step
        progress.entry = {**progress.entry, "r2": health.get("r2")}
    loss = health["loss"]
    lowest = progress.best.get(phase.name, {}).get("loss", float("inf"))
    if loss is not None and loss < lowest and not collapsed:
        progress.best[phase.name] = {"loss": loss, "step": step}
        run.save_model(run.folder / "best" / phase.name, target, step)
    return health
