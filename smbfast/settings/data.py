"""Settings of the data: what a run trains on, and the commands `prepare` and `simulate`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self, TypeGuard

from pydantic import Field, field_validator

from smbfast.base.config import Settings
from smbfast.base.files import read_regular
from smbfast.base.nearest import Foreign
from smbfast.base.workers import engine_of
from smbfast.settings import names

VOCABULARY = "codes.json"  # the vocabulary of the format codes, beside a tokenizer's files
LEAST_WINDOW = 128  # tokens, with the format codes
MOST_IN_A_MOMENT = 84  # events, the most that was seen in demo data


class DataSettings(Settings):
    """Where the patients come from, and how their events become tokens.

    In the format `codes` each event is one token, in strict order of time. In the text formats the
    events of a patient are sorted into buckets, which are spans of time such as a day, and each
    bucket is written as text: its time, then sections such as conditions or drugs with one line
    for each code. The tokens of all events or buckets, in order, are the patient's timeline. A
    window is the part of a timeline that one forward sees; a long timeline has several.

    The tokens are written to disk once, as token shards. Shards that were made from other data or
    with other settings of the text are refused when a run begins.
    """

    path: str | None = Field(
        None,
        description="Folder of a MEDS dataset, with its parquet files under data/train, "
        "data/tuning and data/held_out. `none` simulates a cohort of patients with a fictional "
        "disease (see the group `cohort`).",
    )
    prepared: str | None = Field(
        None,
        description="Folder of the token shards. If it holds finished shards, for example those "
        "that `python -m smbfast.prepare` wrote, they are checked against the settings and used; "
        "if not, they are written there. `none` means the folder `prepared` inside the run folder.",
    )
    split: tuple[float, float, float] | None = Field(
        None,
        description="For a dataset without splits: the fractions of patients that become train, "
        "tuning and held_out, such as 0.8,0.1,0.1. A hash of the patient's id decides, so that a "
        "patient stays in one split whatever other patients there are. `none` takes the splits of "
        "the dataset, folders or metadata/subject_splits.parquet; where there are any, fractions "
        "are refused. The probe needs the same fractions.",
    )
    window: int = Field(
        1024,
        ge=64,
        description="Context length: the largest number of tokens in a window, including the "
        "demographics that are repeated at its start. A longer window shows the model more of a "
        "patient's history and costs more time and memory; it may not exceed the number of "
        "positions that a pretrained backbone allows.",
    )
    format: Literal["text", "codes", "text-paper"] | None = Field(
        None,
        description="How events become tokens. `codes` makes one token of an event: its code, with "
        "a bin of its number or its text value, in strict order of time. `text` writes lines of "
        "text, which a pretrained language model can read; `text-paper` is the longer layout of "
        "the method's paper, with a date, opening and closing tags and commas. `none` means "
        "`codes` for a model made from scratch and `text` for a pretrained backbone. In a "
        "pretrained backbone `codes` adds a token for each code and bin, whose rows are trained.",
    )
    stride: int | None = Field(
        None,
        ge=1,
        description="Distance in tokens from one training window to the next within a timeline. "
        "`none` is data.window: windows follow each other, and an epoch reads each token once. "
        "With half a window most tokens are read twice, the second time behind more of their "
        "history, and predicted once. Decision nodes have windows of their own.",
    )
    gap_floor: int | Literal["auto"] = Field(
        "auto",
        description="With format `codes`: the shortest time between two moments, in minutes, that "
        "has a token of its own. Shorter gaps have none, which saves tokens. `auto` is what a "
        "model that knows codes was trained with, else 5 minutes, and 360 for a simulated cohort, "
        "whose visits last a day.",
    )
    max_codes: int = Field(
        32768,
        ge=1,
        description="With format `codes`: the largest number of codes that have tokens of their "
        "own, those of most training subjects. Other codes, and codes of fewer than ten training "
        "subjects, share the token of an ancestor, of the beginning of the code or of its section.",
    )
    bucket: Literal["auto", "day", "hour", "moment"] = Field(
        "auto",
        description="With the text formats: the span of time whose events are written together, "
        "under one header. A `day` suits outpatient and ward records, an `hour` intensive care; "
        "`moment` makes a bucket of every distinct time. Shorter buckets keep the order of events "
        "more exactly and need more tokens; a window can be divided into context and future only "
        "between two buckets. `auto` takes the longest with which at least 90 % of the tokens of "
        "up to 1,000 training patients lie in windows that can be divided, or else `moment`.",
    )
    delimiters: Literal["special", "text"] = Field(
        "special",
        description="With the text formats: how section tags such as <drugs> enter the vocabulary. "
        "`special` adds each tag as one new token, whose embedding is trained; `text` writes tags "
        "as ordinary text, which takes several tokens for each but leaves the vocabulary of a "
        "pretrained backbone as it is.",
    )
    sections: str | None = Field(
        None,
        description="TOML file of rules that send codes to sections of the text by the beginning "
        "of the code. `none` uses the rules that come with the package; to change them, copy "
        "smbfast/configs/sections.toml, edit the copy and name it here.",
    )
    terminal: list[str] = Field(
        ["MEDS_DEATH"],
        description="Codes after which nothing is to come: a record ends with one of them because "
        "the patient has died, or has left the hospital in data of single stays. Behind it, what "
        "follows is known to be empty; behind the last event of any other record it is unknown. "
        "Objectives that read ahead (objective.jepa=horizon, w_codes) need it. A code matches "
        "whole, or up to a boundary such as //, like section rules.",
    )
    values_per_line: int | None = Field(
        None,
        ge=1,
        description="With the text formats: the largest number of values written for one code in "
        "one bucket. The latest values are written; the others are left out and counted, which "
        "makes records of frequent measurements shorter. `none` writes all values.",
    )
    text_chars: int = Field(
        64,
        ge=0,
        description="The largest number of characters written of a text value, such as a free-text "
        "result. Longer values are cut and counted; 0 leaves text values out.",
    )
    vocab_size: int = Field(
        4096,
        ge=400,
        description="With the text formats: the largest number of tokens in the byte-level BPE "
        "tokenizer that is trained on the train split when there is no pretrained backbone. A "
        "larger vocabulary makes sequences shorter and the embedding table larger. It has no "
        "effect with a pretrained backbone, which brings its own tokenizer.",
    )
    workers: int = Field(
        0,
        ge=0,
        description="Number of processes that turn MEDS files into token shards before training, "
        "one file per process at a time; 0 means one for each CPU core that the command may use, "
        "and never more than there are files. Set it where a job may use only part of the cores, "
        "or if memory runs out. Datasets of up to two million events are always prepared in one "
        "process. The result does not depend on it, and loading during training has nothing to do "
        "with it.",
    )

    @field_validator("split", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return whole_fractions(value)

    @field_validator("gap_floor")
    @classmethod
    def _no_negative_gap(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError("must be 0 minutes or more, or auto")
        return value

    def decided(self, backbone: str | None, *, simulated: bool = False) -> Self:
        """Return the settings with the format and the shortest gap decided.

        Args:
            backbone: the pretrained model or its tokenizer; None for a model made from scratch.
            simulated: whether the patients are simulated, with one visit a day at most.

        Raises:
            ValueError: if the backbone knows codes and no text, windows are too short for codes, or
                the stride would leave tokens out.
        """
        if self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"data.stride must be at most data.window, {self.window}, or tokens between "
                f"windows would be left out; got {self.stride}"
            )
        knows_codes = backbone is not None and (Path(backbone) / VOCABULARY).is_file()
        chosen = self.format or ("text" if backbone and not knows_codes else "codes")
        if knows_codes and chosen != "codes":
            raise ValueError(
                f"data.format must be codes with {backbone}, which has a vocabulary of codes; got "
                f"{chosen}"
            )
        gap_floor = self.gap_floor
        if gap_floor == "auto":
            gap_floor = 360 if simulated else 5
            if backbone is not None and knows_codes:
                gap_floor = _trained_floor(Path(backbone), gap_floor)
        if chosen == "codes" and self.window < LEAST_WINDOW:
            raise ValueError(
                f"data.window must be at least {LEAST_WINDOW} with data.format=codes, because a "
                f"moment may hold {MOST_IN_A_MOMENT} events; got {self.window}"
            )
        return self.model_copy(update={"format": chosen, "gap_floor": gap_floor})

    @property
    def folder(self) -> Path:
        """The folder of the dataset; call it once `path` is known (a simulated cohort fills it)."""
        assert self.path is not None
        return Path(self.path)


def whole_fractions(value: object) -> object:
    """Return fractions of train, tuning and held_out as they are.

    Raises:
        ValueError: they are not three numbers from 0 to 1 that add up to 1, or train or tuning has
            none.
    """
    if value is None:
        return value
    numbers = [float(v) for v in value if isinstance(v, (int, float))] if _is_row(value) else []
    fits = len(numbers) == 3 and all(0 <= v <= 1 for v in numbers) and all(numbers[:2])
    if not fits or abs(sum(numbers) - 1) > 1e-6:
        raise ValueError(
            "must be three fractions, of train, tuning and held_out, that add up to 1, such as "
            f"0.8,0.1,0.1; only that of held_out may be 0; got {_written(value)}"
        )
    return numbers


def _written(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _is_row(value: object) -> TypeGuard[list | tuple]:
    return isinstance(value, (list, tuple)) and len(value) == 3


def _trained_floor(model: Path, default: int) -> int:
    """Return the shortest gap that a model was trained with, if its folder tells it."""
    try:
        record = json.loads(read_regular(model / "smbfast.json"))
        floor = record["options"]["gap_floor"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return default
    return floor if isinstance(floor, int) and floor >= 0 else default


class CohortSettings(Settings):
    """The simulated cohort that a run trains on when `data.path` is `none`.

    Its disease is fictional; it serves to try the program and to compare models with the best
    possible prediction, which is known for simulated patients.
    """

    patients: int = Field(
        2400,
        ge=20,
        description="Number of simulated patients, all splits together: about 60 % fall into "
        "train, 15 % into tuning and 25 % into held_out. More patients train a better model, take "
        "longer and make the results of the probes more certain.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed of the simulated cohort, independent of the seed of the run. "
        "Another seed is another cohort; with the same seed patient i is the same person, however "
        "many patients there are.",
    )
    held_out: int = Field(
        0,
        ge=0,
        description="Number of further simulated patients, all of them held_out, beside those of "
        "cohort.patients. They cost seconds to simulate and make the figures of --final more "
        "certain; without --final none of them is embedded. No patient is trained on or tuned on "
        "because of them.",
    )

    @property
    def folder_name(self) -> str:
        """The name of the cohort's folder in a run, which says which cohort it is."""
        further = f"-{self.held_out}" if self.held_out else ""
        return f"cohort-{self.patients}-{self.seed}{further}"


