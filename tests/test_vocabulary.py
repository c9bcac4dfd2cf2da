"""Rows of new tokens: how they start, that an adapter trains and holds them, that they load again.

Legend: R new tokens, D width.
"""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from smbfast.batch import NewToken
from smbfast.data.formats import VERSIONS
from smbfast.data.sections import SectionMap
from smbfast.model.backbone import PatientEncoder, load_adapter, lora_config, make_encoder
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.model.vocabulary import SHARE, bin_vectors, fit_vocabulary, grow
from smbfast.objective import losses
from smbfast.run.checkpoint import restore_final, save_final
from smbfast.run.optim import make_optimizer, trained
from smbfast.run.step import Updater, backward
from smbfast.settings import LoraSettings, OptimSettings, TrainSettings
from tests import two_paths
from tests.tiny import VOCABULARY, tiny_lm
from tests.windows_of_rows import NUM_ROWS, batch_of_rows

CPU = torch.device("cpu")
WORDS = ["iron", "tablet", "sodium", "glucose", "in", "blood", "drugs"]


def tokenizer_of(names: list[str] | None = None) -> PreTrainedTokenizerFast:
    """One id a word, of the 61 of the tiny vocabulary; `names` are added tokens from 61."""
    vocabulary = {w: i for i, w in enumerate([*WORDS, *(f"w{i}" for i in range(54))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w53"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w53")
    fast.add_tokens(names or [], special_tokens=True)
    return fast


def codes(count: int = NUM_ROWS, bins: int = 10) -> list[NewToken]:
    """New tokens from id 61 on: codes of two words, each of `bins` bins."""
    words = [f"{WORDS[c % 7]} {WORDS[(c // 7) % 7]}" for c in range(-(-count // bins))]
    return [NewToken(VOCABULARY + i, words[i // bins], i % bins, bins) for i in range(count)]


def names_of(tokens: list[NewToken]) -> list[str]:
    return [f"<code {t.id}>" for t in tokens]


def fitted(tokens: list[NewToken], tie: bool = True, dtype: torch.dtype = torch.float32):
    lm = tiny_lm("llama", tie=tie).to(dtype)
    fit_vocabulary(lm, tokenizer_of(names_of(tokens)), tokens)
    return lm


@pytest.mark.parametrize("tie", [True, False])
def test_a_row_starts_as_the_mean_of_its_words_and_the_vector_of_its_bin(tie):
    tokens = [
        NewToken(61, "iron tablet"),
        NewToken(62, ""),
        NewToken(63, "sodium", 0, 3),
        NewToken(64, "sodium", 2, 3),
        NewToken(65, "<code 61> drugs"),  # an added token in a text is only its letters
    ]
    before, lm = tiny_lm("llama", tie=tie), fitted(tokens, tie)
    unknown = 60
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(lm, get)().weight
        assert torch.equal(new[:61], old) and len(new) == 66
        vector = bin_vectors(tokens, float(old.detach().std()), 16)
        letters = old[[unknown, unknown, unknown, unknown, WORDS.index("drugs")]].mean(0)
        for row, mean in (
            (61, old[:2].mean(0)),
            (62, old.mean(0)),
            (63, old[2]),
            (64, old[2]),
            (65, letters),
        ):
            # sums of at most 61 terms
            torch.testing.assert_close(new[row], mean + vector[row - 61], rtol=1e-5, atol=1e-6)
    assert (lm.lm_head.weight is lm.get_input_embeddings().weight) == tie


def test_bins_differ_and_neighbours_are_alike():
    """The bins of all codes lie on one curve; the delimiters of a section are two bins."""
    found = {}
    for num_bins in (2, 3, 10):
        tokens = [NewToken(i, "", i, num_bins) for i in range(num_bins)]
        vector_RD = bin_vectors(tokens, 2.0, 512)
        gaps = torch.cdist(vector_RD, vector_RD)
        for i in range(num_bins):  # farther in bins is farther in space, on both sides
            for steps in (gaps[i, i:], gaps[i, : i + 1].flip(0)):
                assert all(a < b for a, b in pairwise(steps.tolist()))
        found[num_bins] = vector_RD
    assert torch.equal(bin_vectors([NewToken(0, "")], 2.0, 512), torch.zeros(1, 512))
    # all codes have one curve, on which the first of two bins and the third of ten are one place
    torch.testing.assert_close(found[2][0], found[10][2])
    spread = float(bin_vectors([NewToken(i, "", i, 500) for i in range(500)], 2.0, 512).std())
    # 4 directions of 512 draws each: 1 / sqrt(2 * 2048) of one sigma, here with three of them
    assert spread == pytest.approx(2.0 * SHARE, rel=0.05)


def test_rows_of_one_code_differ_in_bf16():
    lm = fitted(codes(), dtype=torch.bfloat16)
    rows = lm.get_input_embeddings().weight[VOCABULARY:].reshape(-1, 10, 16)
    for code in rows[:49]:
        assert len({tuple(row.tolist()) for row in code}) == 10


def test_two_delimiters_of_a_section_do_not_start_alike():
    tokens = [NewToken(61, "drugs", 0, 2), NewToken(62, "drugs", 1, 2)]
    for weight in (fitted(tokens, False).lm_head.weight, fitted(tokens).lm_head.weight):
        weight_VD = weight.detach()
        gap = float((weight_VD[61] - weight_VD[62]).norm())
        assert 0 < gap < float(weight_VD[: len(WORDS)].norm(dim=1).min())


def test_ids_that_are_not_the_tokenizers_are_refused():
    for wrong in ([NewToken(62, "iron")], [NewToken(61, "iron"), NewToken(61, "tablet")]):
        with pytest.raises(ValueError, match="ids below 62, each its own"):
            fit_vocabulary(tiny_lm("llama"), tokenizer_of(["<new>"]), wrong)


def test_records_go_through_json():
    tokens = [NewToken(61, "sodium", 0, 3), NewToken(62, "")]
    records = json.loads(json.dumps([t.to_record() for t in tokens]))
    assert [NewToken.of_record(r) for r in records] == tokens


@pytest.mark.parametrize(
    "record",
    [
        61,
        {"id": 61, "text": "iron"},
        {"id": 61, "text": "iron", "bin": 3, "num_bins": 3},
        {"id": 61, "text": "iron", "bin": 0, "num_bins": None},
        {"id": -1, "text": "iron", "bin": None, "num_bins": None},
        {"id": None, "text": "iron", "bin": None, "num_bins": None},
        {"id": 61, "text": None, "bin": None, "num_bins": None},
    ],
)
def test_bad_records_are_refused(record):
    with pytest.raises(ValueError, match="new token"):
        NewToken.of_record(record)


def test_rows_that_no_token_needs_are_the_same_again():
    one, other = tiny_lm("llama", tie=False), tiny_lm("llama", tie=False)
    for lm, seed in ((one, 1), (other, 2)):
        torch.manual_seed(seed)
        grow(lm, 70)
        grow(lm, 65)  # it has them
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        left, right = one.get_parameter(name), other.get_parameter(name)
        assert left.shape[0] == 70 and torch.equal(left, right)


def saved_base(folder: Path, kind: str = "llama", tie: bool = True) -> Path:
    tiny_lm(kind, tie=tie).save_pretrained(folder)
    return folder


def encoder_of(base: Path, tokens: list[NewToken], *arguments: str) -> PatientEncoder:
    values = {"path": str(base), **dict(a.split("=") for a in arguments)}
    phase = {"name": "only", "steps": 1, "w_sft": 1.0, "w_jepa": 1.0}
    settings = TrainSettings(
        model=values, lora={"r": 2}, data={"window": 128}, phases=[phase], run={"dir": "unused"}
    )
    return make_encoder(settings, tokenizer_of(names_of(tokens)), CPU, tokens)


def trained_encoder(base: Path, tokens: list[NewToken], *arguments: str):
    """An encoder after three steps of both losses, and its target."""
    encoder = encoder_of(base, tokens, *arguments)
    target = TargetEncoder(encoder, TargetForm())
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1.0)
    for step in range(3):
        backward(loss_of(encoder, target, batch_of_rows(step)))
        updater.step(1e-2, target, 0.9)
    return encoder, target


def loss_of(encoder, target, batch):
    return losses(encoder, target, batch, sft_scale=1e-2, jepa_scale=1e-2, normalize=True)


def record_of(tokenizer):
    record = {"trains": "all", "backbone": None, "dtype": "float32", "predictor_layers": 2}
    record |= {"window": 128, "pool": "last", "data_format": "codes", "delimiters": "text"}
    record |= {"format": VERSIONS["codes"], "encoder": "", "vocabulary": len(tokenizer)}
    record |= {"section_rules": SectionMap({}, 0).record()}
    return record | {"options": {"gap_floor": 5, "max_codes": 2000, "text_chars": 64}}


@pytest.mark.parametrize("num_horizons", [0, 2])
def test_a_model_whose_embeddings_have_a_width_of_their_own_is_loaded_again(num_horizons, tmp_path):
    """As in OPT: the width of its configuration is that of its layers, not of its states."""
    tokenizer = tokenizer_of(names_of(codes()))
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        word_embed_proj_dim=8,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        do_layer_norm_before=False,
    )
    encoder = PatientEncoder(OPTForCausalLM(config), 2, num_horizons=num_horizons)
    save_final(tmp_path / "final", encoder, None, tokenizer, record_of(tokenizer))
    again, _, _ = restore_final(tmp_path / "final", CPU)
    held, read = encoder.state_dict(), again.state_dict()
    assert held.keys() == read.keys() and all(torch.equal(held[n], read[n]) for n in held)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [True, False])
def test_two_thousand_rows_are_saved_and_loaded(tie, dtype, tmp_path):
    """The adapter's file is LoRA and rows; plain PEFT gives the same states, ours the same bits."""
    tokens = codes()
    base = saved_base(tmp_path / "base", tie=tie)
    encoder, target = trained_encoder(base, tokens, f"dtype={dtype}")
    final = tmp_path / "final"
    tokenizer = tokenizer_of(names_of(tokens))
    record = {"trains": "lora", "backbone": str(base), "dtype": dtype}
    save_final(final, encoder, target, tokenizer, record_of(tokenizer) | record)
    held = load_file(final / "adapter_model.safetensors")
    rows = [n for n in held if "lora_" not in n]
    assert len(rows) == 2 - tie and all(held[n].shape == (NUM_ROWS, 16) for n in rows)
    batch = batch_of_rows(7)
    ids = batch.ids_T[None, : batch.segment_tuples[0][1]]
    with torch.no_grad():
        ours = encoder.hidden(ids)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        plain.resize_token_embeddings(len(AutoTokenizer.from_pretrained(final)))
        loaded = PeftModel.from_pretrained(plain, final)
        for lm in (loaded, AutoPeftModelForCausalLM.from_pretrained(final, dtype=plain.dtype)):
            states = lm(input_ids=ids, output_hidden_states=True)
            assert torch.equal(states.hidden_states[-1], ours)
            assert torch.equal(states.logits, encoder.lm(input_ids=ids).logits)
        again, average, _ = restore_final(final, CPU)
        assert torch.equal(again.hidden(ids), ours)
        assert all(map(torch.equal, trained(again).values(), trained(encoder).values()))
        assert torch.equal(average.hidden(ids), target.hidden(ids))
    assert again.trained_rows()[0] == [t.id for t in tokens]


def plain_adapter(base: Path, folder: Path, rows: list[int], tie: bool) -> Path:
    """As PEFT leaves it after training; of a backbone whose vocabulary has not grown."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(lm, lora_config(lm, LoraSettings(r=2), rows))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("own", [[], [5, 7]])
@pytest.mark.parametrize("tie", [True, False])
def test_an_adapter_without_the_new_rows_trains_them(tie, own, tmp_path):
    """And keeps what it has: its factors, and rows of its own."""
    base = saved_base(tmp_path / "base", tie=tie)
    adapter = plain_adapter(base, tmp_path / "adapter", own, tie)
    tokens = codes()
    encoder = encoder_of(base, tokens, f"adapter={adapter}")
    start = fitted(tokens, tie).get_input_embeddings().weight[VOCABULARY:]
    ids, row_RD = encoder.trained_rows()
    assert ids == [*own, *(t.id for t in tokens)]
    assert torch.equal(row_RD[len(own) :].detach(), start)
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, value in saved.items():
        stem, _, last = name.rpartition(".")
        whole = f"{name}.default" if last != "weight" else f"{stem}.default.weight"
        assert torch.equal(encoder.lm.get_parameter(whole)[: len(value)], value), name
    target = TargetEncoder(encoder, TargetForm())
    for step in range(20):  # each window has some of the tokens
        backward(loss_of(encoder, target, batch_of_rows(step)))
    seen = row_RD.grad[len(own) :].norm(dim=1) > 0
    read = torch.cat([batch_of_rows(step).ids_T for step in range(20)]).unique()
    read = read[read >= VOCABULARY]  # 0 stands for a masked token
    assert bool(seen[read - VOCABULARY].all())
    if tie:  # as rows of the head, all have a gradient
        assert bool(seen.all()) and len(seen) == NUM_ROWS
    else:
        _, token_R, head_RD = encoder.head
        assert token_R.tolist() == ids
        assert bool((head_RD.grad.norm(dim=1) > 0).all())


def test_an_adapter_with_tensors_beyond_lora_does_not_get_rows(tmp_path):
    """Its whole tables would be dropped without a word."""
    base, folder = saved_base(tmp_path / "base"), tmp_path / "adapter"
    lm = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(lm, lora_config(lm, LoraSettings(r=2), [])).save_pretrained(
        folder, save_embedding_layers=True
    )
    with pytest.raises(ValueError, match="must be a PEFT adapter"):
        encoder_of(base, codes(4), f"adapter={folder}")
    assert isinstance(load_adapter(tiny_lm("llama"), str(folder), trainable=True), PeftModel)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("form", ["merged", "tracked"])
@pytest.mark.parametrize("tie", [True, False])
def test_no_step_makes_a_tensor_of_the_size_of_the_table(tie, form):
    """Nothing but the head's own products, inside the cross-entropy, reads all of it."""
    size, rows = 20_000, range(VOCABULARY, VOCABULARY + NUM_ROWS)
    encoder = two_paths.make_encoder(tie=tie, rows=rows, vocab_size=size)
    target = TargetEncoder(encoder, TargetForm(form, rank=1))
    updater = Updater(make_optimizer(encoder, OptimSettings()), clip=1.0)
    batch = batch_of_rows(0)
    for _ in range(2):  # the first step makes what is kept: which row of the table is which
        with Largest() as seen:
            backward(loss_of(encoder, target, batch))
            updater.step(1e-3, target, 0.9)
    assert NUM_ROWS * 16 <= seen.elements < size * 16 / 4
    assert math.prod(encoder.head[0].shape) == size * 16
