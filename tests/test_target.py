"""The target encoder's two forms: one contract, what each stores, and how it goes on."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from smbkernels.ema import join
from torch.func import functional_call

import smbfast.model.averages as averages
import smbfast.model.decoder as decoder_module
from smbfast.batch import pack_segments
from smbfast.model.averages import held_rank
from smbfast.model.horizon_scale import HorizonScale
from smbfast.model.target import ROWS, TargetEncoder, TargetForm, state_bytes, target_bytes
from smbfast.settings import load
from tests.tiny import DELIMITERS, random_window, tiny_encoder
from tests.two_paths import CASES, make_encoder, move, moved_target
from tests.windows_of_rows import NEW_ROWS

pytestmark = pytest.mark.numeric

FORMS = ["merged", "tracked"]
IDS = torch.tensor([[1, 7, 50, 9, 33, 51, 4, 52, 20, 11, 50, 8]])


def moved(encoder, seed=0, size=0.1):
    """Another step of the online encoder: every trained weight of the language model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in encoder.lm.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.add_(size * noise)


def low_rank(encoder, form="tracked", **more):
    """A target of so small a model does discard: rank 4 of at most 16."""
    return TargetEncoder(encoder, TargetForm(form, rank=1, **more))


def products(target):
    """s B A of every adapted linear, averaged: W̄ - W in fp64."""
    layers = target.encoder.lora_layers()
    weights = {f"{n}.base_layer.weight": m.get_base_layer().weight for n, m in layers.items()}
    exact = target.exact()
    return {n: exact[n].double() - w.detach().double() for n, w in weights.items()}


@torch.no_grad()
@pytest.mark.parametrize("updates", [0, 1, 4, 7])
def test_tracked_forward_is_that_of_merged_weights(updates):
    """In fp64, W + U V by the adapter path against the same sum written out; token rows too."""
    encoder = tiny_encoder(lora=True).double()
    target, merged = low_rank(encoder), TargetEncoder(encoder, TargetForm("merged"))
    for step in range(updates):
        moved(encoder, step)
        target.update(0.7)
    merged.load(target.exact())
    expected = merged.hidden(IDS)
    assert expected.dtype == torch.float64
    assert (target.hidden(IDS) - expected).abs().max() < 1e-12
    if updates:
        assert (target.hidden(IDS) - encoder.hidden(IDS)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_forward_leaves_the_online_encoder_as_it_was(form):
    encoder = tiny_encoder(lora=True)
    before = encoder.hidden(IDS)
    trained = [n for n, p in encoder.named_parameters() if p.requires_grad]
    target = TargetEncoder(encoder, TargetForm(form))
    moved(encoder)
    online = encoder.hidden(IDS)
    assert not torch.equal(online, before)
    torch.testing.assert_close(target.hidden(IDS), before, rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.hidden(IDS), online)
    assert [n for n, p in encoder.named_parameters() if p.requires_grad] == trained


class Whole(torch.nn.Module):
    """A module that owns the decoder and does `run`, as `functional_call` needs one."""

    def __init__(self, decoder, run):
        super().__init__()
        self.decoder, self.run = decoder, run

    def forward(self, embedded):
        return self.run(embedded)


def by_functional_call(target, batch, *, norm):
    """The packed forward of a target with torch's own way to lend weights."""
    encoder = target.encoder
    weights = {n: w for part in target.parts for n, w in part.weights().items()}
    rows = weights.pop(ROWS, None)
    if encoder.is_lora:
        embedded = encoder.embed_packed(batch.target_ids_U, rows)
    else:
        table = weights["embed_tokens.weight"]
        embedded = torch.nn.functional.embedding(batch.target_ids_U, table)
    pack = {"position_T": batch.target_position_U, "segments": batch.target_segments}
    whole = Whole(encoder.decoder, partial(encoder.packed_decoder, **pack, norm=norm))
    merged = encoder.is_lora and target.form == "merged"
    with encoder.lm.disable_adapter() if merged else nullcontext():
        return functional_call(whole, {f"decoder.{n}": w for n, w in weights.items()}, embedded)


def pack_of_two():
    trunks = [random_window(seed, buckets=3).ids_T for seed in (1, 2)]
    branches = [[(len(t) - 4, t[-4:])] for t in trunks]
    return pack_segments(trunks, branches, masked=[[torch.arange(4).numpy()]] * 2)


def lent(target, batch, norm):
    pack = (batch.target_ids_U, batch.target_position_U, batch.target_segments)
    return target.packed(*pack, norm=norm)


@torch.no_grad()
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_are_lent_as_functional_call_does(case, norm):
    """Bit for bit; also after an update and after a load, when what was lent has changed."""
    encoder, batch = make_encoder(lora=case.lora, tie=case.tie), pack_of_two()
    target = moved_target(encoder, case.form)
    found = []
    for change in ("none", "update", "load"):
        if change == "update":
            move(encoder, 9)
            target.update(0.5)
        if change == "load":
            state = target.state().items()
            target.load({n: 1.5 * w if w.is_floating_point() else w for n, w in state})
        found.append(lent(target, batch, norm))
        assert torch.equal(found[-1], by_functional_call(target, batch, norm=norm)), change
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])


