"""The low-rank average: appending is exact, truncation nearly the best there is, nothing is NaN."""

import pytest
import smbkernels.tracked_ema as module
import torch
from smbkernels.tracked_ema import append_, cost, truncate_, truncate_by_eigenvectors_

pytestmark = pytest.mark.numeric

M, N, K, RANK = 3, 40, 24, 5
BOTH = pytest.mark.parametrize("truncate", [truncate_, truncate_by_eigenvectors_])


def factors(q: int, *, decay: float = 1.0, dtype=torch.float64):
    """U and V with column j smaller by decay^j."""
    size = decay ** torch.arange(q, dtype=torch.float64)
    u_MNQ = torch.randn(M, N, q, dtype=torch.float64) * size
    return u_MNQ.to(dtype), torch.randn(M, q, K, dtype=torch.float64).to(dtype)


def best(product_MNK: torch.Tensor, rank: int) -> torch.Tensor:
    """The nearest product of that rank."""
    left, size, right = torch.linalg.svd(product_MNK, full_matrices=False)
    return left[:, :, :rank] * size[:, None, :rank] @ right[:, :rank]


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0])
def test_append_is_the_average(tau):
    u_MNQ, v_MQK = factors(12)
    u_MNQ[:, :, 8:] = 0
    v_MQK[:, 8:] = 0
    b = list(torch.randn(M, N, 4, dtype=torch.float64))
    a = list(torch.randn(M, 4, K, dtype=torch.float64))
    exact = tau * (u_MNQ @ v_MQK) + (1 - tau) * (torch.stack(b) @ torch.stack(a))
    append_(u_MNQ, v_MQK, b, a, start=8, tau=tau)
    torch.testing.assert_close(u_MNQ @ v_MQK, exact, rtol=1e-13, atol=1e-13)


# a full spectrum; a steep one; more columns than the matrix has rows (rank 24 of 30 columns)
@pytest.mark.parametrize(("q", "decay"), [(12, 1.0), (12, 0.1), (30, 0.8)])
def test_truncation_is_the_nearest_product_of_its_rank(q, decay):
    u_MNQ, v_MQK = factors(q, decay=decay)
    product = u_MNQ @ v_MQK
    expected = best(product, RANK)
    discarded_M, norm_M = truncate_by_eigenvectors_(u_MNQ, v_MQK, RANK)
    assert not u_MNQ[:, :, RANK:].any() and not v_MQK[:, RANK:].any()
    gap = (u_MNQ @ v_MQK - expected).norm() / product.norm()
    assert gap < 1e-9
    torch.testing.assert_close(norm_M, product.norm(dim=(1, 2)), rtol=1e-9, atol=0)
    lost_M = (product - expected).norm(dim=(1, 2))
    torch.testing.assert_close(discarded_M, lost_M, rtol=1e-4, atol=1e-9 * float(norm_M.max()))


def by_householder(product_MNK, u_MNQ, rank: int) -> torch.Tensor:
    """What block power iteration keeps, written with P itself and QR: no Gram matrix, no factor L.

    X is an orthonormal basis of the columns of U, in the order of U, as U L'^-1 is up to signs.
    """
    even_MQ = v_length(product_MNK, u_MNQ)
    basis_MNQ, upper_MQQ = torch.linalg.qr(u_MNQ * even_MQ[:, None])
    basis_MNQ = basis_MNQ * upper_MQQ.diagonal(dim1=1, dim2=2).sign()[:, None]
    inner_MQK = basis_MNQ.mT @ product_MNK
    q = u_MNQ.shape[2]
    core_MQR = torch.eye(q, rank).double() + module.NOISE * (
        module._noise(q, rank, u_MNQ) * (1 - torch.eye(q, rank).double())
    )
    for _ in range(module.STEPS):
        core_MQR = torch.linalg.qr(inner_MQK @ (inner_MQK.mT @ core_MQR))[0]
    return basis_MNQ @ (core_MQR @ (core_MQR.mT @ inner_MQK))


