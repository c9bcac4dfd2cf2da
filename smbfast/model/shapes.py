"""The encoder of a run as shapes alone: on `meta`, from a configuration, without any weights.

What does not depend on values follows from it: FLOPs, memory, the bytes that ranks exchange.
"""

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoConfig

from smbfast.base import hub_names
from smbfast.model.backbone import (
    HfModule,
    PatientEncoder,
    compute_dtype,
    lm_of,
    lora_config,
    scratch_config,
)
from smbfast.model.codes_head import CodesHead
from smbfast.settings import TrainSettings

ON_GPU = torch.device("cuda")


def backbone_config(settings: TrainSettings, vocabulary: int) -> HfModule:
    """Return the configuration of a run's backbone, of which nothing but config.json is read.

    Args:
        vocabulary: number of ids of a model made from scratch.

    Raises:
        ValueError: if `model.path` has no configuration that transformers knows.
    """
    path = settings.model.path
    if path is None:
        return scratch_config(settings, vocabulary)
    options = hub_names.options_of(path)
    try:
        return AutoConfig.from_pretrained(path, **options)
    except Exception as error:  # transformers raises many types; the user can correct the path
        raise ValueError(
            f"`model.path` {path} must have a config.json that transformers knows; reading it "
            f"failed with {type(error).__name__}"
        ) from None


def encoder_on_meta(
    settings: TrainSettings,
    config: HfModule,
    *,
    new_rows: int = 0,
    num_horizons: int = 0,
    num_classes: int = 0,
    device: torch.device = ON_GPU,
    layers: int | None = None,
) -> PatientEncoder:
    """Return the encoder that a run would train, without weights.

    Args:
        config: of the backbone; it is not changed.
        new_rows: number of token rows that LoRA trains.
        num_horizons: that positions are paired with; 0 if nothing is predicted within horizons.
        num_classes: of codes to come; 0 without that loss.
        device: that the run would train on, which decides dtypes.
        layers: of the backbone; None for as many as it has.

    Raises:
        ValueError: if LoRA finds none of its targets.
    """
    config = _with_layers(config, layers or config.num_hidden_layers)
    whole = settings.trains == "all"
    dtype = torch.float32 if whole else _base_dtype(settings, device)
    latent = settings.objective.jepa == "horizon" and any(p.w_jepa > 0 for p in settings.phases)
    with torch.device("meta"):
        lm: HfModule = lm_of(config, dtype=dtype)
        compute = None
        if whole:
            compute = compute_dtype(settings.model.dtype, config.hidden_size, device)
        else:
            rows = list(range(config.vocab_size - new_rows, config.vocab_size))
            try:
                lm = get_peft_model(lm, lora_config(lm, settings.lora, rows))
            except ValueError:
                raise ValueError(
                    "lora.targets must name linears of the backbone; it has none of "
                    f"{settings.lora.targets}"
                ) from None
        predictor = settings.objective.predictor_layers
        encoder = PatientEncoder(lm, predictor, compute, num_horizons=num_horizons * latent)
    if num_classes:
        weighted = settings.objective.codes_weight == "prevalence"
        prevalence_HK = np.full((num_horizons, num_classes), 0.1)
        encoder.codes = CodesHead(encoder.width, prevalence_HK, weighted).to("meta")
    return encoder


def _base_dtype(settings: TrainSettings, device: torch.device) -> torch.dtype:
    if settings.model.dtype != "auto":
        return getattr(torch, settings.model.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _with_layers(config: HfModule, layers: int) -> HfModule:
    changed = type(config).from_dict(config.to_dict())
    changed.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        changed.layer_types = config.layer_types[:layers]
    return changed
