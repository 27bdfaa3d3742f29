"""Attention over 2 and 4 processes against one process: out, lse and all gradients."""

from __future__ import annotations

import attention_oracle as oracle
import pytest
import torch
from attention_oracle import EXAMPLES

from extrope_kernels import distributed

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
