"""Which library multiplies a run's fp32 matrices: chosen, forced, kept, refused, and the same."""

import json
from functools import partial

import pytest
import torch
from smbkernels import use
from smbkernels.matmul import products
from smbkernels.matmul.measure import Measured
from smbkernels.operation import FORCED
from torch.utils.flop_counter import FlopCounterMode

import smbfast.check as check
import smbfast.train as entry
from smbfast import objective
from smbfast.base import runtime
from smbfast.data.loader import make_batch
from smbfast.model import decoder as decoder_module
from smbfast.run import loop, matmul
from smbfast.run.open_run import OpenRun
from smbfast.settings import ObjectiveSettings, kernel_choice, load
from tests.factory import tiny_run, write_meds
from tests.refusal import refused
from tests.tiny import random_window
from tests.two_paths import CASES, FP32, assert_same, make_encoder, moved_target, run

CPU = torch.device("cpu")
ROWS = "onednn_rows"
ONEDNN = "oneDNN, gradients of weights"
WINDOWS = [random_window(s, buckets=b) for s, b in ((1, 6), (2, 5), (3, 7))]


@pytest.fixture(autouse=True)
def _onednn():
    if reason := products.missing("cpu"):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def meds(tmp_path_factory):
    return write_meds(tmp_path_factory.mktemp("meds"))


def words_of(meds, folder, *more: str) -> list[str]:
    """Arguments of a run; the shards are made once for all of this file."""
    return tiny_run(meds, folder, f"--data.prepared={meds.parent / 'prepared'}", *more)


@pytest.fixture
def faster(monkeypatch):
    """A machine on which oneDNN is twice as fast; calls it again to say by how much it is."""

    def by(gain: float) -> None:
        result = Measured({"torch": 1.0, ROWS: 1.0 / gain})
        monkeypatch.setattr(matmul, "measured", lambda shapes, rank: result)

    by(2.0)
    return by


def opened(words: list[str]) -> OpenRun:
    settings = load(words[0], words[1:])
    everywhere, by_op = kernel_choice(settings.kernels)
    with use(everywhere, **by_op):
        return OpenRun.open(settings)


@pytest.mark.usefixtures("no_report")
def test_a_run_says_and_saves_what_it_measured(meds, tmp_path, faster, monkeypatch, capsys):
    """And multiplies by it: in training, in evaluations, and where nodes are embedded."""
    used = {}
    for name in ("forward_backward", "evaluate_entry", "probe_run"):
        function = getattr(loop, name)

        def watched(*args, name=name, function=function, **more):
            used[name] = FORCED["linear"]
            return function(*args, **more)

        monkeypatch.setattr(loop, name, watched)
    folder = tmp_path / "run"
    entry.main(words_of(meds, folder))
    assert used == dict.fromkeys(("forward_backward", "evaluate_entry", "probe_run"), ROWS)
    told = next(v for v in capsys.readouterr().out.splitlines() if v.startswith("products"))
    assert ONEDNN in told and f"{matmul.title('torch')}, at this model's shapes" in told
    assert "2.00 x" in told
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first["matmul"]["backend"] == ROWS and ONEDNN in first["matmul"]["text"]
    records = [*folder.glob("checkpoints/*/record.json"), folder / "final" / "smbfast.json"]
    assert len(records) == 4
    assert all(json.loads(r.read_text())["matmul"] == ROWS for r in records)
    assert "linear" not in FORCED


def test_what_a_run_began_with_is_kept(meds, tmp_path, faster):
    """Also on a machine that would choose otherwise, until somebody says so."""
    words = words_of(meds, tmp_path / "run")
    first = opened(words)
    assert first.matmul.backend == ROWS
    first.begin()
    first.save(None, 1, 0, "")
    faster(0.5)
    again = opened(words)
    assert again.progress.step == 1
    assert again.matmul.backend == ROWS and "as in its checkpoint" in again.matmul.text
    forced = opened([*words, "--kernels=linear:torch"])
    assert forced.matmul.backend == "torch" and "as `kernels` says" in forced.matmul.text
    forced.save(None, 2, 0, "")
    faster(2.0)
    assert opened(words).matmul.backend == "torch"


