"""The online encoder: a Hugging Face causal LM with LoRA on a frozen base, or a small one whole.

transformers and PEFT load the model, and `smbfast.model.decoder` runs its layers on packs. Inputs
are embeddings, because a learned mask vector replaces the embedding of a masked token.

Legend: B padded sequences, T positions (of a padded sequence, or tokens of a pack), D width,
V vocabulary, M masked tokens, R rows of the token embedding that are trained beside LoRA.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from smbkernels.attention import Segments
from torch import Tensor, nn
from torch.func import functional_call
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from smbfast.base import hub_names
from smbfast.base.files import read_regular
from smbfast.batch import NewToken
from smbfast.model.codes_head import CodesHead
from smbfast.model.decoder import Each, HfModule, PackedDecoder, Recompute
from smbfast.model.quiet import own_words, require_whole
from smbfast.model.sharding import is_shared_out, load_shared_out
from smbfast.model.vocabulary import fit_vocabulary
from smbfast.settings import LoraSettings, TrainSettings

_MOST_ALPHA = 1e6  # of a LoRA scale; a larger one is a mistake and overflows: our choice
WIDE = 512  # smallest width of a model trained whole that computes in bf16 on a GPU: our choice


class Predictor(nn.Sequential):
    """The JEPA predictor g: Linear d-d and GELU, repeated, then Linear d-d (the paper has two).

    For horizon JEPA it has an embedding of each horizon, `horizon_HD`, which is added to the state
    that it reads: inside g, so that patient and horizon meet in the GELU (our choice).
    """

    horizon_HD: nn.Parameter | None

    def __init__(self, width: int, layers: int, horizons: int = 0) -> None:
        blocks: list[nn.Module] = []
        for _ in range(layers - 1):
            blocks += [nn.Linear(width, width), nn.GELU()]
        super().__init__(*blocks, nn.Linear(width, width))
        # drawn with the size of a normed state
        embedding = nn.Parameter(torch.randn(horizons, width)) if horizons else None
        self.register_parameter("horizon_HD", embedding)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in."""
        return next(self.parameters()).dtype


