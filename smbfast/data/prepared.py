"""Opens a prepared folder: the tokenizer, the token shards of each split, how they were made."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from smbfast.base.files import verify_folder
from smbfast.batch import NewToken
from smbfast.data.meds import MedsDataset
from smbfast.data.sections import SectionMap
from smbfast.data.serialize import VERSION, Serializer, SerializerOptions, text_preamble
from smbfast.data.shards import Shard
from smbfast.data.timelines import Preamble
from smbfast.data.tokens import TextEncoder, load_tokenizer
from smbfast.settings import DataSettings


@dataclass(frozen=True)
class Prepared:
    """What training, embedding and reports read: never the MEDS files themselves."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    encoder: TextEncoder
    record: dict  # prepare.json

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        """Open a finished folder.

        Raises:
            ValueError: the folder is missing or unfinished, or its tokenizer is not the one that
                its shards were made with.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "prepare.json").read_text())
            made_by, delimiters = record["encoder"], record["delimiters"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{folder} must be a finished folder of `python -m smbfast.prepare`; it has no "
                "readable prepare.json"
            ) from None
        verify_folder(folder / "tokenizer")
        tokenizer, _ = load_tokenizer(str(folder / "tokenizer"), delimiters)
        encoder = TextEncoder(tokenizer, delimiters)
        if encoder.fingerprint() != made_by:
            raise ValueError(f"{folder}: the tokenizer is not the one its shards were made with")
        return cls(folder, tokenizer, encoder, record)

    def shards(self, split: str) -> list[Shard]:
        """Open the shards of a split, each verified."""
        return [Shard(self.folder / name) for name in self.record["shards"].get(split, [])]

    @property
    def new_tokens(self) -> list[NewToken]:
        """The tokens that the backbone's tokenizer did not have.

        Raises:
            ValueError: if an earlier version wrote them.
        """
        return [NewToken.of_record(record) for record in self.record["new_tokens"]]

    @property
    def counts(self) -> Counter[str]:
        """What was counted while preparing, all splits together."""
        total: Counter[str] = Counter()
        for counts in self.record["counts"].values():
            total.update(counts)
        return total

    @property
    def preamble(self) -> Preamble:
        """What every window begins with."""
        return text_preamble(self.encoder)

    def serializer(self, dataset: MedsDataset) -> Serializer:
        """Return a serializer that gives exactly the tokens of the shards."""
        return serializer_of(dataset, self.encoder, self.record)

    @property
    def options(self) -> dict:
        """The serializer's options."""
        return dict(self.record["options"])


def serializer_of(dataset: MedsDataset, encoder: TextEncoder, record: dict) -> Serializer:
    """Return the serializer whose options and section rules are in the record of shards or a model.

    Raises:
        ValueError: the record was made with another format of the text or another tokenizer.
    """
    expected = {"format": VERSION, "encoder": encoder.fingerprint()}
    for name, value in expected.items():
        if record.get(name) != value:
            raise ValueError(
                f"the {name} of the text must be {value}, the record says {record.get(name)}: "
                "prepare the data and train again with this version"
            )
    sections = SectionMap(**record["section_rules"])
    options = SerializerOptions(**record["options"])
    return Serializer(encoder, sections, dataset.descriptions, dataset.parents, options)


def make_serializer(
    dataset: MedsDataset,
    encoder: TextEncoder,
    sections: str | None,
    options: SerializerOptions,
) -> Serializer:
    """Return the serializer of a dataset, with the section rules of file `sections` or our own."""
    return Serializer(
        encoder,
        SectionMap.read(Path(sections) if sections else None),
        dataset.descriptions,
        dataset.parents,
        options,
    )


def options_of(data: DataSettings) -> SerializerOptions:
    """Return those data settings that the serializer needs."""
    return SerializerOptions(data.bucket, data.values_per_line, data.text_chars)