@torch.no_grad()
def test_a_parameter_that_two_modules_share_is_lent_to_both():
    encoder, batch = make_encoder(lora=False), pack_of_two()
    first, second = (layer.mlp.up_proj for layer in encoder.decoder.layers)
    second.weight = first.weight
    target = moved_target(encoder)
    assert torch.equal(lent(target, batch, True), by_functional_call(target, batch, norm=True))
    assert second.weight is first.weight


def failing(*_args):
    raise ZeroDivisionError


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fails", [False, True])
def test_every_module_has_its_own_parameters_again(case, fails, monkeypatch):
    """The very objects in the same order, their flags and adapters, and no other attribute."""
    encoder, batch = make_encoder(lora=case.lora, tie=case.tie), pack_of_two()
    target = moved_target(encoder, case.form)

    def seen():
        modules = list(encoder.decoder.modules())
        own = [[(k, id(p)) for k, p in m._parameters.items()] for m in modules]
        flags = [(p.requires_grad, p.grad is None) for p in encoder.parameters()]
        disabled = [getattr(m, "disable_adapters", None) for m in modules]
        return own, flags, disabled, [sorted(vars(m)) for m in modules], list(encoder.state_dict())

    with encoder.lm.disable_adapter() if case.lora else nullcontext():
        encoder.hidden(IDS)  # transformers and PEFT note what they do for the first time
    before = seen()
    if fails:
        monkeypatch.setattr(decoder_module, "swiglu", failing)
        with pytest.raises(ZeroDivisionError):
            lent(target, batch, True)
    else:
        lent(target, batch, True)
        target.hidden(IDS)
    assert seen() == before


@pytest.mark.parametrize("form", FORMS)
def test_tau_of_zero_is_the_online_encoder_and_of_one_changes_nothing(form):
    encoder = tiny_encoder(lora=True)
    target = TargetEncoder(encoder, TargetForm(form))
    for step, tau in enumerate([0.9, 0.5, 1.0, 0.99, 1.0, 0.0]):  # a schedule
        before = target.exact()
        before = {n: w.clone() for n, w in before.items()}
        moved(encoder, step)
        target.update(tau)
        assert target.measures()["distance"] < 1e-6 or tau > 0
        same = [torch.allclose(w, before[n], rtol=0, atol=3e-7) for n, w in target.exact().items()]
        assert all(same) == (tau == 1.0)
    assert target.updates == 6


@pytest.mark.parametrize("form", FORMS)
def test_a_schedule_of_tau_is_averaged_exactly(form):
    """At full rank tracked is exact too; against fp64."""
    encoder = tiny_encoder(lora=True)
    target = TargetEncoder(encoder, TargetForm(form))
    exact = {n: w.double() for n, w in TargetEncoder(encoder, TargetForm("merged")).exact().items()}
    for step in range(11):
        moved(encoder, step)
        tau = 0.8 + 0.02 * step
        target.update(tau)
        online = TargetEncoder(encoder, TargetForm("merged")).exact()
        exact = {n: tau * w + (1 - tau) * online[n].double() for n, w in exact.items()}
    for name, weight in target.exact().items():
        assert (weight.double() - exact[name]).norm() < 1e-6 * exact[name].norm(), name


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_whose_b_is_zero(form):
    """As every adapter begins; nothing is NaN, and the target is the base."""
    encoder = tiny_encoder(lora=True)
    with torch.no_grad():
        for name, parameter in encoder.lm.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    target = low_rank(encoder, form)
    for _ in range(9):
        target.update(0.9)
    found = target.measures()
    assert found["distance"] < 1e-6 and found.get("discarded", 0.0) == 0.0
    torch.testing.assert_close(target.hidden(IDS), encoder.hidden(IDS), rtol=1e-5, atol=1e-6)
    moved(encoder)
    for _ in range(5):
        target.update(0.9)
    assert all(bool(w.isfinite().all()) for w in target.state().values())


