"""Which library's varlen attention is taken, and that each is given what it asks for.

The libraries' functions stand in as fakes of every signature, over an engine that runs on a CPU;
their own arithmetic is for a machine with a GPU to show.
"""

import inspect

import pytest
import torch
from smbkernels.attention import engines, varlen
from smbkernels.attention.engines import Engine, flash_engine, torch_engine
from torch._subclasses import FakeTensorMode

from tests.ops.layouts import LAYOUTS, segments
from tests.ops.varlen_engine import assert_exact, backward, forward


def varlen_attn_2_10(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
):
    raise AssertionError("not called: it has no scale")


def varlen_attn_2_11(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
):
    assert window_size == (-1, 0) and return_aux == "aux"
    return forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def varlen_attn_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert enable_gqa and seqused_k is block_table is num_splits is None
    assert window_size == (-1, 0) and return_aux == "aux"
    return forward(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def varlen_backward(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal,
    rng_state,
    scale=None,
    window_size=None,
):
    assert is_causal and window_size == [-1, 0] and rng_state.dtype == torch.uint64
    # flash attention in torch adds by atomics unless this holds
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
    return backward(grad_out, query, key, value, out, lse, *bounds, scale)


def flash_2_8(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    assert causal and window_size == (-1, 0) and return_attn_probs and not dropout_p
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return *forward(q, k, v, *bounds, softmax_scale), torch.empty(0)


def flash_backward_2_8(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,  # 2.7 ends before it
):
    assert (dropout_p, softcap, alibi_slopes, rng_state) == (0.0, 0.0, None, None)
    assert causal and deterministic and (window_size_left, window_size_right) == (-1, 0)
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    grads = backward(dout, q, k, v, out, softmax_lse, *bounds, softmax_scale)
    for given, found in zip((dq, dk, dv), grads, strict=True):
        given.copy_(found)
    return torch.empty(0)


FOUND = {
    "torch_2_11": torch_engine(varlen_attn_2_11, varlen_backward, "aux"),
    "torch_2_12": torch_engine(varlen_attn_2_12, varlen_backward, "aux"),
    "flash_2_8": flash_engine("2.8.3.post2", flash_2_8, flash_backward_2_8),
}


@pytest.mark.parametrize("library", FOUND)
def test_a_library_is_given_what_it_asks_for(library):
    assert isinstance(FOUND[library], Engine)
    function = varlen.decomposed(library, lambda: FOUND[library])
    assert_exact(function, segments(LAYOUTS["three, none and eight branches"]))


def older_backward(grad_out, query, key, value, out, lse, a, b, max_q, max_k, is_causal, rng_state):
    raise AssertionError("not called: it has no scale")


def stranger(q, k, v, cu_q, cu_k, max_q, max_k, page, *, softmax_scale, causal, window_size):
    raise AssertionError("not called")


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (torch_engine(varlen_attn_2_10, varlen_backward, "aux"), "no argument window_size, scale"),
        (torch_engine(varlen_attn_2_12, older_backward, "aux"), "no argument scale, window_size"),
        (torch_engine(varlen_attn_2_12, None, "aux"), "a function is not there"),
        (flash_engine("2.6.3", flash_2_8, flash_backward_2_8), "2.7 or newer, got 2.6.3"),
        (flash_engine("2.9.0", None, flash_backward_2_8), "a function is not there"),
        (flash_engine("2.9.0", stranger, flash_backward_2_8), "no argument return_attn_probs"),
        (
            flash_engine("2.9.0", flash_2_8, flash_2_8),
            "no argument dropout_p, causal, window_size_l",
        ),
    ],
)
def test_another_signature_is_a_reason_not_a_crash(found, reason):
    assert isinstance(found, str)
    assert reason in found


def test_an_argument_that_must_be_given_and_is_not_known():
    def later(*, page, **_):
        raise AssertionError("not called")

    later.__signature__ = inspect.signature(varlen_attn_2_12).replace(
        parameters=[
            *inspect.signature(varlen_attn_2_12).parameters.values(),
            inspect.Parameter("page", inspect.Parameter.KEYWORD_ONLY),
        ]
    )
    found = torch_engine(later, varlen_backward, "aux")
    assert isinstance(found, str) and found.endswith("argument page is not known here")


@pytest.mark.parametrize("strict", [(False, False), (True, True), (True, False)])
def test_the_deterministic_switch_is_set_back(strict):
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch._C._set_deterministic_algorithms(strict[0], warn_only=strict[1])
    try:
        with pytest.raises(KeyError), engines._deterministic():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            # what nobody asked for is not paid: memory is filled only where it was before
            assert torch.utils.deterministic.fill_uninitialized_memory == strict[0]
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() == strict[0]
        assert torch.is_deterministic_algorithms_warn_only_enabled() == strict[1]
        assert torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch._C._set_deterministic_algorithms(before, warn_only=warned)


def test_flash_attn_comes_first(monkeypatch):
    first, second = (Engine(n, forward, backward) for n in ("flash", "torch"))
    for flash, other, expected in (
        (first, second, first),
        ("no flash", second, second),
        ("no flash", "no torch", "no flash; no torch"),
    ):
        monkeypatch.setattr(engines, "_installed_flash", lambda found=flash: found)
        monkeypatch.setattr(engines, "_installed_torch", lambda found=other: found)
        assert engines.engine.__wrapped__() == expected


def test_the_installed_torch_takes_the_calls():
    found = engines._installed_torch()
    assert isinstance(found, Engine), found
    with FakeTensorMode():
        query, grad = (torch.empty(10, 4, 64, dtype=torch.bfloat16) for _ in range(2))
        key, value = (torch.empty(12, 2, 64, dtype=torch.bfloat16) for _ in range(2))
        cu_q, cu_k = (torch.empty(3, dtype=torch.int32) for _ in range(2))
        bounds = (cu_q, cu_k, 6, 8)
        out, lse = found.forward(query, key, value, *bounds, 0.125)
        assert out.shape == query.shape and lse.shape == (4, 10) and lse.dtype == torch.float32
        grads = found.backward(grad, query, key, value, out, lse, *bounds, 0.125)
        assert [x.shape for x in grads] == [query.shape, key.shape, value.shape]
