"""Finds and reads the predictions of a method that a word names: runs, seeds, folds and a model.

    [NAME=]PATH[,PATH ...][:MODEL]     PATH: a prediction file, a folder of them, a run, a pattern

A folder holds `<task>/<model>.parquet`, with `<model>-<version>.parquet` for several versions of
one model, or files of a task each. Metadata of a file say more than its name. Every path is one
training run, unless paths are folds: then the paths of a pattern are put together, and commas
separate training runs.

Legend: N rows, S runs (training seeds, or versions of one model).
"""

import difflib
import glob
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from smbfast.base.counts import few
from smbfast.judging.prediction_files import (
    Predictions,
    about_file,
    read_predictions,
    repeats,
    together,
)

OWN = "smbfast"  # the model that a folder is taken to mean
_VERSION = re.compile(r"(.+)-(\d+)")
_FOLD = re.compile(r"fold-?\d+")


class Source(NamedTuple):
    """One prediction file, and the task, model and version that it is of."""

    file: Path
    task: str
    model: str
    version: int
    about: dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method of a name: by task, the predictions of each of its runs, which are of the same rows
    or not. role: as in `Scored`, "" where no file says it."""

    name: str
    model: str
    role: str
    runs: dict[str, list[Predictions]]


def read_methods(
    words: list[str], folds: bool, tell: Callable[[str], None] = lambda _: None
) -> list[Method]:
    """Read the method of each word; of one word alone, each model that it holds.

    Args:
        folds: whether the paths of a pattern are folds.
        tell: what progress is said to.

    Raises:
        ValueError: a path is missing or holds no predictions (the nearest is named), a model is
            not there, a file is not of the schema, or a row is in two folds.
    """
    named = [_parsed(word) for word in words]
    runs = [[_sources_of_run(path, folds) for path in paths] for _, paths, _ in named]
    if len(words) == 1 and not named[0][2]:
        models = list(dict.fromkeys(s.model for run in runs[0] for part in run for s in part))
        chosen = [(model, runs[0]) for model in sorted(models, key=lambda m: m != OWN)]
        names = [model for model, _ in chosen]
    else:
        chosen = [
            (_model(word, model, own), own)
            for word, (_, _, model), own in zip(words, named, runs, strict=True)
        ]
        names = _names([name for name, _, _ in named], words, [model for model, _ in chosen])
    methods = []
    for name, (model, own) in zip(names, chosen, strict=True):
        tell(f"predictions of {name}")
        methods.append(_read(name, model, own, folds))
    return methods


def _parsed(word: str) -> tuple[str, list[str], str]:
    """Return name, paths or patterns, and model of a word; name and model may be empty."""
    name, model, rest = "", "", word
    head, equals, tail = word.partition("=")
    if equals and not Path(word).exists() and re.fullmatch(r"[\w .+-]+", head):
        name, rest = head, tail
    front, colon, back = rest.rpartition(":")
    if colon and front and not Path(rest).exists() and re.fullmatch(r"[\w.+-]+", back):
        rest, model = front, back
    paths = [rest] if Path(rest).exists() else [p.strip() for p in rest.split(",") if p.strip()]
    if not paths:
        raise ValueError(f"`{word}` must name a path, such as {name or 'NAME'}=runs/default")
    return name, paths, model


def _sources_of_run(path: str, folds: bool) -> list[list[Source]]:
    """Return the files of each part that a path or pattern stands for."""
    parts = [Path(path)] if Path(path).exists() else [Path(p) for p in sorted(glob.glob(path))]
    if not parts:
        raise ValueError(_not_there(path))
    if folds and len(parts) == 1 and parts[0].is_dir():
        inner = sorted(p for p in parts[0].iterdir() if p.is_dir() and _FOLD.fullmatch(p.name))
        parts = inner or parts
    return [_sources(part) for part in parts]


def _not_there(path: str) -> str:
    """Say that a path is missing, and which name comes nearest."""
    folder, name = Path(path).parent, Path(path).name
    while not folder.is_dir():
        folder, name = folder.parent, folder.name
    entries = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    nearest = difflib.get_close_matches(name, entries, n=1, cutoff=0.6)
    what = "nothing matches" if glob.has_magic(path) else "there is nothing at"
    hint = f"; did you mean {folder / nearest[0]}?" if nearest else ""
    return f"a method must be a prediction file, a folder of them or a run; {what} {path}{hint}"


def _sources(path: Path) -> list[Source]:
    """Return the prediction files of a file or folder.

    Raises:
        ValueError: there is none.
    """
    if path.is_file():
        above = path.parent.parent
        return [_source(path, above if above.name == "predictions" else path.parent)]
    root = path / "predictions" if (path / "predictions").is_dir() else path
    flat, nested = (
        sorted(p for p in root.glob(pattern) if p.is_file() and p.name[0] not in "._")
        for pattern in ("*.parquet", "*/*.parquet")
    )
    # of a run that was probed again, files of the older form are of another split or probe
    flat = [file for file in flat if not (root / file.stem).is_dir()]
    sources = [_source(file, root) for file in (*flat, *nested)]
    if root == path:  # a folder of any name may hold other files as well
        sources = [source for source in sources if source.model != ""]
    if not sources:
        begun = any((path / name).is_file() for name in ("run.json", "config.toml"))
        more = (
            "; the run was not probed yet, or ended before"
            if begun
            else "; with --folds a folder stands for the folders fold-1, fold-2 and so on in it"
            if any(_FOLD.fullmatch(p.name) for p in path.iterdir())
            else ""
        )
        raise ValueError(
            f"{path} must hold predictions, as predictions/<task>/<model>.parquet or files of "
            f"that form; it has none{more}"
        )
    return sources


def _source(file: Path, root: Path) -> Source:
    about = about_file(file)
    nested = file.parent != root
    match = _VERSION.fullmatch(file.stem)
    stem, version = (match[1], int(match[2])) if match else (file.stem, 0)
    # a flat file of others is named by its task; the model is then the folder's only one
    task = about.get("task") or (file.parent.name if nested else file.stem)
    model = about.get("model") or (stem if nested else OWN)
    said = about.get("version")
    return Source(file, str(task), str(model), said if isinstance(said, int) else version, about)


def _model(word: str, wanted: str, runs: list[list[list[Source]]]) -> str:
    """Return the model of a word: the one it names, or `smbfast`, or the only one that is there."""
    models = sorted({s.model for run in runs for part in run for s in part})
    if wanted in models or (not wanted and OWN in models):
        return wanted or OWN
    if not wanted and len(models) == 1:
        return models[0]
    nearest = difflib.get_close_matches(wanted, models, n=1)
    asked = f"has no `{wanted}`" if wanted else f"has no `{OWN}`, which is taken without one"
    hint = f"; did you mean `{nearest[0]}`?" if nearest else ""
    raise ValueError(
        f"`{word}` must end in :MODEL with one of the models there ({', '.join(models)}); it "
        f"{asked}{hint}"
    )


def _names(given: list[str], words: list[str], models: list[str]) -> list[str]:
    """Return a name for each method: the one given, or the shortest that tells them from each
    other."""
    paths = [Path(_parsed(word)[1][0]) for word in words]
    stems = [_stem(path) for path in paths]
    options = (
        stems,
        [f"{stem}:{model}" for stem, model in zip(stems, models, strict=True)],
        models if len(set(stems)) == 1 else stems,
        words,
    )
    own = next((o for o in options if len(set(o)) == len(o)), None)
    if own is None:
        own = [f"{word} ({at + 1})" for at, word in enumerate(words)]
    names = [name or other for name, other in zip(given, own, strict=True)]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"each method must have a name of its own; `{twice}` is there twice")
    return names


def _stem(path: Path) -> str:
    """Return the name of a run, of a fold's folder, or of a file that is in no run."""
    parts = path.parts
    if "predictions" in parts and parts.index("predictions"):
        return parts[parts.index("predictions") - 1]
    name = path.stem if path.suffix == ".parquet" else path.name
    name = re.sub(r"[-_.]?[*?\[].*$", "", name)
    return path.parent.name or name if name in ("", "fold") or _FOLD.fullmatch(name) else name


