"""Writes one page that compares runs: what differs, then probes, losses, health, machine, files.

Everything is read from the folders of the runs, and nothing is written there but a look at
held-out patients. The first run is the one that others are compared with.

Legend: N records of one run.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from smbfast.base.files import committed_file
from smbfast.base.held_out import count_look
from smbfast.base.ours import require_runs_page
from smbfast.judging.compare import compare
from smbfast.reporting import differences, overlays
from smbfast.reporting.cells import mapping, mappings
from smbfast.reporting.compare_page import paired
from smbfast.reporting.html import plots, rendered
from smbfast.reporting.page import verdict
from smbfast.reporting.probes import judged_on
from smbfast.reporting.runlog import Record, Run, column, number, read_run
from smbfast.reporting.took import si
from smbfast.reporting.verdict import collapse
from smbfast.settings.compare import CompareSettings

_LEVELS = {"good": "healthy", "warn": "warning", "bad": "collapsed", "unknown": "not judged"}
_SHOWN = 4  # settings that the first sentences name
_NO_PROBES = "Probes are not compared"


def write_runs(
    folders: Sequence[Path],
    out: Path,
    *,
    final: bool = False,
    command: str,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the page that compares the runs in `folders` and return its path.

    Args:
        out: the page, readable by its owner alone; an older one of ours is replaced.
        final: whether to show figures of held-out patients, where probes were judged on them; a
            look is counted in each such run if the page shows them.
        command: that asked for it, which the page shows and looks record.
        tell: what progress is said to.

    Raises:
        ValueError: fewer than two runs, a run twice or without a readable log, or `out` is a folder
            or a file of others.
    """
    require_runs_page(out)
    if len({Path(folder).resolve() for folder in folders}) < max(len(folders), 2):
        raise ValueError(
            "runs to compare must be two folders or more, each once; got "
            + ", ".join(str(folder) for folder in folders)
        )
    runs = [read_run(Path(folder)) for folder in folders]
    names = names_of([run.path for run in runs])
    probes, reason = _probes(names, runs, final, tell)
    if final and probes:  # before the page is there, so that no look is missed
        for run in runs:
            if run.probe and judged_on(run) == "held_out":
                count_look(run.path, command)
    page = render(names, runs, probes, reason, command)
    with committed_file(out, private=True) as staging:
        staging.write_bytes(page.encode("utf-8", errors="replace"))
    return out


def render(
    names: Sequence[str], runs: Sequence[Run], probes: Record | None, reason: str, command: str
) -> str:
    """Return the whole page as text, without script.

    Args:
        names: of the runs.
        probes: as `compare_page.paired` gives them, or None; `reason` then says why.
    """
    settings = differences.unlike([differences.settings_of(run) for run in runs])
    made_by = differences.unlike([differences.made_by(run) for run in runs])
    data = differences.unlike([_data_facts(run) for run in runs])
    logs = [differences.first_unlike(runs[0], run) for run in runs[1:]]
    same_data = differences.data_finding(names, runs)
    return rendered(
        "runs.html",
        title=f"{names[0]} against {', '.join(names[1:])}",
        names=names,
        findings=[same_data, *differences.other_measures([key for key, _ in settings])],
        sentences=[_settings_text(settings), *_log_texts(names, logs)],
        glance=_glance(runs),
        settings=settings,
        num_same=len(differences.settings_of(runs[0])) - len(settings),
        made_by=made_by,
        paired=probes,
        methods=[],
        reason=reason,
        losses=plots(overlays.losses(names, runs)),
        health=plots(overlays.health(names, runs)),
        collapsed=[(name, collapse(run.phases)) for name, run in zip(names, runs, strict=True)],
        machine=plots(overlays.machine(names, runs)),
        digests=_table([differences.digests_of(run) for run in runs]),
        data=data,
        notes=[(name, note) for name, run in zip(names, runs, strict=True) for note in run.notes],
        files=_files(runs),
        folders=[(name, str(run.path)) for name, run in zip(names, runs, strict=True)],
        command=command,
    )


