"""Settings of the command `push`."""

import re
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from smbfast.base.config import Settings, build, joined
from smbfast.base.hub_names import is_repository, model_inside
from smbfast.base.replace import MANIFEST


class PushSettings(Settings):
    """Put a trained model on the Hugging Face Hub, privately unless --public says otherwise.

    What goes out are the files of the model and its card, and nothing else: weights, configuration,
    tokenizer or vocabulary, smbfast.json, a manifest and README.md. A folder that holds anything
    else is refused, as is a vocabulary with entries of fewer than ten training patients and a card
    that counts 1 to 10 people. Paths of this machine are replaced by a name. Every file is listed
    with its size before anything is sent.

    You are known to the Hub by `hf auth login` or the variable HF_TOKEN; no file of smbfast holds a
    token. Weights may hold traces of the records that they were trained on: who may not have the
    data may not have the model, unless the agreement about the data says otherwise.
    """

    epilog: ClassVar[str] = """Examples

  See what would go out, without a network:
    python -m smbfast.push runs/default/final --to=owner/name --dry-run

  Put an adapter into a private repository, naming its backbone for others:
    python -m smbfast.push runs/lora/final --to=owner/name --base=Qwen/Qwen3-8B

  Use it on another machine, at one commit, tag or branch of it:
    python -m smbfast.embed --model=owner/name@main --data=MEDS_FOLDER --at=last \\
        --out=now.parquet"""

    model: Path = Field(
        description="Folder of a trained model: `final` in a run folder, one of those under "
        "`best`, or `merged`. It may stand alone, without --model=."
    )
    to: str = Field(
        description="Repository of the Hugging Face Hub, as owner/name. It is made if it is not "
        "there; an older model in it is replaced in one commit, and stays in its history."
    )
    public: bool = Field(
        False,
        description="Whether everybody may read the repository. It needs a license, and a "
        "repository that is public already is refused without it. --public is short for it.",
    )
    license: str | None = Field(
        None,
        description="License that the card names, as the Hub writes it, such as apache-2.0 or "
        "other. The agreement about the data and the license of the backbone decide what it may "
        "be. `none` takes what the card says.",
    )
    base: str | None = Field(
        None,
        description="Hub name of the backbone of an adapter that was trained on a folder of this "
        "machine, such as Qwen/Qwen3-8B. If its files are in the cache of this machine, its "
        "weights are compared with those of the run. `none` leaves a name of the Hub as it is, "
        "and of a folder its last part, which tells others nothing.",
    )
    target: bool = Field(
        False,
        description="Whether the EMA teacher, target.safetensors, goes out too. Embeddings of "
        "--encoder=target need it, and nothing else does; it can be larger than an adapter by far. "
        "--target is short for it.",
    )
    message: str = Field(
        "A model of smbfast", min_length=1, description="Text of the commit in the repository."
    )
    dry_run: bool = Field(
        False,
        description="Whether to stop once everything is checked and listed. No network is used "
        "then. --dry-run is short for it.",
    )

    @field_validator("to", "base")
    @classmethod
    def _is_of_the_hub(cls, name: str | None) -> str | None:
        if name is not None and not is_repository(name):
            raise ValueError("must be owner/name of the Hugging Face Hub, and no folder here")
        return name

    @field_validator("license")
    @classmethod
    def _is_one_word(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,39}", name):
            raise ValueError("must be an identifier of the Hub, such as apache-2.0 or other")
        return name

    @field_validator("model")
    @classmethod
    def _is_a_model(cls, folder: Path) -> Path:
        if (folder / MANIFEST).is_file():
            return folder
        raise ValueError(
            f"must be the folder of a trained model; it has no {MANIFEST}{model_inside(folder)}"
        )


def push_arguments(argv: list[str]) -> PushSettings:
    """Return the settings that a command line gives: one word names the model, the rest are keys.

    Raises:
        ValueError: an unknown key, a wrong value, or more than one word.
    """
    keys = PushSettings.model_fields
    settings: list[str] = []
    words: list[str] = []
    for word in joined(PushSettings, argv):
        is_key = word.startswith("-") or word.partition("=")[0].replace("-", "_") in keys
        (settings if is_key else words).append(word)
    if len(words) > 1:
        raise ValueError(
            "one word, the folder of a model, must stand without a key, got "
            f"{len(words)}: {' '.join(words)}; the repository is --to=OWNER/NAME"
        )
    return build(PushSettings, {"model": words[0]} if words else {}, settings)
