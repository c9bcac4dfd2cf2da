"""What a run prints for people: its header, warnings, and the summary at its end."""

import torch
from rich.console import Console
from rich.text import Text

from smbfast.base import terminal
from smbfast.base.config import read_toml
from smbfast.base.progress import duration
from smbfast.base.runtime import GIB, git_state, versions
from smbfast.model.backbone import parameter_counts
from smbfast.model.decoder import HfModule
from smbfast.model.sharding import held_bytes
from smbfast.model.target import target_bytes
from smbfast.reporting.runlog import Finding, number, read_run
from smbfast.reporting.signals import before_training, signals
from smbfast.reporting.verdict import KINDS, alarms, learning
from smbfast.run.data_card import DataCard
from smbfast.run.epochs import in_words
from smbfast.run.open_run import OpenRun
from smbfast.run.optim import total_steps
from smbfast.run.startup import copied_bytes
from smbfast.settings import PhaseSettings, TrainSettings

WRONG = {"bad": "WRONG", "warn": "warning"}  # rows of the end card with which it begins
LEGEND = (  # of the lines of steps and evaluations
    (
        "a step",
        "losses, norm of the gradient, tokens a second, learning rate, most memory; about how "
        "long the run takes yet, with embeddings, probes and report",
    ),
    (
        "an eval",
        "on tuning: the loss by which the best is chosen, each loss, effective ranks, jepa as a "
        "share of a trivial prediction's, r2, gradients",
    ),
)


def header(run: OpenRun) -> dict:
    """Print the header of a run, and return it as the first record of `metrics.jsonl`."""
    package_versions = versions()
    trained, total = parameter_counts(run.encoder)
    backbone = run.settings.model.path or "Qwen3 from scratch"
    how = "trained whole"
    if run.encoder.is_lora:
        lm: HfModule = run.encoder.lm
        how = f"LoRA r{lm.peft_config['default'].r}"
    first = run.progress.step
    _card(
        [
            ("run", f"{run.folder}  ({'resumed after step ' + str(first) if first else 'new'})"),
            (
                "on",
                f"{run.device}, {torch.get_num_threads()} threads   torch "
                f"{package_versions['torch']}  transformers {package_versions['transformers']}  "
                f"{git_state()}",
            ),
            ("products", run.matmul.text),
            (
                "model",
                f"{backbone}, {how}: {_si(trained)} of {_si(total)} parameters trained "
                f"({trained / total:.1%})",
            ),
            *((row.name, row.text) for row in run.card.rows),
            *_step_rows(run, trained),
            *LEGEND,
            (
                "writes",
                f"{run.folder}/  metrics.jsonl, tensorboard, checkpoints, best, final, report.html",
            ),
        ]
    )
    record = {
        "config": run.settings.model_dump(mode="json"),
        "versions": package_versions,
        "git": git_state(),
        "device": str(run.device),
        "matmul": {"backend": run.progress.matmul, "text": run.matmul.text},
        "model": {"backbone": backbone, "trained": trained, "parameters": total, "how": how},
        "data": run.card.facts,
        "card": run.card.record,
    }
    for finding in before_training({"config": record["config"]}):  # of data, the card has warned
        terminal.warn(finding.text)
    return record


def show_data(card: DataCard) -> None:
    """Print the data card and its warnings."""
    _card([(f"  {row.name}", row.text) for row in card.rows], width=13)
    card.warn()


def _step_rows(run: OpenRun, trained: int) -> list[tuple[str, str]]:
    phases, peak = run.settings.phases, run.predicted_peak
    weights = held_bytes(run.encoder)
    has_target = any(phase.w_jepa > 0 for phase in phases)
    average = target_bytes(run.encoder, run.target_form) if has_target else 0
    copied = copied_bytes(run.settings, run.encoder)
    where = "" if run.device.type == "cpu" else " of the host"
    return [
        (
            "step",
            f"{run.settings.optim.batch} windows in micro-batches of up to {run.micro_tokens:,} "
            f"tokens; {total_steps(run.settings)} steps: "
            + ", ".join(f"{p.name} {in_words(p)}{_holds(p)}" for p in phases),
        ),
        (
            "memory",
            f"weights {weights / GIB:.2f} GiB, AdamW moments {8 * trained / GIB:.2f}, target "
            f"{average / GIB:.2f}, copy of a checkpoint {copied / GIB:.2f}{where}; peak of a step "
            + (f"{peak / GIB:.2f}, predicted" if peak else "not predicted"),
        ),
    ]


def _holds(phase: PhaseSettings) -> str:
    """Return what a phase freezes or syncs, in brackets; nothing where it does neither."""
    words = [] if phase.freeze == "none" else [f"{phase.freeze} frozen"]
    words += ["target synced"] if phase.sync and phase.w_jepa > 0 else []
    return f" ({', '.join(words)})" if words else ""