def test_an_adapter_that_rests_is_of_its_own_rank():
    """Every block holds the same factors: they fit rank r, and nothing is discarded."""
    encoder = tiny_encoder(lora=True)
    target = low_rank(encoder)
    for _ in range(12):
        target.update(0.9)
    found = target.measures()
    assert found["distance"] < 1e-6 and found["discarded_worst"] < 1e-5


def test_what_is_discarded_is_reported_and_bounds_the_error():
    encoder = tiny_encoder(lora=True)
    targets = {rank: TargetEncoder(encoder, TargetForm("tracked", rank=rank)) for rank in (1, 2, 4)}
    exact = TargetEncoder(encoder, TargetForm("merged"))
    for step in range(21):
        moved(encoder, step, 0.02)
        for target in (*targets.values(), exact):
            target.update(0.9)
    truth, found = products(exact), {}
    for rank, target in targets.items():
        measures = target.measures()
        gaps = [(p - truth[n]).norm() / truth[n].norm() for n, p in products(target).items()]
        assert max(gaps) <= measures["target_error"] * 1.01 + 1e-5
        assert 0 <= measures["discarded"] <= measures["discarded_worst"]
        found[rank] = measures["target_error"]
    assert found[1] > found[2] > found[4]
    # k and v have 8 outputs, and rank 4r = 16 is all that q, o and the MLP have
    assert found[4] < 1e-6 < found[2]
    assert set(exact.measures()) == {"distance"}


def test_distance_means_the_same_in_both_forms():
    encoder = tiny_encoder(lora=True)
    pair = [TargetEncoder(encoder, TargetForm(form)) for form in FORMS]
    for step in range(6):
        moved(encoder, step)
        found = []
        for target in pair:
            target.update(0.8)
            found.append(target.measures()["distance"])
        assert found[0] > 1e-3 and found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("done", range(1, 7))
@pytest.mark.parametrize("form", FORMS)
def test_stopped_at_any_update_and_resumed_equals_never_stopped(form, done, tmp_path):
    """Bit for bit, with columns that wait for a truncation and without."""
    encoder = tiny_encoder(lora=True)
    whole = low_rank(encoder, form, every=3)
    for step in range(9):
        if step == done:
            state = {n: w.clone().contiguous() for n, w in whole.state().items()}
            save_file(state, tmp_path / "state.safetensors")
            stopped = TargetEncoder.of_state(encoder, load_file(tmp_path / "state.safetensors"))
        moved(encoder, step)
        whole.update(0.9)
        if step >= done:
            stopped.update(0.9)
    assert stopped.form == form
    left, right = whole.state(), stopped.state()
    assert list(left) == list(right)
    assert all(torch.equal(left[n], right[n]) for n in left)
    assert torch.equal(whole.hidden(IDS), stopped.hidden(IDS))
    assert whole.measures() == stopped.measures()


@torch.no_grad()
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_two_thousand_rows_are_averaged_exactly(form, tie):
    """Beside adapters of either form; against the EMA in fp64, and read by the forward."""
    encoder = make_encoder(tie=tie, rows=NEW_ROWS, vocab_size=NEW_ROWS.stop)
    target = low_rank(encoder, form)
    row_RD = encoder.trained_rows()[1]
    exact_RD = row_RD.double()
    for step in range(30):
        move(encoder, step)
        target.update(0.9)
        exact_RD = 0.9 * exact_RD + 0.1 * row_RD.double()
    # the rounding of one step is 2 u of a row's largest element, and decays as the average does:
    # 2 u / (1 - tau) = 1.2e-6 of it
    error = (target.exact()[ROWS].double() - exact_RD).abs().max()
    assert error < 1.2e-6 * exact_RD.abs().max()
    ids = torch.tensor([[NEW_ROWS[0], NEW_ROWS[-1], 5, NEW_ROWS[777]]])
    found = target.hidden(ids)
    move(encoder, 99, only=("trainable_tokens",))
    assert torch.equal(target.hidden(ids), found)
    state = {n: w.clone() for n, w in target.state().items()}
    target.load(state | {ROWS: row_RD.clone()})
    assert (target.hidden(ids) - found).abs().amax(-1)[0, [0, 1, 3]].min() > 1e-3


