"""PermuteFormer over 2 and 4 processes against one: out and gradients, whatever the length."""

from __future__ import annotations

import pytest
import torch

import extrope_kernels
from extrope_kernels import distributed, head_permutations
from extrope_kernels.testing import assert_within_budget

TOKENS, HEADS_Q, HEADS_K, DIM, VALUE_DIM = 52, 4, 2, 16, 24
DECAYS = {
    "default": None,
    "of query heads": torch.tensor([0.5, 0.9, 0.99, 1.0]),
    "strong": torch.tensor([1e-3, 0.3]),
    "none": torch.ones(2),
}


def outcome(function, tensors, dout, **options):
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = function(*leaves, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, dout)


def inputs(dtype):
    generator = torch.Generator().manual_seed(3)
    shapes = [(HEADS_Q, DIM), (HEADS_K, DIM), (HEADS_K, VALUE_DIM), (HEADS_Q, VALUE_DIM)]
    return [torch.randn(2, TOKENS, *x, generator=generator).to(dtype) for x in shapes]


def sharded(mesh, tensors, **options):
    *mine, dout = (distributed.shard(x, mesh, balance=None) for x in tensors)
    found = outcome(distributed.permuteformer_attention, mine, dout, mesh=mesh, **options)
    return [distributed.unshard(x, mesh, balance=None) for x in found]


def permutations():
    return head_permutations(HEADS_K, DIM)


def equals_one_process(mesh, **options):
    tensors = inputs(torch.float64)
    options["permutations"] = permutations()
    found = sharded(mesh, tensors, **options)
    expected = outcome(extrope_kernels.permuteformer_attention, tensors[:3], tensors[3], **options)
    for name, got, want in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = (got - want).abs().max() / want.abs().max()
        assert error <= 1e-13, f"{name}: {error:.3g}"


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("decay", DECAYS)
def test_equals_one_process(ranks, size, decay):
    for normalize in (True, False):
        ranks.run(equals_one_process, size, decay=DECAYS[decay], normalize=normalize, positions=5)


def test_not_causal(ranks):
    for normalize in (True, False):
        ranks.run(equals_one_process, 4, causal=False, normalize=normalize)


def what_is_not_finite_stays_behind(mesh):
    """Rows see the same infinities and NaN as in one process: none before them."""
    q, k, v, _ = inputs(torch.float64)
    v[:, TOKENS // 2 + 1 :, :, 0] = torch.nan
    v[:, TOKENS // 2 + 1 :, :, 1] = torch.inf
    found = distributed.permuteformer_attention(
        *(distributed.shard(x, mesh, balance=None) for x in (q, k, v)),
        mesh=mesh,
        permutations=permutations(),
    )
    # The reference, which a rank runs in float64, spoils rows of its own tokens.
    assert distributed.unshard(found, mesh, balance=None)[:, : TOKENS // 2].isfinite().all()


def test_what_is_not_finite_stays_behind(ranks):
    ranks.run(what_is_not_finite_stays_behind, 2)


def within_the_budget(mesh, dtype):
    tensors, options = inputs(dtype), {"permutations": permutations()}
    one = extrope_kernels.permuteformer_attention
    exactly = [x.double() for x in tensors]
    exact = outcome(one, exactly[:3], exactly[3], **options)
    same = outcome(one, tensors[:3], tensors[3], **options)
    found = sharded(mesh, tensors, **options)
    for name, *three in zip(("out", "dq", "dk", "dv"), found, same, exact):
        assert_within_budget(name, *three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(ranks, dtype):
    ranks.run(within_the_budget, 4, dtype=dtype)


REFUSED = [
    ({"positions": torch.zeros(2)}, TypeError, "positions must be an int, got"),
    ({"positions": 2**63 - TOKENS}, ValueError, "positions of all ranks must fit in int64, got"),
    ({"q": 1}, TypeError, "q must be a Tensor, got int"),
    ({"v": torch.zeros(2, 51, HEADS_K, 24)}, ValueError, r"v must have k's shape .*, got \(2, 51"),
    ({"v": torch.zeros(2, TOKENS, HEADS_K, 256)}, ValueError, "v's head_dim must be less than 256"),
    ({"causal": 1}, TypeError, "causal must be a bool, got int"),
    ({"normalize": 1}, TypeError, "normalize must be a bool"),
]


def refuses(mesh):
    given = dict(zip("qkv", inputs(torch.float32)), mesh=mesh, permutations=permutations())
    for options, error, message in REFUSED:
        with pytest.raises(error, match=f"^permuteformer_attention: {message}"):
            distributed.permuteformer_attention(**{**given, **options})


def test_refuses(ranks):
    ranks.run(refuses, 2)
