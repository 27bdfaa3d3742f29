"""permuteformer_attention and _step against the dense formula and the authors' values."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from extrope_kernels import head_permutations, permuteformer_attention
from extrope_kernels.testing import assert_within_budget, device

VECTOR = json.loads(
    (Path(__file__).parents[1] / "support/data/permuteformer_vectors.json").read_text()
)["vectors"][0]
CPU_CHUNK = 48


def make(batch=2, seqlen=37, heads_q=4, heads_k=2, dim=16, value_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seqlen + dim)
    shapes = ((heads_q, dim), (heads_k, dim), (heads_k, value_dim))
    qkv = [torch.randn(batch, seqlen, *shape, generator=generator) for shape in shapes]
    return [x.to(device(), dtype) for x in qkv], head_permutations(heads_k, dim).to(device())


def powers(permutations, positions):
    """(tokens, heads, dim): the p-th power of each permutation, by composing it p times."""
    orders = []
    for p in positions:
        index = torch.arange(permutations.shape[1]).expand_as(permutations)
        for _ in range(int(p)):
            index = index.gather(1, permutations.cpu())
        orders.append(index)
    return torch.stack(orders) if orders else permutations.cpu()[None][:0]


def dense(q, k, v, permutations, decay, causal=True, normalize=True):
    """The paper's formula, one sequence (tokens, heads, dim) in float64, from i - j alone."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    index = powers(permutations, range(q.shape[0])).repeat_interleave(group, 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    phi_q, phi_k = (torch.relu(x.gather(2, index)) + 1e-3 for x in (q, k))
    i = torch.arange(q.shape[0])
    distance = i[:, None] - i
    scores = torch.einsum("ihc,jhc->hij", phi_q, phi_k)
    if causal:
        if decay is None:
            decay = torch.sigmoid(2 + 3 * torch.arange(k.shape[1] // group) / (k.shape[1] // group))
        rates = decay.double().cpu().repeat_interleave(q.shape[1] // decay.shape[0])
        scores = scores * rates[:, None, None] ** distance.clamp(min=0)
        scores = scores.masked_fill(distance < 0, 0.0)
    out = torch.einsum("hij,jhf->ihf", scores, v)
    return out / scores.sum(-1).T[..., None] if normalize else out


def exact(q, k, v, permutations, decay=None, **options):
    rows = [dense(*x, permutations, decay, **options) for x in zip(q, k, v)]
    return torch.stack(rows).to(device())


def check(name, backend, qkv, permutations, extra_ulps=0.0, **options):
    out = permuteformer_attention(*qkv, permutations=permutations, backend=backend, **options)
    same = permuteformer_attention(*qkv, permutations=permutations, backend="reference", **options)
    assert_within_budget(name, out, same, exact(*qkv, permutations, **options), extra_ulps)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("named", ["reference", None, "triton"])
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


@pytest.mark.parametrize("seqlen", [0, 1, 2, CPU_CHUNK - 1, CPU_CHUNK, CPU_CHUNK + 1, 97, 211])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lengths(seqlen, dtype):
    check("cpu", None, *make(seqlen=seqlen, dtype=dtype))


@pytest.mark.parametrize("seqlen", [1, 15, 16, 17, 3 * 16 + 1])
def test_lengths_in_triton(seqlen):
    """Chunks of 16 tokens and parts of 48 in the interpreter."""
    check("triton", "triton", *make(1, seqlen, heads_q=2, heads_k=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_in_triton(dtype):
    # The interpreter truncates where it should round to bfloat16: one more unit.
    qkv, permutations = make(1, 37, heads_q=2, heads_k=1, dtype=dtype)
    check("triton", "triton", qkv, permutations, extra_ulps=float(dtype == torch.bfloat16))


@pytest.mark.parametrize("dim, value_dim", [(8, 8), (24, 40), (64, 64), (33, 17), (256, 128)])
@pytest.mark.parametrize("named", [None, "triton"])
def test_dims(named, dim, value_dim):
    check("dims", named, *make(1, 41, dim=dim, value_dim=value_dim, heads_q=2, heads_k=2))


@pytest.mark.parametrize("named", [None, "triton"])
@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"causal": False},
        {"causal": False, "normalize": False},
        {"decay": torch.tensor([0.5, 1.0])},
        {"decay": torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64)},
    ],
    ids=str,
)
def test_options(named, options):
    options = {name: x.to(device()) if name == "decay" else x for name, x in options.items()}
    check("options", named, *make(1, 131 if named is None else 53), **options)


@pytest.mark.parametrize("options", [{}, {"causal": False}], ids=str)
def test_results_past_the_caches(options):
    """16 MiB and more in whole lines; dim has a block of few rows behind the full ones."""
    qkv, permutations = make(17, 129, heads_q=32, heads_k=2, dim=28, value_dim=64)
    check("past caches", None, qkv, permutations, **options)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_few_heads_are_cut_along_the_sequence(threads):
    """With three threads for two heads each part but the last is gathered first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check("parts", None, *make(1, 1500, heads_q=2, heads_k=1), decay=torch.tensor([0.999]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("named", [None, "triton", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_are_a_loop(named, causal):
    bounds = [0, 0, 5, 5, 22, 70, 70]
    (q, k, v), permutations = make(1, 70)
    cu_seqlens = torch.tensor(bounds, device=device())
    options = {"permutations": permutations, "causal": causal, "backend": named}
    out = permuteformer_attention(q[0], k[0], v[0], cu_seqlens=cu_seqlens, **options)
    for a, b in pairwise(bounds):
        one = permuteformer_attention(q[:, a:b], k[:, a:b], v[:, a:b], **options)[0]
        torch.testing.assert_close(out[a:b], one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("named", [None, "triton"])
def test_strided_views(named):
    (q, k, v), permutations = make(2, 19)
    wide = torch.cat((k, v), -1)
    arguments = {"permutations": permutations, "backend": named}
    out = permuteformer_attention(
        q.transpose(1, 2).contiguous().transpose(1, 2), wide[..., :16], wide[..., 16:], **arguments
    )
    assert torch.equal(out, permuteformer_attention(q, k, v, **arguments))


@pytest.mark.parametrize("rate", [0.5, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_4096_tokens_do_not_overflow(rate, normalize):
    """The authors' code does near 700 tokens. What a chunk adds to the sums rounds once more: half
    an ulp of what they have grown to.
    """
    qkv, permutations = make(1, 4096, heads_q=1, heads_k=1)
    arguments = {"decay": torch.tensor([rate]).to(device()), "normalize": normalize}
    out = permuteformer_attention(*qkv, permutations=permutations, **arguments)
    assert out.isfinite().all()
    arguments |= {"permutations": permutations, "backend": "reference"}
    same = permuteformer_attention(*qkv, **arguments)
    exact = permuteformer_attention(*(x.double() for x in qkv), **arguments)
    chunks = 4096 / 96
    noise = chunks * torch.finfo(torch.float32).eps / 2 * exact.abs().max().item()
    assert_within_budget("4096", out, same, exact, noise=noise)


@pytest.mark.parametrize("tokens, dim", [(1, 256), (7, 128), (1000, 64), (2500, 33)])
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


@pytest.mark.parametrize("shift", [7, 1_000_000])
def test_shifted_positions_change_nothing(shift):
    qkv, permutations = make()
    out = permuteformer_attention(*qkv, permutations=permutations)
    moved = permuteformer_attention(*qkv, permutations=permutations, positions=shift)
    torch.testing.assert_close(moved, out, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("named", [None, "triton"])
def test_every_run_gives_the_same_bits(named):
    (q, k, v), permutations = make(1, 150 if named is None else 50)

    def run():
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = permuteformer_attention(*leaves, permutations=permutations, backend=named)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)
