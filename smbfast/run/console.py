"""What a run prints for people: its header, warnings, and the summary at its end."""

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from smbfast.base.progress import duration
from smbfast.base.runtime import GIB, few, git_state, versions
from smbfast.data.codes.vocabulary import (
    NUMBERS_WITHOUT_BIN,
    TEXTS_DROPPED,
    TEXTS_WITHOUT_TOKEN,
)
from smbfast.data.masking import needs_cuts
from smbfast.data.prepared import SHARED
from smbfast.model.backbone import parameter_counts
from smbfast.model.decoder import HfModule
from smbfast.model.target import target_bytes
from smbfast.reporting.runlog import GOOD_RATIO, HALF
from smbfast.run.open_run import OpenRun, cuts_text
from smbfast.run.optim import total_steps

_LEFT_OUT = {  # what the formats count, by whether they are codes
    False: ("values_left_out", "texts_cut"),
    True: (*SHARED, NUMBERS_WITHOUT_BIN, TEXTS_WITHOUT_TOKEN, TEXTS_DROPPED),
}
_MANY = 0.2  # share of events on the token of a family or section, above it a run warns: our choice
_FEW_CUT = 0.5  # share of tokens in windows with a cut below which a run warns: our choice


def header(run: OpenRun) -> dict:
    """Print the header of a run, and return it as the first record of `metrics.jsonl`."""
    package_versions, data = versions(), _data_record(run)
    trained, total = parameter_counts(run.encoder)
    backbone = run.settings.model.path or "Qwen3 from scratch"
    how = "trained whole"
    if run.encoder.is_lora:
        lm: HfModule = run.encoder.lm
        how = f"LoRA r{lm.peft_config['default'].r}"
    first = run.progress.step
    warn_of_data(run)
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
            *_data_rows(run, data),
            *_step_rows(run, trained),
            (
                "writes",
                f"{run.folder}/  metrics.jsonl, tensorboard, checkpoints, best, final, report.html",
            ),
        ]
    )
    return {
        "config": run.settings.model_dump(mode="json"),
        "versions": package_versions,
        "git": git_state(),
        "device": str(run.device),
        "matmul": {"backend": run.progress.matmul, "text": run.matmul.text},
        "model": {"backbone": backbone, "trained": trained, "parameters": total, "how": how},
        "data": data,
    }


def _data_record(run: OpenRun) -> dict:
    """Return the counts of the data: what is trained on, and what was left out."""
    counts, per_split = run.prepared.counts, run.prepared.record["counts"]
    unmapped = sum(run.prepared.record["unmapped"].values()) / max(counts["events"], 1)
    return {
        "simulated": run.settings.data.path is None,
        "format": run.prepared.record["data_format"],
        "options": run.prepared.options,
        "tokens_an_event": round(run.prepared.tokens_an_event, 4),
        "subjects": {s: c.get("subjects", 0) for s, c in per_split.items()},
        "tokens": {s: c.get("tokens", 0) for s, c in per_split.items()},
        "windows": len(run.windows),
        "window_tokens": run.windows.num_tokens,
        "windows_with_cut": run.windows.num_with_cut,
        "window_tokens_with_cut": run.windows.num_tokens_with_cut,
        "tokens_lost": run.windows.num_lost,
        "unmapped_share": round(unmapped, 6),
        **{name: counts[name] for name in _LEFT_OUT[run.prepared.record["data_format"] == "codes"]},
        "nonfinite_values": counts["nonfinite_values"],
    }


def _data_rows(run: OpenRun, data: dict) -> list[tuple[str, str]]:
    subjects, tokens, settings = data["subjects"], data["tokens"]["train"], run.settings.data
    return [
        (
            "data",
            f"{few(subjects['train'])} train / {few(subjects.get('tuning', 0))} tuning subjects, "
            f"{_si(tokens)} tokens ({run.prepared.size_text}), vocabulary "
            f"{len(run.prepared.tokenizer):,}",
        ),
        (
            "windows",
            f"{few(len(run.windows))} of up to {settings.window} tokens; {cuts_text(run.windows)}; "
            f"{run.windows.num_lost / max(tokens, 1):.2%} of tokens lost to long demographics",
        ),
        ("left out", run.prepared.left_out()),
    ]


