"""Chooses what becomes a token: the tables of a vocabulary, in the form that goes into JSON.

Everything here is said of ten training subjects or more. A name of fewer is in none of the tables.

Legend: C codes, K keys of numbers.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from smbfast.data.clean import clean
from smbfast.data.codes.bins import KEY_OFFSET, MIN_SUBJECTS, fit_edges, key_value
from smbfast.data.codes.ladder import ANCESTOR, shared_names, steps
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.sections import SectionMap

MAX_CODES = 32_768  # codes with tokens of their own: our choice
_TEXT_LIMIT = 200  # of a description, as in the text format


def fit_tables(
    statistics: CodeStatistics,
    sections: SectionMap,
    descriptions: Mapping[str, str],
    parents: Mapping[str, list[str]],
    max_codes: int,
) -> dict[str, list[dict[str, Any]]]:
    """Return `codes` (frequent ones, by name) and `shared` (names that rare codes share).

    An entry of `codes` has `code`, `text`, `section` and, where they exist, `edges` (numbers) and
    `values` (texts, sorted); of `shared`: `name`, `text`, `section`.
    """
    statistics.settle()
    names = list(statistics.code_ids)
    subjects_C = statistics.codes.sum_KM[:, 0]
    have = dict(zip(statistics.codes.key_K.tolist(), subjects_C.tolist(), strict=True))
    enough = [c for c, n in have.items() if n >= MIN_SUBJECTS]
    enough.sort(key=lambda c: (-have[c], names[c]))
    frequent = {names[c]: c for c in enough[:max_codes]}
    barred = {names[c] for c in enough[max_codes:]}
    edges, values = _edges(statistics, frequent), _values(statistics, frequent)
    codes = []
    for name in sorted(frequent):
        entry: dict[str, Any] = {"code": name, "text": _words(descriptions.get(name) or name)}
        entry["section"] = sections(name, parents.get(name))[0]
        if name in edges:
            entry["edges"] = [key_value(k) for k in edges[name]]
        if name in values:
            entry["values"] = values[name]
        codes.append(entry)
    rare = _rare(statistics, names, frequent)
    shared = []
    events = dict(zip(statistics.codes.key_K.tolist(), statistics.codes.sum_KM[:, 1], strict=True))
    for name, members in shared_names(rare, frequent, parents, barred).items():
        votes: Counter[int] = Counter()
        for code in members:
            count = int(events[statistics.code_ids[code]])
            votes[sections(code, parents.get(code))[0]] += count
        section = min(votes, key=lambda s: (-votes[s], s))
        # the words that describe one rare code must not speak for the others
        described = all((ANCESTOR, name) in steps(c, parents) for c in members)
        text = _words((descriptions.get(name) if described else None) or name)
        shared.append({"name": name, "text": text, "section": section})
    return {"codes": codes, "shared": shared}


def _rare(
    statistics: CodeStatistics, names: list[str], frequent: Mapping[str, int]
) -> dict[str, list[int] | None]:
    """Return the codes without tokens of their own and their subjects (None: ten or more)."""
    table = statistics.codes
    few = table.few(0, len(table.key_K)) if len(table.key_K) else []
    return {
        names[c]: None if n >= MIN_SUBJECTS else ids
        for c, n, ids in zip(table.key_K.tolist(), table.sum_KM[:, 0].tolist(), few, strict=True)
        if names[c] not in frequent
    }


def _edges(statistics: CodeStatistics, frequent: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the edges of each code that has numbers of ten subjects, as keys."""
    table = statistics.numbers
    bounds = table.bounds(len(statistics.code_ids))
    with_number_C = np.zeros(len(statistics.code_ids), np.int64)
    with_number_C[statistics.codes.key_K] = statistics.codes.sum_KM[:, 2]
    edges = {}
    for name, c in frequent.items():
        if with_number_C[c] >= MIN_SUBJECTS:
            a, b = int(bounds[c]), int(bounds[c + 1])
            sums_KM = table.sum_KM[a:b]
            key_K = table.low(a, b) - KEY_OFFSET
            edges[name] = fit_edges(key_K, sums_KM[:, 2], sums_KM[:, 0], table.few(a, b))
    return edges


def _values(statistics: CodeStatistics, frequent: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the texts of each code that become tokens.

    An event of a binned code keeps its number, so there only events without one count.
    """
    table, texts = statistics.texts, list(statistics.text_ids)
    binned = np.zeros(len(statistics.code_ids), bool)
    binned[statistics.codes.key_K] = statistics.codes.sum_KM[:, 2] >= MIN_SUBJECTS
    code_K = table.key_K >> table.low_bits
    subjects_K = np.where(binned[code_K], table.sum_KM[:, 2], table.sum_KM[:, 0])
    names = {c: n for n, c in frequent.items()}
    values: dict[str, list[str]] = {}
    for k in np.flatnonzero(subjects_K >= MIN_SUBJECTS).tolist():
        if int(code_K[k]) in names:
            values.setdefault(names[int(code_K[k])], []).append(texts[int(table.low(k, k + 1)[0])])
    return {name: sorted(its) for name, its in values.items()}


def _words(text: str) -> str:
    """Return a description, or a code, as plain words."""
    return clean(re.sub(r"//|[|_]", " ", text), _TEXT_LIMIT) or "?"
