"""FLOPs of whole steps at the shape of Qwen3-8B, counted on `meta`, where nothing is computed.

Each count equals its closed form, and the closed forms stay under the ceilings that one shared
forward has to reach, against three forwards without padding.
"""

from copy import copy
from dataclasses import replace
from functools import cache
from unittest import mock

import numpy as np
import pytest
import torch
from peft import get_peft_model
from smbkernels import use
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Qwen3Config, masking_utils

from smbfast import objective, reference
from smbfast.batch import PackedBatch, WindowPairs, pack_segments
from smbfast.model.averages import Merged
from smbfast.model.backbone import PatientEncoder, Predictor, lora_config
from smbfast.model.codes_head import CodesHead
from smbfast.model.flops import (
    Flops,
    ModelShape,
    online_flops,
    predictor_flops,
    step_flops,
    target_flops,
)
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.settings import LoraSettings

N = 4096
TRACKED = TargetForm("tracked", rank=4, every=4)
ALL = LoraSettings().targets
LONG = (0.5, 0.75)  # shares of context
EIGHT = [int(share * N) for share in np.linspace(0.3, 0.875, 8)]


@cache
def encoder_of(layers: int, targets: tuple[str, ...] = (), rows: bool = True) -> PatientEncoder:
    """Qwen3-8B with LoRA r = 16 and, with `rows`, delimiters of its own; whole without targets."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
        if targets:
            lora = LoraSettings(targets=list(targets))
            lm = get_peft_model(lm, lora_config(lm, lora, [7, 8, 9] if rows else []))
        return PatientEncoder(lm, 2)


def batch_of(cuts: list[int], horizon: int, sft: bool = True) -> PackedBatch:
    """One trunk; half of each future is masked, its last token too."""
    trunk = np.zeros(N if sft else cuts[-1], np.int64)
    lengths = [min(horizon, N - cut) for cut in cuts]
    labels = np.full(len(trunk), 0 if sft else -100)
    labels[-1] = -100
    return pack_segments(
        [trunk],
        [[(c, np.zeros(n, np.int64)) for c, n in zip(cuts, lengths, strict=True)]],
        next_tokens=[labels],
        masked=[[np.arange(n - 1, 0, -2)[::-1] for n in lengths]],
        windows=[np.zeros(N, np.int64)],
    )


def counted(
    path, encoder, batch, form, *, sft=1.0, jepa=1.0, codes=0.0, freeze="none"
) -> dict[str, int]:
    """FLOPs by operation, of losses and their gradients."""
    backends = {"timeline_attention": "sdpa", "lora_linear": "fused"}
    backends["linear_cross_entropy"] = "chunked"
    with mock.patch.object(Merged, "update"):  # has no values to move here
        target = TargetEncoder(encoder, replace(TRACKED, name=form))
    with use(**backends), FlopCounterMode(display=False) as counter:
        scales = {"sft_scale": sft, "jepa_scale": jepa, "codes_scale": codes}
        scales |= {"normalize": True, "freeze": freeze}
        losses = path.losses(encoder, target, batch.to("meta"), **scales)
        torch.autograd.backward([loss for loss in losses if loss is not None])
    encoder.zero_grad(set_to_none=True)
    return {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}


def of(found: dict[str, int], *names: str) -> int:
    return sum(n for op, n in found.items() if any(name in op for name in names))


def pairs(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def three_forwards(
    online: ModelShape, target: ModelShape, batch: PackedBatch, cuts: list[int], horizon: int
) -> Flops:
    """In closed form, without padding: SFT reads the trunk; each cut is read by both encoders."""
    total = Flops()
    if batch.num_labels:
        total += online_flops(online, N, pairs(N), masked=False)
        head = 2 * batch.num_labels * online.vocabulary * online.width
        # PEFT puts trained rows into a copy of the head, whose gradient is then made whole
        total += Flops(head=head * (3 if online.head_trained or online.head_rows else 2))
    for cut in cuts:
        tokens = min(cut + horizon, N)
        total += online_flops(online, tokens, pairs(tokens), masked=True)
        total += target_flops(target, tokens, pairs(tokens))
    return total + predictor_flops(online, batch.num_masked)


VARIANTS = {
    "tracked": (tuple(ALL), True, "tracked"),
    "merged": (tuple(ALL), True, "merged"),
    "no delimiters": (tuple(ALL), False, "tracked"),
    "some linears": (("q_proj", "v_proj", "down_proj"), False, "tracked"),
    "whole": ((), True, "merged"),
}


@pytest.mark.parametrize("losses", ["both", "sft", "jepa"])
@pytest.mark.parametrize("name", VARIANTS)
def test_flops_of_a_shared_step_equal_the_closed_form(name, losses):
    targets, rows, form = VARIANTS[name]
    check_shared(encoder_of(2, targets, rows), form, losses)


@pytest.mark.slow
def test_flops_of_a_shared_step_of_qwen3_8b():
    check_shared(encoder_of(36, tuple(ALL)), "tracked", "both")


def check_shared(encoder: PatientEncoder, form: str, losses: str) -> None:
    cuts = [] if losses == "sft" else [N // 2, 3 * N // 4]
    batch = batch_of(cuts, N // 8, sft=losses != "jepa")
    shape = ModelShape.of(encoder, tracked=TRACKED if form == "tracked" else None)
    expected = step_flops(shape, batch)
    found = counted(objective, encoder, batch, form)
    assert of(found, "timeline_attention") == expected.attention
    assert of(found, "cross_entropy") == expected.head
    products = expected.base + expected.lora + expected.predictor
    assert of(found, "lora_linear", "aten") == products
    assert sum(found.values()) == expected.total
    assert expected.base and bool(expected.predictor) == (losses != "sft")
    assert bool(expected.lora) == encoder.is_lora


@pytest.mark.parametrize(
    ("name", "losses", "freeze"),
    [
        ("tracked", "both", "none"),
        ("whole", "jepa", "none"),
        ("whole", "codes", "none"),
        ("tracked", "both", "decoder"),
        ("whole", "both", "predictor"),
    ],
)
def test_flops_within_horizons_equal_the_closed_form(name, losses, freeze):
    """Beside SFT, which a frozen decoder excludes; what is checkpointed in the head of codes is
    computed twice."""
    targets, rows, form = VARIANTS[name]
    encoder = copy(encoder_of(2, targets, rows))
    encoder._modules = dict(encoder._modules)  # the other tests go on without these
    with torch.device("meta"):
        encoder.predictor = Predictor(encoder.width, 2, 3)
    encoder.codes = CodesHead(encoder.width, np.full((3, 500), 0.1)).to("meta")
    latent, codes = losses != "codes", losses != "jepa"
    batch = pack_segments(
        [np.zeros(n, np.int64) for n in (N, N // 2)],
        [[], []],
        next_tokens=[np.full(n, -100 * (freeze == "decoder")) for n in (N, N // 2)],
        pairs=[spread(7, N), spread(5, N // 2)],
        num_horizons=3 if latent else 0,
    )
    shape = ModelShape.of(encoder, tracked=TRACKED if form == "tracked" else None)
    expected = step_flops(shape, batch, codes=codes, freeze=freeze)
    assert batch.num_latent == (3 * 12 if latent else 0) and batch.num_pairs == 3 * 12
    weights = {"jepa": float(latent), "codes": float(codes), "freeze": freeze}
    found = counted(objective, encoder, batch, form, **weights)
    again = 2 * batch.num_pairs * 256 * 500 if codes else 0
    assert sum(found.values()) == expected.total + again
    assert bool(expected.codes) == codes and bool(expected.means) == latent
    products = 4 if freeze == "predictor" else 6
    assert expected.predictor == products * batch.num_latent * 2 * encoder.width**2


@pytest.mark.parametrize(("name", "freeze"), [("tracked", "decoder"), ("whole", "predictor")])
def test_flops_of_masked_jepa_with_a_part_frozen_equal_the_closed_form(name, freeze):
    """Behind a frozen decoder the first linear of the predictor needs no gradient of its input."""
    targets, rows, form = VARIANTS[name]
    encoder, batch = encoder_of(2, targets, rows), batch_of([N // 2], N // 8, sft=False)
    shape = ModelShape.of(encoder, tracked=TRACKED if form == "tracked" else None)
    expected = step_flops(shape, batch, freeze=freeze)
    assert expected.total < step_flops(shape, batch).total
    assert sum(counted(objective, encoder, batch, form, freeze=freeze).values()) == expected.total


def spread(positions: int, length: int) -> WindowPairs:
    """Positions of a trunk, each with three horizons that reach to its end."""
    token_N = np.linspace(0, length - 2, positions).astype(np.int64)
    pair_P = np.arange(3 * positions)
    none = np.empty(0, np.int64)
    return WindowPairs(token_N, pair_P // 3, pair_P % 3, np.full(len(pair_P), length), none, none)


@pytest.fixture
def on_meta(monkeypatch):
    """transformers looks into position ids for packed rows, which `meta` has no values of."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)


