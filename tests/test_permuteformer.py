"""permuteformer_attention and permuteformer_step against the dense formula and the authors' values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from extrope_kernels import head_permutations, permuteformer_attention, permuteformer_step
from extrope_kernels.testing import assert_within_budget, device

VECTOR = json.loads((Path(__file__).parent / "data/permuteformer_vectors.json").read_text())[
    "vectors"
][0]
CPU_CHUNK, TRITON_CHUNK = 96, 16  # 16: of the interpreter


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
    return torch.stack(orders)


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


def check(name, backend, qkv, permutations, **options):
    out = permuteformer_attention(*qkv, permutations=permutations, backend=backend, **options)
    same = permuteformer_attention(
        *qkv, permutations=permutations, backend="reference", **options
    )
    assert_within_budget(name, out, same, exact(*qkv, permutations, **options))


@pytest.mark.parametrize("normalize", [True, False])
def test_authors_values(any_backend, normalize):
    """The authors' dot product, without a denominator; ours with one by the same scores."""
    batch, tokens, heads, dim = 1, VECTOR["params"]["T"], VECTOR["params"]["H"], VECTOR["params"]["d"]
    qkv = [
        torch.tensor(VECTOR[name]).view(heads, tokens, dim).transpose(0, 1)[None] for name in "qkv"
    ]
    out = permuteformer_attention(
        *(x.to(device()) for x in qkv),
        permutations=torch.tensor(VECTOR["perm"]).to(device()),
        normalize=normalize,
        backend=any_backend,
    )
    want = torch.tensor(VECTOR[KEYS[normalize]]).view(heads, tokens, dim).transpose(0, 1)[None]
    torch.testing.assert_close(out.cpu(), want, atol=2e-6, rtol=2e-6)