class PatientEncoder(nn.Module):
    """The online encoder: backbone, predictor and mask vector, which hold all trained weights."""

    def __init__(
        self,
        lm: PreTrainedModel | PeftModel,
        predictor_layers: int,
        compute: torch.dtype | None = None,
        *,
        num_horizons: int = 0,
        codes: CodesHead | None = None,
    ) -> None:
        """Take a causal LM over.

        Args:
            lm: with LoRA, or one whose weights are all trained.
            predictor_layers: number of linears in the predictor.
            compute: dtype to which layers and embeddings are cast in each forward, so that weights
                in fp32 keep what an update adds and products are bf16's. None computes with the
                weights as they are, and is the only choice with LoRA.
            num_horizons: of horizon JEPA; 0 without it.
            codes: the head of codes to come, if the run has that loss.
        """
        super().__init__()
        self.lm = lm
        assert compute is None or not self.is_lora
        self.compute = compute
        table_VD: Tensor = _embeddings(self.base).weight
        self.width = table_VD.shape[-1]
        self.predictor = Predictor(self.width, predictor_layers, num_horizons)
        # drawn with the spread of the embeddings, so that the first norm gets its usual input
        scale = table_VD.detach().float().std()
        self.mask_vector = nn.Parameter(torch.randn(self.width, device=scale.device) * scale)
        self.codes = codes
        self._tokens: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._packed_decoder: PackedDecoder | None = None

    @property
    def num_horizons(self) -> int:
        """The number of horizons that JEPA predicts, 0 without horizon JEPA."""
        return 0 if self.predictor.horizon_HD is None else len(self.predictor.horizon_HD)

    @property
    def is_lora(self) -> bool:
        """Whether the base is frozen and a LoRA adapter is trained."""
        return isinstance(self.lm, PeftModel)

    @property
    def is_shared_out(self) -> bool:
        """Whether ranks share the base, so that all of them must run the same forwards."""
        return is_shared_out(self.decoder)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the layers compute in."""
        dtype: torch.dtype = next(self.decoder.parameters()).dtype
        return self.compute or dtype

    @property
    def base(self) -> PreTrainedModel:
        """The causal LM; with LoRA, the one whose linears hold the adapters."""
        lm: HfModule = self.lm
        return lm.get_base_model() if self.is_lora else lm

    @property
    def decoder(self) -> HfModule:
        """The language model without its head, as transformers made it."""
        return self.base.base_model

    @property
    def packed_decoder(self) -> PackedDecoder:
        """The same layers, run on packs.

        Raises:
            ValueError: if it does not support the backbone's layers.
        """
        if self._packed_decoder is None:
            self._packed_decoder = PackedDecoder(self.decoder)
        return self._packed_decoder

    @property
    def head_VD(self) -> Tensor:
        """The weight of the LM head."""
        return _head(self.base).weight

    def embed(self, ids_BT: Tensor, masked_BT: Tensor | None = None) -> Tensor:
        """Return input embeddings [B, T, D], with the mask vector where `masked_BT` is true."""
        embedded_BTD = self._narrow(_embeddings(self.base)(ids_BT))
        if masked_BT is None:
            return embedded_BTD
        vector_D = self.mask_vector.to(embedded_BTD.dtype)
        return torch.where(masked_BT[..., None], vector_D, embedded_BTD)

    def hidden(
        self, ids_BT: Tensor, masked_BT: Tensor | None = None, *, each: Each | None = None
    ) -> Tensor:
        """Return hidden states after the final norm, [B, T, D], under causal attention.

        Sequences are padded on the right. No real position sees the padding, so attention needs no
        mask for it.

        Args:
            each: called with the states of every layer; see `decode`.
        """
        return decode(self.decoder, self.embed(ids_BT, masked_BT), self.compute, each)

    def packed(
        self,
        ids_T: Tensor,
        position_T: Tensor,
        segments: Segments,
        masked_M: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        recompute: Recompute = "none",
        each: Each | None = None,
    ) -> Tensor:
        """Return hidden states after the final norm, [T, D], of a pack of trunks and branches.

        Args:
            masked_M: rows of T that read the mask vector.
            rows: those of T whose states are wanted, int64; None for all.
            recompute: activation checkpointing; see `smbfast.model.decoder.PackedDecoder`.
            each: called with the states of every layer; see there too.

        Raises:
            ValueError: if the packed decoder does not support the backbone's layers.
        """
        embedded_TD = self.embed_packed(ids_T)
        if masked_M is not None and len(masked_M):
            vector_MD = self.mask_vector.to(embedded_TD.dtype).expand(len(masked_M), -1)
            embedded_TD = embedded_TD.index_copy(0, masked_M, vector_MD)
        run = partial(self.packed_decoder, recompute=recompute, rows_R=rows, each=each)
        return run(embedded_TD, position_T, segments)

    def embed_packed(self, ids_T: Tensor, row_RD: Tensor | None = None) -> Tensor:
        """Return input embeddings [..., D] of ids [...].

        Rows that are trained beside a frozen table are looked up separately. PEFT would copy the
        whole table in each forward, and fill another one with gradients.

        Args:
            row_RD: used in place of the trained rows.
        """
        table = _embeddings(self.base)
        adapter = getattr(table, "token_adapter", None)
        if adapter is None or (row_RD is None and table.disable_adapters):
            return self._narrow(table(ids_T))
        embedded_TD = F.embedding(ids_T, adapter.base_layer.weight)
        slot_T = self._trained_tokens(adapter, ids_T.device)[1][ids_T]
        if row_RD is None:
            row_RD = adapter.trainable_tokens_delta["default"]
        own_TD = F.embedding(slot_T.clamp_min(0), row_RD.to(embedded_TD.dtype))
        return torch.where((slot_T >= 0)[..., None], own_TD, embedded_TD)

    @property
    def head(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The LM head's weight [V, D], and ids [R] and weights [R, D] of its rows that LoRA trains.

        The last two are None where no row is trained separately.
        """
        module = _head(self.base)
        adapter = getattr(module, "token_adapter", None)
        if adapter is None:
            return module.weight, None, None
        weight_VD = adapter.base_layer.weight
        token_R = self._trained_tokens(adapter, weight_VD.device)[0]
        return weight_VD, token_R, adapter.trainable_tokens_delta["default"]

    def _narrow(self, embedded: Tensor) -> Tensor:
        return embedded if self.compute is None else embedded.to(self.compute)

    def _trained_tokens(self, adapter: HfModule, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return ids [R] of trained rows, and each token's index among them or -1: [V]."""
        key = id(adapter), device
        if key not in self._tokens:
            token_R = torch.tensor(adapter.token_indices["default"], device=device)
            size = adapter.base_layer.weight.shape[0]
            slot_V = torch.full((size,), -1, device=device)
            slot_V[token_R] = torch.arange(len(token_R), device=device)
            self._tokens[key] = token_R, slot_V
        return self._tokens[key]

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Return the linears with a LoRA adapter by their name in `decoder`."""
        return {n: m for n, m in self.decoder.named_modules() if isinstance(m, LoraLayer)}

    def trained_rows(self) -> tuple[list[int], Tensor] | None:
        """Return ids and rows [R, D] of the token embeddings trained beside LoRA; None without."""
        adapter = getattr(_embeddings(self.base), "token_adapter", None)
        if adapter is None:
            return None
        return list(adapter.token_indices["default"]), adapter.trainable_tokens_delta["default"]


def decode(
    decoder: HfModule,
    embedded_BTD: Tensor,
    compute: torch.dtype | None = None,
    each: Each | None = None,
) -> Tensor:
    """Return hidden states after the final norm, [B, T, D], by transformers' own forward.

    Args:
        compute: dtype of the copies of the weights that it reads; None for the weights themselves.
        each: called with the states of every layer, [B, T, D], which transformers calls
            `hidden_states`: the input embeddings first, those after the final norm last.
    """
    inputs = {"inputs_embeds": embedded_BTD, "use_cache": False}
    inputs["output_hidden_states"] = each is not None
    if compute is None:
        output = decoder(**inputs)
    else:
        weights = {n: p.to(compute) for n, p in decoder.named_parameters()}
        output = functional_call(decoder, weights, (), inputs)
    if each is not None:
        for states_BTD in output.hidden_states:
            each(states_BTD)
    return output.last_hidden_state


def make_encoder(
    settings: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    new_tokens: Sequence[NewToken] = (),
    *,
    num_horizons: int = 0,
    prevalence_HK: np.ndarray | None = None,
) -> PatientEncoder:
    """Return the online encoder at the start of training, in the dtypes of the settings.

    A frozen base is in the dtype that it computes in; weights that are all trained are fp32.

    Args:
        new_tokens: those that the tokenizer has and the backbone does not know; LoRA trains their
            rows.
        num_horizons: those of horizon JEPA; 0 without it.
        prevalence_HK: of each class of codes to come within each horizon; None without that loss.

    Raises:
        ValueError: if the model cannot be read, LoRA finds none of its targets, or an adapter does
            not fit.
    """
    torch.manual_seed(settings.run.seed)
    lm: PreTrainedModel | PeftModel
    compute = None
    if settings.trains == "lora":
        assert settings.model.path is not None
        dtype, shared = _dtype(settings, device), device if settings.model.fsdp else None
        base = load_lm(settings.model.path, dtype, shared)
        fit_vocabulary(base, tokenizer, new_tokens)
        lm = _with_adapter(base, settings, [token.id for token in new_tokens])
    else:
        if settings.model.path is None:
            lm = _from_scratch(settings, tokenizer)
        else:
            lm = load_lm(settings.model.path, torch.float32)
            fit_vocabulary(lm, tokenizer, new_tokens)
        compute = compute_dtype(settings.model.dtype, lm.config.hidden_size, device)
    _check_embeddings_and_logits(lm)
    if lm.config.max_position_embeddings < settings.data.window:
        raise ValueError(
            f"data.window must be at most {lm.config.max_position_embeddings}, the positions of "
            f"this backbone, got {settings.data.window}"
        )
    layers, weighted = settings.objective.predictor_layers, settings.objective.codes_weight
    encoder = PatientEncoder(lm, layers, compute, num_horizons=num_horizons)
    if prevalence_HK is not None:
        encoder.codes = CodesHead(encoder.width, prevalence_HK, weighted == "prevalence")
    return encoder.to(device)


def _check_embeddings_and_logits(lm: PreTrainedModel | PeftModel) -> None:
    """Raise a ValueError unless embeddings are plain look-ups and logits are states times head."""
    for module in (_embeddings(lm), _head(lm)):
        if isinstance(module, LoraLayer):
            raise ValueError(
                "lora.targets must be linears of the layers; got the embeddings or the LM head, "
                "which train only the rows of new tokens"
            )
    names = ("logits_scaling", "logit_scale", "final_logit_softcapping")
    other = [n for n in names if getattr(lm.config, n, None) not in (None, 1)]
    if getattr(_head(lm), "bias", None) is not None:
        other.append("a bias of the LM head")
    if other:
        raise ValueError(f"the backbone must have plain logits; this one has {', '.join(other)}")


def load_lm(path: str, dtype: torch.dtype, shared: torch.device | None = None) -> PreTrainedModel:
    """Load a causal LM from a folder or the hub, from safetensors only and without remote code.

    Args:
        shared: of a backbone that is shared out over ranks, the device of this rank.

    Raises:
        ValueError: if it cannot be read, or weights are missing.
    """
    options = hub_names.options_of(path)
    require_layers(Path(path))
    try:
        with own_words():
            if shared is None:
                options |= {"use_safetensors": True, "attn_implementation": "sdpa"}
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    path, dtype=dtype, output_loading_info=True, **options
                )
                lm, missing = loaded[0], loaded[1]["missing_keys"]
            else:
                config = AutoConfig.from_pretrained(path, **options)
                with torch.device("meta"):
                    lm, missing = lm_of(config, dtype=dtype), []
    except Exception as error:  # transformers raises many types; the user can correct the path
        raise ValueError(
            f"`model.path` {path} must be a causal LM that transformers loads from safetensors; "
            f"loading failed with {type(error).__name__}"
        ) from None
    require_whole(path, missing)
    return lm if shared is None else load_shared_out(lm, path, shared)


def require_layers(folder: Path) -> None:
    """Refuse a configuration that claims more layers than its weights can be of.

    Layers are made before weights are read, and a number in a file of text could ask for any.

    Raises:
        ValueError: if `num_hidden_layers` is above the number of tensors in the folder.
    """
    try:
        config = json.loads(read_regular(folder / "config.json"))
        layers, num_tensors = config.get("num_hidden_layers", 0), 0
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                num_tensors += len(tensors.keys())
    except (OSError, ValueError, AttributeError, RecursionError, SafetensorError):
        return  # loading says what is wrong with it
    if not isinstance(layers, int) or layers > num_tensors:
        raise ValueError(
            f"{folder / 'config.json'}: num_hidden_layers must be at most the number of tensors "
            f"beside it, {num_tensors}, got {layers}"
        )


def _dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.model.dtype != "auto":
        return getattr(torch, settings.model.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def compute_dtype(chosen: str, width: int, device: torch.device) -> torch.dtype | None:
    """Return what a model that is trained whole computes in, if not with its fp32 weights.

    Args:
        chosen: `model.dtype`: `auto` is bfloat16 on a GPU from a width of `WIDE` on.
        width: of its hidden states.
        device: that it is trained on.
    """
    if chosen == "auto":
        chosen = "bfloat16" if device.type == "cuda" and width >= WIDE else "float32"
    return torch.bfloat16 if chosen == "bfloat16" else None


def _from_scratch(settings: TrainSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ids = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return lm_of(scratch_config(settings, len(tokenizer), **ids))


def scratch_config(settings: TrainSettings, vocabulary: int, **ids: Any) -> Qwen3Config:
    """Return the configuration of a model made from scratch."""
    model = settings.model
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=model.hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.hidden // model.heads,
        intermediate_size=model.ffn,
        max_position_embeddings=max(4096, settings.data.window),
        tie_word_embeddings=True,
        eos_token_id=None,
        **ids,
    )


def lm_of(config: HfModule, **options: Any) -> PreTrainedModel:
    """Return a causal LM of a configuration, with new weights."""
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", **options)


def _with_adapter(lm: PreTrainedModel, settings: TrainSettings, new_tokens: list[int]) -> PeftModel:
    if settings.model.adapter:
        return load_adapter(lm, settings.model.adapter, trainable=True, new_tokens=new_tokens)
    try:
        with own_words():
            return get_peft_model(lm, lora_config(lm, settings.lora, new_tokens))
    except ValueError:
        raise ValueError(
            f"lora.targets must name linears of the backbone; found none of {settings.lora.targets}"
        ) from None


def lora_config(lm: PreTrainedModel, lora: LoraSettings, new_tokens: list[int]) -> LoraConfig:
    """Return PEFT's configuration of a new LoRA adapter; `new_tokens` are ids whose rows train."""
    rows = {name: new_tokens for name in _tables(lm)} if new_tokens else None
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=lora.targets,
        trainable_token_indices=rows,
    )


