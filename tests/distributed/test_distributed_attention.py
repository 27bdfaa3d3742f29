"""Attention over 2 and 4 processes against one process: out, lse and all gradients."""

from __future__ import annotations

import itertools

import attention_oracle as oracle
import pytest
import torch
from score_examples import EXAMPLES

import extrope_kernels
from extrope_kernels import RopeFreqs, distributed
from extrope_kernels.testing import assert_within_budget

STRATEGIES = ("gather", "ring", "ulysses")
BALANCES = ("zigzag", None)
SEQLEN = 48  # 12 or 24 tokens a rank: windows, chunks and blocks cross from one to another
# Two calls add the same numbers in another order: a few roundings of float64.
EXACT = 1e-13


def leaves(dtype, seqlen=SEQLEN, heads_q=8, heads_k=2, head_dim=16, batch=1, head_dim_v=None):
    """q, k, v and the gradients of out and of lse, the same on every rank."""
    q, k, v = oracle.make_qkv(batch, seqlen, None, heads_q, heads_k, head_dim, dtype, head_dim_v)
    wide = torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn((*q.shape[:-1], v.shape[-1]), generator=generator).to(dtype)
    dlse = torch.randn((batch, heads_q, seqlen), generator=generator).to(wide)
    return (q, k, v), dout, dlse