def test_a_run_from_before_the_choice_stays_as_it_is(meds, tmp_path, faster):
    words = words_of(meds, tmp_path / "run")
    first = opened(words)
    first.progress.matmul = None
    first.begin()
    first.save(None, 1, 0, "")
    assert opened(words).matmul.backend == "torch"


@pytest.mark.parametrize("word", ["torch", "linear:torch", "linear:onednn", f"linear:{ROWS}"])
def test_what_is_forced_is_not_measured(word, meds, tmp_path, monkeypatch):
    monkeypatch.setattr(matmul, "measured", lambda shapes, rank: pytest.fail("measured"))
    made = opened(words_of(meds, tmp_path / "run", f"--kernels={word}"))
    assert made.matmul.backend == made.progress.matmul == word.removeprefix("linear:")


def test_the_reference_path_multiplies_as_transformers_does(meds, tmp_path, faster):
    words = words_of(meds, tmp_path / "run", "--objective.path=reference")
    assert opened(words).matmul.backend == "torch"


def test_a_tiny_run_is_the_same_on_every_machine(meds, tmp_path):
    """Its products are too small for a choice, on which other tests rely."""
    made = opened(words_of(meds, tmp_path / "run"))
    assert made.matmul.backend == "torch" and "too small" in made.matmul.text


def test_check_says_it(meds, tmp_path, faster, capsys):
    check.main(words_of(meds, tmp_path / "run"))
    (line,) = (v for v in capsys.readouterr().out.splitlines() if v.startswith("kernels"))
    assert f"linear: {ROWS}" in line and f"matrix products: {ONEDNN}" in line


@pytest.fixture
def without_onednn(monkeypatch):
    """A machine on which it cannot run, once it is asked for."""

    def take() -> None:
        products.reason_against.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)

    yield take
    monkeypatch.undo()
    products.reason_against.cache_clear()


def test_what_cannot_run_here_is_refused_with_the_way_out(meds, tmp_path, faster, without_onednn):
    words = words_of(meds, tmp_path / "run")
    first = opened(words)
    first.begin()
    first.save(None, 1, 0, "")
    without_onednn()
    refused(lambda: entry.main(words), "oneDNN", "AMX", "checkpoint", "--kernels=linear:torch")
    assert opened([*words, "--kernels=linear:torch"]).matmul.backend == "torch"
    forced = [*words, "--kernels=linear:onednn"]
    refused(lambda: entry.main(forced), "oneDNN", "AMX", "kernels=auto")


def test_without_onednn_a_new_run_says_why(meds, tmp_path, without_onednn):
    without_onednn()
    made = opened(words_of(meds, tmp_path / "run"))
    assert made.matmul.backend == "torch" and "AMX" in made.matmul.text


def test_layers_in_bf16_are_torch_s(meds, tmp_path, faster):
    """A model from scratch is fp32 whatever is asked for, so its layers are made bf16 here."""
    encoder = make_encoder(lora=True).bfloat16()
    settings = load("tiny", [])
    choice = matmul.choose_matmul(settings, encoder, None, 0)
    assert choice.backend == "auto" and "bfloat16 on cpu" in choice.text
    with use(linear=ROWS), pytest.raises(ValueError, match="float32, got bfloat16"):
        matmul.choose_matmul(settings, encoder, None, 0)


def test_a_saved_model_embeds_by_what_it_was_trained_with(capsys, without_onednn):
    with matmul.recorded(ROWS, CPU):
        assert FORCED["linear"] == ROWS
    for other in (None, "torch"):
        with matmul.recorded(other, CPU):
            assert FORCED["linear"] == "auto"
    assert not capsys.readouterr().err
    without_onednn()
    with matmul.recorded(ROWS, CPU):
        assert FORCED["linear"] == "auto"
    told = capsys.readouterr().err
    assert "oneDNN" in told and "AMX" in told and "rounding" in told


