"""Settings of a run, and their help, from a preset or TOML file and the command line."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from smbfast.base.config import build, read_toml, with_overrides
from smbfast.base.help_page import DefaultsShown, help_text
from smbfast.base.schema import schema_text
from smbfast.settings.adapters import on_its_backbone
from smbfast.settings.training import TrainSettings


def presets() -> list[str]:
    """The names of the shipped configurations."""
    names = (
        Path(str(f)).stem for f in files("smbfast.configs").iterdir() if f.name.endswith(".toml")
    )
    return sorted(n for n in names if n != "sections")


def run_arguments(argv: list[str]) -> tuple[str, list[str]]:
    """The preset or file that a command line names, and its overrides in their long form."""
    words = list(argv)
    named = words and "=" not in words[0] and not words[0].startswith("-")
    name = words.pop(0) if named else "default"
    words = [f"--probe.{a[2:]}" if a.startswith("--final=") else a for a in words]
    words = ["--probe.final=true" if a == "--final" else a for a in words]
    for short in ("export", "profile", "resume"):  # `--export merged`, `--export=merged`
        words = [f"--run.{a[2:]}" if a.startswith(f"--{short}=") else a for a in words]
        if f"--{short}" in words[:-1]:
            at = words.index(f"--{short}")
            words[at : at + 2] = [f"--run.{short}={words[at + 1]}"]
    return name, words


def load(name: str, overrides: list[str]) -> TrainSettings:
    """A preset or TOML file with dotted overrides laid over it.

    A file may begin from a preset with `base = "default"`.

    Raises:
        ValueError: no such preset or file, an unknown key, a wrong type, a value out of range, or
            an adapter as `model.path` whose backbone is not there.
    """
    return on_its_backbone(build(TrainSettings, _values_of(name), overrides))


def run_help(argv: list[str], prog: str, epilog: str = "") -> str:
    """The help of a command that takes a preset or file and overrides: `train` and `check`.

    Where `argv` has --schema it is the JSON schema of such a file.

    Defaults are those of the preset or file that `argv` names, with its overrides. They need not
    be a valid run: `lora --help` is answered without the backbone that `lora` needs.

    Raises:
        ValueError: no such preset or file, or an unknown key.
    """
    if "--schema" in argv:
        return run_schema()
    words = [word for word in argv if word not in ("-h", "--help", "--print")]
    name, overrides = run_arguments(words)
    values = _values_of(name)
    source = f"file {name}" if name.endswith(".toml") else f"preset {name}"
    overridden = with_overrides(TrainSettings, values, overrides)
    return help_text(
        TrainSettings, f"{prog} [PRESET]", epilog, DefaultsShown(source, values, overridden)
    )


def run_schema() -> str:
    """Return the JSON schema of a file that `train` and `check` take."""
    about = "Preset that the file begins from: keys that it leaves out, or all phases, are its own."
    return schema_text(TrainSettings, {"base": {"enum": presets(), "description": about}})


def _values_of(name: str) -> dict[str, Any]:
    """What a preset or file sets, with the preset that a file begins from under it."""
    values: dict[str, Any]
    if name.endswith(".toml"):
        values = {"preset": Path(name).stem, **read_toml(Path(name))}
    elif name in presets():
        values = {"preset": name, **_preset(name)}
    else:
        raise ValueError(
            f"`{name}` must be a preset ({', '.join(presets())}), a .toml file or --key=value"
        )
    while "base" in values:
        base = values.pop("base")
        if base not in presets():
            raise ValueError(f"`base` must be a preset ({', '.join(presets())}), got {base!r}")
        values = _over(_preset(base), values)
    return values


def _preset(name: str) -> dict[str, Any]:
    return read_toml(Path(str(files("smbfast.configs") / f"{name}.toml")))


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _over(below[key], value) if both else value
    return merged
