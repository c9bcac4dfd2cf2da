"""How runs differ, from the files of their folders: settings, data, bytes, first unlike step.

Everything is compared with the first run. What a clock or a memory meter says is left out, so that
two runs of the same command are the same.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smbfast.base.files import MANIFEST
from smbfast.base.replace import sha256
from smbfast.reporting.cells import mapping, mappings
from smbfast.reporting.runlog import Finding, Record, Run, number

# of a step what does not depend on a clock; evaluations have no clock
_STEP_KEYS = ("sft", "jepa", "codes", "grad_norm", "lr", "masked", "labels", "pairs")
_NO_MEASURE = ("kind", "step", "phase", "untrained", "probe_task", "time", "seconds")
_LARGE = 0.01  # relative: what rounding alone does not give early in a run; our choice
_PLACES = ("run.dir",)  # says where a run is, not what
_HASHED = ("config.toml", "metrics.jsonl", "probe.json")
_DIGESTS = {
    "data_digest": "MEDS data",
    "encoder": "tokenizer or vocabulary",
    "weights_digest": "backbone before training",
}
# settings by which a tuning loss is another measure, by loss
_MEASURES = {
    "any loss": ("data.window", "data.format", "eval.windows"),
    "JEPA losses": (
        *("objective.jepa", "objective.mask_ratio", "objective.mask_unit", "objective.skeleton"),
        *("objective.target_norm", "objective.horizons", "objective.context"),
    ),
    "losses of codes to come": ("objective.horizons", "objective.codes_weight"),
}


@dataclass(frozen=True)
class Unlike:
    """Where the logs of two runs part.

    num_shared: steps that both logged. step, phase, text: of the first record with a value that is
    not the same to the bit, None and "" where there is none. large: the first step at which a loss
    differs by more than 1 %, or None.
    """

    num_shared: int
    step: int | None = None
    phase: str = ""
    text: str = ""
    large: int | None = None


def settings_of(run: Run) -> dict[str, str]:
    """Return the resolved settings of a run as text, by dotted key; phases go by their names."""
    config = dict(mapping(run.header.get("config")))
    phases = mappings(config.pop("phases", None))
    flat = dict(_flat(config, ""))
    for place, phase in enumerate(phases):
        name = str(phase.get("name", place))
        flat |= dict(_flat({k: v for k, v in phase.items() if k != "name"}, f"phases.{name}."))
    flat["phases"] = ", ".join(str(phase.get("name")) for phase in phases)
    return flat


def made_by(run: Run) -> dict[str, str]:
    """Return what made a run beside its settings as text, by name: versions, commit, device."""
    header = run.header
    products = mapping(header.get("matmul")).get("backend")
    own = {"commit": header.get("git"), "device": header.get("device"), "products": products}
    own |= mapping(header.get("versions"))
    return {name: str(value) for name, value in own.items() if value is not None}


def unlike(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the keys that are not the same in all tables, with the text in each or a dash."""
    keys = dict.fromkeys(itertools.chain.from_iterable(tables))
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys if key not in _PLACES]
    return [(key, texts) for key, texts in rows if len(set(texts)) > 1]


def digests_of(run: Run) -> dict[str, str]:
    """Return what a run was trained on and from: digests by what they are of.

    They are those of `final`, or else of the newest checkpoint; {} where neither can be read.
    """
    record = _json(run.path / "final" / "smbfast.json")
    if not record:
        records = sorted((run.path / "checkpoints").glob("step-*/record.json"))
        identity = mapping(_json(records[-1]).get("identity")) if records else {}
        names = {"data_digest": "data", "weights_digest": "backbone", "encoder": "encoder"}
        record = {ours: identity.get(name) for ours, name in names.items()}
    own = {words: record.get(key) for key, words in _DIGESTS.items()}
    return {words: str(value) for words, value in own.items() if value}