def test_the_ceiling_is_that_of_the_faster_library(monkeypatch):
    seconds = {"MKL": 2e-3, "oneDNN": 1e-3}
    product, clock = torch.Tensor.__matmul__, {"now": 0.0, "by": ""}

    def slow(left, right):
        clock["now"] += seconds["MKL"]
        return product(left, right)

    def fast(left, right):
        clock["now"] += seconds["oneDNN"]

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    monkeypatch.setattr(runtime, "times_by_onednn", fast)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: clock["now"])
    rate = runtime.matmul_rate(CPU, FP32, seconds=0.0)
    assert rate.library == "oneDNN" and rate.flops == pytest.approx(2 * 1024**3 / 1e-3)
    seconds["oneDNN"] = 3e-3
    rate = runtime.matmul_rate(CPU, FP32, seconds=0.0)
    assert rate.library == runtime.library(CPU, FP32)
    assert rate.flops == pytest.approx(2 * 1024**3 / 2e-3)


@pytest.fixture
def batch():
    return make_batch(WINDOWS, ObjectiveSettings(min_future=4, cuts=2), 0, 0, jepa=True)


@pytest.mark.numeric
@pytest.mark.parametrize("backend", ["onednn", ROWS])
@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_both_paths_agree(case, backend, batch, monkeypatch):
    """Losses and all gradients, with every product of the shared forward by oneDNN."""
    monkeypatch.setattr(products, "LEAST_SIZE", 0)
    encoder = make_encoder(lora=case.lora, tie=case.tie)
    target = moved_target(encoder, case.form)
    expected = run("reference", encoder, target, [batch])
    with use(linear=backend):
        # the tolerance of tests/test_equivalence.py: the same sums, in another order
        assert_same(run("shared", encoder, target, [batch]), expected, 5e-6)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_flops_are_the_same(case, batch, monkeypatch):
    monkeypatch.setattr(products, "LEAST_SIZE", 0)
    encoder = make_encoder(lora=case.lora, tie=case.tie)
    target = moved_target(encoder, case.form)
    counts = []
    for backend in ("torch", "onednn", ROWS):
        with use(linear=backend), FlopCounterMode(display=False) as counter:
            run("shared", encoder, target, [batch])
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.numeric
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4]], ids=str)
def test_autocast_in_bf16_on_a_cpu(case, batch):
    """Losses and gradients are as close to fp32 as those of transformers under autocast."""
    encoder = make_encoder(lora=case.lora, tie=case.tie)
    target = moved_target(encoder, case.form)
    losses, gradients = run("reference", encoder, target, [batch])
    far = {}
    for path in ("reference", "shared"):
        with torch.autocast("cpu", torch.bfloat16):
            value, grads = run(path, encoder, target, [batch])
        assert all(g.dtype == FP32 for g in grads.values())
        difference = torch.cat([(grads[n] - g).flatten() for n, g in gradients.items()])
        size = torch.cat([g.flatten() for g in gradients.values()]).norm()
        gaps = [abs(value[n] - losses[n]) / losses[n] for n in losses]
        far[path] = (max(gaps), float(difference.norm() / size))
    # two computations whose operands are rounded to 8 bits at other places: each is off by sums
    # of the same roundings, and neither by more than twice the other and one rounding
    for ours, theirs in zip(far["shared"], far["reference"], strict=True):
        assert 0 < ours <= 2 * theirs + 2**-8, far


def test_queries_and_keys_have_the_dtype_of_values(batch, monkeypatch):
    """RoPE multiplies by fp32, and attention takes one dtype."""
    seen, attention = [], decoder_module.timeline_attention

    def watched(query, key, value, *args, **kwargs):
        seen.append({query.dtype, key.dtype, value.dtype})
        return attention(query, key, value, *args, **kwargs)

    monkeypatch.setattr(decoder_module, "timeline_attention", watched)
    losses = partial(objective.losses, sft_scale=1.0, jepa_scale=1.0, normalize=True)
    encoder = make_encoder(lora=True)
    with torch.autocast("cpu", torch.bfloat16):
        losses(encoder, moved_target(encoder), batch)
    assert seen and all(dtypes == {torch.bfloat16} for dtypes in seen)
