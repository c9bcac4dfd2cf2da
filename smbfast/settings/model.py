"""Settings of what is trained: the backbone, its LoRA adapters and the two losses."""

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from smbfast.base.config import Settings
from smbfast.base.schema import or_one_item


class ModelSettings(Settings):
    """The backbone: a pretrained causal language model, or a small Qwen3 made from scratch.

    `model.path` decides between the two. The keys `hidden`, `layers`, `heads`, `kv_heads` and `ffn`
    are the sizes of the model made from scratch and have no effect on a pretrained one.
    """

    path: str | None = Field(
        None,
        description="Folder or Hugging Face Hub name of a pretrained causal language model with "
        "safetensors weights, such as Qwen/Qwen3-8B. `none` makes a small Qwen3 with random "
        "weights. Qwen3, Qwen2, Llama and Mistral without sliding windows are supported by the "
        "shared forward; other models need objective.path=reference. The folder of a LoRA adapter, "
        "such as `final` of an earlier run, stands for its backbone together with model.adapter.",
    )
    adapter: str | None = Field(
        None,
        description="Folder of a PEFT LoRA adapter of model.path with which training goes on; "
        "`none` begins with a new adapter. The adapter's own rank, scale and layers replace those "
        "of the group `lora`, and it must be plain LoRA: no dropout, DoRA or biases. Embeddings of "
        "tokens that are new to the backbone are trained beside it, whether or not it has them.",
    )
    train: Literal["lora", "all"] | None = Field(
        None,
        description="Which weights are trained. `lora` freezes the backbone and trains small "
        "low-rank adapters, `all` trains every weight, held in float32. `none` means `lora` if "
        "model.path is given and `all` for a model made from scratch.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Number format that the backbone computes in; adapters, predictor and whatever "
        "else is trained are stored and updated in float32. Under LoRA it is also the format of "
        "the frozen weights: `auto` is bfloat16 on a GPU and float32 on a CPU, and bfloat16 needs "
        "half the memory for the backbone. Where all weights are trained (a model made from "
        "scratch, or model.train=all) they are float32, and are copied to bfloat16 for each "
        "forward: `auto` does so on a GPU if the hidden states are at least 512 wide. Choose "
        "float32 to rule out rounding, if time and memory allow it.",
    )
    recompute: Literal["none", "mlp", "full"] = Field(
        "none",
        description="Activation checkpointing (also called gradient checkpointing): what the "
        "backward pass computes again instead of holding it in memory. `none` holds everything "
        "and is fastest, `mlp` computes the inner activations of the MLPs again, and `full` "
        "everything in a layer but its input, which needs the least memory and the most time. "
        "`mlp` and `full` need objective.path=shared; the results change by rounding at most.",
    )
    fsdp: bool = Field(
        False,
        description="Whether the processes of torchrun share the frozen backbone (FSDP2), for one "
        "that does not fit on a GPU: each holds an equal part of every layer, and a layer is "
        "gathered just before it runs. Embeddings and head are whole on every GPU. Steps take "
        "longer by what the connection between the GPUs costs; checkpoints and results are as "
        "without it, but for rounding. It needs torchrun, LoRA, objective.path=shared and a "
        "tracked target.",
    )
    hidden: int = Field(
        128,
        ge=8,
        description="Width of the hidden states of a model made from scratch, and of the "
        "embeddings it gives. It must be a multiple of twice model.heads. A wider model can learn "
        "more and is slower.",
    )
    layers: int = Field(
        4,
        ge=1,
        description="Number of transformer layers of a model made from scratch. Time and memory of "
        "a step grow in proportion to it.",
    )
    heads: int = Field(
        4,
        ge=1,
        description="Number of attention heads (query heads) in each layer of a model made from "
        "scratch. Each head is model.hidden / model.heads wide, which must be an even number.",
    )
    kv_heads: int = Field(
        2,
        ge=1,
        description="Number of key and value heads in each layer of a model made from scratch. It "
        "must divide model.heads: each is shared by a group of query heads (grouped-query "
        "attention), and fewer of them make a smaller model.",
    )
    ffn: int = Field(
        384,
        ge=8,
        description="Inner width of the MLP (the feed-forward part) in each layer of a model made "
        "from scratch, usually two to four times model.hidden.",
    )