def names_of(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that tell runs from each other, in plain characters."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for depth in range(1, max(len(own) for own in parts) + 1):
        names = [re.sub(r"[^\w .+-]", "-", "-".join(own[-depth:])) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} {place + 1}" for place, name in enumerate(names)]


def _probes(
    names: Sequence[str], runs: Sequence[Run], final: bool, tell: Callable[[str], None]
) -> tuple[Record | None, str]:
    """Return what is shown of the probes of the runs, paired, or None and why there is nothing."""
    hidden = [
        name
        for name, run in zip(names, runs, strict=True)
        if run.probe and judged_on(run) == "held_out"
    ]
    if hidden and not final:
        return None, (
            f"{_NO_PROBES}: those of {', '.join(hidden)} were judged on held-out patients, and "
            "--final shows them, and is counted in the run."
        )
    words = [f"{name}={run.path.resolve()}" for name, run in zip(names, runs, strict=True)]
    try:
        record = compare(CompareSettings(methods=words), tell)
    except ValueError as error:
        return None, f"{_NO_PROBES}: {error}"
    if "held_out" in record["judged_on"] and not final:
        return None, f"{_NO_PROBES}: predictions are of held-out patients, and --final shows them."
    return paired(record), ""


def _settings_text(settings: list[tuple[str, list[str]]]) -> str:
    if not settings:
        return "No setting differs."
    # where and how a run is written says least of what it does
    keys = sorted((key for key, _ in settings), key=lambda key: key.startswith(("run.", "preset")))
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    many = "1 setting differs" if len(keys) == 1 else f"{len(keys)} settings differ"
    return f"{many}: {', '.join(keys[:_SHOWN])}{more}."


def _log_texts(names: Sequence[str], logs: Sequence[differences.Unlike]) -> list[str]:
    """Say of each run where its log parts from that of the first."""
    texts = []
    for name, log in zip(names[1:], logs, strict=True):
        pair = f"{names[0]} and {name}"
        if not log.num_shared:
            texts.append(f"{pair}: no step is in both logs.")
        elif log.step is None:
            texts.append(
                f"{pair}: every measure of the {log.num_shared:,} steps that both logged is the "
                "same to the bit."
            )
        else:
            large = (
                f" A loss differs by more than 1 % from step {log.large:,} on."
                if log.large is not None
                else " No loss differs by more than 1 %."
            )
            texts.append(
                f"{pair}: their metrics differ first at step {log.step:,} ({log.phase}), "
                f"{log.text}; {log.num_shared:,} steps are in both logs.{large}"
            )
    return texts


def _glance(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the rows of the first table: name, and a cell a run; without those nobody has."""
    rows: list[tuple[str, list[str]]] = [
        ("state", [verdict(run).text.split(":")[0] for run in runs]),
        ("representation", [_LEVELS[collapse(run.phases).level] for run in runs]),
    ]
    for key, label in (("sft", "SFT"), ("jepa", "JEPA"), ("codes", "codes to come")):
        values = [_known(run, "evals", key) for run in runs]
        rows.append((f"tuning loss, {label}, last", [_last(own) for own in values]))
    speeds = [sorted(_known(run, "steps", "tokens_per_s")) for run in runs]
    memory = [_known(run, "steps", "memory_gib") for run in runs]
    data = [mapping(run.header.get("data")) for run in runs]
    models = [mapping(run.header.get("model")) for run in runs]
    ends = [run.end or {} for run in runs]
    tokens, epochs, flops = (
        [(_known(run, "steps", key) or [math.nan])[-1] for run in runs]
        for key in ("tokens", "epochs", "flops")
    )
    rows += [
        ("steps", [f"{run.phases[-1].end:,}" if run.phases else "–" for run in runs]),
        ("time", [_duration(number(end.get("seconds"))) for end in ends]),
        ("tokens / s, median", [f"{own[len(own) // 2]:,.0f}" if own else "–" for own in speeds]),
        ("peak memory", [f"{max(own):.2f} GiB" if own else "–" for own in memory]),
        ("peak memory, predicted", [_predicted(run) for run in runs]),
        ("tokens to train on", [_count(mapping(own.get("tokens")).get("train")) for own in data]),
        ("tokens seen", [_count(value) for value in tokens]),
        ("epochs", [_count(value, ".3f") for value in epochs]),
        ("FLOPs", [si(value) or "–" for value in flops]),
        ("parameters", [_count(model.get("parameters")) for model in models]),
    ]
    return [(name, cells) for name, cells in rows if set(cells) != {"–"}]


def _predicted(run: Run) -> str:
    peak = number(mapping(run.header.get("memory")).get("predicted"))
    return f"{peak:.2f} GiB" if math.isfinite(peak) else "–"


def _known(run: Run, kind: str, key: str) -> list[float]:
    value_N = column([r for phase in run.phases for r in getattr(phase, kind)], key)
    return [float(value) for value in value_N if math.isfinite(value)]


def _last(values: list[float]) -> str:
    if not values:
        return "–"
    least = f" (least {min(values):.4f})" if min(values) < values[-1] else ""
    return f"{values[-1]:.4f}{least}"


def _count(value: object, form: str = ",.0f") -> str:
    amount = number(value)
    return format(amount, form) if math.isfinite(amount) else "–"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _data_facts(run: Run) -> dict[str, str]:
    """Return the warnings and rows of the data card, whose small counts are hidden already."""
    card = mapping(run.header.get("card"))
    rows: dict[str, str] = {}
    for row in mappings(card.get("rows")):
        name = str(row.get("name"))
        text = str(row.get("text"))
        rows[name] = f"{rows[name]}; {text}" if name in rows else text
    return rows


def _table(tables: Sequence[dict[str, str]]) -> list[tuple[str, list[str], bool]]:
    """Return all keys with the text of each run, and whether they are the same."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [table.get(key, "–") for table in tables]) for key in keys]
    return [(key, cells, len(set(cells)) == 1) for key, cells in rows]


def _files(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """Return the files that say what a run is: size and digest in each run, and whether they are
    the same."""
    tables = [differences.files_of(run) for run in runs]
    shown = [
        {name: f"{_size(size)} · {digest[:8]}" for name, (size, digest) in table.items()}
        for table in tables
    ]
    digests = [{name: digest for name, (_, digest) in table.items()} for table in tables]
    same = {name: same for name, _, same in _table(digests)}
    return [(name, cells, same[name]) for name, cells, _ in _table(shown)]


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes} B"