def v_length(product_MNK, u_MNQ) -> torch.Tensor:
    """By what a column of U is made as long as its row of V; U has independent columns here."""
    v_MQK = torch.linalg.lstsq(u_MNQ, product_MNK).solution
    return (v_MQK.norm(dim=2) / u_MNQ.norm(dim=1)).sqrt()


@pytest.mark.parametrize(("q", "decay"), [(12, 1.0), (12, 0.1), (20, 0.8)])
def test_block_power_is_what_it_says_and_its_bound_is_exact(q, decay):
    """Against QR by reflections: two steps from the first columns; and no better than the best."""
    u_MNQ, v_MQK = factors(q, decay=decay)
    product = u_MNQ @ v_MQK
    expected = by_householder(product, u_MNQ, RANK)
    discarded_M, norm_M = truncate_(u_MNQ, v_MQK, RANK)
    assert not u_MNQ[:, :, RANK:].any() and not v_MQK[:, RANK:].any()
    found = u_MNQ @ v_MQK
    assert (found - expected).norm() / product.norm() < 1e-9
    torch.testing.assert_close(norm_M, product.norm(dim=(1, 2)), rtol=1e-9, atol=0)
    lost_M = (product - found).norm(dim=(1, 2))
    least_M = (product - best(product, RANK)).norm(dim=(1, 2))
    torch.testing.assert_close(discarded_M, lost_M, rtol=1e-4, atol=1e-8 * float(norm_M.max()))
    assert bool((lost_M >= (1 - 1e-9) * least_M).all())


def test_every_rank_of_the_columns_is_kept_where_there_is_room():
    """Q = R, or dependent columns: nothing is discarded.

    Where columns are dependent, the shift of L, 2e-12 of the trace, is a column of its own.
    """
    for q in (RANK, 12):
        u_MNQ, v_MQK = factors(q, decay=0.3)
        u_MNQ[:, :, 3:] = u_MNQ[:, :, :1]
        product = u_MNQ @ v_MQK
        truncate_(u_MNQ, v_MQK, RANK)
        assert (u_MNQ @ v_MQK - product).norm() < 1e-10 * product.norm()


