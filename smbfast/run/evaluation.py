"""What a run measures during training: losses on fixed tuning windows.

Legend: M masked tokens, D width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from smbfast import objective, reference
from smbfast.base.parts import is_part
from smbfast.batch import PackedBatch
from smbfast.data.loader import FIXED, make_micro_batches
from smbfast.data.masking import needs_cuts
from smbfast.model.backbone import PatientEncoder
from smbfast.model.target import JepaStates, TargetEncoder
from smbfast.reference import Measured
from smbfast.run import console
from smbfast.run.diagnostics import diagnose
from smbfast.run.metrics import MetricsLog
from smbfast.run.open_run import OpenRun
from smbfast.settings import PhaseSettings, TrainSettings


def fixed_batches(run: OpenRun) -> dict[bool, list[PackedBatch]]:
    """Return the tuning windows, cuts, masks and positions that every evaluation uses.

    The key True has the micro-batches with what JEPA predicts, for phases with a target encoder;
    the key False has those without. Where cuts or pairs of positions and horizons are needed, the
    windows are some that have them, as in training; if no tuning window has one, JEPA is not
    evaluated. Windows are spread evenly over the subjects.
    """
    settings, tuning = run.settings, run.tuning
    batches = {}
    for jepa in (False, True):
        usable: Sequence[int] | np.ndarray = range(len(tuning))
        if needs_cuts(settings.objective, jepa=jepa) and tuning.num_with_cut:
            usable = np.flatnonzero(tuning.has_cut_W)
        elif tuning.num_with_pair:
            usable = np.flatnonzero(tuning.has_pair_W)
        count = min(settings.eval.windows, len(usable))
        places = np.linspace(0, len(usable) - 1, count).astype(np.int64)
        batches[jepa] = make_micro_batches(
            [tuning[usable[i]] for i in places.tolist()],
            settings.objective,
            settings.run.seed,
            FIXED,
            tokens=run.micro_tokens,
            ratio=run.shape.attention_ratio,
            jepa=jepa,
            codes=run.encoder.codes is not None,
            horizons=tuning.horizons,
        )
    return batches


@torch.no_grad()
@is_part("evaluation")
def evaluate(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    fixed: dict[bool, list[PackedBatch]],
    settings: TrainSettings,
    phase: PhaseSettings,
) -> dict:
    """Return the losses on the fixed batches and, with a target, its diagnostics and distance.

    `loss` is the weighted sum of the phase, by which the best step of the phase is chosen. It is
    None if a loss of the phase was not measured, because the tuning windows have no label, or no
    mask: then no step is the best.
    """
    device = encoder.mask_vector.device
    batches = fixed[target is not None]
    num_labels = sum(b.num_labels for b in batches)
    path = objective if settings.objective.path == "shared" else reference
    measured = [path.measure(encoder, target, b.to(device)) for b in batches]
    num_pairs = sum(b.num_pairs for b in batches)
    sft = sum(float(m.sft) for m in measured) / num_labels if num_labels else None
    codes = [float(m.codes) for m in measured if m.codes is not None]
    values: dict = {"sft": sft, "jepa": None}
    values["codes"] = sum(codes) / num_pairs if codes else None
    if target is not None:
        values |= _jepa_health(measured, settings) | target.measures()
    weights = ((phase.w_sft, "sft"), (phase.w_jepa, "jepa"), (phase.w_codes, "codes"))
    parts = [(weight, values[name]) for weight, name in weights]
    parts = [(weight, loss) for weight, loss in parts if weight > 0]
    measured_all = all(loss is not None for _, loss in parts)
    values["loss"] = sum(weight * loss for weight, loss in parts) if measured_all else None
    return values


def _jepa_health(measured: list[Measured], settings: TrainSettings) -> dict:
    """Return the JEPA loss with what it is compared with; empty where nothing is predicted."""
    masked = [m.masked for m in measured if m.masked is not None]
    if masked:
        names = JepaStates.__dataclass_fields__
        states = JepaStates(**{n: torch.cat([getattr(s, n) for s in masked]) for n in names})
        return diagnose(states, normalize=settings.objective.target_norm == "layer")
    latent = [m.latent for m in measured if m.latent is not None]
    if not latent:
        return {}
    error = sum(float((s.prediction_QD - s.target_QD).double().square().sum()) for s in latent)
    return {"jepa": error / sum(s.target_QD.numel() for s in latent)}


def evaluate_step(
    run: OpenRun,
    target: TargetEncoder | None,
    fixed: dict[bool, list[PackedBatch]],
    phase: PhaseSettings,
    step: int,
    entry: dict,
    log: MetricsLog,
) -> dict:
    """Evaluate after `step` steps, log it, warn, and save the model if it is the phase's best.

    Args:
        entry: the measures when the phase began, with which warnings compare.

    Returns:
        The measures, as from `evaluate`.
    """
    health = evaluate(run.encoder, target, fixed, run.settings, phase)
    log.write("eval", step=step, phase=phase.name, **health)
    console.warn(health, entry)
    best = run.progress.best
    loss = health["loss"]
    if loss is not None and loss < best.get(phase.name, {}).get("loss", float("inf")):
        best[phase.name] = {"loss": loss, "step": step}
        run.save_model(run.folder / "best" / phase.name, target, step)
    return health