def warn_of_data(run: OpenRun) -> None:
    """Warn if the vocabulary knows too few of the codes, or if JEPA sees too few of the tokens."""
    coarse = run.prepared.share_coarse
    if coarse > _MANY:
        _warning(
            f"{coarse:.1%} of the events have only the token of their family or section, because "
            "the vocabulary does not know their codes: it comes from the data that a model was "
            "first trained on, and needs ten training subjects for each code"
        )
    share = run.windows.num_tokens_with_cut / max(run.windows.num_tokens, 1)
    objective, phases = run.settings.objective, run.settings.phases
    if share < _FEW_CUT and any(needs_cuts(objective, jepa=p.w_jepa > 0) for p in phases):
        _warning(
            f"{share:.1%} of the tokens lie in windows with a cut, and steps with JEPA or on the "
            "future alone read no others: raise data.window, lower objective.min_future or, in a "
            "text format, choose a finer data.bucket"
        )


def _step_rows(run: OpenRun, trained: int) -> list[tuple[str, str]]:
    phases, peak = run.settings.phases, run.predicted_peak
    weights = sum(p.numel() * p.element_size() for p in run.encoder.parameters())
    has_target = any(phase.w_jepa > 0 for phase in phases)
    average = target_bytes(run.encoder, run.target_form) if has_target else 0
    return [
        (
            "step",
            f"{run.settings.optim.batch} windows in micro-batches of up to {run.micro_tokens:,} "
            f"tokens; {total_steps(run.settings)} steps: "
            + ", ".join(f"{p.name} {p.steps}" for p in phases),
        ),
        (
            "memory",
            f"weights {weights / GIB:.2f} GiB, AdamW moments {8 * trained / GIB:.2f}, target "
            f"{average / GIB:.2f}; peak of a step "
            + (f"{peak / GIB:.2f}, predicted" if peak else "not predicted"),
        ),
    ]


def warn(health: dict, entry: dict) -> None:
    """Warn if the target collapses or the predictor learns nothing, and say what to try."""
    if health.get("target_rank") is None:
        return
    if health["ratio"] > 1 and health["ratio"] >= entry.get("ratio", 0):
        _warning(
            f"JEPA loss is {health['ratio']:.2f} of the best trivial predictor's (good: below "
            f"{GOOD_RATIO}); if it stays, train longer, lower the learning rate or raise w_sft"
        )
    for name in ("target_rank", "target_std"):
        if health[name] < HALF * entry.get(name, 0):
            _warning(
                f"{name} {health[name]:.2f} is below half of its value at phase entry: the target "
                "is collapsing; raise w_sft or tau, or lower the learning rate"
            )


def _warning(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def end_card(opened: OpenRun, training: float, health: dict) -> None:
    """Print the results of a run and the commands that can follow.

    Args:
        training: seconds spent training, by all processes of this run.
        health: measures of the last evaluation.
    """
    run, settings, best = opened.folder, opened.settings, opened.progress.best
    rows = [("trained", f"{total_steps(settings)} steps in {duration(training)}")]
    rows += [
        (f"best {name}", f"step {b['step']}, tuning loss {b['loss']:.4f}: {run}/best/{name}")
        for name, b in best.items()
    ]
    if health.get("target_rank") is not None:
        rows.append(
            (
                "target",
                f"effective rank {health['target_rank']:.1f}, std {health['target_std']:.2f}, loss "
                f"{health['ratio']:.2f} of the best trivial predictor's",
            )
        )
    cohort = f"{run}/cohort-{settings.cohort.patients}-{settings.cohort.seed}"
    data = settings.data.path or cohort
    rows += [
        ("report", f"{run}/report.html"),
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


def already_done(run: Path) -> None:
    """Say that a run is finished already."""
    print(f"{run} is finished: {run}/report.html. Name another --run.dir for a new run.")


def _card(rows: list[tuple[str, str]]) -> None:
    """Print a name and a text per line, not wrapped, so that commands can be copied."""
    console = Console(highlight=False, emoji=False)
    for name, text in rows:
        console.print(
            Text(f"{name:<11}", style="bold").append(text, style="not bold"), soft_wrap=True
        )


def _si(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(int(value))