def test_equal_singular_values_are_cut_somewhere():
    """A tie has no nearest product of its rank but many, each as near."""
    u_MNQ = torch.linalg.qr(torch.randn(M, N, 12, dtype=torch.float64))[0]
    v_MQK = torch.linalg.qr(torch.randn(M, K, 12, dtype=torch.float64))[0].mT.contiguous()
    product = u_MNQ @ v_MQK
    discarded_M, norm_M = truncate_(u_MNQ, v_MQK, RANK)
    least = (12 - RANK) ** 0.5
    lost_M = (product - u_MNQ @ v_MQK).norm(dim=(1, 2))
    for found_M in (lost_M, discarded_M):
        torch.testing.assert_close(found_M, torch.full_like(found_M, least), rtol=1e-9, atol=0)
    torch.testing.assert_close(norm_M, torch.full_like(norm_M, 12**0.5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_in_its_module(bad, side):
    pair = factors(12)
    clean = [x.clone() for x in pair]
    truncate_(*clean, RANK)
    pair[side][1, 3, 2] = bad
    discarded_M, norm_M = truncate_(*pair, RANK)
    assert not norm_M[1].isfinite() and not discarded_M[1].isfinite()
    assert not (pair[0] @ pair[1])[1].isfinite().any()
    for found, alone in zip(pair, clean, strict=True):
        assert torch.equal(found[[0, 2]], alone[[0, 2]])


@BOTH
def test_truncation_of_fp32_factors_is_as_good_as_their_storage(truncate):
    u_MNQ, v_MQK = factors(12, decay=0.1, dtype=torch.float32)
    expected = best(u_MNQ.double() @ v_MQK.double(), RANK)
    truncate(u_MNQ, v_MQK, RANK)
    gap = (u_MNQ.double() @ v_MQK.double() - expected).norm() / expected.norm()
    assert gap < 2e-7


@BOTH
def test_scales_of_the_columns_do_not_matter(truncate):
    """A tiny U beside a large V, as in the first steps of an adapter, is the same product."""
    u_MNQ, v_MQK = factors(12)
    size = 10.0 ** torch.linspace(-9, 9, 12, dtype=torch.float64)
    expected_u, expected_v = u_MNQ.clone(), v_MQK.clone()
    truncate(expected_u, expected_v, RANK)
    expected = expected_u @ expected_v
    u_MNQ, v_MQK = u_MNQ * size, v_MQK / size[:, None]
    truncate(u_MNQ, v_MQK, RANK)
    assert (u_MNQ @ v_MQK - expected).norm() / expected.norm() < 1e-9


def repeated(u_MNQ, v_MQK):
    """The same adapter in every block, as when nothing moves."""
    u_MNQ[:, :, 4:] = u_MNQ[:, :, :4].repeat(1, 1, 2)
    v_MQK[:, 4:] = v_MQK[:, :4].repeat(1, 2, 1)


def zero_b(u_MNQ, v_MQK):
    u_MNQ.zero_()


def zero_in_part(u_MNQ, v_MQK):
    u_MNQ[1].zero_()
    u_MNQ[:, :, 4:8] = 0
    v_MQK[2, 0] = 0


def barely_apart(u_MNQ, v_MQK):
    repeated(u_MNQ, v_MQK)
    u_MNQ += 1e-7 * torch.randn_like(u_MNQ)
    v_MQK *= 1 + 1e-7


def all_zero(u_MNQ, v_MQK):
    u_MNQ.zero_()
    v_MQK.zero_()


@pytest.mark.parametrize("spoil", [repeated, zero_b, zero_in_part, barely_apart, all_zero])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@BOTH
def test_dependent_and_zero_columns(spoil, dtype, truncate):
    u_MNQ, v_MQK = factors(12, dtype=dtype)
    spoil(u_MNQ, v_MQK)
    expected = best(u_MNQ.double() @ v_MQK.double(), RANK)
    discarded_M, norm_M = truncate(u_MNQ, v_MQK, RANK)
    for found in (u_MNQ, v_MQK, discarded_M, norm_M):
        assert bool(found.isfinite().all())
    gap = (u_MNQ.double() @ v_MQK.double() - expected).norm()
    if truncate is truncate_by_eigenvectors_ or spoil is not zero_in_part:  # of full rank
        assert gap <= 1e-6 * expected.norm()
    truncate(u_MNQ, v_MQK, RANK)  # and again, with what it left
    assert bool(u_MNQ.isfinite().all())


def test_same_bits_twice_and_however_it_is_cut(monkeypatch):
    found = []
    for chunk in (1 << 25, 1 << 25, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        torch.manual_seed(3)
        u_MNQ, v_MQK = factors(12, dtype=torch.float32)
        truncate_(u_MNQ, v_MQK, RANK)
        found.append((u_MNQ, v_MQK))
    assert all(torch.equal(x, y) for x, y in zip(found[0], found[1], strict=True))
    torch.testing.assert_close(found[2][0] @ found[2][1], found[0][0] @ found[0][1])


def test_the_cost_of_the_8b_model_is_what_the_docstring_says():
    layer = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(12288, 4096)] * 2 + [(4096, 12288)]
    found = cost(layer * 36, 16, 64, 4)
    assert found.bytes == pytest.approx(5.5e9, rel=0.01)
    assert found.flops == pytest.approx(35e9, rel=0.01)
    merged = sum(n * k for n, k in layer) * 36
    assert found.bytes < 0.1 * 10 * merged and found.flops < 0.2 * (2 * 16 + 5) * merged
