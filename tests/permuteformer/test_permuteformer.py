"""permuteformer_attention beside the generated calls: the authors' values, long sums, slopes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.permuteformer_oracle import Mode, dense
from test_properties_permute import powers

from extrope_kernels import head_permutations, permuteformer_attention, permuteformer_step
from extrope_kernels.testing import assert_within_budget, device

VECTOR = json.loads(
    (Path(__file__).parents[1] / "support/data/permuteformer_vectors.json").read_text()
)["vectors"][0]


def make(batch=2, seqlen=37, heads_q=4, heads_k=2, dim=16, value_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seqlen + dim)
    shapes = ((heads_q, dim), (heads_k, dim), (heads_k, value_dim))
    qkv = [torch.randn(batch, seqlen, *shape, generator=generator) for shape in shapes]
    return [x.to(device(), dtype) for x in qkv], head_permutations(heads_k, dim).to(device())


def exact(q, k, v, permutations, decay=None, causal=True, normalize=True):
    """The paper's formula in float64."""
    heads_q, heads_k = q.shape[2], k.shape[2]
    if decay is None or not causal:
        heads = torch.arange(heads_k, dtype=torch.promote_types(q.dtype, torch.float32))
        decay = torch.sigmoid(2 + 3 * heads / heads_k) if causal else torch.ones(1)
    rates = decay.double().to(device()).repeat_interleave(heads_q // decay.shape[0])
    q, k, v = (x.double() for x in (q, k, v))
    tokens = torch.arange(q.shape[1], device=device())[None]
    dims = powers(permutations, tokens)
    q, k = (
        x.gather(-1, dims.repeat_interleave(x.shape[2] // heads_k, 2).expand_as(x)) for x in (q, k)
    )
    return torch.stack([dense(*rows, Mode(rates, causal, normalize)) for rows in zip(q, k, v)])


def check(name, qkv, permutations, **options):
    out = permuteformer_attention(*qkv, permutations=permutations, **options)
    same = permuteformer_attention(*qkv, permutations=permutations, backend="reference", **options)
    assert_within_budget(name, out, same, exact(*qkv, permutations, **options))


def test_rows_are_means_of_values_unless_asked_for_sums():
    (q, k, v), permutations = make()
    out = permuteformer_attention(q, k, torch.ones_like(v), permutations=permutations)
    torch.testing.assert_close(out, torch.ones_like(out))
    out, _ = permuteformer_step(q, k, torch.ones_like(v), permutations=permutations)
    torch.testing.assert_close(out, torch.ones_like(out))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("named", ["reference", None])
def test_authors_values(named, normalize):
    """The authors' dot product, without a denominator; and with one, by the same scores."""
    sizes = VECTOR["params"]
    shape = (1, sizes["H"], sizes["T"], sizes["d"])
    q, k, v, want = (
        torch.tensor(VECTOR[name]).view(shape).transpose(1, 2)
        for name in (*"qkv", "out_normalised" if normalize else "out_unnormalised")
    )
    out = permuteformer_attention(
        *(x.to(device()) for x in (q, k, v)),
        permutations=torch.tensor(VECTOR["perm"]).to(device()),
        normalize=normalize,
        backend=named,
    )
    torch.testing.assert_close(out.cpu(), want, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_small_and_large_scores(scale, normalize):
    """eps rules the scores of small queries and keys, and vanishes in those of large ones."""
    (q, k, v), permutations = make(1, 150, dim=64, value_dim=64)
    qkv = [x.bfloat16() for x in (scale * q, scale * k, v)]
    check("scale", qkv, permutations, normalize=normalize)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_few_heads_are_cut_along_the_sequence(threads):
    """With three threads for two heads each part but the last is gathered first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("parts", *make(1, 1500, heads_q=2, heads_k=1), decay=torch.tensor([0.999]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_2000_tokens_do_not_overflow(rate, normalize):
    """The authors' code does near 700 tokens. What a chunk adds to the sums rounds once more: half
    an ulp of what they have grown to.
    """
    qkv, permutations = make(1, 2000, heads_q=1, heads_k=1)
    arguments = {"decay": torch.tensor([rate]).to(device()), "normalize": normalize}
    out = permuteformer_attention(*qkv, permutations=permutations, **arguments)
    assert out.isfinite().all()
    arguments |= {"permutations": permutations, "backend": "reference"}
    same = permuteformer_attention(*qkv, **arguments)
    exact = permuteformer_attention(*(x.double() for x in qkv), **arguments)
    chunks = 2000 / 96
    noise = chunks * torch.finfo(torch.float32).eps / 2 * exact.abs().max().item()
    assert_within_budget("2000", out, same, exact, noise=noise)


@pytest.mark.parametrize("tokens, dim", [(7, 256), (2500, 33)])
@pytest.mark.parametrize("normalize", [True, False])
def test_long_sums_are_made_of_short_ones(tokens, dim, normalize):
    """Half of all features are eps. Added to a growing sum one by one they round alike each time:
    the normaliser of 1000 tokens was 50 units off."""
    qkv, permutations = make(1, tokens, heads_q=2, heads_k=1, dim=dim, value_dim=dim)
    arguments = {"permutations": permutations, "causal": False, "normalize": normalize}
    out = permuteformer_attention(*qkv, **arguments)
    arguments["backend"] = "reference"
    exact = permuteformer_attention(*(x.double() for x in qkv), **arguments)
    assert_within_budget("sums", out, permuteformer_attention(*qkv, **arguments), exact)


# -------------------------------------------------------------------------------------------------
# Gradients, and the ops as PyTorch sees them


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"causal": False}], ids=str)
@pytest.mark.parametrize("named", [None, "reference"])
def test_derivatives_of_float64(named, options):
    """The reference has those of second order; without a name it runs as an op, with the first."""
    qkv, permutations = make(1, 5, heads_q=2, heads_k=1, dim=4, value_dim=3, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in qkv]

    def run(*leaves):
        arguments = {"permutations": permutations, "backend": named, **options}
        return permuteformer_attention(*leaves, **arguments)

    assert torch.autograd.gradcheck(run, leaves)
    if named == "reference":
        assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens, dim", [(2, 8), (16, 8), (40, 16)])
def test_gradients_of_16_bits_are_rounded_once(tokens, dim, dtype):
    """Of few tokens, dout . out of a rounded out is off by as much as a gradient."""
    qkv, permutations = make(1, tokens, dim=dim, value_dim=dim, dtype=dtype)
    dout = torch.randn(1, tokens, 4, dim, generator=torch.Generator().manual_seed(1))

    def gradients(wide=dtype, **options):
        leaves = [x.to(wide).requires_grad_() for x in qkv]
        out = permuteformer_attention(*leaves, permutations=permutations, **options)
        return torch.autograd.grad(out, leaves, dout.to(device(), dtype).to(wide))

    decay = {"decay": torch.tensor([0.9, 0.99]).to(device())}
    exact = gradients(torch.float64, backend="reference", **decay)
    for x in zip(
        ("dq", "dk", "dv"), gradients(**decay), gradients(backend="reference", **decay), exact
    ):
        assert_within_budget(*x)


def test_double_backward_points_to_the_reference():
    qkv, permutations = make(1, 5)
    leaves = [x.requires_grad_() for x in qkv]
    out = permuteformer_attention(*leaves, permutations=permutations)
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"permuteformer: .*backend='reference'"):
        torch.autograd.grad(dq.sum(), leaves[1])


@pytest.mark.thorough
@pytest.mark.parametrize("narrower", ["baseline", "avx2"])
def test_narrower_instructions_on_a_wider_processor(narrower, run_narrower):
    run_narrower(narrower, "tests/permuteformer/test_properties_permuteformer.py")
