"""Derivatives of the rotation: first, second, to the frequencies, under torch.func."""

from __future__ import annotations

import pytest
import torch
from support.rope_cases import Case, check, check_gradients
from torch.autograd import gradcheck, gradgradcheck

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods
from extrope_kernels.testing import DTYPES, assert_within_budget, device, make_qk

LONG_POSITIONS = (1_009, 100_003, 1_000_003, 15_999_989)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", LONG_POSITIONS)
def test_forward_and_backward_against_float64(backend, start, dtype):
    """Exact at any position."""
    q, k = make_qk(2, 11, 3, 1, head_dim=72, dtype=dtype)
    freqs = methods.yarn(64, factor=4.0, original_max_position_embeddings=4096).to(device())
    case = Case(q, k, freqs, {"positions": start, "interleaved": start % 4 == 1})
    check(case, backend)
    check_gradients(case, backend)


def test_backward_of_strided_views_and_of_a_sum(backend):
    """The gradient of a sum is an expanded scalar: strides all zero."""
    q, _ = make_qk(2, 5, 3)
    leaf = q.transpose(1, 2).contiguous().requires_grad_()
    freqs = methods.rope(64).to(device())
    apply_rope(leaf.transpose(1, 2), freqs, positions=9, backend=backend).sum().backward()
    ones = torch.ones_like(q)
    expected = apply_rope(ones, freqs, positions=9, inverse=True, backend="reference")
    torch.testing.assert_close(leaf.grad.transpose(1, 2), expected, rtol=0, atol=1e-6)