@pytest.mark.parametrize("name", ["tracked", "merged", "no delimiters", "whole"])
def test_flops_of_the_reference_equal_the_closed_form(name, on_meta):
    targets, rows, form = VARIANTS[name]
    check_reference(encoder_of(2, targets, rows), form)


def test_flops_of_the_reference_of_another_depth(on_meta):
    """Beside two layers of the same widths: what a layer adds is counted once for each."""
    check_reference(encoder_of(5, tuple(ALL)), "tracked")


def check_reference(encoder: PatientEncoder, form: str) -> None:
    cut = N // 2
    batch = batch_of([cut], N)
    shape = ModelShape.of(encoder, tracked=TRACKED if form == "tracked" else None)
    expected = three_forwards(shape, shape, batch, [cut], N)
    found = counted(reference, encoder, batch, form)
    products = expected.base + expected.lora + expected.head + expected.predictor
    assert of(found, "aten.mm", "aten.addmm") == products
    # attention on `meta` is dense: all N² pairs, 2 products forward, 4 backward
    dense = 2 * N * N * shape.heads * shape.head_dim * shape.layers
    assert of(found, "aten.bmm") == dense * (3 * 2 + 2 * 4)
    assert sum(found.values()) == products + of(found, "aten.bmm")


@pytest.mark.parametrize("target", ["tracked", "merged"])
@pytest.mark.parametrize("share", LONG)
def test_flops_with_lora_stay_under_their_ceilings(share, target):
    """The reference's target is tracked too, or merged, which costs it less."""
    encoder, cut = encoder_of(36, tuple(ALL)), int(share * N)
    shape = ModelShape.of(encoder, tracked=TRACKED)
    plain = shape if target == "tracked" else ModelShape.of(encoder)
    batch = batch_of([cut], N)
    ours, theirs = step_flops(shape, batch), three_forwards(shape, plain, batch, [cut], N)
    assert ours.base / theirs.base <= {0.5: 0.805, 0.75: 0.705}[share]
    ratio = (ours.base + ours.lora) / (theirs.base + theirs.lora)
    assert ratio <= {0.5: 0.81, 0.75: 0.71}[share]
    ratio = (ours.total - ours.head) / (theirs.total - theirs.head)
    assert ratio <= {0.5: 0.82, 0.75: 0.72}[share]


