"""Powers of permutations: the authors' vectors, distant positions, gradients, to the bit."""

import pytest
import torch
from support.vectors import load
from test_properties_permute import powers
from torch.autograd import gradcheck, gradgradcheck

from extrope_kernels import head_permutations, permute, permute_qk
from extrope_kernels.testing import device, make_qk

VECTORS = load("permute")


def rows(heads=2, head_dim=64):
    return head_permutations(heads, head_dim).to(device())


def assert_same(outs, expected):
    for out, want in zip(outs, expected, strict=True):
        assert out.dtype == want.dtype and torch.equal(out, want)


def test_the_authors_permutations_and_powers():
    drawn = head_permutations(2, 8)
    assert drawn.tolist() == VECTORS["perm"] and drawn.dtype == torch.int64
    dims = torch.arange(8.0, device=device()).expand(1, 6, 2, 8)
    out = permute(dims, drawn.to(device()))
    expected = torch.tensor(VECTORS["powers_0_to_5"], device=device()).transpose(0, 1)
    assert torch.equal(out[0], expected.float())


@pytest.mark.parametrize(
    "position", (0, 1, 999_983, 10**6, 2**40, 2**62 + 1, 2**63 - 1, -1, -(10**6), -(2**63))
)
def test_a_distant_position_is_exact(position):
    table = rows(3, 72)
    x = torch.randn(1, 1, 3, 72, device=device())
    given = torch.tensor([position], device=device())
    expected = x.gather(-1, powers(table, given[None]))
    out = permute(x, table, positions=given)
    assert torch.equal(out, expected)
    assert torch.equal(permute(x, table, positions=position), expected)
    back = permute(out, table, positions=given, inverse=True)
    assert torch.equal(back, x)


def test_nan_and_signed_zero_pass_through():
    x = torch.tensor([torch.nan, -0.0, torch.inf, 1.0], device=device()).view(1, 1, 1, 4)
    table = torch.tensor([[1, 2, 3, 0]], device=device())
    out = permute(x, table, positions=1).flatten()
    assert out[0] == 0 and out[0].signbit() and out[1] == torch.inf and out[3].isnan()


# -------------------------------------------------------------------------------------------------
# Derivatives, transforms, compilation

SMALL = head_permutations(2, 8).to(device())
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

    def run(q, k, backend=None):
        return permute_qk(q, k, SMALL, backend=backend, **options)

    return run, [x.requires_grad_() for x in (q, k)]


@pytest.mark.parametrize("case", CASES)
def test_finite_differences_twice(case):
    run, leaves = build_case(case)
    assert gradcheck(run, leaves, fast_mode=True)
    assert gradgradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("in_dims", ((0, 0), (1, None), (None, 2)))
@pytest.mark.parametrize("case", ("plain", "offsets", "packed"))
def test_vmap(case, in_dims):
    run, leaves = build_case(case)
    stacked = [
        x if dim is None else torch.stack([x * (i + 1) for i in range(3)], dim).detach()
        for x, dim in zip(leaves, in_dims, strict=True)
    ]
    got = torch.vmap(run, in_dims)(*stacked)
    expected = torch.vmap(lambda *x: run(*x, "reference"), in_dims)(*stacked)
    assert_same(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_the_gather_of_a_gpu(case, monkeypatch):
    """Of blocks of tokens."""
    from extrope_kernels.ops.permuteformer import op

    monkeypatch.setattr(op, "_TOKENS", 2)
    run, leaves = build_case(case)
    options = dict(CASES[case])
    positions = options.pop("positions", None)
    if isinstance(positions, int):
        options["offset"], positions = positions, None
    at = [SMALL, positions, options.pop("cu_seqlens", None)]
    at = [x if x is None else x.to(device()) for x in at]
    assert_same(op._permute_by_gather(*leaves, *at, **options), run(*leaves, "reference"))


@pytest.mark.thorough
@pytest.mark.parametrize("narrower", ("baseline", "avx2"))
def test_narrower_instructions(narrower, run_narrower):
    run_narrower(narrower, "tests/permuteformer/test_properties_permute.py")
