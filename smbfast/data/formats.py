"""The formats in which events become tokens, behind one surface: text, and one token an event.

What knows the ids is the encoder: a tokenizer for text, a vocabulary for codes. What makes the
timelines is the serializer. Everything downstream takes either of each.
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from smbfast.data.codes.serializer import CodeSerializer, code_preamble
from smbfast.data.codes.vocabulary import CodeVocabulary
from smbfast.data.meds import MedsDataset
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import Serializer, SerializerOptions, text_preamble
from smbfast.data.timelines import Preamble
from smbfast.data.tokens import TextEncoder
from smbfast.settings import DataSettings
from smbfast.settings.data import VOCABULARY

VERSIONS = {"text": 1, "text-paper": 2, "codes": 1}  # of the tokens: part of every fingerprint
MINUTE = 60_000_000  # microseconds

PatientEncoding = TextEncoder | CodeVocabulary
PatientSerializer = Serializer | CodeSerializer


def sections_of(data: DataSettings) -> SectionMap:
    """Return the section rules that the settings name, or those of this package."""
    return SectionMap.read(Path(data.sections) if data.sections else None)


def options_of(data: DataSettings, bucket: str | None = None) -> dict:
    """Return what decides how events become tokens, beside the vocabulary, as JSON values.

    Args:
        data: with its format decided (`DataSettings.decided`).
        bucket: what `bucket=auto` chose.
    """
    if data.format == "codes":
        return {
            "gap_floor": data.gap_floor,
            "max_codes": data.max_codes,
            "text_chars": data.text_chars,
            "terminal": list(data.terminal),
        }
    names = ("format", "values_per_line", "text_chars", "terminal")
    return {"bucket": bucket or data.bucket} | {name: getattr(data, name) for name in names}


def read_encoding(
    folder: Path, tokenizer: PreTrainedTokenizerBase, record: dict
) -> PatientEncoding:
    """Return what knows the ids, from the folder of a tokenizer.

    Args:
        record: of prepared shards or of a model, for its `data_format` and `delimiters`.

    Raises:
        ValueError: the vocabulary of the format codes is missing or damaged.
    """
    if record.get("data_format") == "codes":  # an earlier version's record does not have it
        return CodeVocabulary.read(folder / VOCABULARY)
    return TextEncoder(tokenizer, record["delimiters"])


def serializer_of(
    dataset: MedsDataset, encoding: PatientEncoding, record: dict
) -> PatientSerializer:
    """Return the serializer whose options and section rules are in the record of shards or a model.

    Raises:
        ValueError: the record was made with another version of the format or another vocabulary.
    """
    name = record.get("data_format", "text-paper")
    expected = {"format": VERSIONS[name], "encoder": encoding.fingerprint()}
    for key, value in expected.items():
        if record.get(key) != value:
            raise ValueError(
                f"the {key} of {name} must be {value}, the record says {record.get(key)}: "
                "prepare the data and train again with this version"
            )
    return make_serializer(
        dataset, encoding, SectionMap(**record["section_rules"]), record["options"]
    )


def make_serializer(
    dataset: MedsDataset, encoding: PatientEncoding, sections: SectionMap, options: dict
) -> PatientSerializer:
    """Return the serializer of a dataset; `options` are those of `options_of`."""
    if isinstance(encoding, CodeVocabulary):
        # the parents of rare codes are not in a vocabulary's file: they come with the data
        vocabulary = CodeVocabulary(encoding.content, dataset.parents)
        gap_floor, terminal = options["gap_floor"] * MINUTE, options.get("terminal", ())
        return CodeSerializer(vocabulary, gap_floor=gap_floor, terminal=terminal)
    return Serializer(
        encoding, sections, dataset.descriptions, dataset.parents, SerializerOptions(**options)
    )


def preamble_of(encoding: PatientEncoding, options: dict) -> Preamble:
    """Return what every window begins with; `options` are those of `options_of`."""
    if isinstance(encoding, CodeVocabulary):
        return code_preamble(encoding)
    return text_preamble(encoding, options["format"])