class PrepareSettings(DataSettings):
    """Turn a MEDS dataset into token shards.

    Training does this by itself. Run this command first for a large dataset, then give the folder
    to training as --data.prepared=OUT together with the same settings of the text. If the command
    was stopped, give it again: it goes on with the files that are left. Started several times at
    once, on one machine or on many that share the folder, it divides the work.

    Without a tokenizer the format is `codes`: each event becomes one token, of a vocabulary that
    is fitted on the train split. With the tokenizer of a pretrained backbone the format is `text`:
    events are sorted into buckets, which are spans of time such as a day, and each bucket is
    written as its time and sections such as conditions or drugs with one line for each code.
    """

    epilog: ClassVar[str] = """Examples

  Prepare a dataset for a small model made from scratch, and see how its codes become tokens:
    python -m smbfast.prepare --path=MEDS_FOLDER --out=shards --explain

  Prepare it for a pretrained backbone, with its tokenizer and hourly buckets:
    python -m smbfast.prepare --path=MEDS_FOLDER --out=shards --tokenizer=Qwen/Qwen3-8B \\
        --bucket=hour

  Prepare it on four machines of a Slurm cluster, each with its own cores:
    srun --ntasks=4 --cpus-per-task=32 python -m smbfast.prepare --path=MEDS_FOLDER --out=shards

  Prepare it on a Dask cluster that is running:
    python -m smbfast.prepare --path=MEDS_FOLDER --out=shards --on=dask://HOST:8786"""
    foreign: ClassVar[Mapping[str, Foreign]] = names.PREPARE

    path: str = Field(
        description="Folder of the MEDS dataset to read, with its parquet files under data/train, "
        "data/tuning and data/held_out."
    )
    prepared: str | None = Field(
        None,
        description="Without effect in this command, which writes to `out`. The key exists because "
        "training has it in the same group of settings.",
    )
    window: int = Field(
        1024,
        ge=64,
        description="The context length for which `bucket=auto` chooses a bucket and the table of "
        "windows is written; give that of the training, which then starts at once. The shards hold "
        "whole timelines: training with another --data.window writes a table of its own.",
    )
    out: str = Field(
        description="Folder to write, with the tokenizer and the token shards. If it holds shards "
        "that the same settings made, only the missing ones are written; shards made with other "
        "settings are refused."
    )
    tokenizer: str | None = Field(
        None,
        description="Folder or Hugging Face Hub name of a tokenizer, normally that of the "
        "pretrained backbone to be trained. `none` is for a model made from scratch: "
        "a vocabulary of codes is fitted on the train split, or with a text format a byte-level "
        "BPE tokenizer of `vocab_size` tokens is trained on it.",
    )
    explain: bool = Field(
        False,
        description="Whether to print how the codes of the train split became tokens: a row for "
        "each family of codes with its section, its tokens and bins, its share of the events, and "
        "the shares that have the token of an ancestor, of the beginning of the code, of the "
        "family or of the section. Families of fewer than ten patients are not shown.",
    )
    on: str | None = Field(
        None,
        description="Address of a running cluster whose workers do the work of this command, "
        "dask://HOST:PORT of a Dask scheduler or ray://HOST:PORT of the client server of Ray. They "
        "must see `path` and `out` under the same names and have smbfast installed. `none` works "
        "with `workers` on this machine; the shards are the same.",
    )
    splits: list[Literal["train", "tuning", "held_out"]] = Field(
        ["train", "tuning"],
        min_length=1,
        description="Splits of the dataset to prepare. Training needs train and tuning; held_out "
        "patients are embedded directly from the MEDS files and need no shards.",
    )

    @field_validator("on")
    @classmethod
    def _an_address(cls, value: str | None) -> str | None:
        if value is not None:
            engine_of(value)
        return value


