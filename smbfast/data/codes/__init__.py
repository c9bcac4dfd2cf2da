"""The data format `codes`: one token an event, from a vocabulary fitted on training subjects."""

from smbfast.data.codes.alphabet import GAP_EDGES, CodeToken
from smbfast.data.codes.statistics import CodeStatistics
from smbfast.data.codes.summary import FamilySummary, summary
from smbfast.data.codes.vocabulary import CodeVocabulary, EncodedEvents

__all__ = [
    "GAP_EDGES",
    "CodeStatistics",
    "CodeToken",
    "CodeVocabulary",
    "EncodedEvents",
    "FamilySummary",
    "summary",
]
