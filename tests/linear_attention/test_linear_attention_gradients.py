"""Gradients of permuteformer_attention: budgets against float64, and the reference's own."""

from __future__ import annotations

import pytest
import torch
from test_linear_attention import make

from extrope_kernels import permuteformer_attention
from extrope_kernels.testing import assert_within_budget, device

CASES = [
    {},
    {"normalize": False},
    {"causal": False},
    {"decay": torch.tensor([0.5, 0.9, 0.99, 1.0])},  # a state a query head
]


def gradients(qkv, dout, dtype, **arguments):
    leaves = [x.to(dtype).requires_grad_() for x in qkv]
    out = permuteformer_attention(*leaves, **arguments)
    return torch.autograd.grad(out, leaves, dout.to(dtype))


def check(named, qkv, permutations, **options):
    if "decay" in options:
        options["decay"] = options["decay"].to(device())
    arguments = {"permutations": permutations, **options}
    dout = torch.randn_like(qkv[0][..., :1]).expand(*qkv[0].shape[:-1], qkv[2].shape[-1])
    dtype = qkv[0].dtype
    got = gradients(qkv, dout, dtype, backend=named, **arguments)
    same = gradients(qkv, dout, dtype, backend="reference", **arguments)
    exact = gradients(qkv, dout, torch.float64, backend="reference", **arguments)
    for name, *grads in zip(("dq", "dk", "dv"), got, same, exact):
        noise = _saved_out_noise(name, grads[-1], dtype, arguments)
        assert_within_budget(name, *grads, noise=noise)


def _saved_out_noise(name, exact, dtype, arguments):
    """With a denominator, dq and dk take <dout, out> of the out that was saved, rounded to dtype.

    That is half an ulp of one of the two terms of equal size that their difference is made of.
    """
    if dtype == torch.float32 or name == "dv" or not arguments.get("normalize", True):
        return 0.0
    return torch.finfo(dtype).eps / 2 * exact.abs().max().item()


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpu(options, dtype):
    check(None, *make(2, 203, dim=24, value_dim=40, dtype=dtype), **options)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_triton(options):
    check("triton", *make(1, 53, dim=24, value_dim=40), **options)


@pytest.mark.parametrize("named", [None, "triton"])
def test_packed(named):
    (q, k, v), permutations = make(1, 60)
    cu_seqlens = torch.tensor([0, 0, 1, 50, 60], device=device(), dtype=torch.int32)
    check(named, (q[0], k[0], v[0]), permutations, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("options", CASES[:3], ids=str)
def test_reference_has_derivatives_of_second_order(options):
    qkv, permutations = make(1, 5, heads_q=2, heads_k=1, dim=4, value_dim=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in qkv]

    def run(*leaves):
        arguments = {"permutations": permutations, "backend": "reference", **options}
        return permuteformer_attention(*leaves, **arguments)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_float64_runs_the_reference_with_a_gradient_of_its_own():
    qkv, permutations = make(1, 5, heads_q=2, heads_k=1, dim=4, value_dim=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in qkv]
    assert torch.autograd.gradcheck(
        lambda *x: permuteformer_attention(*x, permutations=permutations), leaves
    )
