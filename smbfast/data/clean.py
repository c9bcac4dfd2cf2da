"""Cleans text from data, so that it never looks like a line's end, a header or a tag.

Text is judged after NFKC normalization, because some tokenizers normalize: to them a full-width
`＜` is a `<`.
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
_MARKS = tuple("[<+@:")  # with which tags and the headers of the format `text` begin
_AGE = re.compile(r"^Age(?= |$)")


def clean(text: str, limit: int | None = None) -> str:
    """Replace newlines, control and invisible characters by single spaces; cut at `limit`.

    Of a long text no more is read than is returned, but for what is not seen.
    """
    if limit is None:
        return _spaced(text).strip()
    return _beginning(text, limit)[:limit].rstrip()


def shortened(text: str, limit: int) -> tuple[str, bool]:
    """Return `clean(text, limit)`, and whether more of the text would be seen."""
    # of two characters behind the limit one is seen: spaces are single
    head = _beginning(text, limit + 2)
    return head[:limit].rstrip(), len(head) > limit


def _beginning(text: str, least: int) -> str:
    """Return the cleaned beginning of a text, at least so long; all of it if it is shorter."""
    read = 2 * least + 32
    while read < len(text):
        head = _spaced(text[:read]).lstrip()
        if len(head) >= least:
            return head
        read *= 2
    return clean(text)


def _spaced(text: str) -> str:
    """Replace what is not seen by single spaces; plain text, which is most, is looked at faster."""
    if text.isascii() and text.isprintable() and "  " not in text:
        return text
    return _HIDDEN.sub(" ", text)


def line_head(text: str) -> str:
    """Return cleaned text as it may begin a line: a bracket there would read as a header or tag."""
    return _BRACKET.sub("(", text) or "?"


def lean_head(text: str) -> str:
    """Return cleaned text as it may begin a line of the format `text`.

    There a sign would read as the time of a bucket, and `Age` as the line that windows begin with.
    """
    folded = unicodedata.normalize("NFKC", text)
    if _AGE.match(folded):
        return "a" + folded[1:]
    return "(" + text[1:] if folded.startswith(_MARKS) else text or "?"


def without_tags(text: str) -> str:
    """Return cleaned text in which `‹` replaces the `<` of whatever would read as a delimiter."""
    if text.isascii():
        return _TAG.sub("‹", text)
    folded = unicodedata.normalize("NFKC", text)
    return _TAG.sub("‹", folded) if _TAG.search(folded) else text