class SimulateSettings(Settings):
    """Write a simulated cohort as a MEDS dataset with labels and the best possible predictions.

    The disease is fictional and stands for no real population. The folder `oracles` holds, for
    every label, the probability that an observer who knows the simulation computes from the same
    history (the Bayes filter): no model can predict better on average. A decision node is a patient
    and a time at which a prediction is asked for.
    """

    epilog: ClassVar[str] = """Examples

  Write 5,000 patients and train on them:
    python -m smbfast.simulate --out=cohort --patients=5000
    python -m smbfast.train --data.path=cohort --probe.labels=death_1y"""
    foreign: ClassVar[Mapping[str, Foreign]] = names.SIMULATE

    out: Path = Field(description="Folder to write the dataset to; it must not exist yet.")
    patients: int = Field(
        3000,
        ge=1,
        description="Number of simulated patients, all splits together: about 60 % fall into "
        "train, 15 % into tuning and 25 % into held_out.",
    )
    held_out: int = Field(
        0,
        ge=0,
        description="Number of further patients, all of them held_out. Their ids follow those of "
        "`patients`, who stay as they are.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed of the cohort. Another seed is another cohort; with the same seed "
        "patient i is the same person, however many patients there are.",
    )
    nodes: int = Field(
        1,
        ge=1,
        le=8,
        description="Number of decision nodes (prediction times) drawn for each patient. Two draws "
        "that fall on the same time count as one node. More nodes give more label rows; the events "
        "stay the same.",
    )
    patients_per_file: int = Field(
        16384,
        ge=1,
        description="Number of patients in one parquet file, rounded up to a multiple of 256. One "
        "file is held in memory at a time, so a smaller number needs less memory; the patients "
        "stay the same.",
    )