class LoraSettings(Settings):
    """Low-rank adapters (LoRA) on a frozen backbone, as PEFT makes them.

    Each adapted weight matrix W acts as W + alpha / r * B A, where only the two narrow matrices A
    and B are trained. These settings are used only when LoRA is trained, which is the default with
    model.path, and no existing adapter is given as model.adapter; otherwise they are ignored.
    """

    r: int = Field(
        16,
        ge=1,
        description="Rank of the adapters: the narrow dimension of the matrices A and B. A larger "
        "rank lets the adapters change the backbone in more ways and needs more memory.",
    )
    alpha: int = Field(
        32,
        ge=1,
        description="Numerator of the scale alpha / r by which the adapters' output is multiplied. "
        "A larger value strengthens the adapters, much like a larger learning rate. To keep that "
        "scale when you change lora.r, change alpha by the same factor. It is not used with "
        "model.adapter, which brings its own.",
    )
    dropout: float = Field(
        0.0,
        description="Dropout inside the adapters. Only 0 is accepted: both losses come from one "
        "shared forward, which agrees with separate forwards only if nothing is dropped at random.",
    )
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Names of the linear layers that get an adapter, as the backbone calls them. "
        "The default is all seven of a Qwen3 or Llama layer, attention and MLP. Fewer of them need "
        "less memory; embeddings and the language-model head cannot be named.",
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, value: float) -> float:
        if value != 0:
            raise ValueError(
                "must be 0: with dropout one shared forward would differ from separate forwards"
            )
        return value


