"""What a run measures: fixed tuning positions on the way, embeddings and probes at the end.

Legend: M masked positions, D width.
"""

import json
from pathlib import Path

import torch

from smbfast import objective, reference
from smbfast.batch import PackedBatch
from smbfast.data.labels import Labels, find_tasks, read_labels, require_splits, with_splits
from smbfast.data.loader import FIXED, WindowSet, make_rows
from smbfast.data.meds import MedsDataset
from smbfast.data.nodes import distinct_nodes, node_texts
from smbfast.data.prepared import Prepared
from smbfast.diagnostics import diagnose
from smbfast.files import write_text
from smbfast.model.backbone import PatientEncoder, make_encoder
from smbfast.model.target import TargetEncoder
from smbfast.probing.embedding import embed_nodes, packed_of, write_embeddings
from smbfast.probing.run_probe import run_probe
from smbfast.reference import JepaStates
from smbfast.reporting.sample import sample_of
from smbfast.runtime import few
from smbfast.settings import DataSettings, PhaseSettings, ProbeConfig, TrainSettings


def fixed_batches(
    tuning: WindowSet, settings: TrainSettings, layout: dict
) -> dict[bool, list[PackedBatch]]:
    """The same tuning windows, cuts and masks at every evaluation, without and with branches.

    Args:
        layout: `tokens` and `ratio` of `make_rows`.
    """
    count = min(settings.eval.windows, len(tuning))
    chosen = [tuning[i] for i in torch.linspace(0, len(tuning) - 1, count).long().tolist()]
    draws = (chosen, settings.objective, settings.run.seed, FIXED)
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
    labels = sum(b.labels for b in batches)
    path = objective if settings.objective.path == "shared" else reference
    found = [path.measure(encoder, target, b.to(device)) for b in batches]
    sft = sum(float(total) for total, _ in found) / max(labels, 1)
    values: dict = {"sft": sft, "jepa": None}
    parts = [states for _, states in found if states is not None]
    if parts:
        names = JepaStates.__dataclass_fields__
        states = JepaStates(**{n: torch.cat([getattr(p, n) for p in parts]) for n in names})
        normalize = settings.objective.target_norm == "layer"
        values |= diagnose(states, normalize=normalize) | target.measures()
    values["loss"] = phase.w_sft * sft + phase.w_jepa * (values["jepa"] or 0.0)
    return values


def final_record(
    settings: TrainSettings,
    prepared: Prepared,
    encoder: PatientEncoder,
    data: DataSettings,
    step: int,
) -> dict:
    """What `smbfast.embed` needs to know of a final folder."""
    return {
        "trains": settings.trains,
        "backbone": _lasting(settings.model.path),
        "dtype": str(next(encoder.trunk.parameters()).dtype).removeprefix("torch."),
        "vocabulary": len(prepared.tokenizer),
        "predictor_layers": settings.objective.predictor_layers,
        "window": data.window,
        "pool": settings.probe.pool,
        "delimiters": prepared.record["delimiters"],
        "format": prepared.record["format"],
        "encoder": prepared.record["encoder"],
        "section_rules": prepared.record["section_rules"],
        "options": prepared.options,
        "step": step,
    }


def _lasting(path: str | None) -> str | None:
    """A local folder by its absolute path, so that it is found from anywhere."""
    return str(Path(path).resolve()) if path and Path(path).is_dir() else path


def read_tasks(settings: TrainSettings, data: DataSettings) -> list[tuple[Path, Labels]]:
    """The tasks to probe, read and checked before anything is trained.

    Raises:
        ValueError: a task that is not there, or labels that cannot be used.
    """
    names, root = settings.probe.labels, Path(data.path)
    if names is None and settings.data.path is None:
        names = sorted(p.name for p in (root / "labels").iterdir() if p.is_dir())
    if not names:
        return []
    dataset = MedsDataset.open(root)
    tasks = [(f, with_splits(read_labels(f), dataset)) for f in find_tasks(names, root)]
    for _, labels in tasks:
        require_splits(labels)
    return tasks


def finish(
    settings: TrainSettings,
    data: DataSettings,
    tasks: list[tuple[Path, Labels]],
    prepared: Prepared,
    encoder: PatientEncoder,
    target: TargetEncoder | None,
    device: torch.device,
) -> None:
    """Embed with the trained and the untrained encoder, and probe."""
    run, probe = settings.folder, settings.probe
    simulated = settings.data.path is None
    if simulated:
        sample = sample_of(prepared, settings)
        write_text(run / "sample.json", json.dumps(sample))
    if not tasks:
        return
    dataset = MedsDataset.open(Path(data.path))
    nodes = distinct_nodes([labels for _, labels in tasks])
    serializer = prepared.serializer(dataset)
    untrained = make_encoder(
        settings.model_copy(update={"model": settings.model.model_copy(update={"adapter": None})}),
        prepared.tokenizer,
        device,
        prepared.record["new_tokens"],
    )
    files, path = {}, settings.objective.path
    for name, packed in (
        (probe.encoder, packed_of(encoder, target, probe.encoder, path)),
        ("untrained", packed_of(untrained, None, "online", path)),
    ):
        counts: dict[str, int] = {}
        texts = node_texts(dataset, serializer, nodes, data.window, counts)
        table = embed_nodes(
            packed,
            texts,
            device,
            total=len(nodes.subject_K),
            tokens=probe.tokens,
            pool=probe.pool,
        )
        files[name] = run / "embeddings" / f"{name}.parquet"
        write_embeddings(table, files[name])
        told = ", ".join(f"{k.replace('_', ' ')} {few(v)}" for k, v in counts.items())
        print(f"embeddings/{name}.parquet: {told}")
    run_probe(
        ProbeConfig(
            embeddings=files[probe.encoder],
            untrained=files["untrained"],
            data=dataset.path,
            labels=[str(folder) for folder, _ in tasks],
            out=run,
            bootstraps=probe.bootstraps,
            seed=settings.run.seed,
        )
    )
