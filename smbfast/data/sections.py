"""Assigns codes to sections of the text, by rules a user can edit (configs/sections.toml)."""

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from smbfast.base.config import read_toml
from smbfast.base.files import digest_of

SECTIONS: tuple[str, ...] = (
    "demographics",
    "conditions",
    "observations",
    "measurements",
    "procedures",
    "drugs",
    "death",
    "notes",
)


@dataclass(frozen=True)
class SectionMap:
    """Rules `beginning of a code -> section`; the longest beginning that matches wins."""

    rules: dict[str, int]  # upper case -> index into SECTIONS
    fallback: int

    @classmethod
    def read(cls, path: Path | None = None) -> "SectionMap":
        """Read rules from a TOML file, by default the one shipped with this package.

        Raises:
            ValueError: the file is not TOML, a section does not exist, or a rule is not text or
                stands in two sections.
        """
        path = Path(path) if path else Path(str(files("smbfast.configs") / "sections.toml"))
        content = read_toml(path)
        unknown = set(content) - {"sections", "fallback"}
        if unknown:
            raise ValueError(f"{path}: expected `sections` and `fallback`, got {sorted(unknown)}")
        fallback = _section(path, content.get("fallback", "observations"))
        if not isinstance(content.get("sections", {}), dict):
            raise ValueError(f"{path}: `sections` must be a table of lists")
        rules: dict[str, int] = {}
        for name, beginnings in content.get("sections", {}).items():
            section = _section(path, name)
            if not isinstance(beginnings, list):
                raise ValueError(f"{path}: `sections.{name}` must be a list of beginnings of codes")
            for rule in beginnings:
                if not isinstance(rule, str) or not rule:
                    raise ValueError(f"{path}: `sections.{name}` must hold text only")
                if rules.setdefault(rule.upper(), section) != section:
                    raise ValueError(f"{path}: the rule `{rule}` stands in two sections")
        return cls(rules, fallback)

    def __call__(self, code: str, parents: list[str] | None = None) -> tuple[int, bool]:
        """Return the section index of a code, and whether a rule (not the fallback) decided."""
        for name in (code, *(parents or ())):
            section = self._match(name.upper())
            if section is not None:
                return section, True
        return self.fallback, False

    def _match(self, code: str) -> int | None:
        ends = [len(code), *(m.start() for m in re.finditer(r"[^A-Z0-9]", code))]
        for end in sorted(ends, reverse=True):
            section = self.rules.get(code[:end])
            if section is not None:
                return section
        return None

    def record(self) -> dict:
        """Return the rules in the form that goes into JSON."""
        return {"rules": self.rules, "fallback": self.fallback}

    def fingerprint(self) -> str:
        """Return a digest that changes when a rule does."""
        return digest_of(self.rules, self.fallback)


def family(code: str) -> str:
    """Return the first part of a code, by which unmapped codes are reported, never all of it."""
    first, *rest = re.split(r"//|/|\||:", code, maxsplit=1)
    return first if rest else "(no prefix)"


def _section(path: Path, name: object) -> int:
    if name not in SECTIONS:
        raise ValueError(f"{path}: a section must be one of {', '.join(SECTIONS)}; got {name!r}")
    return SECTIONS.index(str(name))
