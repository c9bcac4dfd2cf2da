"""Tiny encoders and windows that tests of the model build on."""

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from smbfast.batch import PackedBatch, Timeline
from smbfast.data.loader import Step
from smbfast.data.timelines import Preamble
from smbfast.data.windows import WindowSet
from smbfast.model.backbone import PatientEncoder, lora_config
from smbfast.settings import LoraSettings, ObjectiveSettings

VOCABULARY = 61
DELIMITERS = [50, 51, 52]  # of the tiny vocabulary: rows that LoRA trains


def tiny_lm(kind: str, seed: int = 0, tie: bool = True, **more: float) -> torch.nn.Module:
    """A Qwen3 or Llama of a few thousand parameters, in fp32; `more` goes into its config."""
    torch.manual_seed(seed)
    shape = dict(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.3,  # large enough that every weight matters to the output
    )
    config = {"qwen3": Qwen3Config, "llama": LlamaConfig}[kind](**{**shape, **more})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def tiny_encoder(kind: str = "qwen3", *, lora: bool = False, seed: int = 0) -> PatientEncoder:
    """The encoder of a tiny model; a LoRA one has a delta that is not zero."""
    lm = tiny_lm(kind, seed)
    if lora:
        lm = get_peft_model(lm, lora_config(lm, LoraSettings(r=4, alpha=8), DELIMITERS))
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if "lora_B" in name or "trainable_tokens_delta" in name:
                    parameter.normal_(std=0.2)
    encoder = PatientEncoder(lm, 2)
    return encoder


def window_set(timelines: list[Timeline], objective: ObjectiveSettings) -> WindowSet:
    """Their windows, each of which holds a whole timeline."""
    return WindowSet.of([timelines], 256, Preamble(), objective)


def step_of(index: int, micro_batches: list[PackedBatch]) -> Step:
    """A step of all its micro-batches, with counts of what they hold."""
    by_horizon = [b.pairs.num_by_horizon for b in micro_batches if b.num_latent]
    return Step(
        index,
        micro_batches,
        num_labels=sum(b.num_labels for b in micro_batches),
        num_masked=sum(b.num_masked + b.num_latent for b in micro_batches),
        num_tokens=sum(b.num_trunk_tokens for b in micro_batches),
        num_pairs=sum(b.num_pairs for b in micro_batches),
        num_by_horizon=tuple(map(sum, zip(*by_horizon, strict=True))),
    )


def random_window(
    seed: int,
    buckets: int = 6,
    lines: int = 4,
    *,
    header: int = 3,
    start: int = 0,
) -> Timeline:
    """A window whose buckets are [header token, tag, lines..., tag], with random ids."""
    random = np.random.default_rng(seed)
    ids = [1, *random.integers(3, 50, header - 1).tolist()]
    ends, starts, stops, times = [], [], [], []
    for bucket in range(buckets):
        ids += [2, 50]
        for _ in range(int(random.integers(1, lines + 1))):
            starts.append(len(ids))
            ids += random.integers(3, 50, int(random.integers(1, 5))).tolist()
            stops.append(len(ids))
            times.append(bucket * 86_400_000_000)
        ids.append(51)
        ends.append(len(ids))
    return Timeline(
        subject=seed,
        ids_T=np.array(ids, np.int32),
        header=header,
        bucket_end_B=np.array(ends, np.int32),
        bucket_time_B=np.arange(buckets, dtype=np.int64) * 86_400_000_000,
        bucket_head_B=np.ones(buckets, np.uint16),
        line_start_L=np.array(starts, np.int32),
        line_end_L=np.array(stops, np.int32),
        line_time_L=np.array(times, np.int64),
        line_section_L=np.full(len(starts), 3, np.uint8),
        line_code_L=np.zeros(len(starts), np.int32),
        start=start,
        labels_from=header if start else 0,
    )