class ObjectiveSettings(Settings):
    """The two losses: where a record is cut, what is masked and what JEPA has to predict.

    SFT (supervised fine-tuning) is next-token prediction on a window. JEPA predicts hidden states
    instead of tokens. A cut splits a window into the context the model sees and the future it must
    predict; it lies at the end of a bucket, in the format codes at any event time. Part of the
    future is masked, and a small predictor must give, at each masked token, the hidden state that
    the EMA teacher computes from the unmasked window. The EMA teacher, also called the target
    encoder, is an exponential moving average of the weights of the encoder in training, the online
    encoder.

    The window as it is forms a trunk; the masked future of each cut is a branch, which sees the
    trunk up to the cut and itself. Trunks and branches of many patients lie in one row without
    padding (sequence packing) under shared-prefix attention, also called tree attention, so that
    one forward serves SFT and every cut.
    """

    path: Literal["shared", "reference"] = Field(
        "shared",
        description="How the losses are computed. `shared` takes one packed forward for SFT and "
        "all cuts, with tree attention; `reference` takes three padded forwards in plain PyTorch, "
        "with the same losses and gradients but several times slower. Use `reference` to check a "
        "result or for a backbone that the shared forward does not support.",
    )
    self_check: bool = Field(
        True,
        description="Whether to compare the losses and all gradients of the shared forward with "
        "the reference before the first step of each phase, on a few of its windows, and to stop "
        "with an error if they differ by more than rounding. `false` skips the comparison; it has "
        "no effect with objective.path=reference.",
    )
    mask_ratio: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the eligible tokens of a future that are masked, at least one for "
        "each cut. Eligible are the tokens of events; dates, section tags, gaps, ages and "
        "demographics are never masked. A larger share leaves less of the future visible and is "
        "harder; 1 masks every eligible token.",
    )
    skeleton: Literal["visible", "hidden"] = Field(
        "visible",
        description="What a masked future shows beside its events: dates, section tags, gaps, ages "
        "and demographics. `visible` leaves them as they are, so the model sees when something "
        "happens and of which kind, as in the paper. `hidden` replaces them by the mask vector "
        "too; only the events that are not masked are read then, and with objective.mask_ratio=1 "
        "nothing but the length of the future is known. They are never predicted.",
    )
    mask_unit: Literal["token", "event", "span"] = Field(
        "token",
        description="What is masked as one piece: single tokens, as in the paper; an event, which "
        "is a whole line of the text (one code with its values); or a span, a run of tokens of "
        "random length. Larger pieces are harder to guess from the tokens beside them; the number "
        "of masked tokens stays the same.",
    )
    span: int = Field(
        8,
        ge=1,
        description="Mean length of a masked run, in tokens, with objective.mask_unit=span; "
        "without effect otherwise.",
    )
    jepa: Literal["mask", "horizon"] = Field(
        "mask",
        description="What JEPA predicts of the future. `mask`, the paper's, predicts the EMA "
        "teacher's states at masked tokens behind a cut. `horizon` predicts, from the state at the "
        "end of a bucket (in the format codes, of a moment), the teacher's mean state over each of "
        "objective.horizons; it needs no masked copy of the future and no second pass, and trains "
        "the very state that is embedded. Cuts and masks, and the keys about them, are for `mask` "
        "alone.",
    )
    horizons: Literal["auto"] | list[str] = Field(
        "auto",
        description="Spans of time behind a position that horizon JEPA and w_codes look at, such "
        "as 6h,3d,30d (h for hours, d for days). `auto` takes the four longest of 6h, 1d, 3d, 7d, "
        "30d, 180d, 365d and 1095d of which at least a fifth of the pairs of position and horizon "
        "can be used on the training split, and says so at the start. In a text format a horizon "
        "is at least a bucket long, and only whole buckets inside it count.",
        json_schema_extra=or_one_item,
    )
    censored: Literal["drop", "none"] = Field(
        "drop",
        description="What becomes of a pair whose horizon ends after the last event of a record. "
        "`drop` leaves it out, as nobody knows what was to come; after one of data.terminal, such "
        "as death, it is known that nothing comes, so these pairs stay. `none` leaves no pair out, "
        "as if nothing happened after the last event.",
    )
    positions: int = Field(
        32,
        ge=1,
        description="Largest number of positions of a window from which horizon JEPA and w_codes "
        "predict in a step. In a window with more ends of buckets, they are drawn anew at each "
        "step.",
    )
    codes_weight: Literal["none", "prevalence"] = Field(
        "none",
        description="How codes weigh in the loss of w_codes. `none` weighs them alike, so common "
        "codes decide; `prevalence` divides by the square root of a code's prevalence in the "
        "horizon (at least 0.001), so that rare codes count for more.",
    )
    cuts: int = Field(
        1,
        ge=1,
        description="Number of cuts for each window and step. Each cut has its own masked future "
        "(a branch). More cuts give JEPA more to predict from the same window and cost only the "
        "tokens of their branches; a window with fewer permitted places gets fewer cuts.",
    )
    context: tuple[float, float] = Field(
        (0.25, 0.9),
        description="Smallest and largest share of a window that may lie before a cut, from 0 to 1 "
        "and in this order. A cut is drawn with equal chance among the bucket ends in this range. "
        "Lower values ask for longer futures from less context.",
    )
    min_future: int = Field(
        16,
        ge=1,
        description="Smallest number of tokens that must follow a cut; later places of a window "
        "are not cut. Windows without a permitted cut have no part in JEPA, so lower it if most "
        "windows are that short.",
    )
    horizon: int | None = Field(
        None,
        ge=1,
        description="Number of tokens after a cut that form its future; `none` takes all up to the "
        "end of the window. A short horizon asks for the near future only and makes each cut, "
        "whose branch is then short, cheap.",
    )
    sft_labels: Literal["all", "future"] = Field(
        "all",
        description="Which tokens of a window SFT predicts. `all` trains on every token; `future` "
        "only on those after the window's earliest cut, the part that JEPA predicts too, and then "
        "a window without a cut has no part in SFT.",
    )
    target_norm: Literal["layer", "none"] = Field(
        "layer",
        description="What is done to the EMA teacher's hidden states before the squared error is "
        "taken. `layer` applies a layer norm without trained weights, which holds the loss on one "
        "scale; `none` compares with the states as they are. Choose `none` only to reproduce the "
        "paper's formula literally.",
    )
    tau: float = Field(
        0.996,
        ge=0,
        le=1,
        description="Decay of the EMA teacher: at each optimizer step its weights become tau * "
        "teacher + (1 - tau) * online encoder. Closer to 1 the teacher changes more slowly (0.996 "
        "averages about the last 250 steps); 0 copies the online encoder, 1 never changes.",
    )
    tau_end: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Decay of the EMA teacher at the last step with JEPA. It is reached in a "
        "straight line from objective.tau at the first step with JEPA; steps of phases without "
        "JEPA, which have no teacher, do not count. `none` leaves the decay at objective.tau "
        "throughout.",
    )
    target_form: Literal["auto", "merged", "tracked"] = Field(
        "auto",
        description="How the EMA teacher stores the average of LoRA-adapted weights. `merged` "
        "holds the average of each whole matrix in float32, 4 bytes an element; over a bfloat16 "
        "backbone that is twice the memory of those matrices, and the teacher computes with the "
        "average rounded to bfloat16. `tracked` holds a low-rank average of the adapters and uses "
        "the frozen backbone's own matrices; an upper bound of its relative error is written to "
        "metrics.jsonl as target_error at each evaluation. `auto` is tracked with LoRA, but "
        "merged for a float32 model so narrow that the low-rank columns would add 20 % or more to "
        "the teacher's matrix products. With model.train=all the teacher is always merged, and "
        "tracked is refused.",
    )
    tracked_rank: int = Field(
        4,
        ge=1,
        description="Rank of the EMA teacher's low-rank average, as a multiple of the adapters' "
        "rank: 4 with lora.r of 16 is rank 64, and never more than the matrix has. A larger rank "
        "has a smaller error (target_error in metrics.jsonl) and needs more memory and time. It "
        "is used where the teacher is tracked, which `auto` normally chooses with LoRA; a very "
        "large value can make `auto` choose merged for a float32 model.",
    )
    tracked_every: int = Field(
        4,
        ge=1,
        description="Each optimizer step adds columns to the EMA teacher's low-rank average; after "
        "this many steps the average is truncated back to its rank. A larger number truncates less "
        "often, and its columns take more memory and time in each forward: this times the "
        "adapters' rank, which may be 16384, or as much as a matrix is wide. It is used where the "
        "teacher is tracked, which `auto` normally chooses with LoRA.",
    )
    predictor_layers: int = Field(
        2,
        ge=1,
        description="Number of linear layers in the predictor, the small network that maps the "
        "online encoder's state at a masked token to the EMA teacher's. The paper has 2, with a "
        "GELU in between. Only JEPA uses the predictor; embeddings are taken before it.",
    )

    @field_validator("horizons", mode="before")
    @classmethod
    def _are_spans(cls, value: object) -> object:
        if value in ("auto", ["auto"]):  # a command line gives a list
            return "auto"
        names = [str(name) for name in (value if isinstance(value, list) else [value])]
        hours = [hours_of(name) for name in names]
        if not hours or sorted(set(hours)) != hours:
            raise ValueError("must be auto, or different spans in ascending order such as 7d,30d")
        return names

    @model_validator(mode="after")
    def _mixes_horizon(self) -> "ObjectiveSettings":
        if self.jepa == "horizon" and self.predictor_layers < 2:
            raise ValueError(
                "objective.jepa=horizon needs objective.predictor_layers of at least 2: with one "
                "linear layer, patient and horizon never meet"
            )
        return self

    @field_validator("context")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1] <= 1:
            raise ValueError(
                f"must be two shares in order, such as 0.25,0.9, got {value[0]:g},{value[1]:g}"
            )
        return value


def hours_of(name: str) -> int:
    """Return the hours of a span such as `6h` or `30d`.

    Raises:
        ValueError: if it is not a whole number from 1 with h or d behind it.
    """
    match = re.fullmatch(r"([1-9]\d{0,5})([hd])", name)
    if not match:
        raise ValueError(f"must be auto, or spans such as 6h or 30d (hours, days), got {name}")
    return int(match[1]) * (24 if match[2] == "d" else 1)
