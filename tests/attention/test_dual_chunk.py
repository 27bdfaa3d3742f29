"""Dual Chunk Attention against the authors' outputs and the closed form."""

from itertools import pairwise

import pytest
import torch
from attention_oracle import both_orders, check_outputs, closed_form, frequencies, make_qkv
from score_examples import dual_chunk
from vectors import load

from extrope_kernels import dual_chunk_attention
from extrope_kernels.testing import assert_within_budget, device

DATA = load("score")
VECTORS = {v["id"]: v for v in DATA["vectors"] if v["method"] == "dual_chunk"}


def check(backend, q, k, v, freqs, chunk_size, local_window):
    """Compare out and lse with the closed form, within the error budget."""
    relative = dual_chunk(q.shape[1], k.shape[1], chunk_size, local_window)
    wanted = closed_form(q, k, v, relative, freqs)
    plain = both_orders(q, k, v, relative, freqs, wanted)
    found = dual_chunk_attention(
        q, k, v, freqs, chunk_size=chunk_size, local_window=local_window, return_lse=True,
        backend=backend,
    )  # fmt: skip
    check_outputs(backend, q, found, plain, wanted)


@pytest.mark.parametrize("name", VECTORS)
def test_the_authors_output(name, any_backend):
    vector = VECTORS[name]
    params = vector["params"]
    sizes = {"chunk_size": params["chunk_size"], "local_window": params["local_window"]}
    n, head_dim = params["n"], params["head_dim"]
    x = torch.tensor(vector["x"], device=device()).view(1, n, 1, head_dim)
    check(any_backend, x, x, x, frequencies(head_dim), **sizes)
    relative = dual_chunk(n, n, **sizes)
    exact, _ = closed_form(x, x, x, relative, frequencies(head_dim))
    original = torch.tensor(vector["out"], device=device()).view_as(x)
    assert (original - exact).abs().max() < 5e-7
    rows = [[torch.nan if p is None else p for p in row] for row in vector["positions"]]
    assert torch.equal(relative.seen.nan_to_num(-1), torch.tensor(rows).double().nan_to_num(-1))


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (61, 61), (1, 50), (7, 50), (9, 4)])
@pytest.mark.parametrize("chunk_size, local_window", [(12, 2), (1, 0), (10, 9), (40, 8), (99, 7)])
def test_chunks(chunk_size, local_window, seqlen_q, seqlen_k, any_backend):
    q, k, v = make_qkv(1, seqlen_q, seqlen_k, 4, 2)
    freqs = frequencies(32, attention_factor=1.2)
    check(any_backend, q, k, v, freqs, chunk_size, local_window)


@pytest.mark.skipif(device() != "cpu", reason="about the CPU's blocks of 4, 8 or 32 keys")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "chunk_size, local_window", [(3, 1), (7, 0), (8, 1), (33, 2), (31, 0), (70, 6)]
)
def test_three_regions_in_a_block_of_keys_of_the_cpu(chunk_size, local_window, dtype):
    q, k, v = make_qkv(1, 150, None, 4, 2, 16, dtype)
    check("cpu", q, k, v, frequencies(16), chunk_size, local_window)


def test_one_chunk_is_plain_attention(any_backend):
    q, k, v = make_qkv(1, 30, None, 2, 1)
    sizes = [{"chunk_size": 34, "local_window": 4}, {"chunk_size": 999, "local_window": 0}]
    outs = [
        dual_chunk_attention(q, k, v, frequencies(32), backend=any_backend, **size)
        for size in sizes
    ]
    assert torch.equal(*outs)


def test_packed_is_a_loop_over_sequences(any_backend):
    q, k, v = (x[0] for x in make_qkv(1, 50, None, 4, 2))
    bounds = [0, 3, 3, 40, 50]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=q.device)
    options = {"freqs": frequencies(32), "chunk_size": 12, "local_window": 2}
    out = dual_chunk_attention(q, k, v, cu_seqlens=cu_seqlens, backend=any_backend, **options)
    for first, last in pairwise(bounds):
        part = [x[None, first:last] for x in (q, k, v)]
        relative = dual_chunk(last - first, last - first, 12, 2)
        wanted = closed_form(*part, relative, options["freqs"])
        plain = both_orders(*part, relative, options["freqs"], wanted)
        assert_within_budget("out", out[None, first:last], plain[0], wanted[0])
