"""Opens a prepared folder: what knows the ids, the token shards of each split, their record."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypedDict

from transformers import PreTrainedTokenizerBase

from smbfast.base.counts import share
from smbfast.base.files import digest_of, verify_folder
from smbfast.base.runtime import few
from smbfast.batch import NewToken
from smbfast.data.code_classes import CodeClasses
from smbfast.data.formats import (
    VOCABULARY,
    PatientEncoding,
    PatientSerializer,
    preamble_of,
    read_encoding,
    serializer_of,
)
from smbfast.data.horizon_counts import candidates, chosen
from smbfast.data.horizons import Horizons
from smbfast.data.meds import MedsDataset
from smbfast.data.prepare_record import read_record, require_record
from smbfast.data.shards import LAYOUT, Shard
from smbfast.data.style import SPAN
from smbfast.data.timelines import Preamble
from smbfast.data.tokens import load_tokenizer
from smbfast.data.verified import verify_files
from smbfast.data.window_index import VERSION, cut_settings, stored_pairs, stored_windows
from smbfast.data.windows import WindowSet
from smbfast.settings import ObjectiveSettings

CLASSES = "classes.json"  # of codes to come
SHARED = ("ancestor", "prefix", "family", "section")  # rungs on which rare codes share a token


class ShardRecord(TypedDict):
    """What prepare.json says of a shard, so that a start opens none."""

    file: str
    sha256: str
    timelines: int
    tokens: int


def require_current(folder: Path, record: dict) -> None:
    """Raise a ValueError if an earlier version wrote a prepared folder."""
    if "data_format" not in record or record.get("layout") != LAYOUT:
        raise ValueError(
            f"{folder} was prepared by an earlier version: the layout of its shards must be "
            f"{LAYOUT}, its record says {record.get('layout')}; prepare the data again, into "
            "another folder"
        )


@dataclass(frozen=True)
class Prepared:
    """What training, embedding and reports read: never the MEDS files themselves."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    encoding: PatientEncoding
    record: dict  # prepare.json
    spare: Path | None = None  # folder for what belongs into `folder` where that is not writable

    @classmethod
    def open(
        cls, folder: Path, verify: Literal["once", "all"] = "once", spare: Path | None = None
    ) -> "Prepared":
        """Open a finished folder.

        Args:
            verify: whether to read only shards that were never verified, or changed since, or all.
            spare: folder that takes what is recorded and made here if `folder` cannot be written.

        Raises:
            ValueError: the folder is missing or unfinished, an earlier version wrote it, a shard is
                damaged, or its tokenizer is not the one that its shards were made with.
        """
        folder = Path(folder)
        try:
            record = read_record(folder / "prepare.json")
        except ValueError:
            raise ValueError(
                f"{folder} must be a finished folder of `python -m smbfast.prepare`; it has no "
                "readable prepare.json"
            ) from None
        require_current(folder, record)
        require_record(folder / "prepare.json", record)
        verify_folder(folder / "tokenizer")
        tokenizer, _ = load_tokenizer(str(folder / "tokenizer"), record["delimiters"])
        encoding = read_encoding(folder / "tokenizer", tokenizer, record)
        if encoding.fingerprint() != record["encoder"]:
            raise ValueError(f"{folder}: the tokenizer is not the one its shards were made with")
        opened = cls(folder, tokenizer, encoding, record, spare)
        shards = (shard for of_split in record["shards"].values() for shard in of_split)
        files = {shard["file"]: shard["sha256"] for shard in shards}
        verify_files(folder, files, opened._folders, every=verify == "all")
        return opened

    @property
    def _folders(self) -> list[Path]:
        return [self.folder, *([self.spare] if self.spare else [])]

    def shards(self, split: str) -> list[Shard]:
        """Return the shards of a split, none of which is opened before it is used."""
        records: list[ShardRecord] = self.record["shards"].get(split, [])
        return [Shard(self.folder / r["file"], r["timelines"], r["sha256"]) for r in records]

    def windows(
        self,
        split: str,
        window: int,
        objective: ObjectiveSettings,
        stride: int | None = None,
        horizons: Horizons | None = None,
        classes: CodeClasses | None = None,
    ) -> WindowSet:
        """Return the training windows of a split, from the table on disk, which is made if need be.

        Args:
            window: context length in tokens.
            objective: which decides the windows that have a cut.
            stride: the distance of windows in tokens; None is `window`.
            horizons: of an objective that reads ahead (`horizons`); None where none does.
            classes: of the codes that it reads (`classes`); None where it reads none.
        """
        cut = window, self.preamble, objective, stride
        ahead = (horizons.names, horizons.bucket, horizons.censored) if horizons else None
        made_of = self._digest(split, window, stride or window, cut_settings(objective), ahead)
        name = f"windows/{made_of}/{split}.windows"
        return stored_windows(self._folders, name, self.shards(split), *cut, horizons, classes)

    def horizons(self, objective: ObjectiveSettings) -> Horizons:
        """Return the horizons of an objective, with the shares of pairs that the train split knows.

        Their counts are on disk, and are made if need be.

        Raises:
            ValueError: a named horizon is shorter than a bucket, or `auto` has none to take.
        """
        wanted, span = objective.horizons, SPAN[self.options.get("bucket", "moment")]
        bucket = span if span > 1 else 0
        if wanted == "auto":
            horizons = candidates(bucket, objective.censored)
        else:
            horizons = Horizons(tuple(wanted), bucket, objective.censored)
            if horizons.spans_H[0] < bucket:
                raise ValueError(
                    f"objective.horizons must not be shorter than data.bucket, which is "
                    f"{self.options['bucket']} in {self.folder}; got {wanted[0]}"
                )
        made_of = self._digest("train", horizons.names, bucket, horizons.censored)
        name = f"windows/{made_of}/pairs.json"
        counts = stored_pairs(self._folders, name, self.shards("train"), horizons)
        horizons = replace(horizons, shares=counts)
        return chosen(horizons) if wanted == "auto" else horizons

    def classes(self) -> CodeClasses:
        """Return the classes of codes to come, which were found in the train split.

        Raises:
            ValueError: there is none, or their file is missing or damaged.
        """
        classes = CodeClasses.read(self.folder / CLASSES, self.record["classes"])
        if not classes.num_classes:
            raise ValueError(
                f"{self.folder} must hold a code that ten training subjects have, for w_codes; it "
                "has none. Prepare the train split too, or train without w_codes"
            )
        return classes

    def _digest(self, split: str, *parts: object) -> str:
        """Return a digest of the shards of a split and of what is made of them."""
        record = self.record
        made_by = [record[key] for key in ("data_format", "format", "encoder", "options")]
        shards = [shard["sha256"] for shard in record["shards"].get(split, [])]
        return digest_of(VERSION, made_by, shards, *parts)

    @property
    def new_tokens(self) -> list[NewToken]:
        """The tokens that are new to the backbone, whose rows are trained.

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
        return preamble_of(self.encoding, self.options)

    @property
    def vocabulary_file(self) -> Path | None:
        """The vocabulary of the format codes, which a model needs beside its tokenizer."""
        file = self.folder / "tokenizer" / VOCABULARY
        return file if self.record["data_format"] == "codes" else None

    @property
    def tokens_an_event(self) -> float:
        """Tokens of the timelines of the train split over its events."""
        counts = self.record["counts"]["train"]
        return counts["tokens"] / max(counts["events"], 1)

    @property
    def format_text(self) -> str:
        """The format in words, such as `text by day` or `codes`."""
        name, bucket = self.record["data_format"], self.record["options"].get("bucket")
        return f"{name} by {bucket}" if bucket else name

    @property
    def size_text(self) -> str:
        """The format and its tokens an event in words."""
        return f"{self.format_text}, {self.tokens_an_event:.2f} an event{self.split_text}"

    @property
    def split_text(self) -> str:
        """How a dataset without splits was divided, in words; empty for one with splits."""
        fractions = self.record.get("split")  # an earlier version's record does not have it
        if not fractions:
            return ""
        return f", split {','.join(f'{f:g}' for f in fractions)} by a hash of the subject"

    @property
    def share_coarse(self) -> float:
        """Share of events on the token of a family or a section; 0 in the text formats."""
        counts = self.counts
        return (counts["family"] + counts["section"]) / max(counts["events"], 1)

    def left_out(self) -> str:
        """Return a line about what of the events does not reach the model as it is."""
        counts = self.counts
        events = max(counts["events"], 1)
        unmapped = sum(self.record["unmapped"].values()) / events
        parts = [f"events of codes without a section rule {unmapped:.2%}"]
        if self.record["data_format"] == "codes":
            shares = (f"{name} {share(counts[name], events, 2)}" for name in SHARED)
            parts.append(f"events on a shared token: {', '.join(shares)}")
            parts += [
                f"numbers without a bin {few(counts['numbers_without_bin'])}",
                f"text values in no token {few(counts['texts_without_token'])}, and "
                f"{few(counts['texts_dropped_for_number'])} beside a number",
            ]
        else:
            most = self.record["options"]["values_per_line"]
            if most is not None:
                parts.append(
                    f"values beyond the latest {most} of a line {few(counts['values_left_out'])}"
                )
            parts.append(f"texts cut {few(counts['texts_cut'])}")
        parts += [
            f"values that were NaN or infinite {few(counts['nonfinite_values'])}",
            f"births after a subject's first event {few(counts['late_births'])}",
            f"subjects without an event with a date {few(counts['subjects_without_events'])}",
        ]
        unread = self.record.get("unread", {})  # an earlier version's record does not have it
        if unread.get("subjects"):
            parts.append(f"subjects in no split {few(unread['subjects'])}")
        if unread.get("files"):
            parts.append(f"files in the folder of no split {unread['files']:,}")
        return "; ".join(parts)

    def serializer(self, dataset: MedsDataset) -> PatientSerializer:
        """Return a serializer that gives exactly the tokens of the shards."""
        return serializer_of(dataset, self.encoding, self.record)

    @property
    def options(self) -> dict:
        """The serializer's options."""
        return dict(self.record["options"])
