"""Explains a prepared folder: how the codes of its train split became tokens, without a patient."""

import json
from dataclasses import asdict

from smbfast.base.staging import staged
from smbfast.base.workers import Workers, num_cores
from smbfast.data.codes.explain import explain, explain_text, text_summary
from smbfast.data.codes.summary import summary
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.fitting import COUNTS, SUMMARY, code_statistics, count_codes
from smbfast.data.meds import MedsDataset
from smbfast.data.prepared import Prepared
from smbfast.data.sections import SectionMap
from smbfast.data.source_index import FOLDER
from smbfast.settings import DataSettings


def explained(prepared: Prepared, data: DataSettings) -> list[str]:
    """Return a table of families of codes, lines of at most 100 columns.

    The format codes has it from when its vocabulary was made. For text, and for a vocabulary that
    came with a backbone, the events of the train split are counted once more.

    Args:
        data: the settings that the folder was prepared with.
    """
    file = prepared.folder / "tokenizer" / SUMMARY
    counts = prepared.counts
    if file.is_file():
        return explain(json.loads(file.read_text()), counts)
    dataset = MedsDataset.open(data.folder, index=prepared.folder / FOLDER, split=data.split)
    workers = Workers(min(data.workers or num_cores(), len(dataset.splits["train"])))
    with staged(prepared.folder / COUNTS) as staging, workers:
        statistics = code_statistics(data, dataset, count_codes(data, dataset, staging, workers))
    if isinstance(prepared.encoding, CodeVocabulary):
        vocabulary = CodeVocabulary(prepared.encoding.content, dataset.parents)
        return explain([asdict(row) for row in summary(vocabulary, statistics)], counts)
    sections = SectionMap(**prepared.record["section_rules"])
    rows = text_summary(statistics, sections, dataset.parents)
    return explain_text([asdict(row) for row in rows], counts)
