"""Rotations beside the generated ones: every head_dim in every dtype, large ones, and back."""

from __future__ import annotations

import pytest
import torch
from support.rope_cases import Case, check

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, methods
from extrope_kernels.ops.rope import reference
from extrope_kernels.testing import DTYPES, device, make_qk


def frequencies(dim, **changes):
    """YaRN-like: an attention factor, frequencies from 1 down."""
    inv_freq = methods.rope(dim).inv_freq.to(device())
    return RopeFreqs(changes.get("inv_freq", inv_freq), changes.get("attention_factor", 1.1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (2, 8, 64, 72, 80, 96, 128, 256))
def test_head_dims(backend, head_dim, dtype):
    """Of one pair, of whole registers, and of what is left."""
    q, k = make_qk(head_dim=head_dim, dtype=dtype)
    for interleaved in (False, True):
        check(Case(q, k, frequencies(head_dim), {"interleaved": interleaved}), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_heads_and_tokens(backend, dtype):
    for shape in ((1, 1, 73, 1), (2, 17, 8, 2), (1, 131, 1, 1)):
        q, k = make_qk(*shape, head_dim=16, dtype=dtype)
        check(Case(q, k, frequencies(16), {"positions": 9}), backend)


def test_one_tensor_is_what_it_is_among_two(backend):
    q, k = make_qk()
    together = apply_rope_qk(q, k, frequencies(64), backend=backend)
    assert torch.equal(apply_rope(q, frequencies(64), backend=backend), together[0])
    assert torch.equal(apply_rope(k, frequencies(64), backend=backend), together[1])


@pytest.mark.parametrize("rotate", (torch.ops.extrope.rope_fwd, reference.rope_fwd))
def test_a_tensor_that_is_not_given_comes_back_empty(rotate):
    q, _ = make_qk(head_dim=8)
    assert rotate(q, None, frequencies(8).inv_freq)[1].shape == (0,)


def test_zero_and_large_frequencies(backend):
    q, k = make_qk(head_dim=8)
    inv_freq = torch.tensor([0.0, 1e-30, 6.5, 4000.0], device=device())
    check(Case(q, k, frequencies(8, inv_freq=inv_freq), {"positions": 77}), backend)


@pytest.mark.parametrize("decay", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
def test_inverse_undoes(backend, interleaved, decay):
    q, k = make_qk(dtype=torch.float64)
    freqs = methods.xpos(64).to(device()) if decay else frequencies(64)
    options = dict(positions=100_003, interleaved=interleaved, backend=backend)
    if decay:
        options["positions"] = 300
    there = apply_rope_qk(q, k, freqs, **options)
    back = apply_rope_qk(*there, freqs, inverse=True, **options)
    for x, y in zip((q, k), back):
        torch.testing.assert_close(x, y, rtol=0, atol=32 * torch.finfo(torch.float64).eps)


@pytest.mark.thorough
@pytest.mark.skipif(device() != "cpu", reason="chooses among the CPU's kernels")
@pytest.mark.parametrize("narrower", ("baseline", "avx2"))
def test_narrower_instructions(narrower, run_narrower):
    tests = "cpu and (head_dims or heads or float64 or denormals)"
    files = [f"tests/rope/test_rope{name}.py" for name in ("", "_decay", "_gradients", "_memory")]
    run_narrower(narrower, *files, "-k", tests)