def bf16_encoder():
    encoder = tiny_encoder(lora=True)
    for parameter in encoder.lm.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    assert encoder.decoder.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    return encoder


def test_merged_halves_of_a_bf16_backbone_are_an_fp32_average():
    """Its bits, while the GEMMs read the high half itself: no copy and no conversion."""
    encoder = bf16_encoder()
    wide = tiny_encoder(lora=True)
    with torch.no_grad():
        for mine, theirs in zip(wide.lm.parameters(), encoder.lm.parameters(), strict=True):
            mine.copy_(theirs)
    target, full = (
        TargetEncoder(encoder, TargetForm("merged")),
        TargetEncoder(wide, TargetForm("merged")),
    )
    for step in range(20):
        moved(encoder, step, 0.01)
        moved(wide, step, 0.01)
        for either in (target, full):
            either.update(0.996)
    state, expected = target.state(), full.state()
    adapted, rows = target.parts
    for name in (s.name for s in adapted.sources):
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(join(state[name], state[f"{name}.remainder"]), expected[name])
        assert adapted.weights()[name].data_ptr() == state[name].data_ptr()
    assert torch.equal(rows.weights()["token_rows"], expected["token_rows"])
    for name, weight in target.exact().items():
        assert torch.equal(weight, full.exact()[name])
    assert target.measures()["distance"] == pytest.approx(full.measures()["distance"], rel=1e-6)
    hidden = target.hidden(IDS)
    assert hidden.dtype == torch.bfloat16 and bool(hidden.isfinite().all())
    # an average that an earlier version kept in fp32 becomes the same halves
    old = TargetEncoder.of_state(encoder, expected)
    assert all(torch.equal(w, state[n]) for n, w in old.state().items())


@pytest.mark.parametrize("form", FORMS)
def test_a_backbone_of_two_dtypes(form):
    """As where a model keeps some modules in fp32."""
    encoder = bf16_encoder()
    layer = encoder.decoder.layers[1].mlp.down_proj.base_layer
    layer.weight.data = layer.weight.data.float()
    target = low_rank(encoder, form)
    for step in range(5):
        moved(encoder, step)
        target.update(0.9)
    again = TargetEncoder.of_state(encoder, target.state())
    for name, weight in target.exact().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, again.exact()[name])


