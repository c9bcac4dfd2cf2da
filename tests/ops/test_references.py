"""The operations against their formulas in fp64, and their gradients by finite differences."""

import math

import pytest
import torch
from smbkernels import (
    add_rms_norm,
    ema_update_,
    linear,
    linear_cross_entropy,
    masked_jepa_mse,
    qk_norm_rope,
    swiglu,
)

pytestmark = pytest.mark.numeric


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rows", [[], [3], [0, 4, 2, 2]])
def test_masked_jepa_mse(normalize, rows):
    prediction_MD, target_TD = normal(len(rows), 7), normal(5, 7)
    expected = 0.0
    for m, row in enumerate(rows):
        t = target_TD[row]
        if normalize:
            t = (t - t.mean()) / torch.sqrt(((t - t.mean()) ** 2).mean() + 1e-5)
        expected += float(((prediction_MD[m] - t) ** 2).sum() / 7)
    row_M = torch.tensor(rows, dtype=torch.long)
    value = masked_jepa_mse(prediction_MD, target_TD, row_M, normalize=normalize)
    assert float(value) == pytest.approx(expected, abs=1e-12)


def test_masked_jepa_mse_has_a_gradient_for_the_prediction_alone():
    prediction_MD, target_TD = normal(3, 6).requires_grad_(), normal(4, 6).requires_grad_()
    row_M = torch.tensor([1, 0, 3])
    assert torch.autograd.gradcheck(
        lambda p: masked_jepa_mse(p, target_TD.detach(), row_M), prediction_MD
    )
    masked_jepa_mse(prediction_MD, target_TD, row_M).backward()
    assert target_TD.grad is None and prediction_MD.grad is not None


def test_linear():
    x_TK, weight_NK, bias_N = normal(3, 4), normal(2, 4), normal(2)
    y_TN = linear(x_TK, weight_NK, bias_N)
    for t in range(3):
        for n in range(2):
            expected = sum(float(x_TK[t, k] * weight_NK[n, k]) for k in range(4)) + bias_N[n]
            assert float(y_TN[t, n]) == pytest.approx(float(expected), abs=1e-12)
    leaves = [tensor.requires_grad_() for tensor in (x_TK, weight_NK, bias_N)]
    assert torch.autograd.gradcheck(linear.reference, leaves)


def test_linear_cross_entropy():
    hidden_ND, weight_VD = normal(5, 4).requires_grad_(), normal(9, 4).requires_grad_()
    label_N = torch.tensor([0, 8, 3, 3, 1])
    z = hidden_ND @ weight_VD.T
    expected = (torch.logsumexp(z, 1) - z[torch.arange(5), label_N]).sum()
    torch.testing.assert_close(linear_cross_entropy(hidden_ND, weight_VD, label_N), expected)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, label_N), (hidden_ND, weight_VD)
    )
    assert linear_cross_entropy(hidden_ND.bfloat16(), weight_VD, label_N).dtype == torch.float32


@pytest.mark.parametrize("tau", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("adapter", [True, False])
def test_ema_update(tau, adapter):
    average_NK, weight_NK, b_NR, a_RK = normal(6, 5), normal(6, 5), normal(6, 2), normal(2, 5)
    merged = weight_NK + (1.5 * b_NR @ a_RK if adapter else 0)
    expected = tau * average_NK + (1 - tau) * merged
    pair = ([b_NR], [a_RK]) if adapter else (None, None)
    ema_update_([average_NK], [weight_NK], *pair, scale=[1.5], tau=tau)
    torch.testing.assert_close(average_NK, expected)


def test_an_fp32_average_of_bf16_weights_moves_where_a_bf16_one_does_not():
    weight = torch.ones(100, dtype=torch.bfloat16) * 1.01
    kept, lost = torch.ones(100), torch.ones(100, dtype=torch.bfloat16)
    for _ in range(500):
        ema_update_([kept], [weight], tau=0.996)
        lost.lerp_(weight, 1 - 0.996)
    assert float(kept[0]) - 1 == pytest.approx((float(weight[0]) - 1) * (1 - 0.996**500), rel=1e-3)
    assert float(lost[0]) == 1.0


@pytest.mark.parametrize("residual", [True, False])
def test_add_rms_norm(residual):
    x_TD, residual_TD, weight_D = (normal(*s).requires_grad_() for s in ((3, 4), (3, 4), (4,)))
    given = (x_TD, residual_TD if residual else None, weight_D)
    sum_TD, normed_TD = add_rms_norm.reference(*given, eps=0.1)
    for t in range(3):
        pairs = zip(x_TD[t].tolist(), residual_TD[t].tolist(), strict=True)
        s = [x + residual * r for x, r in pairs]
        rms = (sum(v * v for v in s) / 4 + 0.1) ** 0.5
        assert sum_TD[t].tolist() == pytest.approx(s, abs=1e-12)
        expected = [w * v / rms for w, v in zip(weight_D.tolist(), s, strict=True)]
        assert normed_TD[t].tolist() == pytest.approx(expected, abs=1e-12)
    assert torch.autograd.gradcheck(lambda *g: add_rms_norm.reference(*g, eps=0.1), given)


@pytest.mark.parametrize("norm", [True, False])
def test_qk_norm_rope(norm):
    shapes = ((2, 3, 4), (2, 1, 4), (4,), (4,))
    q_THC, k_TGC, *weights = (normal(*s).requires_grad_() for s in shapes)
    cos_TC, sin_TC = normal(2, 4), normal(2, 4)
    weights = weights if norm else [None, None]
    turned = qk_norm_rope.reference(q_THC, k_TGC, *weights, cos_TC, sin_TC, eps=0.1)
    for x_TNC, weight_C, y_TNC in zip((q_THC, k_TGC), weights, turned, strict=True):
        for t in range(2):
            for n in range(x_TNC.shape[1]):
                x = x_TNC[t, n].tolist()
                if norm:
                    rms = (sum(v * v for v in x) / 4 + 0.1) ** 0.5
                    x = [w * v / rms for w, v in zip(weight_C.tolist(), x, strict=True)]
                cos, sin = cos_TC[t].tolist(), sin_TC[t].tolist()
                expected = [x[c] * cos[c] - x[c + 2] * sin[c] for c in (0, 1)]
                expected += [x[c] * cos[c] + x[c - 2] * sin[c] for c in (2, 3)]
                assert y_TNC[t, n].tolist() == pytest.approx(expected, abs=1e-12)
    leaves = (q_THC, k_TGC, *(w for w in weights if w is not None))
    assert torch.autograd.gradcheck(
        lambda q, k, *w: qk_norm_rope.reference(q, k, *(w or weights), cos_TC, sin_TC, eps=0.1),
        leaves,
    )


def test_swiglu():
    gate_TF, up_TF = normal(3, 4).requires_grad_(), normal(3, 4).requires_grad_()
    out_TF = swiglu.reference(gate_TF, up_TF)
    for t in range(3):
        for g, u, y in zip(gate_TF[t].tolist(), up_TF[t].tolist(), out_TF[t].tolist(), strict=True):
            assert y == pytest.approx(g / (1 + math.exp(-g)) * u, abs=1e-12)
    assert torch.autograd.gradcheck(swiglu.reference, (gate_TF, up_TF))
