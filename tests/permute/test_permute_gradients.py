"""The permutation is linear and orthogonal: its gradient, of any order, is its inverse."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from extrope_kernels import head_permutations, permute, permute_qk
from extrope_kernels.testing import DTYPES, device, make_qk

TABLE = head_permutations(2, 8).to(device())
CASES = {
    "plain": dict(),
    "inverse": dict(inverse=True, positions=5),
    "positions": dict(positions=torch.tensor([[5, -3, 9], [100, 7, 2**40]])),
    "offsets": dict(positions=torch.tensor([4, 40])),
    "packed": dict(cu_seqlens=torch.tensor([0, 1, 1, 3], dtype=torch.int32)),
}


def build_case(name):
    options = {
        key: value.to(device()) if isinstance(value, torch.Tensor) else value
        for key, value in CASES[name].items()
    }
    q, k = make_qk(2, 3, 4, 2, head_dim=8, dtype=torch.float64)
    if "cu_seqlens" in options:
        q, k = q[0].contiguous(), k[0].contiguous()

    def run(q, k, backend):
        return permute_qk(q, k, TABLE, backend=backend, **options)

    return run, [x.requires_grad_() for x in (q, k)]


@pytest.mark.parametrize("case", CASES)
def test_finite_differences_twice(permute_backend, case):
    run, leaves = build_case(case)
    assert gradcheck(lambda *x: run(*x, permute_backend), leaves, fast_mode=True)
    assert gradgradcheck(lambda *x: run(*x, permute_backend), leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_the_inverse_to_the_bit(permute_backend, dtype):
    q, k = make_qk(2, 11, 4, 2, head_dim=72, dtype=dtype)
    weights = make_qk(2, 11, 4, 2, head_dim=72, dtype=dtype, seed=1)
    table = head_permutations(2, 72).to(device())
    options = dict(positions=10**6, backend=permute_backend)
    leaves = [x.requires_grad_() for x in (q, k)]
    torch.autograd.backward(permute_qk(*leaves, table, **options), weights)
    expected = permute_qk(*weights, table, positions=10**6, inverse=True, backend="reference")
    for leaf, want in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, want)


def test_gradients_of_a_sum_and_of_one_output(permute_backend):
    """The gradient of a sum is an expanded scalar; an output without a use has none."""
    _, (q, k) = build_case("plain")
    out_q, _ = permute_qk(q, k, TABLE, backend=permute_backend)
    out_q.sum().backward()
    assert torch.equal(q.grad, torch.ones_like(q)) and k.grad.count_nonzero() == 0


def test_func_grad_of_grad(permute_backend):
    run, (q, k) = build_case("positions")

    def slope(q, backend):
        return torch.func.grad(lambda x: run(x, k, backend)[0].pow(3).sum())(q)

    second = torch.func.grad(lambda x: slope(x, permute_backend).sum())(q)
    assert torch.equal(second, torch.func.grad(lambda x: slope(x, "reference").sum())(q))


@pytest.mark.parametrize("in_dims", ((0, 0), (1, None), (None, 2)))
@pytest.mark.parametrize("case", ("plain", "offsets", "packed"))
def test_vmap(permute_backend, case, in_dims):
    run, leaves = build_case(case)
    stacked = [
        x if dim is None else torch.stack([x * (i + 1) for i in range(3)], dim).detach()
        for x, dim in zip(leaves, in_dims, strict=True)
    ]
    got = torch.vmap(lambda *x: run(*x, permute_backend), in_dims)(*stacked)
    expected = torch.vmap(lambda *x: run(*x, "reference"), in_dims)(*stacked)
    for out, want in zip(got, expected, strict=True):
        assert torch.equal(out, want)


def test_per_sample_gradients(permute_backend):
    q, _ = make_qk(3, 5, 2, head_dim=8)

    def loss(x, backend):
        return permute(x[None], TABLE, positions=7, backend=backend).pow(3).sum()

    got = torch.vmap(torch.func.grad(lambda x: loss(x, permute_backend)))(q)
    torch.testing.assert_close(got, 3 * q.pow(2), rtol=1e-6, atol=0)
