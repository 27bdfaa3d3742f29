"""Linear attention in bfloat16 on the CPU: float32 inside, rounded once at the door."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_linear_attention import make

from extrope_kernels import permuteformer_attention, permuteformer_step
from extrope_kernels.testing import assert_within_budget, device

pytestmark = pytest.mark.skipif(device() != "cpu", reason="about the CPU's kernels")
BF16 = torch.bfloat16


def check(name, qkv, permutations, **options):
    arguments = {"permutations": permutations, **options}
    out = permuteformer_attention(*qkv, **arguments)
    same = permuteformer_attention(*qkv, backend="reference", **arguments)
    exact = permuteformer_attention(*(x.double() for x in qkv), backend="reference", **arguments)
    assert_within_budget(name, out, same, exact)


@pytest.mark.parametrize("dim, value_dim", [(64, 64), (128, 128), (32, 96), (33, 17), (8, 40)])
@pytest.mark.parametrize("seqlen", [1, 31, 65, 97, 193])
def test_around_blocks(seqlen, dim, value_dim):
    """Around whole registers, blocks of rows and chunks of 48 tokens."""
    check("blocks", *make(1, seqlen, dim=dim, value_dim=value_dim, dtype=BF16))


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": False},
        {"causal": False},
        {"causal": False, "normalize": False},
        {"decay": torch.tensor([0.01, 1.0])},
        {"decay": torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.float64), "normalize": False},
    ],
    ids=str,
)
def test_options_in_bf16(options):
    check("options", *make(2, 203, dim=64, value_dim=64, dtype=BF16), **options)


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_small_and_large_scores(scale, normalize):
    """eps rules the scores of small queries and keys, and vanishes in those of large ones."""
    (q, k, v), permutations = make(1, 150, dim=64, value_dim=64)
    qkv = [(scale * q).to(BF16), (scale * k).to(BF16), v.to(BF16)]
    check("scale", qkv, permutations, normalize=normalize)


def test_few_heads_in_bf16_are_cut_along_the_sequence():
    qkv, permutations = make(1, 1500, heads_q=2, heads_k=1, dim=64, value_dim=64, dtype=BF16)
    check("parts", qkv, permutations, decay=torch.tensor([0.999]))


@pytest.mark.parametrize("options", [{}, {"causal": False}], ids=str)
def test_large_results_in_bf16(options):
    """16 MiB and more."""
    check("large", *make(33, 129, 32, 2, dim=28, value_dim=64, dtype=BF16), **options)


def test_packed_sequences_in_bf16_are_a_loop():
    (q, k, v), permutations = make(1, 240, dim=64, value_dim=64, dtype=BF16)
    bounds = [0, 0, 5, 100, 240]
    out = permuteformer_attention(
        q[0], k[0], v[0], permutations=permutations, cu_seqlens=torch.tensor(bounds)
    )
    for a, b in pairwise(bounds):
        one = permuteformer_attention(q[:, a:b], k[:, a:b], v[:, a:b], permutations=permutations)
        assert torch.equal(out[a:b], one[0])


def test_steps_in_bf16_give_what_the_whole_does():
    (q, k, v), permutations = make(2, 240, dim=40, value_dim=24, dtype=BF16)
    arguments = {"permutations": permutations, "decay": torch.tensor([0.9, 0.99])}
    outs, state, first = [], None, 0
    for end in (96, 97, 170, 240):
        rows = slice(first, end)
        out, state = permuteformer_step(
            q[:, rows], k[:, rows], v[:, rows], state, positions=first, **arguments
        )
        outs.append(out)
        first = end
    same = permuteformer_attention(q, k, v, backend="reference", **arguments)
    wide = [x.double() for x in (q, k, v)]
    exact, final = permuteformer_step(*wide, backend="reference", **arguments)
    assert_within_budget("steps", torch.cat(outs, 1), same, exact)
    torch.testing.assert_close(state.kv.double(), final.kv, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(state.k.double(), final.k, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("which", range(3))
def test_nan_in_bf16_spoils_no_earlier_row(which):
    """Of either sign: relu must not swallow it."""
    qkv, permutations = make(1, 130, heads_q=1, heads_k=1, dim=64, value_dim=64, dtype=BF16)
    qkv[which].view(torch.int16)[0, 70, 0, 3] = -1
    out = permuteformer_attention(*qkv, permutations=permutations)
    assert out[0, :70].isfinite().all()
    spoilt = out[0, 70:, 0].isnan()
    assert spoilt[0].all() if which == 0 else spoilt[:, 3].all()


@pytest.mark.parametrize("narrower", ["baseline", "avx2"])
def test_narrower_instructions_on_a_wider_processor(narrower, run_narrower):
    run_narrower(
        narrower,
        "tests/linear_attention/test_linear_attention_bf16.py",
        "-k",
        "around_blocks or options",
    )