def load_adapter(
    lm: PreTrainedModel, path: str, *, trainable: bool, new_tokens: Sequence[int] = ()
) -> PeftModel:
    """Load a PEFT LoRA adapter onto its backbone.

    Args:
        trainable: whether the adapter's weights require gradients.
        new_tokens: ids whose rows are to be trained, also where the adapter has none for them. Such
            a row starts as it stands in the backbone. None unless `trainable`.

    Raises:
        ValueError: if it is no plain LoRA adapter, or does not fit the backbone.
    """
    if not (Path(path) / "adapter_model.safetensors").is_file():
        raise ValueError(
            f"`model.adapter` {path} must be a folder with adapter_model.safetensors; it is not"
        )
    try:
        config = PeftConfig.from_pretrained(path)
        _require_numbers(config, Path(path))
        rows = _rows_of(config, lm)
        wanted = {name: list(dict.fromkeys([*rows[name], *new_tokens])) for name in rows}
        with own_words():
            if wanted == rows:
                adapted = PeftModel.from_pretrained(lm, path, is_trainable=trainable)
            else:
                adapted = _with_more_rows(lm, Path(path), config, wanted)
    except Exception as error:  # PEFT raises many types; the user can correct the path
        raise ValueError(
            f"`model.adapter` {path} must be a PEFT adapter of this backbone; loading failed with "
            f"{type(error).__name__}"
        ) from None
    plain = isinstance(config, LoraConfig) and not (
        config.lora_dropout
        or config.use_dora
        or config.modules_to_save
        or config.bias != "none"
        or config.lora_bias
    )
    if not plain:  # the target encoder averages only W + s B A and token rows
        raise ValueError(
            f"`model.adapter` {path} must be plain LoRA: no dropout, DoRA, bias or modules_to_save"
        )
    return adapted


