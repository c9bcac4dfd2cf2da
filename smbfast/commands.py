"""smbfast COMMAND: every command under one name, each imported when it is asked for."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from smbfast import __version__
from smbfast.base.nearest import edits
from smbfast.base.typed import typed_as

COMMANDS = {
    "simulate": "Write a simulated cohort as a MEDS dataset, with labels, to try everything on.",
    "tasks": "Make label files from definitions of tasks, or check labels for leakage.",
    "check": "Meet in a minute what a training run would meet, or plan it for GPUs elsewhere.",
    "prepare": "Turn a MEDS dataset into token shards, once, before training on many processes.",
    "train": "Train a model, embed its decision nodes, probe them and write the report.",
    "embed": "Embed patients at any moment with a trained model; no label is needed.",
    "probe": "Measure what a linear model reads about outcomes from embeddings.",
    "compare": "Judge whether one method predicts better than another on the same patients.",
    "report": "Write the page that says what a run did.",
    "experiment": "Run arms that differ in one thing, over replicates, or cross-validate.",
    "push": "Send a trained model to a repository of the Hugging Face Hub, private by default.",
}
_OTHERS = {  # what other programs call these commands
    "train": "fit finetune fine-tune pretrain sft resume",
    "prepare": "preprocess tokenize",
    "simulate": "generate",
    "embed": "encode extract predict infer inference",
    "probe": "eval evaluate test",
    "check": "plan doctor validate dry-run",
    "compare": "diff",
    "tasks": "label labels",
    "experiment": "sweep",
    "push": "upload publish share",
}
OTHER_NAMES = {other: name for name, others in _OTHERS.items() for other in others.split()}


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first word names with the words behind it.

    Without a word, and for --help, it prints what there is; for --version, the versions.

    Raises:
        SystemExit: 2 and one line, if there is no such command; else as the command ends.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_module = Path(sys.argv[0]).parts[-2:] == ("smbfast", "__main__.py")
    script = "python -m smbfast" if is_module else "smbfast"
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(_page(script))
    elif words[0] in ("--version", "-V", "version"):
        print(_versions())
    elif words[0] in COMMANDS:
        with typed_as(script):
            import_module(f"smbfast.{words[0]}").main(words[1:])
    else:
        print(f"{script}: {_unknown(words, script)}", file=sys.stderr)
        raise SystemExit(2)


def _page(script: str) -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            f"usage: {script} COMMAND [--key=VALUE ...]",
            "",
            "smbfast trains patient world models on electronic health records in MEDS format.",
            "",
            *(f"  {name:<{width}}  {about}" for name, about in COMMANDS.items()),
            "",
            f"{script} train                    trains a small model on a simulated cohort, in",
            f"{'':<{len(script)}}                          minutes on a CPU.",
            f"{script} COMMAND --help           explains every setting of a command.",
            f"{script} COMMAND --schema         prints the JSON schema of its TOML, for editors.",
            f"{script} --version                prints the versions of what computes.",
            "",
            "python -m smbfast.COMMAND is the same; with torchrun, -m smbfast.COMMAND.",
        ]
    )


def _versions() -> str:
    """Return the versions of this package and of what it computes with; nothing is imported."""
    names = {"Python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("torch", "transformers", "peft"):
        try:
            names[package] = version(package)
        except PackageNotFoundError:
            names[package] = "missing"
    return f"smbfast {__version__} ({', '.join(f'{n} {v}' for n, v in names.items())})"


def _unknown(words: list[str], script: str) -> str:
    """Return the line about a first word that is no command: what was meant, and what there is."""
    word = words[0]
    if word.startswith("-") or "=" in word:
        return f"a command must stand before `{word}`, one of {', '.join(COMMANDS)}"
    distance = {name: edits(word.lower(), name) for name in COMMANDS}
    near = min(distance, key=lambda name: distance[name])
    meant = OTHER_NAMES.get(word.lower()) or (near if distance[near] <= 2 < len(word) else "")
    if not meant and _is_preset(word):
        return (
            f"`{word}` is no command; a preset or file stands behind train: {script} train {word}"
        )
    hint = f"; did you mean `{meant}`?" if meant else ""
    return f"the command must be one of {', '.join(COMMANDS)}, got `{word}`{hint}"


def _is_preset(word: str) -> bool:
    from smbfast.settings import presets  # imports pydantic, which a list of commands does not need

    return word.endswith(".toml") or word in presets()