def outcome(function, tensors, grads, sinks=None, **options):
    """out, lse and the gradients of q, k, v and sinks; grads: of out and of lse."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    wanted = list(tensors)
    if sinks is not None:
        options["sinks"] = sinks.clone().requires_grad_()
        wanted.append(options["sinks"])
    out, lse = function(*tensors, return_lse=True, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), wanted, grads)


def cut(found, mesh, balance):
    """The part of this rank of out, lse, dq, dk and dv."""
    dims = (1, 2, 1, 1, 1)
    return [distributed.shard(x, mesh, dim=dim, balance=balance) for x, dim in zip(found, dims)]


def assert_close(names, found, expected, tolerance):
    for name, got, want in zip(names, found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype, name
        error = (got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.3g}"


NAMES = ("out", "lse", "dq", "dk", "dv")


def equals_one_process(mesh, score, strategy, balance, dtype, tolerance, **options):
    example = EXAMPLES[score]
    sharded = getattr(distributed, example.attention.__name__)
    shape = {name: options.pop(name) for name in ("batch", "head_dim_v") if name in options}
    tensors, dout, dlse = leaves(dtype, **shape)
    options |= {"freqs": oracle.frequencies(16), **example.parameters}
    scale = options.pop("query_scale", None)
    of_all = {} if scale is None else {"query_scale": scale}
    expected = outcome(example.attention, tensors, (dout, dlse), **options, **of_all)
    if scale is not None:
        of_all = {"query_scale": distributed.shard(scale, mesh, dim=-1, balance=balance)}
    how = {"mesh": mesh, "strategy": strategy, "balance": balance}
    grads = [distributed.shard(dout, mesh, balance=balance)]
    grads.append(distributed.shard(dlse, mesh, dim=2, balance=balance))
    mine = [distributed.shard(x, mesh, balance=balance) for x in tensors]
    found = outcome(sharded, mine, grads, **options, **of_all, **how)
    assert_close(NAMES, found[:5], cut(expected[:5], mesh, balance), tolerance)
    if "sinks" in options:
        whole = found[5].clone()
        for dim in range(mesh.ndim):
            torch.distributed.all_reduce(whole, group=mesh.get_group(dim))
        assert_close(("dsinks",), (whole,), expected[5:], tolerance)


@pytest.mark.parametrize("score", EXAMPLES)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equals_one_process(ranks, score, balance, strategy):
    for size in (2, 4):
        ranks.run(
            equals_one_process,
            size,
            score=score,
            strategy=strategy,
            balance=balance,
            dtype=torch.float64,
            tolerance=EXACT,
        )


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("score", ["self_extend", "blockwise_causal"])
def test_every_option(ranks, score, balance, strategy):
    generator = torch.Generator().manual_seed(2)
    ranks.run(
        equals_one_process,
        4,
        score=score,
        strategy=strategy,
        balance=balance,
        dtype=torch.float64,
        tolerance=EXACT,
        batch=2,
        head_dim_v=24,
        log_n=7,
        softmax_scale=0.3,
        softcap=3.0,
        sliding_window=17,
        interleaved=True,
        sinks=torch.randn(8, generator=generator).double(),
        query_scale=1 + torch.rand(2, SEQLEN, generator=generator),
    )


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_two_dimensions(ranks, balance, strategy):
    """Ulysses inside: heads are exchanged in the second dimension."""
    generator = torch.Generator().manual_seed(2)
    ranks.run(
        equals_one_process,
        (2, 2),
        score="dual_chunk",
        strategy=strategy,
        balance=balance,
        dtype=torch.float64,
        tolerance=EXACT,
        batch=2,
        sinks=torch.randn(8, generator=generator).double(),
        query_scale=1 + torch.rand(SEQLEN, generator=generator),
    )


BOUNDARIES = {
    "in the middle": [0, 5, 7, 30, 48],
    "at the ends of chunks": [0, 6, 24, 36, 48],
    "one": [0, 48],
    "single tokens and empty ones": [0, 0, 1, 2, 2, 3, 40, 41, 48, 48],
}


def packed_equals_one_process(mesh, score, strategy, balance, boundaries, **options):
    """Against each sequence by itself."""
    example = EXAMPLES[score]
    sharded = getattr(distributed, example.attention.__name__)
    (q, k, v), dout, dlse = leaves(torch.float64)
    options |= {"freqs": oracle.frequencies(16), **example.parameters}
    scale = 1 + torch.rand(SEQLEN)
    per_sequence = []
    for first, last in itertools.pairwise(boundaries):
        one = slice(first, last)
        grads = (dout[:, one], dlse[..., one])
        parts = [x[:, one] for x in (q, k, v)]
        per_sequence.append(
            outcome(example.attention, parts, grads, **options, query_scale=scale[one])
        )
    *rest, dsinks = zip(*per_sequence)
    expected = [torch.cat(x, 2 if n == 1 else 1) for n, x in enumerate(rest)]
    grads = [distributed.shard(dout, mesh, balance=balance)[0]]
    grads.append(distributed.shard(dlse, mesh, dim=2, balance=balance)[0])
    found = outcome(
        sharded,
        [distributed.shard(x, mesh, balance=balance)[0] for x in (q, k, v)],
        grads,
        **options,
        query_scale=distributed.shard(scale, mesh, dim=0, balance=balance),
        cu_seqlens=torch.tensor(boundaries),
        mesh=mesh,
        strategy=strategy,
        balance=balance,
    )
    assert_close(NAMES, found[:5], [x[0] for x in cut(expected, mesh, balance)], EXACT)
    whole = found[5].clone()
    for dim in range(mesh.ndim):
        torch.distributed.all_reduce(whole, group=mesh.get_group(dim))
    assert_close(("dsinks",), (whole,), (sum(dsinks),), EXACT)


@pytest.mark.parametrize("score", ["self_extend", "dual_chunk"])
@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(
    ("strategy", "size"), [("gather", 2), ("gather", 4), ("gather", (2, 2)), ("ulysses", 4)]
)
def test_packed_equals_one_process(ranks, score, strategy, size, balance, boundaries):
    ranks.run(
        packed_equals_one_process,
        size,
        score=score,
        strategy=strategy,
        balance=balance,
        boundaries=BOUNDARIES[boundaries],
        log_n=4,
        sinks=torch.randn(8, generator=torch.Generator().manual_seed(2)).double(),
    )


def frequencies_of_sequences(mesh):
    """A row for each packed sequence."""
    boundaries = [0, 5, 7, 30, 48]
    (q, k, v), _, _ = leaves(torch.float64)
    inv_freq = torch.rand(4, 8)
    expected = [
        extrope_kernels.rerope_attention(
            *(x[:, first:last] for x in (q, k, v)), RopeFreqs(inv_freq[n]), window=6
        )
        for n, (first, last) in enumerate(itertools.pairwise(boundaries))
    ]
    mine = (distributed.shard(x, mesh)[0] for x in (q, k, v))
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    found = distributed.rerope_attention(
        *mine, RopeFreqs(inv_freq), window=6, cu_seqlens=cu_seqlens, mesh=mesh
    )
    assert_close(("out",), (found,), (distributed.shard(torch.cat(expected, 1), mesh)[0],), EXACT)


def test_frequencies_of_packed_sequences(ranks):
    ranks.run(frequencies_of_sequences, 4)


def within_the_budget(mesh, strategy, balance, dtype, backend, **options):
    """Forward and backward no further from float64 than twice the error of one process."""
    example = EXAMPLES["leaky_rerope"]
    tensors, dout, dlse = leaves(dtype, seqlen=128, heads_q=4)
    options |= {"freqs": oracle.frequencies(16), "backend": backend, **example.parameters}
    one = outcome(example.attention, tensors, (dout, dlse), **options)
    exactly = [x.double() for x in (*tensors, dout, dlse)]
    options_of_exact = {**options, "backend": None}
    if "sinks" in options:
        options_of_exact["sinks"] = options["sinks"].double()
    exact = outcome(example.attention, exactly[:3], exactly[3:], **options_of_exact)
    grads = [distributed.shard(dout, mesh, balance=balance)]
    grads.append(distributed.shard(dlse, mesh, dim=2, balance=balance))
    mine = [distributed.shard(x, mesh, balance=balance) for x in tensors]
    how = {"mesh": mesh, "strategy": strategy, "balance": balance}
    found = outcome(distributed.rerope_attention, mine, grads, **options, **how)
    for name, got, same, want in zip(NAMES, found, one, exact):
        dim = 2 if name == "lse" else 1
        whole = distributed.unshard(got, mesh, dim=dim, balance=balance)
        assert_within_budget(name, whole, same, want)
        if strategy == "gather" and name in ("out", "dq") and "sliding_window" not in options:
            assert torch.equal(whole, same), f"{name}: other bits"
        if strategy == "ring" and dtype.itemsize == 2 and name != "lse":
            # Both round once: over n elements RMS errors spread by 1 / sqrt(2 n), taken six times.
            ours, theirs = ((x.double() - want).square().mean().sqrt() for x in (whole, same))
            assert ours <= theirs * (1 + 6 / (2 * want.numel()) ** 0.5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(
    ("strategy", "runs"),
    [("gather", None), ("ulysses", None), ("ring", None), ("ring", "reference")],
)
def test_low_precision(ranks, strategy, runs, balance, dtype):
    ranks.run(within_the_budget, 4, strategy=strategy, balance=balance, dtype=dtype, backend=runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_option_in_low_precision(ranks, strategy, dtype):
    ranks.run(
        within_the_budget,
        4,
        strategy=strategy,
        balance="zigzag",
        dtype=dtype,
        backend=None,
        log_n=7,
        softcap=3.0,
        sliding_window=45,
        sinks=torch.randn(4, generator=torch.Generator().manual_seed(2)),
    )
