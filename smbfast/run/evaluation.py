"""What a run measures: losses on fixed tuning windows during training, and probes at its end.

Legend: M masked tokens, D width.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from smbfast import objective, reference
from smbfast.base.files import write_text
from smbfast.base.helpers import helper
from smbfast.base.parts import is_part
from smbfast.base.runtime import few
from smbfast.batch import PackedBatch
from smbfast.data.loader import FIXED, make_micro_batches
from smbfast.data.masking import needs_cuts
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import distinct_nodes, node_texts
from smbfast.data.source_index import FOLDER
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.target import JepaStates, TargetEncoder
from smbfast.probing.embedding import Model, embed_nodes, packed_of, untrained
from smbfast.probing.run_probe import run_probe
from smbfast.reference import Measured
from smbfast.reporting.sample import sample_of
from smbfast.run import console
from smbfast.run.diagnostics import diagnose
from smbfast.run.metrics import MetricsLog
from smbfast.run.open_run import OpenRun
from smbfast.run.origin import origin_of
from smbfast.settings import PhaseSettings, ProbeCommandSettings, TrainSettings


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


def probe_run(run: OpenRun, target: TargetEncoder | None) -> None:
    """Embed decision nodes with the trained and the untrained encoder, and probe both."""
    settings, probe, prepared = run.settings, run.settings.probe, run.prepared
    if settings.data.path is None:
        with helper("the report's sample"):
            sample = sample_of(prepared, settings)
            write_text(run.folder / "sample.json", json.dumps(sample))
    if not run.tasks:
        return
    index = prepared.folder / FOLDER
    dataset = MedsDataset.open(run.data.folder, index=index, split=run.data.split)
    nodes = distinct_nodes([labels for _, labels in run.tasks])
    probed = packed_of(run.encoder, target, probe.encoder, settings.objective.path)
    models = {probe.encoder: Model(probed), "untrained": _untrained(run)}
    final = run.folder / "final"
    files = {name: run.folder / "embeddings" / f"{name}.parquet" for name in models}
    counts: dict[str, int] = {}
    embed_nodes(
        {
            files[name]: replace(model, origin=origin_of(final, name, probe.pool))
            for name, model in models.items()
        },
        nodes,
        node_texts(dataset, prepared.serializer(dataset), nodes, run.data.window, counts),
        run.device,
        tokens=probe.tokens,
        pool=probe.pool,
    )
    del models  # an untrained model of its own is needed no longer
    text = ", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in counts.items())
    for name in files:
        print(f"embeddings/{name}.parquet: {text}")
    run_probe(
        ProbeCommandSettings(
            embeddings=files[probe.encoder],
            untrained=files["untrained"],
            data=dataset.path,
            split=run.data.split,
            labels=[str(folder) for folder, _ in run.tasks],
            out=run.folder,
            bootstraps=probe.bootstraps,
            seed=settings.run.seed,
        ),
        index=index,
    )


def _untrained(run: OpenRun) -> Model:
    """Return the encoder as it was before training; without LoRA it is made a second time."""
    path = run.settings.objective.path
    if run.encoder.is_lora:
        return untrained(run.encoder, path)
    prepared = run.prepared
    again = make_encoder(run.settings, prepared.tokenizer, run.device, prepared.new_tokens)
    return Model(packed_of(again, None, "online", path))