def _read(name: str, model: str, runs: list[list[list[Source]]], folds: bool) -> Method:
    """Read every run of a method, its folds put together."""
    by_task: dict[str, list[Predictions]] = {}
    files: set[Path] = set()
    role = ""
    for run in runs:
        # without folds, each part of a pattern is a run
        for parts in [run] if folds else [[part] for part in run]:
            own = [[s for s in part if s.model == model] for part in parts]
            for source in (s for part in own for s in part):
                if source.file.resolve() in files:
                    raise ValueError(
                        f"{name} must name each file once; {source.file} is there twice"
                    )
                files.add(source.file.resolve())
                role = str(source.about.get("role") or role)
            for task, read in _of_run(name, own).items():
                by_task.setdefault(task, []).extend(read)
    return Method(name, model, role, by_task)


def _of_run(name: str, parts: list[list[Source]]) -> dict[str, list[Predictions]]:
    """Return the predictions of each version in one run, for each task."""
    chosen: dict[tuple[str, int], list[Source]] = {}
    for part in parts:
        for source in part:
            chosen.setdefault((source.task, source.version), []).append(source)
    tasks: dict[str, list[Predictions]] = {}
    for (task, _), sources in sorted(chosen.items()):
        read = [read_predictions(source.file) for source in sources]
        kinds = {predictions.kind for predictions in read}
        if len(kinds) > 1:
            raise ValueError(
                f"{name}: the files of {task} must be of one kind, got {sorted(kinds)}"
            )
        whole = together(read)
        if len(read) > 1 and (num_twice := repeats(whole)):
            raise ValueError(
                f"{name}: the folds of {task} must hold each row once; {few(num_twice)} rows are "
                "in two of them. Are they training seeds? Then leave out --folds"
            )
        tasks.setdefault(task, []).append(whole)
    return tasks
