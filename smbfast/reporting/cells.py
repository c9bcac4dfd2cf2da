"""From values of JSON records, whatever their type, to what stands in a cell of a page."""

import math
import re

from smbfast.reporting.runlog import Record, number

# below this nobody can be found again in a count: the rule of the US claims data (CMS)
SMALL = 10
_SMALL_TEXT = re.compile(r"(all but )?<=\d{1,9}")


def count(value: object) -> str:
    """Return a count for readers; one of 1 to 10 is only said to be small."""
    if isinstance(value, str) and _SMALL_TEXT.fullmatch(value):  # a record without small counts
        return value.replace("<=", "≤")
    amount = number(value)
    if not math.isfinite(amount):
        return "–"
    return f"≤{SMALL}" if 1 <= amount <= SMALL else f"{amount:,.0f}"


def part(value: object, whole: object) -> str:
    """Return a count of a whole that is shown beside it, so that none is learned by subtraction."""
    if number(whole) > SMALL >= number(whole) - number(value) >= 1:
        return f"all but ≤{SMALL}"
    return count(value)


def tells(value: object, whole: object) -> bool:
    """Whether shares of a count of a whole can be shown; of few, each step of a curve is one."""
    rest = number(whole) - number(value)
    return number(value) > SMALL and (rest == 0 or rest > SMALL)


def interval(item: object) -> tuple[float, float, float]:
    """Return value, low and high of a record, nan where unknown."""
    item = mapping(item)
    return number(item.get("value")), number(item.get("low")), number(item.get("high"))


def mapping(value: object) -> Record:
    """Return a JSON object, or an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: object) -> list[Record]:
    """Return the JSON objects of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(value: object) -> list[float]:
    """Return a list as floats, nan for what is no number."""
    return [number(item) for item in value] if isinstance(value, list) else []