def warn(health: dict, entry: dict, phase: PhaseSettings) -> Finding | None:
    """Warn if the run collapses or JEPA learns nothing, and say what to try.

    Args:
        health: measures of an evaluation.
        entry: those of the evaluation with which the phase began.

    Returns:
        The first finding that calls the run collapsed, if there is one.
    """
    wrong = alarms(entry, [health], jepa=phase.w_jepa > 0)
    for finding in wrong:
        terminal.warn(finding.text)
    learns = learning([health])
    # one that is still random only has to become better
    if learns.level == "warn" and not _better(health, entry):
        terminal.warn(
            f"{learns.text}; if it stays, train longer, lower the learning rate or raise w_sft"
        )
    return next((finding for finding in wrong if finding.level == "bad"), None)


def _better(health: dict, entry: dict) -> bool:
    """Whether JEPA predicts better than when the phase began, or was not measured then."""
    if health.get("r2") is not None:
        return entry.get("r2") is None or number(health["r2"]) > number(entry["r2"])
    return number(health.get("ratio")) < number(entry.get("ratio"))


def end_card(opened: OpenRun, training: float, health: dict) -> None:
    """Print what was wrong with a run, its results, and the commands that can follow.

    Args:
        training: seconds spent training, by all processes of this run.
        health: measures of the last evaluation.
    """
    run, settings, best = opened.folder, opened.settings, opened.progress.best
    rows = [(WRONG[f.level], f.text) for f in signals(read_run(run))]
    rows += [("trained", f"{total_steps(settings)} steps in {duration(training)}")]
    rows += [
        (f"best {name}", f"step {b['step']}, tuning loss {b['loss']:.4f}: {run}/best/{name}")
        for name, b in best.items()
    ]
    rows += [
        (f"best {p.name}", "none: the tuning windows do not measure all losses of this phase")
        for p in settings.phases
        if p.name not in best
    ]
    if states := _states(health):
        rows.append(("states", states))
    if (learns := learning([health])).level != "unknown":
        rows.append(("jepa", learns.text))
    data = settings.data.path or _cohort(settings)
    rows.append(("report", f"{run}/report.html"))
    if opened.tasks and not settings.probe.final:
        rows.append(("held out", "at the end, the same command with --final, which is counted"))
    rows += [
        (
            "embed",
            f"python -m smbfast.embed --model={run}/final --data={data} --labels=TASK --out=F",
        ),
        ("probe", f"python -m smbfast.probe --embeddings=F --data={data} --labels=TASK"),
        ("adapt", f"python -m smbfast.train lora --model.path={run}/final --data.path=MEDS_FOLDER"),
    ]
    if settings.trains == "lora":
        rows.pop()
    _card(rows)


def _states(health: dict) -> str:
    """Return the effective ranks of an evaluation, and what the probe made of the embeddings."""
    ranks = [
        f"{health[f'{kind}_rank']:.1f} ({states})"
        for kind, states in KINDS.items()
        if health.get(f"{kind}_rank") is not None
    ]
    texts = [f"effective rank {', '.join(ranks)}"] if ranks else []
    if health.get("probe_auroc") is not None:
        texts.append(f"{health['probe_task']} AUROC {health['probe_auroc']:.3f} on tuning nodes")
    return "; ".join(texts)


def already_done(settings: TrainSettings) -> None:
    """Say that a run is finished already, and how to probe labels that it has not probed."""
    run = settings.folder
    print(f"{run} is finished: {run}/report.html. Name another --run.dir for a new run.")
    if settings.probe.final:
        return
    then = (read_toml(run / "config.toml").get("probe") or {}).get("labels")
    asked = settings.probe.labels or []
    data = settings.data.path or _cohort(settings)
    for task in (t for t in asked if t not in (then or [])):
        if then is None and settings.data.path is None:
            return  # all tasks of the cohort were probed
        print(
            f"labels {task} were not probed by this run, and nothing is probed now. These do it:\n"
            f"  python -m smbfast.embed --model={run}/final --data={data} --labels={task} --out=F\n"
            f"  python -m smbfast.probe --embeddings=F --data={data} --labels={task}"
        )


def _cohort(settings: TrainSettings) -> str:
    return f"{settings.folder}/{settings.cohort.folder_name}"


def _card(rows: list[tuple[str, str]], width: int = 11) -> None:
    """Print a name and a text per line, not wrapped, so that commands can be copied."""
    console = Console(highlight=False, emoji=False)
    for name, text in rows:
        console.print(
            Text(f"{name:<{width - 1}} ", style="bold").append(text, style="not bold"),
            soft_wrap=True,
        )


def _si(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))