def test_tracked_factors_stay_fp32_beside_a_bf16_backbone():
    encoder = bf16_encoder()
    target = low_rank(encoder)
    for step in range(5):
        moved(encoder, step)
        target.update(0.9)
    assert {w.dtype for w in target.parts[0].weights().values()} == {torch.float32}
    assert target.hidden(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize(("lora", "form", "calls"), [(False, "merged", 1), (True, "merged", 2)])
def test_one_call_moves_all_matrices(lora, form, calls, monkeypatch):
    """And one the token rows, which have no adapter."""
    target = TargetEncoder(tiny_encoder(lora=lora), TargetForm(form))
    seen = []
    real = averages.ema_update_
    monkeypatch.setattr(
        averages, "ema_update_", lambda *a, **k: (seen.append(len(a[0])), real(*a, **k))
    )
    target.update(0.9)
    assert len(seen) == calls and max(seen) >= 14


@pytest.mark.parametrize("form", ["merged", "tracked"])
def test_a_parameter_that_was_given_another_tensor_is_followed(form):
    encoder = tiny_encoder(lora=True)
    target = TargetEncoder(encoder, TargetForm(form))
    with torch.no_grad():
        for layer in encoder.lora_layers().values():
            b = layer.lora_B["default"].weight
            b.data = b.data + 0.1
    assert target.measures()["distance"] > 1e-3
    target.update(0.0)
    assert target.measures()["distance"] < 1e-5
    assert not any(w.requires_grad for w in target.state().values())


def test_a_state_of_the_other_form_is_refused_and_changes_nothing():
    encoder = tiny_encoder(lora=True)
    merged, tracked = (TargetEncoder(encoder, TargetForm(form)) for form in ("merged", "tracked"))
    for one, other in ((merged, tracked), (tracked, merged)):
        before = {n: w.clone() for n, w in one.state().items()}
        with pytest.raises(ValueError):
            one.load(other.state())
        after = one.state()
        assert all(torch.equal(w, after[n]) for n, w in before.items())


def test_the_form_is_chosen_by_what_is_trained_and_what_it_costs(monkeypatch):
    assert TargetEncoder(tiny_encoder()).form == "merged"
    # a narrow model in fp32: columns would cost more than the products they are added to
    assert TargetEncoder(tiny_encoder(lora=True)).form == "merged"
    # in bf16 a merged average is rounded in the forward, however narrow
    assert TargetEncoder(tiny_encoder(lora=True).bfloat16()).form == "tracked"
    monkeypatch.setattr("smbfast.model.target.NARROW", 100.0)
    assert TargetEncoder(tiny_encoder(lora=True)).form == "tracked"
    with pytest.raises(ValueError, match="needs LoRA"):
        TargetEncoder(tiny_encoder(), TargetForm("tracked"))
    with pytest.raises(ValueError, match=r"objective\.target_form"):
        load("tiny", ["--objective.target_form=tracked"])


@pytest.mark.parametrize("form", FORMS)
def test_a_state_of_another_model_is_refused(form):
    target = TargetEncoder(tiny_encoder(lora=True), TargetForm(form))
    other = TargetEncoder(tiny_encoder("llama", lora=True), TargetForm(form))
    state = target.state()
    assert list(other.state()) == list(state)  # the same names and shapes: it loads
    other.load(state)
    name = next(iter(state))
    for spoiled in (
        {n: w for n, w in state.items() if n != name},
        state | {name: state[name][:-1]},
        state | {"more": state[name]},
        TargetEncoder(tiny_encoder()).state(),
    ):
        with pytest.raises(ValueError, match="other shapes"):
            TargetEncoder.of_state(other.encoder, spoiled)


@pytest.mark.parametrize("numbers", [[1, 10**6, 0], [1, 0, 0], [0, 4, 0], [1, 4], 4, [1.5, 4, 0]])
def test_a_tracked_average_of_settings_that_none_has_takes_no_memory(numbers):
    target = low_rank(tiny_encoder(lora=True))
    state = {**target.state(), "tracked.settings": torch.tensor(numbers)}
    with pytest.raises(ValueError, match=r"objective\.tracked_|whole number"):
        TargetEncoder.of_state(target.encoder, state)


def test_columns_that_no_tracked_average_has_are_refused_before_the_first_step():
    """A first phase may have no target, and take days."""
    encoder = tiny_encoder(lora=True)  # of rank 4
    TargetEncoder(encoder, TargetForm("tracked", every=300))
    for every in (1, 4096):
        assert TargetForm("tracked", every=every).resolved(encoder).every == every
    for form in (TargetForm("tracked", every=4097), TargetForm("tracked", rank=0)):
        with pytest.raises(ValueError, match=r"tracked_every 1 to 4096 with an adapter of rank 4"):
            form.resolved(encoder)
        with pytest.raises(ValueError, match=r"tracked_every 1 to 4096"):
            state_bytes(encoder, form)


def test_memory_is_foretold():
    encoder = tiny_encoder(lora=True)
    for form in FORMS:
        target = TargetEncoder(encoder, TargetForm(form))
        factors = [w for part in target.parts for w in (part.weights().values())]
        expected = sum(w.numel() * w.element_size() for w in factors)
        assert target_bytes(encoder, TargetForm(form)) == expected
    assert held_rank(64, 64, 4, 4) == 16 and held_rank(8, 64, 4, 4) == 8
    assert held_rank(8, 64, 16, 1) == 16  # an adapter wider than its matrix still fits
    assert encoder.trained_rows()[0] == DELIMITERS


def test_a_first_step_that_is_not_finite_gives_horizons_no_scale():
    """It is skipped, and the next one gives it, also where a run goes on from a checkpoint."""
    scale, states_QD = HorizonScale(1, 2, torch.device("cpu")), torch.tensor([[1.0, 2.0], [3.0, 6]])
    for factor in (float("nan"), 1.0):
        sums = scale.new_sums()
        sums.add(factor * states_QD, torch.tensor([0, 0]))
        assert scale.lacks([2])
        scale.begin(sums)
        scale.update(sums, [2])
    assert not scale.lacks([2])
    again = HorizonScale(1, 2, torch.device("cpu"))
    again.load(scale.state())
    horizon_Q = torch.tensor([0, 0])
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) * torch.tensor([1 / 1.01, 2 / 2.01])
    for each in (scale, again):
        torch.testing.assert_close(each.standardised(states_QD, horizon_Q), expected)
