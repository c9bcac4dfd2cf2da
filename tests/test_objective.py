"""The reference objective: by hand on a tiny case, and what may influence what."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from smbfast.data.loader import Step, make_batch
from smbfast.model.target import TargetEncoder, TargetForm
from smbfast.reference import branch_rows, jepa_sum, measure, online_hidden, sft_sum, trunk_rows
from smbfast.settings import ObjectiveSettings
from tests.tiny import DELIMITERS, random_window, step_of, tiny_encoder
from tests.two_paths import apart

pytestmark = pytest.mark.numeric

WINDOWS = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 4), (3, 9))]
OBJECTIVE = ObjectiveSettings(min_future=4, cuts=2)
FORMS = [(False, "merged"), (True, "merged"), (True, "tracked")]
CASES = [("qwen3", False), ("qwen3", True), ("llama", False), ("llama", True)]


def batch_of(windows=WINDOWS, objective=OBJECTIVE, step=0):
    return make_batch(windows, objective, 0, step, jepa=True)


def perturbed_target(encoder, form="auto"):
    """A target that has moved away from the online encoder."""
    target = TargetEncoder(encoder, TargetForm(form))
    for name, weight in target.state().items():
        if not name.startswith("tracked."):
            weight.add_(0.05 * torch.randn_like(weight))
    return target


@pytest.mark.parametrize(("kind", "lora"), CASES)
@torch.no_grad()
def test_sft_is_the_cross_entropy_of_the_causal_lm(kind, lora):
    encoder, batch = tiny_encoder(kind, lora=lora), batch_of()
    expected = 0.0
    for window in WINDOWS:
        ids = torch.from_numpy(window.ids_T.astype("int64"))
        logits = encoder.lm(input_ids=ids[None]).logits[0].double()
        for t in range(len(ids) - 1):
            z = logits[t]
            expected += float(torch.log(torch.exp(z).sum()) - z[ids[t + 1]])
    assert float(sft_sum(encoder, batch)) == pytest.approx(expected, rel=1e-5)


def encoder_rows(base):
    return base.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]


def merged_copy(encoder, target):
    """The target encoder as a plain model of its own: weights written out, no adapter."""
    lm = copy.deepcopy(encoder.lm)
    if not encoder.is_lora:
        with torch.no_grad():
            for name, weight in target.exact().items():
                lm.base_model.get_parameter(name).copy_(weight)
        return lm.base_model
    base = lm.get_base_model()
    with torch.no_grad():
        averages = target.exact()
        encoder_rows(base).copy_(averages.pop("token_rows"))
        for name, weight in averages.items():
            base.base_model.get_parameter(name).copy_(weight)
        for name, parameter in lm.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return base.base_model


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize(("lora", "form"), FORMS)
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_jepa_by_hand(kind, lora, form, norm):
    encoder, batch = tiny_encoder(kind, lora=lora), batch_of()
    target = perturbed_target(encoder, form)
    trunk = merged_copy(encoder, target)
    masked = set(batch.masked_M.tolist())
    at_M = batch.target_position_U[batch.target_M]
    pair = dict(zip(batch.masked_M.tolist(), at_M.tolist(), strict=True))
    first, act, second = encoder.predictor
    expected = 0.0
    for segment, prefix in branch_rows(batch):
        rows = [*range(prefix.start, prefix.stop), *range(segment.start, segment.stop)]
        table = encoder.base.get_input_embeddings()
        embedded = [
            encoder.mask_vector if r in masked else table(batch.ids_T[r : r + 1])[0] for r in rows
        ]
        online = encoder.decoder(inputs_embeds=torch.stack(embedded)[None]).last_hidden_state[0]
        start = prefix.start
        trunk_row = next(t for t in trunk_rows(batch) if t.start == start)
        ids = batch.ids_T[trunk_row][None]
        full = trunk(input_ids=ids).last_hidden_state[0]
        for column, row in enumerate(rows):
            if row not in masked:
                continue
            z = online[column] @ first.weight.T + first.bias
            z = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            g = z @ second.weight.T + second.bias
            t = full[pair[row]]
            if norm == "layer":
                t = (t - t.mean()) / torch.sqrt(t.var(correction=0) + 1e-5)
            expected += float(((g - t) ** 2).mean())
    assert isinstance(act, torch.nn.GELU)
    value = jepa_sum(encoder, target, batch, normalize=norm == "layer")
    assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("kind", "lora"), CASES)
def test_every_trained_parameter_gets_a_gradient_and_nothing_else(kind, lora):
    encoder, batch = tiny_encoder(kind, lora=lora), batch_of()
    target = perturbed_target(encoder)
    loss = sft_sum(encoder, batch) + jepa_sum(encoder, target, batch, normalize=True)
    loss.backward()
    for name, parameter in encoder.named_parameters():
        has = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert has == parameter.requires_grad, name
    assert encoder.mask_vector.grad is not None
    assert all(not w.requires_grad and w.grad is None for w in target.state().values())


def test_with_lora_only_adapters_delimiter_rows_predictor_and_mask_vector_are_trained():
    encoder = tiny_encoder(lora=True)
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    kinds = ("lora_", "trainable_tokens_delta", "predictor.", "mask_vector")
    assert all(any(k in n for k in kinds) for n in trained)
    assert all(any(k in n for n in trained) for k in kinds)
    assert encoder.trained_rows()[0] == DELIMITERS
    assert all(p.dtype == torch.float32 for n, p in encoder.named_parameters() if n in trained)


@pytest.mark.parametrize("lora", [False, True])
def test_the_identity_of_a_masked_token_cannot_change_the_online_side(lora):
    encoder, batch = tiny_encoder(lora=lora), batch_of()
    assert not bool(batch.ids_T[batch.masked_M].any())  # not even in the batch
    with torch.no_grad():
        before = online_hidden(encoder, batch)
        ids_T = batch.ids_T.clone()
        ids_T[batch.masked_M] = torch.randint(1, 60, (batch.num_masked,))
        after = online_hidden(encoder, replace(batch, ids_T=ids_T))
    assert torch.equal(before, after)


def test_masked_predictions_see_only_what_stands_before_them():
    """Change any token of the future after position i: the prediction at i keeps its bits."""
    encoder, batch = tiny_encoder(), batch_of([WINDOWS[0]], ObjectiveSettings(min_future=4))
    (segment, _prefix) = branch_rows(batch)[0]
    with torch.no_grad():
        before = online_hidden(encoder, batch)
        visible = [
            r for r in range(segment.start, segment.stop) if r not in batch.masked_M.tolist()
        ]
        for row in visible:
            ids_T = batch.ids_T.clone()
            ids_T[row] = (ids_T[row] + 7) % 49 + 1
            after = online_hidden(encoder, replace(batch, ids_T=ids_T))
            earlier = batch.masked_M < row
            assert torch.equal(before[earlier], after[earlier])
            if bool((~earlier).any()):
                assert not torch.equal(before[~earlier], after[~earlier])


def test_the_unmasked_future_of_the_trunk_never_enters_the_online_side():
    encoder, batch = tiny_encoder(), batch_of()
    with torch.no_grad():
        before = online_hidden(encoder, batch)
        ids_T = batch.ids_T.clone()
        for segment, prefix in branch_rows(batch):
            del segment
            later = [p.stop for _, p in branch_rows(batch) if p.start == prefix.start]
            trunk = next(t for t in trunk_rows(batch) if t.start == prefix.start)
            ids_T[max(later) : trunk.stop] = 5
        after = online_hidden(encoder, replace(batch, ids_T=ids_T))
    assert torch.equal(before, after)


@pytest.mark.parametrize(("lora", "form"), FORMS)
def test_target_gets_no_gradient_and_starts_as_the_online_encoder(lora, form):
    encoder, batch = tiny_encoder(lora=lora), batch_of()
    target = TargetEncoder(encoder, TargetForm(form))
    ids = batch.ids_T[trunk_rows(batch)[0]][None]
    hidden = target.hidden(ids)
    assert not hidden.requires_grad
    torch.testing.assert_close(hidden, encoder.hidden(ids).detach(), rtol=1e-4, atol=1e-5)
    assert target.measures()["distance"] < 1e-7
    states = measure(encoder, target, batch).masked
    assert not states.target_MD.requires_grad and states.prediction_MD.requires_grad


@pytest.mark.parametrize(("lora", "form"), FORMS)
def test_target_is_the_exact_average_of_effective_weights(lora, form):
    """Against an fp64 average of the merged weights over real updates."""
    encoder = tiny_encoder(lora=lora)
    target = TargetEncoder(encoder, TargetForm(form))

    def effective():
        if not lora:
            return {n: p.detach().double() for n, p in encoder.decoder.named_parameters()}
        weights = {}
        for name, layer in encoder.lora_layers().items():
            b, a = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
            weight = layer.get_base_layer().weight.double()
            weights[f"{name}.base_layer.weight"] = (weight + 2 * b @ a).detach()  # alpha / r = 2
        return weights | {"token_rows": encoder.trained_rows()[1].detach().double()}

    exact = effective()
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        batch = batch_of(step=step)
        (sft_sum(encoder, batch) / batch.num_labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        target.update(0.9)
        exact = {
            n: 0.9 * w + 0.1 * e
            for (n, w), e in zip(exact.items(), effective().values(), strict=True)
        }
    assert target.updates == 5
    found = target.exact()
    assert set(found) == set(exact)
    for name, weight in found.items():
        gap = (weight.double() - exact[name]).norm() / exact[name].norm()
        assert gap < 1e-6, name
    assert target.measures()["distance"] > 1e-3


def test_the_target_covers_every_trained_weight_of_the_trunk():
    """Whole: all of the trunk. LoRA: every adapted linear and the trained token rows."""
    whole = tiny_encoder()
    assert set(TargetEncoder(whole).exact()) == {n for n, _ in whole.decoder.named_parameters()}
    lora = tiny_encoder(lora=True)
    linears = {f"{n}.base_layer.weight" for n in lora.lora_layers()}
    assert len(linears) == 2 * 7
    for form in ("merged", "tracked"):
        assert set(TargetEncoder(lora, TargetForm(form)).exact()) == linears | {"token_rows"}


def test_after_updates_the_target_is_the_model_of_the_averaged_weights():
    """The forward itself, against a copy whose weights are averaged by hand in fp64."""
    encoder = tiny_encoder()
    target = TargetEncoder(encoder)
    plain = copy.deepcopy(encoder.lm).double()
    for _ in range(3):
        with torch.no_grad():
            for parameter in encoder.lm.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            pairs = zip(plain.parameters(), encoder.lm.parameters(), strict=True)
            for average, parameter in pairs:
                average.mul_(0.8).add_(parameter.double(), alpha=0.2)
        target.update(0.8)
    ids = batch_of().ids_T[:20][None]
    expected = plain.float().base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(target.hidden(ids), expected, rtol=1e-4, atol=1e-5)


def test_head_predictor_and_mask_vector_have_no_average():
    for lora, form in FORMS:
        names = TargetEncoder(tiny_encoder(lora=lora), TargetForm(form)).state()
        assert not any("lm_head" in n or "predictor" in n or "mask_vector" in n for n in names)


def gradients(encoder, target, step: Step, w_sft=0.5, w_jepa=2.0):
    encoder.zero_grad()
    for micro in step.micro_batches:
        (w_sft * sft_sum(encoder, micro) / step.num_labels).backward()
        if micro.num_masked:
            loss = jepa_sum(encoder, target, micro, normalize=True)
            (w_jepa * loss / step.num_masked).backward()
    return {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lora", [False, True])
def test_means_are_of_the_whole_step_however_it_is_cut(lora):
    encoder = tiny_encoder(lora=lora)
    target = perturbed_target(encoder)
    splits = [[WINDOWS], [WINDOWS[:1], WINDOWS[1:]], [[w] for w in WINDOWS]]
    found = [
        gradients(encoder, target, step_of(0, [batch_of(part) for part in split]))
        for split in splits
    ]
    floor = 1e-3 * sum(float(g.square().sum()) for g in found[0].values()) ** 0.5
    for other in found[1:]:
        for name, gradient in found[0].items():
            assert apart(other[name], gradient, floor) < 5e-6, name  # as in test_equivalence


def test_padding_neighbours_do_not_matter():
    encoder = tiny_encoder()
    together = float(sft_sum(encoder, batch_of()))
    alone = sum(float(sft_sum(encoder, batch_of([w]))) for w in WINDOWS)
    assert together == pytest.approx(alone, rel=1e-5)
