"""What a run measures: fixed tuning positions on the way, embeddings and probes at the end.

Legend: M masked positions, D width.
"""

import json
from pathlib import Path

import torch

from smbfast import objective, reference
from smbfast.base.files import write_text
from smbfast.base.runtime import few
from smbfast.batch import PackedBatch
from smbfast.data.loader import FIXED, make_rows
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import distinct_nodes, node_texts
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.target import JepaStates, TargetEncoder
from smbfast.probing.embedding import embed_nodes, packed_of, write_embeddings
from smbfast.probing.run_probe import run_probe
from smbfast.reporting.sample import sample_of
from smbfast.run import console
from smbfast.run.diagnostics import diagnose
from smbfast.run.metrics import MetricsLog
from smbfast.run.open_run import OpenRun
from smbfast.settings import PhaseSettings, ProbeCommandSettings, TrainSettings


def fixed_batches(run: OpenRun) -> dict[bool, list[PackedBatch]]:
    """The same tuning windows, cuts and masks at every evaluation.

    By whether there is a target encoder: with it, the batches have masked branches.
    """
    settings, tuning = run.settings, run.tuning
    count = min(settings.eval.windows, len(tuning))
    chosen = [tuning[i] for i in torch.linspace(0, len(tuning) - 1, count).long().tolist()]
    draws = (chosen, settings.objective, settings.run.seed, FIXED)
    layout = {"tokens": run.micro_tokens, "ratio": run.shape.attention_ratio}
    return {jepa: make_rows(*draws, jepa=jepa, **layout) for jepa in (False, True)}


@torch.no_grad()
def evaluate(
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    fixed: dict[bool, list[PackedBatch]],
    settings: TrainSettings,
    phase: PhaseSettings,
) -> dict:
    """Losses on the fixed positions, and the health of the target if there is one.

    `loss` is that of the phase, by which its best step is chosen.
    """
    device = encoder.mask_vector.device
    batches = fixed[target is not None]
    labels = sum(b.num_labels for b in batches)
    path = objective if settings.objective.path == "shared" else reference
    measured = [path.measure(encoder, target, b.to(device)) for b in batches]
    sft = sum(float(total) for total, _ in measured) / max(labels, 1)
    values: dict = {"sft": sft, "jepa": None}
    parts = [states for _, states in measured if states is not None]
    if parts:
        names = JepaStates.__dataclass_fields__
        states = JepaStates(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
        normalize = settings.objective.target_norm == "layer"
        values |= diagnose(states, normalize=normalize) | target.measures()
    values["loss"] = phase.w_sft * sft + phase.w_jepa * (values["jepa"] or 0.0)
    return values


def evaluate_step(
    run: OpenRun,
    target: TargetEncoder | None,
    fixed: dict[bool, list[PackedBatch]],
    phase: PhaseSettings,
    step: int,
    entry: dict,
    log: MetricsLog,
) -> dict:
    """Evaluate after step `step`, log it, warn, and write the model if it is the phase's best.

    Args:
        entry: the measures when the phase began, which warnings compare with.
    """
    health = evaluate(run.encoder, target, fixed, run.settings, phase)
    log.write("eval", step=step, phase=phase.name, **health)
    console.warn(health, entry)
    best = run.progress.best
    if health["loss"] < best.get(phase.name, {}).get("loss", float("inf")):
        best[phase.name] = {"loss": health["loss"], "step": step}
        run.save_model(run.folder / "best" / phase.name, target, step)
    return health


def probe_run(run: OpenRun, target: TargetEncoder | None) -> None:
    """Embed with the trained and the untrained encoder, and probe."""
    settings, probe, prepared = run.settings, run.settings.probe, run.prepared
    if settings.data.path is None:
        sample = sample_of(prepared, settings)
        write_text(run.folder / "sample.json", json.dumps(sample))
    if not run.tasks:
        return
    dataset = MedsDataset.open(Path(run.data.path))
    nodes = distinct_nodes([labels for _, labels in run.tasks])
    serializer = prepared.serializer(dataset)
    untrained = make_encoder(
        settings.model_copy(update={"model": settings.model.model_copy(update={"adapter": None})}),
        prepared.tokenizer,
        run.device,
        prepared.record["new_tokens"],
    )
    files, path = {}, settings.objective.path
    for name, packed in (
        (probe.encoder, packed_of(run.encoder, target, probe.encoder, path)),
        ("untrained", packed_of(untrained, None, "online", path)),
    ):
        counts: dict[str, int] = {}
        texts = node_texts(dataset, serializer, nodes, run.data.window, counts)
        table = embed_nodes(
            packed,
            texts,
            run.device,
            total=len(nodes.subject_K),
            tokens=probe.tokens,
            pool=probe.pool,
        )
        files[name] = run.folder / "embeddings" / f"{name}.parquet"
        write_embeddings(table, files[name])
        text = ", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in counts.items())
        print(f"embeddings/{name}.parquet: {text}")
    run_probe(
        ProbeCommandSettings(
            embeddings=files[probe.encoder],
            untrained=files["untrained"],
            data=dataset.path,
            labels=[str(folder) for folder, _ in run.tasks],
            out=run.folder,
            bootstraps=probe.bootstraps,
            seed=settings.run.seed,
        )
    )