@pytest.mark.parametrize("share", LONG)
def test_flops_trained_whole_stay_under_their_ceilings(share):
    shape, cut = ModelShape.of(encoder_of(36)), int(share * N)
    batch = batch_of([cut], N)
    ours, theirs = step_flops(shape, batch), three_forwards(shape, shape, batch, [cut], N)
    assert ours.base / theirs.base <= {0.5: 0.79, 0.75: 0.68}[share]


def test_flops_of_eight_cuts():
    shape = ModelShape.of(encoder_of(36, tuple(ALL)), tracked=TRACKED)
    batch = batch_of(EIGHT, N // 8)
    ours, theirs = step_flops(shape, batch), three_forwards(shape, shape, batch, EIGHT, N // 8)
    assert ours.total / theirs.total <= 0.30


def test_flops_of_jepa_alone_share_nothing_at_one_cut():
    """Context and masked future are read once on either path: only more cuts share."""
    shape = ModelShape.of(encoder_of(36, tuple(ALL)), tracked=TRACKED)
    for share in LONG:
        batch = batch_of([int(share * N)], N, sft=False)
        assert step_flops(shape, batch) == three_forwards(shape, shape, batch, [int(share * N)], N)
    batch = batch_of(EIGHT, N // 8, sft=False)
    ours, theirs = step_flops(shape, batch), three_forwards(shape, shape, batch, EIGHT, N // 8)
    assert ours.total / theirs.total <= 0.32