def test_autograd_notices_that_a_saved_tensor_was_rotated_in_place(backend):
    q, _ = make_qk()
    weight = torch.ones_like(q, requires_grad=True)
    loss = (q * weight).sum()
    with torch.no_grad():
        apply_rope(q, methods.rope(64).to(device()), inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CASES = {
    "plain": dict(),
    "interleaved": dict(interleaved=True),
    "rotary_offset": dict(rotary_offset=1, freq_shape=(1, 2, 3)),
    "interleaved_offset": dict(interleaved=True, rotary_offset=2),
    "inverse": dict(inverse=True, attention_factor=1.3),
    "positions": dict(positions=torch.tensor([[5, 3, 9], [100, 7, 0]])),
    "offsets": dict(positions=torch.tensor([4, 40])),
    "per_sequence": dict(freq_shape=(2, 3)),
    "per_sequence_of_groups": dict(freq_shape=(2, 1, 3), heads_k=1),
    "per_head": dict(freq_shape=(1, 2, 3)),
    "per_both": dict(freq_shape=(2, 2, 3)),
    "packed": dict(cu_seqlens=torch.tensor([0, 1, 1, 3], dtype=torch.int32), freq_shape=(3, 3)),
    "decay": dict(log_decay=True),
    "axes": dict(positions=torch.arange(18).view(3, 2, 3) % 7, axes=(2, 0, 1), freq_shape=(2, 3)),
}


def build_case(name):
    options = dict(CASES[name])
    shape = options.pop("freq_shape", (3,))
    attention_factor = options.pop("attention_factor", 1.0)
    log_decay = methods.xpos(6).log_decay.to(device()) if options.pop("log_decay", False) else None
    axes = options.pop("axes", None)
    axes = None if axes is None else torch.tensor(axes, dtype=torch.int32, device=device())
    options = {
        key: value.to(device()) if isinstance(value, torch.Tensor) else value
        for key, value in options.items()
    }
    heads_k = options.pop("heads_k", 2)
    q, k = make_qk(2, 3, 2, heads_k, head_dim=8, dtype=torch.float64)
    if "cu_seqlens" in options:
        q, k = q[0].contiguous(), k[0].contiguous()
    inv_freq = torch.rand(shape, dtype=torch.float64, device=device())

    def rotate(q, k, inv_freq, backend):
        freqs = RopeFreqs(inv_freq, attention_factor, log_decay, axes)
        return apply_rope_qk(q, k, freqs, backend=backend, **options)

    return rotate, [x.requires_grad_() for x in (q, k, inv_freq)]


@pytest.mark.parametrize("case", CASES)
def test_finite_differences_twice(backend, case):
    rotate, leaves = build_case(case)
    assert gradcheck(lambda *x: rotate(*x, backend), leaves, fast_mode=True)
    assert gradgradcheck(lambda *x: rotate(*x, backend), leaves, fast_mode=True)


@pytest.mark.parametrize("case", ("plain", "per_head"))
def test_one_tensor(backend, case):
    _, (q, _, inv_freq) = build_case(case)

    def one(q, inv_freq):
        return apply_rope(q, RopeFreqs(inv_freq), backend=backend)

    assert gradcheck(one, (q, inv_freq), fast_mode=True)
    assert gradgradcheck(one, (q, inv_freq), fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_second_derivatives_of_frequencies(backend, dtype):
    """As exact with rows of 16 bits as with those of 32, also far out."""
    q, k = make_qk(2, 11, 3, 1, head_dim=64, dtype=dtype)
    weights = [torch.randn_like(x) for x in (q, k)]

    def second(wide, backend):
        inv_freq = methods.rope(64).inv_freq.to(device()).requires_grad_()
        x = [x.to(wide) for x in (q, k)]
        rotated = apply_rope_qk(*x, RopeFreqs(inv_freq), positions=100_000, backend=backend)
        loss = sum((x * w.to(wide)).sum() for x, w in zip(rotated, weights))
        (first,) = torch.autograd.grad(loss, inv_freq, create_graph=True)
        return torch.autograd.grad(first.sum(), inv_freq)[0]

    plain, exact = (second(x, "reference") for x in (torch.float32, torch.float64))
    assert_within_budget("second", second(dtype, backend), plain, exact)


# -------------------------------------------------------------------------------------------------
# torch.func


def test_func_grad_of_grad(backend):
    rotate, (q, k, inv_freq) = build_case("plain")

    def slope(q, backend):
        return torch.func.grad(lambda x: rotate(x, k, inv_freq, backend)[0].pow(3).sum())(q)

    second = torch.func.grad(lambda x: slope(x, backend).sum())(q)
    expected = torch.func.grad(lambda x: slope(x, "reference").sum())(q)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize(
    "in_dims", ((0, 0, None), (1, None, None), (None, 2, None), (None, None, 0), (0, 0, 0))
)
@pytest.mark.parametrize("case", ("plain", "packed"))
def test_vmap(backend, case, in_dims):
    rotate, leaves = build_case(case)
    stacked = [
        x if dim is None else torch.stack([x * (i + 1) for i in range(3)], dim).detach()
        for x, dim in zip(leaves, in_dims)
    ]
    got = torch.vmap(lambda *x: rotate(*x, backend), in_dims)(*stacked)
    expected = torch.vmap(lambda *x: rotate(*x, "reference"), in_dims)(*stacked)
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("size", (0, 3))
@pytest.mark.parametrize("places", (False, True))
def test_vmap_of_tensors_that_require_gradients(backend, size, places):
    """Outside of torch.func. Samples are one batch or, with places of their own, a loop."""
    x = torch.randn(size, 2, 5, 3, 8, device=device(), requires_grad=True)
    positions = torch.arange(5 * size, device=device()).view(size, 5) if places else None
    freqs = methods.rope(8).to(device())

    def gradient(name):
        def rotate(x, positions):
            return apply_rope(x, freqs, positions=positions, backend=name)

        out = torch.vmap(rotate, (0, 0 if places else None))(x, positions)
        return torch.autograd.grad(out.pow(3).sum(), x)[0]

    torch.testing.assert_close(gradient(backend), gradient("reference"))


def test_per_sample_gradients(backend):
    """vmap over grad: what differential privacy and influence functions call."""
    rotate, (q, k, inv_freq) = build_case("plain")
    samples = torch.stack([q.detach(), 2 * q.detach()])

    def loss(q, backend):
        return rotate(q, k, inv_freq, backend)[0].pow(3).sum()

    got = torch.vmap(torch.func.grad(lambda x: loss(x, backend)))(samples)
    expected = torch.vmap(torch.func.grad(lambda x: loss(x, "reference")))(samples)
    torch.testing.assert_close(got, expected)
