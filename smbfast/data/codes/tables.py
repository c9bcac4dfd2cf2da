"""The tokens of a vocabulary in id order, and arrays by which events find them.

Places count from the first token; ids add the vocabulary's `first_id`.

Legend: N events, W frequent codes + 1 (the last row, -1, is of events whose code has no tokens of
its own), E edges or V values of all codes.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from smbfast.data.clean import clean
from smbfast.data.codes.alphabet import CodeToken, fixed_alphabet
from smbfast.data.codes.bins import KEY_BITS, KEY_OFFSET, decimal_keys

_TEXT_BITS = 32


class TokenTables:
    """Numbers the tokens: the alphabet; each code, its bins, its values; the shared names."""

    def __init__(self, codes: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
        self.tokens = fixed_alphabet()
        self.own: dict[str, int] = {}  # frequent code -> its row
        self.place: dict[str, int] = {}  # frequent code or shared name -> place of its token
        self.text_ids: dict[str, int] = {}
        self._names = {t.name for t in self.tokens}
        self._first_bin_W = np.full(len(codes) + 1, -1, np.int64)
        self._first_edge_W = np.zeros(len(codes) + 1, np.int64)
        edges: list[int] = []
        values: list[tuple[int, int]] = []
        for own, entry in enumerate(codes):
            self._put_code(own, entry, edges, values)
        for entry in shared:
            self.place[entry["name"]] = len(self.tokens)
            name = f"{clean(entry['name'])}//*"
            self._put(CodeToken(name, entry["text"], "code", entry["section"]))
        values.sort()
        self._edge_E = np.array(edges, np.int64)
        self._value_V = np.array([key for key, _ in values], np.int64)
        self._value_place_V = np.array([place for _, place in values], np.int64)
        self.binned = self._first_bin_W >= 0
        self.has_values = np.zeros(len(codes) + 1, bool)
        self.has_values[self._value_V >> _TEXT_BITS] = True

    def bins(self, own_N: np.ndarray, value_N: np.ndarray) -> np.ndarray:
        """Return the place of code x bin of finite values of binned codes, int64 [N]."""
        key_N = (own_N << KEY_BITS) | (decimal_keys(value_N) + KEY_OFFSET)
        bin_N = np.searchsorted(self._edge_E, key_N, side="right") - self._first_edge_W[own_N]
        return self._first_bin_W[own_N] + bin_N

    def values(self, own_N: np.ndarray, text_N: np.ndarray) -> np.ndarray:
        """Return the place of code x value, int64 [N]; -1 where there is no such token.

        `text_N` are ids of `text_ids`, or -1; at least one code must have a value.
        """
        key_N = np.where(text_N < 0, -1, (own_N << _TEXT_BITS) | text_N)
        at_N = np.minimum(np.searchsorted(self._value_V, key_N), len(self._value_V) - 1)
        return np.where(self._value_V[at_N] == key_N, self._value_place_V[at_N], -1)

    def _put_code(
        self, own: int, entry: dict[str, Any], edges: list[int], values: list[tuple[int, int]]
    ) -> None:
        code, words, section = entry["code"], entry["text"], entry["section"]
        name = clean(code) or "?"
        self.own[code], self.place[code] = own, len(self.tokens)
        self._put(CodeToken(name, words, "code", section))
        self._first_edge_W[own] = len(edges)
        if "edges" in entry:
            self._first_bin_W[own] = len(self.tokens)
            keys = decimal_keys(np.array(entry["edges"], np.float64)) + KEY_OFFSET
            edges += [(own << KEY_BITS) | k for k in keys.tolist()]
            num = len(keys) + 1
            for b in range(num):
                sign, spoken = _interval(entry["edges"], b)
                label, meaning = f"{name} {sign}", f"{words} {spoken}"
                self._put(CodeToken(label, meaning, "bin", section, b, num))
        for value in entry.get("values", ()):
            text = self.text_ids.setdefault(value, len(self.text_ids))
            values.append(((own << _TEXT_BITS) | text, len(self.tokens)))
            self._put(CodeToken(f"{name} = {value}", f"{words}: {value}", "value", section))

    def _put(self, token: CodeToken) -> None:
        while token.name in self._names:
            token = replace(token, name=token.name + "*")
        self._names.add(token.name)
        self.tokens.append(token)


def _interval(edges: list[float], b: int) -> tuple[str, str]:
    """Return a bin as a sign and in words."""
    shown = [f"{e:g}" for e in edges]
    if not edges:
        return "(number)", "any number"
    if b == 0:
        return f"< {shown[0]}", f"below {shown[0]}"
    if b == len(edges):
        return f">= {shown[-1]}", f"{shown[-1]} or more"
    return f"[{shown[b - 1]}, {shown[b]})", f"{shown[b - 1]} to {shown[b]}"
