"""The benchmark of a whole step: who may be timed, what is counted, what is printed."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from smbkernels.attention import attention_flops
from smbkernels.attention.segments import PREFIX
from torch.utils.flop_counter import FlopCounterMode

import bench.step.__main__ as entry
from bench import records
from bench.measure import difference
from bench.step import measure as step_measure
from bench.step import report as step_report
from bench.step.measure import OURS, Parts, Result, measure, variants
from bench.step.rivals import Packed, Padded
from bench.step.variants import PARTS, Smbfast
from bench.step.workloads import TINY, Workload, on_cuda, padded_fill, window, workloads
from bench.timing import Ceiling

BEST = Ceiling(bandwidth=1e10, patterns={"copy": 1e10}, matmul=1e11)
SMALL = Workload("small", TINY, (128, 64), (0.25, 0.75), 1, cuts=2, horizon=32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
def test_every_variant_reproduces_the_reference():
    makes = variants(SMALL, "cpu", ablate=True)
    del makes["B2"]  # as B1, but compiled
    results = {r.variant: r for r in measure(SMALL, "cpu", makes, 0)}
    assert "B3" in results and "FlexAttention" in results.pop("B3").reason
    assert "scores" in results.pop(f"{OURS} torch timeline_attention").reason
    assert {"B0", "B0c", "B1", "B1c", "B3'", OURS} <= set(results) and len(results) == 13
    for r in results.values():
        assert len(r.errors) == 5 and not r.reason, (r.variant, r.reason)
        assert max(r.errors.values()) < 5e-6, (r.variant, r.errors)
        assert r.flops > 0 and r.held_mib > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_what_the_decomposition_sees():
    """Forward alone: on a CPU it has no backward."""
    variant = Packed(SMALL.size.encoder("cpu"), shared=True, flex=True)
    variant.take(SMALL)
    hidden = []
    for ready in (lambda: None, variant.ready):
        ready()
        with torch.no_grad():
            (one,) = variant.passes[0]
            embedded_TD = variant.encoder.embed(one.ids_T, one.masked_T)
            rest = (one.position_T, one.segments)
            hidden.append(variant.hidden(variant.encoder.decoder, embedded_TD, *rest))
    assert variant.masks and one.segments.host_S6[:, PREFIX].any()
    assert difference(hidden[:1], hidden[1:]) < 1e-5


class Still(Packed):
    """Its target never moves."""

    def update(self, tau: float) -> None:
        if tau == 0:
            super().update(tau)


class Unmasked(Packed):
    """Reads the embedding of token 0 where the mask vector belongs."""

    def take(self, workload: Workload) -> None:
        super().take(workload)
        none = torch.zeros_like
        self.passes = [[replace(p, masked_T=none(p.masked_T)) for p in two] for two in self.passes]


class LastLabelLost(Padded):
    """Predicts one token too few."""

    def take(self, workload: Workload) -> None:
        super().take(workload)
        r = self.trunks[-1]
        self.trunks[-1] = replace(r, row_N=r.row_N[:-1], read_N=r.read_N[:-1])


@pytest.mark.parametrize(
    "make, name",
    [(Still, "JEPA loss of a moved target"), (Unmasked, "JEPA loss"), (LastLabelLost, "SFT loss")],
)
def test_a_wrong_rival_is_not_timed(make, name):
    (result,) = measure(SMALL, "cpu", {"B1": make}, 1)
    assert result.reason.startswith("wrong: ") and name in result.wrong
    assert not result.times


def test_a_run_with_a_wrong_rival_fails(monkeypatch, capsys):
    monkeypatch.setattr(entry, "ceiling", lambda *_: BEST)
    monkeypatch.setattr(entry, "variants", lambda *_, **__: {"B1": Still})
    with pytest.raises(SystemExit, match="W1 B1 wrong: JEPA loss of a moved target off by"):
        entry.main(["--quick", "--only=W1"])
    assert "B1       not measured: wrong" in capsys.readouterr().out


def test_what_one_rival_cannot_do_ends_no_run():
    def broken(encoder, **_):
        raise RuntimeError("no such kernel\nlong story")

    bad, good = measure(SMALL, "cpu", {"B1": broken, OURS: Smbfast}, 1)
    assert bad.reason == "failed: RuntimeError: no such kernel" and not bad.times
    assert len(good.times) == 1 and set(PARTS) <= set(good.times[0])


def test_a_part_within_another_is_not_counted_twice(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(step_measure.time, "perf_counter", lambda: float(next(now)))
    part = Parts("cpu")  # at 0
    with part("losses"):  # from 1
        with part("online forward"):  # from 2 to 3
            pass
    # to 4, read at 5
    assert part.read() == {"other": 2e3, "losses": 2e3, "online forward": 1e3}


def test_causal_attention_is_counted_as_what_it_sees():
    q, k = torch.randn(2, 4, 8, 16, requires_grad=True), torch.randn(2, 2, 8, 16)
    with FlopCounterMode(display=False, custom_mapping=step_measure.causal_formulas()) as counter:
        out = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        out.sum().backward()
    ends = (attention_flops(2 * 36, 4, 16, backward=back) for back in (False, True))
    assert counter.get_total_flops() == sum(ends)


def test_workloads_are_what_they_say():
    for quick in (False, True):
        for name, share in (("W1", 0.5), ("W2", 0.75), ("W4", 0.75), ("W5", 0.5)):
            w = workloads("cpu", quick=quick)[name]
            for batch in w.batches():
                batch.check()
                rows = batch.segment_tuples
                trunks = [n for _, n, _, prefix in rows if not prefix]
                assert [p for *_, p in rows if p] == [share * n for n in trunks]
        mixed = workloads("cpu", quick=quick)["W3"]
        assert 0.43 < padded_fill(mixed.lengths) < 0.48
    (batch,) = workloads("cpu", quick=False)["K8"].batches()
    branches = [(n, prefix / 1024) for _, n, _, prefix in batch.segment_tuples if prefix]
    assert len(branches) == 8 * 4 and {n for n, _ in branches} == {128}
    assert all(0.3 <= share <= 0.875 for _, share in branches)
    for w in on_cuda():
        assert w.nodes or {n % 16 for n in w.lengths} == {0}
    whole = window(0, 64, 100)
    lines = zip(whole.line_start_L, whole.line_end_L, strict=True)
    assert [(a, b) for a, b in lines][:3] == [(17, 24), (24, 31), (33, 40)]
    assert whole.bucket_end_B.tolist() == [32, 48, 64]


def timed(name: str, variant: str, *ms: float) -> Result:
    workload = replace(SMALL, name=name)
    return Result(workload, variant, (1e-5, 1e-4), times=[{"backward": m} for m in ms])


def test_targets_are_judged_by_medians():
    results = [
        *(timed("W2", OURS, 1, 2, 90), timed("W2", "B1", 2.5, 1, 80)),
        *(timed("W1", OURS, 1), timed("W1", "B1", 1)),
        *(timed("W3", OURS, 1), replace(timed("W3", "B0"), reason="not enough memory")),
        timed("E8", OURS, 1),
    ]
    lines = step_report.judged(results)
    assert [line.split(":")[0].split()[0] for line in lines] == ["W2", "W1", "W3", "E8"]
    assert lines[0].endswith("1.25 x, at least 1.25 x: met")
    assert lines[1].endswith("1.00 x, at least 1.05 x: NOT MET")
    assert "not measured" in lines[2] and "not enough memory" in lines[2]
    assert "not measured" in lines[3] and "B1 not asked for" in lines[3]


@pytest.mark.slow
def test_a_quick_run_writes_table_records_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(entry, "ceiling", lambda *_: BEST)
    entry.main(["--quick", "--only=W1,E8", "--rivals=B1,B4,B3", "--ablate=", "--save"])
    out = capsys.readouterr().out
    assert "B3       not measured: FlexAttention has no backward on a CPU" in out
    assert "no target is judged" in out and "% of the step" in out
    lines = [json.loads(x) for x in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [(x["workload"], x["variant"]) for x in lines] == [
        *(("W1", "B1"), ("W1", "B3"), ("W1", OURS)),
        *(("E8", "B1"), ("E8", OURS)),
    ]
    b1, b3, ours = lines[:3]
    assert b3["not_measured"] and "ms_p50" not in b3
    assert b1["ours_is_faster_by"] == pytest.approx(b1["ms_p50"] / ours["ms_p50"])
    assert ours["tokens_per_s"] == pytest.approx(256e3 / ours["ms_p50"])
    assert ours["matmul_share"] == pytest.approx(ours["flops"] / ours["ms_p50"] * 1e3 / 1e11)
    assert sum(ours["ms_parts"].values()) > 0.5 * ours["ms_p50"]
    drawn = (tmp_path / "step.svg").read_text()
    assert "backward" in drawn and "W1: 2 x 128 tokens" in drawn and ">B4<" in drawn


def test_peak_memory_is_printed(capsys):
    step_measure.main(["W1", "B1", "quick"])
    peak_mib = json.loads(capsys.readouterr().out)
    assert peak_mib is None or peak_mib >= 0


def test_progress_ends_where_it_said_it_would():
    """Also where a variant is refused: then its rounds count as done."""

    def broken(encoder, **_):
        raise RuntimeError("no such kernel")

    advanced: list[int] = []
    makes = {"B1": broken, "B3": "not here", OURS: Smbfast}
    measure(SMALL, "cpu", makes, 2, advanced.append)
    assert step_measure.num_runnable(makes) == 2
    assert sum(advanced) == SMALL.num_tokens * 2 * (1 + 2)


def test_help_and_mistakes(capsys):
    with pytest.raises(SystemExit):
        entry.main(["--help"])
    assert "B3'" in capsys.readouterr().out
    for argument in ("--only=W9", "--rivals=B9", "--ablate=W9"):
        with pytest.raises(SystemExit):
            entry.main(["--quick", argument])