def _require_numbers(config: HfModule, folder: Path) -> None:
    """Raise a ValueError if ranks are not those of the tensors, or scales are no usual numbers."""
    with safe_open(folder / "adapter_model.safetensors", "pt") as tensors:
        names = [name for name in tensors.keys() if "lora_A" in name]  # noqa: SIM118
        ranks = [tensors.get_slice(name).get_shape()[0] for name in names]
    claimed = [config.r, *config.rank_pattern.values()]
    scales = [config.lora_alpha, *config.alpha_pattern.values()]
    if max(claimed) > max(ranks) or not all(abs(scale) < _MOST_ALPHA for scale in scales):
        raise ValueError("rank and scale must be those of the tensors")


def _rows_of(config: HfModule, lm: PreTrainedModel) -> dict[str, list[int]]:
    """Return the ids of the rows that an adapter trains, for the table and for an untied head."""
    tables = _tables(lm)
    rows = getattr(config, "trainable_token_indices", None) or {}
    if not isinstance(rows, dict):  # a list is of the table alone
        rows = {tables[0]: rows}
    return {name: list(rows.get(name, [])) for name in dict.fromkeys([*tables, *rows])}


def _with_more_rows(
    lm: PreTrainedModel, folder: Path, config: HfModule, rows: dict[str, list[int]]
) -> PeftModel:
    """Load an adapter to train it, and `rows` with it; its own rows are the first of them."""
    state = load_file(folder / "adapter_model.safetensors")
    config.trainable_token_indices, config.inference_mode = rows, False
    adapted = get_peft_model(lm, config)
    for name, parameter in adapted.named_parameters():
        if name.endswith("trainable_tokens_delta.default"):
            saved = name.removesuffix(".default")
            row_RD = state.get(saved, parameter[:0])
            state[saved] = torch.cat([row_RD.to(parameter), parameter[len(row_RD) :]]).detach()
    loaded: HfModule = set_peft_model_state_dict(adapted, state)
    if loaded.unexpected_keys:
        raise ValueError("the adapter holds tensors that are not of plain LoRA")
    return adapted


def _tables(lm: PreTrainedModel) -> list[str]:
    """Return the names of the modules whose rows are trained beside LoRA: the table first.

    An untied head is one, as its frozen rows would never predict a new token.
    """
    table, head = _embeddings(lm), _head(lm)
    wanted = [table] if head.weight is table.weight else [table, head]
    names = {id(m): n.rsplit(".", 1)[-1] for n, m in lm.named_modules()}
    return [names[id(module)] for module in wanted]


def _embeddings(lm: PreTrainedModel | PeftModel) -> HfModule:
    return lm.get_input_embeddings()


def _head(lm: PreTrainedModel | PeftModel) -> HfModule:
    return lm.get_output_embeddings()


def merged(encoder: PatientEncoder) -> PreTrainedModel:
    """Return the causal LM with adapters merged in; the encoder cannot be used afterwards."""
    lm: HfModule = encoder.lm
    return lm.merge_and_unload() if encoder.is_lora else lm


def parameter_counts(encoder: PatientEncoder) -> tuple[int, int]:
    """Return the number of trained parameters and of all parameters."""
    sizes = [(p.numel(), p.requires_grad) for p in encoder.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)
