"""Settings of the commands that read what a run has written: `embed`, `probe` and `report`."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from smbfast.base.config import Settings, build, joined
from smbfast.base.nearest import Foreign
from smbfast.settings import names
from smbfast.settings.data import whole_fractions
from smbfast.settings.pools import Pool


class EmbedSettings(Settings):
    """Compute embeddings of patients at given moments, from what was known by then.

    A decision node is a patient and a time at which a prediction is asked for. Its embedding sees
    the patient's events up to that time and nothing later. Nodes are the rows of MEDS label files
    (--labels) or given directly (--at); no outcome is needed for either. The result is one parquet
    file with the columns subject_id, prediction_time, split and embedding, one row for each
    distinct node, however many tasks ask for it. Its metadata say what made it.
    """

    epilog: ClassVar[str] = """Examples

  Embed new patients as they are now, and as they were at a date:
    python -m smbfast.embed --model=runs/default/final --data=MEDS_FOLDER --at=last \\
        --out=now.parquet
    python -m smbfast.embed --model=runs/default/final --data=MEDS_FOLDER --at=2024-01-31 \\
        --out=then.parquet

  Embed the decision nodes of two tasks with the final model of a run:
    python -m smbfast.embed --model=runs/default/final --data=MEDS_FOLDER \\
        --labels=mortality_1y,readmission_30d --out=embeddings.parquet

  Embed by eight GPUs of this machine; examples/slurm/embed.sbatch is a job array:
    torchrun --nproc-per-node=8 -m smbfast.embed --model=runs/default/final \\
        --data=MEDS_FOLDER --at=last --out=now.parquet

  Embed with an adapter whose backbone is in another folder than during training:
    python -m smbfast.embed --model=final --model.path=Qwen3-8B --data=MEDS_FOLDER --at=last \\
        --out=now.parquet"""
    aliases: ClassVar[dict[str, str]] = {"model.path": "backbone"}
    foreign: ClassVar[Mapping[str, Foreign]] = names.EMBED

    model: str = Field(
        description="Folder of a trained model: `final` in a run folder, or one of those under "
        "`best`; or owner/name or owner/name@revision of the Hugging Face Hub. It brings its "
        "tokenizer, its context length and the form of the text."
    )
    backbone: str | None = Field(
        None,
        description="Folder or hub name of the backbone of a LoRA adapter, if it is no longer "
        "where it was during training; --model.path, its name in training, is the same. Its "
        "weights must be those of the run, by the digest that the run recorded. `none` takes it "
        "from where it was.",
    )
    data: str = Field(
        description="Folder of the MEDS dataset that holds the patients' events. Splits are not "
        "needed: parquet files under data/, or in the folder itself, are enough."
    )
    labels: list[str] = Field(
        [],
        description="Tasks whose decision nodes are embedded: folders of MEDS label files, or "
        "names of folders under <data>/labels. Their outcomes are not read and may be missing.",
    )
    at: str | None = Field(
        None,
        description="Moments at which patients are embedded, in place of --labels: `last`, the "
        "time of each patient's last event; a date or time such as 2024-01-31 or "
        "2024-01-31T12:00, for every patient with an event by then (a date alone is the midnight "
        "that begins that day); or a parquet or csv file with the columns subject_id and "
        "prediction_time. Times have no time zone, as those of MEDS.",
    )
    out: str = Field(
        description="Parquet file to write. It is readable by you alone and appears only when it "
        "is complete; an older file of this name is replaced. Until then its embeddings lie in "
        "parts in the folder OUT.parts: the same command started again goes on with them, and "
        "started several times, on any number of machines that share the folder, it divides them. "
        "At the end there must be room for the embeddings three times, because memory does not "
        "hold them."
    )
    encoder: Literal["online", "target"] = Field(
        "online",
        description="Which encoder gives the embeddings: `online`, the one that was trained, or "
        "`target`, its EMA teacher, which is stored only if the model's last phase had JEPA.",
    )
    pool: Pool | None = Field(
        None,
        description="How the hidden states of a node become one embedding: `last` takes the state "
        "at its last token; `mean` the average over all tokens of its window; `layers` that "
        "average after every layer, side by side, which for L layers is L + 1 times as wide; "
        "`spread` the state at the last token beside average, maximum and standard deviation over "
        "the tokens, four times as wide. `none` does as the run did for its own probes.",
    )
    tokens: int = Field(
        16384,
        ge=64,
        description="Largest number of tokens in one forward, with the nodes of many windows "
        "packed together; on a CPU never more than 1,024, which stay in its cache. A longer window "
        "has a forward of its own. Lower it if memory runs out; the embeddings change by rounding "
        "at most.",
    )
    path: Literal["shared", "reference"] = Field(
        "shared",
        description="How nodes are computed. `shared` takes one forward for all nodes of a window, "
        "which read the same history once; `reference` takes a forward for each history and each "
        "node, slower but with the same result. Use `reference` to check, or for a model that the "
        "shared forward does not support.",
    )
    device: str = Field(
        "auto",
        description="Device that computes: `cpu`, `cuda`, or one GPU of several by its number, "
        "such as `cuda:1`. `auto` is the first GPU, or the CPU if there is none; under "
        "torchrun each process has a GPU of its own.",
    )

    @field_validator("out")
    @classmethod
    def _is_parquet(cls, out: str) -> str:
        if not out.endswith(".parquet"):
            raise ValueError("must be the name of a file that ends in .parquet")
        return out

    @model_validator(mode="after")
    def _has_nodes(self) -> "EmbedSettings":
        if bool(self.labels) == (self.at is not None):
            given = "both" if self.labels else "neither"
            raise ValueError(f"one of labels and at must say what is embedded, got {given}")
        return self


class ProbeCommandSettings(Settings):
    """Probe frozen embeddings: what does a linear model read from them about later outcomes?

    Binary tasks (columns subject_id, prediction_time, boolean_value): features are standardised on
    train, and an L2 logistic regression is fitted on train alone, with the penalty that gives the
    least log loss on tuning. Tuning also calibrates its probabilities, and says when boosted trees,
    a second head for the trained model, stop. Reported are AUROC, AUPRC, Brier score and skill, and
    slope and intercept of calibration.

    Time to event (columns subject_id, prediction_time, duration_days, event and, where one event
    rules out another, competing): a Cox regression on all features, fitted on train, with the ridge
    that gives the best partial likelihood on tuning. Reported are the cumulative/dynamic AUC and
    Brier score at three horizons, Harrell's and Uno's C.

    Each task has one verdict, worst first: the trained model against the best baseline by the
    primary figure, AUROC or mean AUC over the horizons, of each patient's first decision node, with
    Holm's correction over the tasks. Groups by node, past events, sex and age stand below.

    Figures and predictions are of tuning, on which models are chosen. Those of held_out are for the
    end: --final gives them, and counts in held_out.json of the run how often it did.

    Intervals (95 %) resample patients, not rows, and differences between models use the same
    resamples.
    """

    epilog: ClassVar[str] = """Examples

  Probe the embeddings of a run on two tasks, beside the same backbone untrained:
    python -m smbfast.probe --data=MEDS_FOLDER --labels=mortality_1y,readmission_30d \\
        --embeddings=runs/x/embeddings/online.parquet \\
        --untrained=runs/x/embeddings/untrained.parquet

  Judge embeddings of all splits on held-out patients, once, at the end:
    python -m smbfast.probe --data=MEDS_FOLDER --labels=mortality_1y --final \\
        --embeddings=all.parquet"""
    foreign: ClassVar[Mapping[str, Foreign]] = names.PROBE

    embeddings: Path = Field(
        description="Parquet file with the embeddings of the trained model, as `python -m "
        "smbfast.embed` or a training run writes it."
    )
    data: Path = Field(
        description="Folder of the MEDS dataset that the labels belong to. Its events give the "
        "baseline of age, sex and counts of codes."
    )
    split: tuple[float, float, float] | None = Field(
        None,
        description="For a dataset without splits: the fractions of patients in train, tuning and "
        "held_out, such as 0.8,0.1,0.1, as the model was trained with them. `none` takes the "
        "splits of the labels and of the dataset.",
    )
    untrained: list[Path] = Field(
        [],
        description="Parquet files with embeddings of the same backbone before training, at the "
        "same decision nodes, one file for each set of first weights; figures are means over them. "
        "A training run writes embeddings/untrained.parquet and, of a backbone made from scratch, "
        "untrained-1.parquet and so on. An empty list leaves this baseline out.",
    )
    model: Path | None = Field(
        None,
        description="Folder of the trained model, such as `final` in a run folder. Its tokens are "
        "counted for the baseline `bag`, which says what the form of the tokens gives without any "
        "training. `none` takes the model of the run that the embeddings lie in; without one the "
        "baseline is left out.",
    )
    beside: list[str] = Field(
        [],
        description="Other models to judge on the same rows, as NAME=PATH, with commas between: "
        "an embeddings file, which is probed alike, or predictions, a parquet file or a folder "
        "such as `predictions` of another run, in the schema that this command writes. Every "
        "judged row must be there.",
    )
    labels: list[str] = Field(
        [],
        description="Tasks to probe: folders of MEDS label files, or names of folders under "
        "<data>/labels. If the list is empty, all tasks under <data>/labels are probed.",
    )
    competing: list[str] = Field(
        [],
        description="Competing events of time-to-event tasks, as TASK=OTHER_TASK: an event of "
        "OTHER_TASK at the same node is one after which that of TASK cannot happen, such as a "
        "discharge alive for a death in hospital. Labels with a column `competing` need none.",
    )
    out: Path | None = Field(
        None,
        description="Folder that receives the results, probe.json, and the predictions of every "
        "model, predictions/<task>/<model>.parquet. `none` means the folder of the embeddings.",
    )
    final: bool = Field(
        False,
        description="Whether the probes are judged on held_out instead of tuning. It is for the "
        "end: who chooses anything by held-out figures needs other patients to judge by. The file "
        "held_out.json, in the folder of the run that wrote the embeddings or else in `out`, "
        "records when and by which command it was asked for. --final is short for it.",
    )
    bootstraps: int = Field(
        1000,
        ge=0,
        description="Number of times the judged patients are resampled for the 95 % intervals of "
        "the primary figure and the metrics of binary tasks. More resamples make the limits "
        "steadier and take longer; 0 gives no intervals and no verdict. Slope and intercept take "
        "at most 200, and of more than 200,000 rows only the primary figure takes them all.",
    )
    cox_bootstraps: int = Field(
        200,
        ge=0,
        description="Number of resamples for the 95 % intervals of metrics of time-to-event tasks "
        "other than the primary one, which take longer to compute; 0 gives no intervals.",
    )
    few_shot: bool = Field(
        False,
        description="Whether binary tasks are also fitted to few rows: to 8, 16, 32, 64 and 128 of "
        "each class of train, and as many of tuning for choices, five times each, for the trained "
        "model, code counts, and boosted trees on counts and values. --few-shot is short for it.",
    )
    seed: int = Field(
        0,
        ge=0,
        description="Random seed of the resamples. The same seed gives the same intervals.",
    )
    small_cells: int = Field(
        10,
        ge=0,
        description="Privacy of small groups: in the printed table and probe.json a count "
        "from 1 to this number appears as <=N, and one that leaves so many of its whole as all "
        "but <=N. 0 shows every count as it is.",
    )

    @field_validator("untrained", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str | Path) else value

    @field_validator("split", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        return whole_fractions(value)


class ReportSettings(Settings):
    """Write the report of one run into its folder, or one page that compares several runs.

    Folders of runs are given as words. One run: report.html in its folder, with losses, signs of
    collapse, probes and data. Training writes it by itself at its end; use this command for a run
    that is under way or was stopped.

    Several runs: how they differ in settings, data and bytes, the first step at which their
    metrics do, losses and health on shared axes, speed, memory, and their probes side by side,
    each run against the first. Differences of probes are paired: by patient and prediction time,
    from the predictions of both runs. Nothing is trained or fitted.

    Pages need no network and no script, and show no count of 1 to 10 people.
    """

    epilog: ClassVar[str] = """Examples

  Write the report of a run that has not finished:
    python -m smbfast.report runs/default

  Compare two runs, or more, with the first:
    python -m smbfast.report runs/jepa runs/sft --out=jepa-sft.html

  Show the predicted risk of one patient over time, beside their events:
    python -m smbfast.report runs/default --patient=1234"""
    foreign: ClassVar[Mapping[str, Foreign]] = names.REPORT

    run: Path = Field(
        Path("runs/default"),
        description="Folder of a training run, as it was given by --run.dir; the first word that "
        "is no setting is short for it. The page is written to report.html in it, replacing an "
        "older one.",
    )
    against: list[Path] = Field(
        [],
        description="Folders of further runs, which are compared with `run`; the other words are "
        "short for it. No folder is changed then, but for a look that --final counts.",
    )
    out: Path | None = Field(
        None,
        description="File to write a comparison of runs or the page of a patient to, ending in "
        ".html; a file that is not such a page of ours is not replaced. `none` means "
        "comparison.html in the current folder, and for a patient patient.html in the folder of "
        "the run.",
    )
    patient: int | None = Field(
        None,
        description="Subject id of a patient of train or tuning whose predicted risks are shown "
        "over time beside their events, on a page of its own. It is asked for by id because the "
        "page shows dates and codes of one person, by which somebody who knows them may recognise "
        "them: it is readable by you alone, says so, and must be handled like the data themselves. "
        "report.html shows such a page of a simulated patient alone. It needs the dataset of the "
        "run, and loads its model.",
    )
    data: Path | None = Field(
        None,
        description="Folder of the MEDS dataset of `patient`, if it is no longer where it was "
        "during training; it must have the fingerprint of the run's data. `none` takes it from "
        "where it was.",
    )
    final: bool = Field(
        False,
        description="Whether figures of held-out patients are shown, where the probes were judged "
        "on them; without it the page leaves them out. Each time is recorded in held_out.json of "
        "each run shown. --final is short for it.",
    )

    @field_validator("out")
    @classmethod
    def _is_page(cls, out: Path | None) -> Path | None:
        if out is not None and out.suffix != ".html":
            raise ValueError("must be the name of a file that ends in .html")
        return out

    @model_validator(mode="after")
    def _is_one_page(self) -> "ReportSettings":
        if self.against and self.patient is not None:
            raise ValueError("patient shows one patient of one run, got several runs")
        if self.patient is None and self.data is not None:
            raise ValueError("data is where a patient is read from, and needs patient")
        if self.out is not None and not self.against and self.patient is None:
            raise ValueError(
                "out names the page of a comparison or of a patient; the report of one run is "
                "written to report.html in its folder"
            )
        return self


def report_arguments(argv: list[str]) -> ReportSettings:
    """Return the settings that a command line gives: words name runs, the rest are settings.

    Raises:
        ValueError: an unknown key, a wrong value, or a run that is named both ways.
    """
    keys = ReportSettings.model_fields
    settings: list[str] = []
    words: list[str] = []
    for word in joined(ReportSettings, argv):
        name, given_value, _ = word.partition("=")  # a folder may be called `run`
        is_key = word.startswith("-") or (given_value and name.replace("-", "_") in keys)
        (settings if is_key else words).append(word)
    given = {word.lstrip("-").partition("=")[0] for word in settings}
    if words and (twice := sorted(given & {"run", "against"})):
        raise ValueError(f"runs must be named as words or by `{twice[0]}`, not by both")
    values: dict = {"run": words[0], "against": words[1:]} if words else {}
    return build(ReportSettings, values, settings)
