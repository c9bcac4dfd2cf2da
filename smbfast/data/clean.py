"""Text from data as it may stand in a line: it never looks like a line's end, a header or a tag.

Looking like one is judged after NFKC, because some tokenizers normalize: a full-width `＜` is a `<`
to them.
"""

import re
import unicodedata

from smbfast.data.sections import SECTIONS

# spaces, controls and all that is not seen: soft hyphen, joiners, direction marks, tag characters
_HIDDEN = re.compile(
    r"[\x00-\x20\x7f-\xa0\xad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000"
    r"\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]+"
)
_TAG = re.compile(r"<(?=/?(?:" + "|".join(SECTIONS) + r")>)", re.IGNORECASE)
_BRACKET = re.compile(r"^[\[<\uff3b\uff1c\ufe47\ufe64]")


def clean(text: str, limit: int | None = None) -> str:
    """Text in which newlines, control and invisible characters have become single spaces."""
    return _HIDDEN.sub(" ", text).strip()[:limit].rstrip()


def line_head(text: str) -> str:
    """Cleaned text that may begin a line: a header or a tag begins with a bracket, it does not."""
    return _BRACKET.sub("(", text) or "?"


def without_tags(text: str) -> str:
    """Cleaned text in which `‹` opens what would read as a delimiter."""
    if text.isascii():
        return _TAG.sub("‹", text)
    folded = unicodedata.normalize("NFKC", text)
    return _TAG.sub("‹", folded) if _TAG.search(folded) else text
