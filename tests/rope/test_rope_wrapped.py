"""The rotation by frequencies of `axial`, Resonance and Ms-PoE, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from truncation import truncation

from extrope_kernels import apply_rope, apply_rope_qk, methods
from extrope_kernels.testing import DTYPES, assert_within_budget, device, make_qk

HEADS, HEAD_DIM = 5, 48


YARN = methods.yarn(40, factor=4.0, original_max_position_embeddings=4096)


WRAPPED = {
    "resonance": methods.resonance(YARN),
    "ms_poe": methods.ms_poe(YARN, heads=HEADS, order=[3, 0, 4, 1, 2]),
    "ms_poe of resonance": methods.ms_poe(methods.resonance(YARN), heads=HEADS),
    "ms_poe of a batch": methods.ms_poe(
        methods.dynamic_ntk(
            40, factor=2.0, seq_len=torch.tensor([5, 500]), max_position_embeddings=64
        ),
        heads=HEADS,
    ),
}


def by_definition(x, freqs, positions):
    """Every head's pairs as complex numbers, rotated one after another in x's dtype."""
    inv_freq = freqs.inv_freq
    inv_freq = inv_freq[:, None] if inv_freq.dim() == 3 else inv_freq
    angles = positions[:, None, None].double() * inv_freq.double()
    half = inv_freq.shape[-1]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), -1) * freqs.attention_factor
    return torch.cat((rotated, x[..., 2 * half :]), -1)


def outputs_and_gradients(rotate, q, k, weights):
    q, k = (x.detach().clone().requires_grad_() for x in (q, k))
    outs = rotate(q, k)
    loss = sum((out * w.to(out.dtype)).sum() for out, w in zip(outs, weights))
    return [*(out.detach() for out in outs), *torch.autograd.grad(loss, (q, k))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WRAPPED)
def test_forward_and_backward(backend, name, dtype):
    freqs = WRAPPED[name].to(device())
    q, k = make_qk(2, 11, HEADS, HEADS, head_dim=HEAD_DIM, dtype=dtype)
    weights = make_qk(2, 11, HEADS, HEADS, head_dim=HEAD_DIM, dtype=dtype, seed=1)
    positions = torch.randint(0, 100_000, (11,), device=device())

    def rotate(q, k, backend):
        return apply_rope_qk(q, k, freqs, positions=positions, backend=backend)

    def define(q, k):
        return [by_definition(x, freqs, positions) for x in (q, k)]

    got = outputs_and_gradients(lambda q, k: rotate(q, k, backend), q, k, weights)
    same = outputs_and_gradients(lambda q, k: rotate(q, k, "reference"), q, k, weights)
    exact = outputs_and_gradients(define, q.double(), k.double(), [w.double() for w in weights])
    for values in zip(("q", "k", "dq", "dk"), got, same, exact):
        assert_within_budget(*values, truncation(backend, dtype))


def test_fewer_heads_of_k_than_of_q(backend):
    """Logits see the distance divided by the group's ratio."""
    q, k = make_qk(1, 9, 6, 2, head_dim=40)
    order = [1, 0]
    keys = methods.ms_poe(YARN, heads=2, order=order).to(device())
    queries = methods.ms_poe(YARN, heads=6, order=order, group=3).to(device())
    got_q = apply_rope(q, queries, positions=1000, backend=backend)
    got_k = apply_rope(k, keys, positions=1000, backend=backend).repeat_interleave(3, 2)
    again_q = apply_rope(q, queries, backend="reference")
    again_k = apply_rope(k, keys, backend="reference").repeat_interleave(3, 2)
    logits = torch.einsum("bihd,bjhd->bhij", got_q, got_k)
    expected = torch.einsum("bihd,bjhd->bhij", again_q, again_k)
    # Sums of 40 products below 20, of factors rounded twice each.
    assert (logits - expected).abs().max() <= 40**0.5 * 20 * 4 * torch.finfo(torch.float32).eps


def test_resonance_repeats_after_its_wavelengths(backend):
    freqs = methods.resonance(methods.rope(40)).to(device())
    wavelengths = (2 * math.pi / freqs.inv_freq).round().long()
    x = make_qk(1, 1, 1, 1, head_dim=40)[0]
    for pair, wavelength in enumerate(wavelengths.tolist()):
        first = apply_rope(x, freqs, positions=3, backend=backend)
        later = apply_rope(x, freqs, positions=3 + wavelength, backend=backend)
        for dim in (pair, pair + 20):
            # An angle below 10 as exact as the frequency, and two roundings of x below 5.
            assert (first - later).abs()[..., dim].max() <= 5 * 12 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("ladder", ["own", "shared"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_axial_rotates_every_share_by_its_axis(backend, axes, ladder, interleaved):
    freqs = methods.axial(48, axes=axes, ladder=ladder).to(device())
    q, k = make_qk(2, 10, 3, 2, head_dim=50)
    weights = make_qk(2, 10, 3, 2, head_dim=50, seed=1)
    positions = torch.randint(0, 1000, (axes, 2, 10), device=device())
    rotary_dim = 2 * len(freqs.inv_freq)

    def rotate(q, k):
        return apply_rope_qk(
            q, k, freqs, positions=positions, interleaved=interleaved, backend=backend
        )

    def define(x):
        rest = x[..., rotary_dim:]
        x = x[..., :rotary_dim]
        pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
        angles = positions[freqs.axes.long()].movedim(0, -1).double() * freqs.inv_freq.double()
        turn = torch.polar(torch.ones_like(angles), angles)[:, :, None].to(torch.complex128)
        pairs = torch.view_as_real(torch.view_as_complex(pairs.double().contiguous()) * turn)
        out = pairs.flatten(-2) if interleaved else pairs.mT.flatten(-2)
        return torch.cat((out.to(x.dtype), rest), -1)

    got = outputs_and_gradients(rotate, q, k, weights)
    exact = outputs_and_gradients(
        lambda q, k: [define(q), define(k)], q.double(), k.double(), [w.double() for w in weights]
    )
    for a, b in zip(got, exact):
        # Two products and a sum of numbers below 6, each rounded to float32.
        assert (a.double() - b).abs().max() <= 3 * 6 * torch.finfo(torch.float32).eps
