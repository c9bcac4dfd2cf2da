"""The two layouts of text, and how each writes a name, a number and the time of a bucket.

`text-paper` follows the public tools of the method's authors. `text` says the same in fewer tokens;
its rules are our choice, and `python -m bench.tokens` shows what each of them saves.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from smbfast.batch import UNKNOWN
from smbfast.data.timelines import MOST_YEARS, YEAR

Format = Literal["text", "text-paper"]
SPAN = {"day": 86_400_000_000, "hour": 3_600_000_000, "moment": 1}  # microseconds
_DAY, _HOUR = SPAN["day"], SPAN["hour"]
_MOST_DAYS = 10_000_000  # so that days and a clock fit into one integer


@dataclass(frozen=True)
class Style:
    """What a layout writes, element by element, so that each can be measured alone."""

    relative: bool  # a bucket begins with the time since the one before it, not with its date
    closing: bool  # a section ends with a closing tag
    commas: bool  # a colon behind every name and a comma between all values
    rounded: bool  # numbers have three digits, `1230`, instead of four, `1.234e+05`
    short_names: bool  # names lose brackets and units that tell them from no other name
    age: bool  # windows begin with the age; the date of birth is no line


PAPER = Style(
    relative=False, closing=True, commas=True, rounded=False, short_names=False, age=False
)
LEAN = Style(relative=True, closing=False, commas=False, rounded=True, short_names=True, age=True)
STYLES: dict[Format, Style] = {"text": LEAN, "text-paper": PAPER}


def number(value: float, style: Style) -> str:
    """Return a finite number with as many digits as the style has."""
    if not style.rounded:
        return f"{value:.4g}"
    text = f"{value:.3g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        text = f"{mantissa}e{int(exponent)}"
        plain = f"{float(text):.0f}"
        # up to six places a number is read faster, and has fewer tokens, without an exponent
        text = plain if 0 < int(exponent) < 6 else text
    return "0" if text == "-0" else text


def age_line(years: int) -> str:
    """Return the line that tells an age in whole years."""
    return f"Age {years}\n"


def age_at(birth: int, time: int) -> str:
    """Return the line of the age at `time`, microseconds since 1970; empty where it is unknown."""
    if birth == UNKNOWN or time < birth:
        return ""
    return age_line(min((time - birth) // YEAR, MOST_YEARS))


def dates(time_K: np.ndarray, bucket: str) -> tuple[list[str], np.ndarray]:
    """Return the distinct `[date]` headers of buckets that begin at `time_K` (int64 microseconds
    since 1970), and which of them each bucket has (int64 [K])."""
    unit = {"day": "D", "hour": "h", "moment": "us"}[bucket]
    unique_U, which_K = np.unique(time_K, return_inverse=True)
    headers = []
    for time in unique_U.tolist():
        stamp = str(np.datetime64(time, "us").astype(f"datetime64[{unit}]"))
        stamp = stamp.replace("T", " ").removesuffix(".000000")
        headers.append(f"[{stamp}{':00' if unit == 'h' else ''}]\n")
    return headers, which_K


def times_since(
    time_K: np.ndarray, before_K: np.ndarray, bucket: str
) -> tuple[list[str], np.ndarray]:
    """Return the distinct headers that tell the time since the bucket before, as `dates` does.

    `+3` is three days later, `+3 07` three days later at seven, `@07` at seven of the same day,
    `+3 07:10` and `@07:10` the same for moments, `:40` another minute of the same hour. The first
    bucket of a timeline is `+0`, `@07` or `@07:10`.

    Args:
        time_K, before_K: when each bucket and the one before it begin, int64 microseconds since
            1970; UNKNOWN before a first bucket.
    """
    first_K = before_K == UNKNOWN
    days_K = np.floor_divide(time_K, _DAY) - np.floor_divide(before_K, _DAY)
    days_K = np.where(first_K, 0, np.clip(days_K, 0, _MOST_DAYS))
    clock_K = np.mod(time_K, _DAY)
    same_K = ~first_K & (np.floor_divide(time_K, _HOUR) == np.floor_divide(before_K, _HOUR))
    key_K = (days_K * _DAY + clock_K) * 2 + (same_K & (bucket == "moment"))
    unique_U, which_K = np.unique(key_K, return_inverse=True)
    headers = []
    for key in unique_U.tolist():
        days, clock = divmod(key // 2, _DAY)
        if bucket == "day":
            headers.append(f"+{days}\n")
            continue
        hour, rest = divmod(clock, _HOUR)
        begin = "" if key % 2 else f"+{days} {hour:02}" if days else f"@{hour:02}"
        headers.append(begin + (_minutes(rest) if bucket == "moment" else "") + "\n")
    return headers, which_K


def _minutes(rest: int) -> str:
    minute, rest = divmod(rest, 60_000_000)
    second, fraction = divmod(rest, 1_000_000)
    text = f":{minute:02}"
    if second or fraction:
        text += f":{second:02}" + (f".{fraction:06}".rstrip("0") if fraction else "")
    return text


_BRACKETS = re.compile(r" ?\[[^\[\]]*\]")
_UNIT = re.compile(r" ?\([^()]*\)$")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Return each name without brackets and unit, as far as that tells it from all other names.

    Of the names `Glucose [Blood] (mg/dL)` and `Sodium [Blood] (mEq/L)` and `Sodium [Urine] (mEq/L)`
    the first becomes `Glucose` and the last `Sodium [Urine]`.
    """
    forms = {name: _forms(name) for name in names}
    uses = Counter(form for own in forms.values() for form in own)
    return {name: next((f for f in own if uses[f] == 1), name) for name, own in forms.items()}


def _forms(name: str) -> list[str]:
    """Return the forms of a name, each once and the shortest first."""
    unbracketed, without_unit = _BRACKETS.sub("", name), _UNIT.sub("", name)
    forms = {_UNIT.sub("", unbracketed.strip()), unbracketed, without_unit, name}
    return sorted({form.strip() for form in forms} - {""}, key=lambda form: (len(form), form))
