"""Positions by axis: gradients, graphs and vmap."""

import pytest
import torch
from test_mrope import by_axis, draw, frequencies

from extrope_kernels import apply_rope, apply_rope_qk
from extrope_kernels.testing import device, make_qk


@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
def test_gradients(backend, interleaved, packed):
    q, k = make_qk(1 if packed else 2, 7, 2, 1, dtype=torch.float64)
    options = {"interleaved": interleaved}
    inv_freq = torch.rand(2, 32, device=device())
    if packed:
        q, k = q[0], k[0]
        options["cu_seqlens"] = torch.tensor([0, 3, 7], dtype=torch.int32, device=device())
    positions = draw(3, 1 if packed else 2, 7, largest=1000)
    leaves = [x.clone().requires_grad_() for x in (q, k, inv_freq)]
    freqs = frequencies(inv_freq=leaves[2])
    outs = apply_rope_qk(*leaves[:2], freqs, positions=positions, backend=backend, **options)
    expected = by_axis(*leaves[:2], freqs, positions, **options)
    weights = [torch.randn_like(x) for x in outs]
    got = torch.autograd.grad(outs, leaves, weights)
    want = torch.autograd.grad(expected, leaves, weights)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


def test_compile(backend):
    q, _ = make_qk()
    freqs = frequencies()
    compiled = torch.compile(
        lambda x, p: apply_rope(x * 1.0, freqs, positions=p, backend=backend), fullgraph=True
    )
    leaf, positions = q.clone().requires_grad_(), draw(3, 2, 13)
    out = compiled(leaf, positions)
    torch.testing.assert_close(out, apply_rope(q, freqs, positions=positions, backend=backend))
    out.sum().backward()
    ones = apply_rope(torch.ones_like(q), freqs, positions=positions, inverse=True)
    torch.testing.assert_close(leaf.grad, ones * freqs.attention_factor**2)


def test_vmap_over_positions(backend):
    q, _ = make_qk()
    positions = draw(4, 3, 2, 13)
    got = torch.vmap(lambda p: apply_rope(q, frequencies(), positions=p, backend=backend))(
        positions
    )
    for out, given in zip(got, positions):
        assert torch.equal(out, apply_rope(q, frequencies(), positions=given, backend=backend))


# -------------------------------------------------------------------------------------------------
# Sections
