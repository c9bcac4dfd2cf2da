"""Which token a code gets that fewer than ten training subjects have.

Such a code walks a ladder of coarser names, finest first: its ancestors by `parent_codes`, an ICD
code cut step by step to 3 characters, the code cut at its last separators, its family, its section.
The design lists the cuts at separators before those of ICD; here the finer cut comes first. At each
name that no frequent code bears, a token stands only if at least ten subjects are mapped to it.

The same walk serves the fit and codes that were never seen, so the names of rare codes need not
be kept.
"""

import re
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping

from smbfast.data.codes.bins import MIN_SUBJECTS
from smbfast.data.sections import family

RUNGS = ("own", "ancestor", "prefix", "family", "section")
OWN, ANCESTOR, PREFIX, FAMILY, SECTION = range(len(RUNGS))

_ICD = re.compile(
    r"(?P<head>(?:.*[^A-Z])?ICD[^/|]*(?://|/|\|)(?:\d{1,2}(?://|/|\|))?)"
    r"(?P<code>(?=[A-Z.]*\d)[A-Z0-9.]{4,})",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"//|[|/]")
Step = tuple[int, str]  # rung and name


def steps(code: str, parents: Mapping[str, list[str]]) -> list[Step]:
    """Return the names a code may share a token with, finest first, without its section.

    The first is the code itself, whose token then stands for it and all that is below it.
    """
    rung_of: dict[str, int] = {code: PREFIX}
    for name in _ancestors(code, parents):
        rung_of.setdefault(name, ANCESTOR)
    last = family(code)
    for name in _cuts(code, last):
        rung_of.setdefault(name, PREFIX)
    rung_of.setdefault(last, FAMILY)
    return [(rung, name) for name, rung in rung_of.items()]


def shared_names(
    rare: Mapping[str, list[int] | None],
    frequent: Collection[str],
    parents: Mapping[str, list[str]],
    barred: Collection[str] = (),
) -> dict[str, list[str]]:
    """Return the names that get a token and the codes mapped to each, both sorted.

    Args:
        rare: the subjects of each rare code; None for ten or more.
        frequent: codes with a token of their own, which end a walk.
        barred: names that must get no token.
    """
    walks = {c: [n for _, n in steps(c, parents)] for c in sorted(rare)}
    dead = _without_ten(walks, rare) - set(frequent) | set(barred)
    at: dict[str, str | None] = {}
    members: dict[str, set[str]] = defaultdict(set)

    def walk(codes: Iterable[str]) -> None:
        for code in codes:
            name = next((n for n in walks[code] if n in frequent or n not in dead), None)
            at[code] = name
            if name is not None and name not in frequent:
                members[name].add(code)

    walk(walks)
    failing = {n for n, codes in members.items() if not ten_subjects(rare[c] for c in codes)}
    while failing:
        # a name waits while a code that now stands at another failing name could still come to it
        waits = {n for f in failing for c in members[f] for n in walks[c] if n != f} & failing
        fallen = failing - waits or {max(failing, key=lambda n: (len(n), n))}
        dead |= fallen
        moved = sorted(c for n in fallen for c in members.pop(n))
        walk(moved)
        failing -= fallen
        touched = {n for c in moved if (n := at[c]) is not None and n in members}
        failing -= touched
        failing |= {n for n in touched if not ten_subjects(rare[c] for c in members[n])}
    return {n: sorted(members[n]) for n in sorted(members)}


def _ancestors(code: str, parents: Mapping[str, list[str]]) -> list[str]:
    """Return all ancestors, nearest first; a cycle ends."""
    seen, queue = {code: None}, deque([code])
    while queue:
        for name in parents.get(queue.popleft(), ()):
            if name not in seen:
                seen[name] = None
                queue.append(name)
    return list(seen)[1:]


def _cuts(code: str, last: str) -> list[str]:
    cuts = []
    icd = _ICD.fullmatch(code)
    if icd:
        head, tail = icd["head"], icd["code"]
        cuts += [head + cut for n in range(len(tail) - 1, 2, -1) if (cut := tail[:n])[-1] != "."]
    for start in reversed([m.start() for m in _SEPARATOR.finditer(code)]):
        cut = code[:start].rstrip("/|:")
        if cut and cut != last and len(cut) > len(last):
            cuts.append(cut)
    return cuts


def _without_ten(walks: dict[str, list[str]], rare: Mapping[str, list[int] | None]) -> set[str]:
    """Return the names that would not have ten subjects if every code below came to them."""
    below: dict[str, set[int] | None] = {}
    for code, names in walks.items():
        ids = rare[code]
        for name in names:
            have = below.setdefault(name, set())
            if have is not None:
                have.update(ids or ())
                if ids is None or len(have) >= MIN_SUBJECTS:
                    below[name] = None
    return {n for n, have in below.items() if have is not None}


def ten_subjects(groups: Iterable[list[int] | None]) -> bool:
    """Whether the union of groups of subjects has ten; None is a group that has."""
    union: set[int] = set()
    for ids in groups:
        if ids is None:
            return True
        union.update(ids)
        if len(union) >= MIN_SUBJECTS:
            return True
    return False
