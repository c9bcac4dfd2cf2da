"""The kernel from logits to their gradient, at every boundary of its blocks, against fp64."""

from dataclasses import replace

import pytest
import torch
from smbkernels.cross_entropy import chunk_rows, head_flops
from smbkernels.cross_entropy import triton as backend
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.ops.test_linear_cross_entropy import BF16, FP32, FP64, NEEDS, Head, Large, check, on

pytestmark = pytest.mark.numeric


@pytest.fixture
def small(monkeypatch) -> None:
    """Blocks of 64 logits, chunks of 4 rows."""
    monkeypatch.setattr(backend, "BLOCK_V", 64)
    for name in ("LEAST", "LEAST_ON_CUDA"):
        monkeypatch.setattr(f"smbkernels.cross_entropy.op.{name}", 4)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("N, V", [(0, 70), (1, 1), (1, 64), (3, 2), (4, 63), (5, 65), (9, 260)])
@pytest.mark.parametrize("R", [0, 3])
def test_values_and_gradients(N, V, R, dtype, device, small):
    if dtype == BF16 and device == "cpu":
        pytest.skip("the interpreter rounds to bf16 towards zero")
    head = Head.of(N, 24, V, min(R, V), dtype=dtype, device=device)
    check(on("triton", device), head)


def test_blocks_as_they_are_shipped(device):
    for V in (40, backend.BLOCK_V, 2 * backend.BLOCK_V + 1):
        check(on("triton", device), Head.of(3, 8, V, 2, device=device))


@pytest.mark.parametrize("needs", NEEDS)
def test_gradients_of_what_is_trained_alone(needs, device, small):
    check(on("triton", device), Head.of(9, 16, 90, 2, needs=needs, device=device))


def test_a_label_in_any_column(device, small):
    head = Head.of(66, 8, 66, 0, device=device)  # a whole block, and one of two columns
    check(on("triton", device), replace(head, label=torch.arange(66, device=device)))


@pytest.mark.parametrize("grad", [1.0, -0.37])
def test_the_incoming_gradient_counts(grad, device, small):
    check(on("triton", device), Head.of(9, 16, 90, 2, device=device), grad=grad)


def test_extreme_logits_and_strided_inputs(device, small):
    head = Head.of(9, 48, 90, 2, device=device)
    for size in (1e3, 1e-6):
        check(on("triton", device), replace(head, weight=head.weight * size))
    narrow = replace(head, hidden=head.hidden[:, 1:25], weight=head.weight[:, ::2])
    narrow = replace(narrow, rows=head.rows[:, 24:], label=head.label.repeat(2, 1).t()[:, 0])
    check(on("triton", device), narrow)


def gradient_of(logits_CV: Tensor, label_C: Tensor, *, needs: bool = True) -> tuple:
    log_p_C1 = torch.empty(len(label_C), 1, device=logits_CV.device)
    backend._gradient_(logits_CV, label_C[:, None], log_p_C1, logits_CV, needs)
    return log_p_C1[:, 0], logits_CV


@pytest.mark.parametrize("margin", [0.0, 3.0, 9.0, 14.0, 40.0])
def test_the_gradient_of_a_likely_label_keeps_its_digits(margin, device, small):
    """exp(log p) - 1 in fp32 would have none of them where p is within 1e-7 of 1.

    A log-probability is the difference of a logit and the log-sum-exp, and as good as these: some
    eps of the largest. A probability has that as its relative error.
    """
    on("triton", device)  # or it is skipped
    logits = torch.randn(5, 130, device=device)
    label = torch.tensor([0, 63, 64, 127, 129], device=device)
    logits[torch.arange(5), label] = logits.max(1).values + margin
    truth = logits.double().log_softmax(1)
    dz = truth.exp()
    log_p = truth.gather(1, label[:, None])[:, 0]
    dz[torch.arange(5), label] = log_p.expm1()
    found_log_p, found = gradient_of(logits.clone(), label)
    eps = torch.finfo(FP32).eps
    bound = 8 * eps * max(1.0, float(truth.abs().max()))
    assert (found_log_p.double() - log_p).abs().max() <= bound
    others = torch.ones_like(dz, dtype=torch.bool).scatter_(1, label[:, None], False)
    assert ((found.double() - dz).abs()[others] <= bound * dz.abs()[others]).all()
    own = found.gather(1, label[:, None])[:, 0]
    # as good as the log-probability allows
    assert torch.allclose(own.double(), found_log_p.double().expm1(), rtol=8 * eps, atol=0)