def data_finding(names: Sequence[str], runs: Sequence[Run]) -> Finding:
    """Say whether runs were trained on the same data in the same tokens, the worst first."""
    digests = [digests_of(run) for run in runs]
    data, tokens = ([own.get(key) for own in digests] for key in list(_DIGESTS.values())[:2])
    shown = "; ".join(f"{name} {value}" for name, value in zip(names, data, strict=True))
    if None in data:
        who = ", ".join(name for name, value in zip(names, data, strict=True) if value is None)
        return Finding(
            "warn",
            f"It is not known whether these runs read the same data: {who} has neither `final` "
            "nor a checkpoint that says so.",
        )
    if len(set(data)) > 1:
        return Finding(
            "bad",
            f"These runs were not trained on the same data (fingerprints: {shown}). Their losses "
            "are of unlike patients and cannot be compared; probes are, on the patients and "
            "moments that both were judged on.",
        )
    if len(set(tokens)) > 1:
        return Finding(
            "warn",
            f"The same data (fingerprint {data[0]}) in unlike tokens: losses a token cannot be "
            "compared.",
        )
    return Finding("good", f"The same data, fingerprint {data[0]}, in the same tokens.")


def other_measures(differing: Sequence[str]) -> list[Finding]:
    """Return what settings that differ make of the losses: other measures, not better ones."""
    findings = []
    for losses, keys in _MEASURES.items():
        if moved := [key for key in keys if key in differing]:
            text = f"{', '.join(moved)} differ, so that {losses} measure different things: a lower "
            findings.append(Finding("warn", f"{text}one is not a better one."))
    return findings


def first_unlike(one: Run, other: Run) -> Unlike:
    """Return where the logs of two runs part."""
    ours, theirs = _logged(one), _logged(other)
    shared = sorted(ours.keys() & theirs.keys())
    num_shared = len({key[0] for key in shared})
    first: tuple[int, str, str] | None = None
    large = None
    for key in shared:
        step, kind, _ = key
        gaps = list(_gaps(ours[key], theirs[key], kind))
        if gaps and first is None:
            texts = [f"{name} {_known(a)} and {_known(b)}" for name, a, b in gaps[:3]]
            more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
            kinds = {"step": "in training", "eval": "in the evaluation"}
            first = step, str(ours[key].get("phase")), f"{kinds[kind]}: {', '.join(texts)}{more}"
        if large is None and any(
            name in ("sft", "jepa", "codes") and abs(a - b) > _LARGE * abs(a) for name, a, b in gaps
        ):
            large = step
    return Unlike(num_shared, *first, large) if first else Unlike(num_shared)


def files_of(run: Run) -> dict[str, tuple[int, str]]:
    """Return the files of a run that say what it is: bytes and SHA-256, by their path in it.

    Those of `final` are as its manifest has them.
    """
    own = {}
    for name in _HASHED:
        file = run.path / name
        if file.is_file():
            own[name] = file.stat().st_size, sha256(file)
    listed = mapping(_json(run.path / "final" / MANIFEST).get("files"))
    for name, entry in sorted(listed.items()):
        if isinstance(entry, list) and len(entry) == 2 and math.isfinite(number(entry[0])):
            own[f"final/{name}"] = int(number(entry[0])), str(entry[1])
    return own


def _logged(run: Run) -> dict[tuple[int, str, int], Record]:
    """Return records by step, kind and place among those of the same step and kind.

    Of a step the evaluation at phase entry stands behind the step that ends the phase before.
    """
    logged: dict[tuple[int, str, int], Record] = {}
    for phase in run.phases:
        for record in (*phase.steps, *phase.evals):
            step, kind = int(record["step"]), str(record["kind"])
            place = 0
            while (step, kind, place) in logged:
                place += 1
            logged[step, kind, place] = record
    return logged


def _gaps(one: Record, other: Record, kind: str) -> Iterator[tuple[str, float, float]]:
    keys = _STEP_KEYS if kind == "step" else [k for k in one if k not in _NO_MEASURE and k in other]
    for key in keys:
        a, b = number(one.get(key)), number(other.get(key))
        if a != b and not (math.isnan(a) and math.isnan(b)):
            yield key, a, b


def _known(value: float) -> str:
    """Return a measure as text; one that the log of a run lacks, or that is not finite, says so."""
    return f"{value:.7g}" if math.isfinite(value) else "none"


def _flat(value: Record, prefix: str) -> Iterator[tuple[str, str]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _text(inner)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    return str(value)


def _json(file: Path) -> Record:
    try:
        content = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}
    return mapping(content)