def test_without_gradients_logits_stay(device, small):
    on("triton", device)
    logits, label = torch.randn(3, 70, device=device), torch.tensor([0, 64, 69], device=device)
    before = logits.clone()
    log_p, after = gradient_of(logits, label, needs=False)
    assert torch.equal(after, before)
    torch.testing.assert_close(log_p, before.log_softmax(1).gather(1, label[:, None])[:, 0])


def test_a_label_outside_is_nan_and_nothing_is_read_there(device, small):
    on("triton", device)
    logits, label = torch.randn(3, 70, device=device), torch.tensor([-1, 5, 70], device=device)
    log_p, _ = gradient_of(logits, label)
    assert log_p.isnan().tolist() == [True, False, True]


def test_nan_stays_in_its_row(device, small):
    on("triton", device)
    logits, label = torch.randn(3, 70, device=device), torch.tensor([1, 5, 69], device=device)
    clean = gradient_of(logits.clone(), label)
    logits[1, 66] = torch.nan
    log_p, dz = gradient_of(logits, label)
    assert log_p.isnan().tolist() == [False, True, False] and bool(dz[1].isnan().all())
    assert torch.equal(dz[[0, 2]], clean[1][[0, 2]])


def test_the_same_bits_again_and_the_loss_whatever_is_wanted(device, small):
    head = Head.of(21, 32, 300, 3, device=device)
    first, second = (head.run(on("triton", device)) for _ in range(2))
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    without = replace(head, needs="h")
    assert torch.equal(without.run(on("triton", device))["loss"], first["loss"])


@pytest.mark.parametrize("needs", NEEDS)
def test_custom_op(needs, device, small):
    on("triton", device)
    head = Head.of(9, 12, 30, 2, needs=needs, device=device)
    forward = torch.ops.smb.linear_cross_entropy_triton.default
    # not the check that differentiates the gradients too, which is refused
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(forward, (*head.leaves(), 0.5, *(k in needs for k in "hwt")), test_utils=tests)


def test_compiles_into_one_graph(device, small):
    head, f = Head.of(9, 12, 30, 2, device=device), on("triton", device)
    plain = head.run(f, grad=0.5)
    traced = head.run(torch.compile(f, fullgraph=True, backend="aot_eager"), grad=0.5)
    assert all(torch.equal(v, traced[k]) for k, v in plain.items())


def test_flops(device):
    f, leaves = on("triton", device), Head.of(10, 24, 50, 3, device=device).leaves()
    with FlopCounterMode(display=False) as counter:
        f(*leaves).backward()
    assert counter.get_total_flops() == head_flops(
        10, 24, 50, 3, hidden=True, weight=True, tokens=True
    )


def test_logits_are_held_once_also_in_bf16(monkeypatch):
    on("triton", "cpu")
    # a program for each row: few, but so many that a chunk's logits are more than the head
    monkeypatch.setattr("smbkernels.cross_entropy.op.LEAST", 16)
    N, D, V = 40, 8, 300
    head, C = Head.of(N, D, V, 3, dtype=BF16), chunk_rows(N, D, V)
    assert N > 2 * C and C * V > V * D
    with Large(C * V) as large:
        arguments = (head.hidden, head.weight, head.label, head.token, head.rows, 1.0)
        backend._launch(*arguments, True, False, True)
    assert len({x.untyped_storage().data_ptr() for x in large.held}) == 1
    assert {x.untyped_storage().nbytes() for x in large.held} == {2 * C * V}


def test_fp64_is_refused_and_chunks_are_larger_on_a_gpu(device):
    head = Head.of(4, 8, 20, dtype=FP64, device=device)
    with pytest.raises(ValueError, match=r"hidden_ND must be fp32 or bf16, got torch\.float64"):
        on("triton", device)(*head.leaves())
    assert chunk_rows(4096, 4096, 151936, "cuda") == 2048
    assert chunk_rows(3000, 4096, 151936, "cuda") == 1500
    assert chunk_rows(513, 64, 1000, "cuda") == 513
