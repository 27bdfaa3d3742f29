"""Attention over 2 and 4 processes against one process: out, lse and all gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from extrope_kernels import RopeFreqs, distributed, methods, rope_attention, scores
from extrope_kernels.testing import assert_within_budget

STRATEGIES = ("gather", "ring", "ulysses")
BALANCES = ("zigzag", None)
SEQLEN = 48  # 12 or 24 tokens a rank: windows, chunks and blocks cross from one to another
AS_THEY_ARE = scores.PositionMap()
SCORES = {
    "plain": None,
    "rerope": scores.rerope(6),
    "leaky_rerope": scores.leaky_rerope(6, 2.5),
    "self_extend": scores.self_extend(6, 3),
    "dual_chunk": scores.dual_chunk(9, 2),
    "blockwise_causal": scores.blockwise_causal(10),
    "string": scores.string(9, 2),
    "rows without keys": scores.Score("own", (scores.Region(3, AS_THEY_ARE, AS_THEY_ARE),), 5),
}
FREQS = methods.rope(16)
NAMES = ("out", "lse", "dq", "dk", "dv")
# Two calls add the same numbers in another order: a few roundings of float64.
EXACT = 1e-13


def leaves(dtype, seqlen=SEQLEN, heads_q=8, heads_k=2, head_dim=16, batch=1, head_dim_v=None):
    """q, k, v and the gradients of out and of lse, the same on every rank."""
    generator = torch.Generator().manual_seed(seqlen * 1000 + head_dim)
    head_dim_v = head_dim_v or head_dim
    shapes = ((heads_q, head_dim), (heads_k, head_dim), (heads_k, head_dim_v))
    tensors = [torch.randn(batch, seqlen, *x, generator=generator).to(dtype) for x in shapes]
    generator.manual_seed(1)
    dout = torch.randn(batch, seqlen, heads_q, head_dim_v, generator=generator).to(dtype)
    dlse = torch.randn(batch, heads_q, seqlen, generator=generator)
    return tensors, (dout, dlse.to(torch.promote_types(dtype, torch.float32)))


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def outcome(function, tensors, grads, sinks=None, **options):
    """out, lse and the gradients of q, k, v and sinks; grads: of out and of lse."""
    tensors = [x.clone().requires_grad_() for x in tensors]
    wanted = list(tensors)
    if sinks is not None:
        options["sinks"] = sinks.clone().requires_grad_()
        wanted.append(options["sinks"])
    out, lse = function(*tensors, return_lse=True, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), wanted, grads)


def cut(found, cutting):
    """The part of this rank of out, lse and what else there is."""
    return [distributed.shard(x, dim=2 if n == 1 else 1, **cutting) for n, x in enumerate(found)]


def assert_close(names, found, expected, tolerance=EXACT):
    for name, got, want in zip(names, found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype, name
        # A row without keys has a log-sum-exp of -inf on both sides.
        error = torch.where(got == want, 0.0, got.double() - want.double()).abs().max()
        error /= want[want.isfinite()].abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.3g}"


def assert_sinks_close(mesh, dsinks, expected):
    whole = dsinks.clone()
    torch.distributed.all_reduce(whole, group=mesh.get_group())
    assert_close(("dsinks",), (whole,), (expected,))


def equals_one_process(mesh, score, cases, shape=None, scale=None, **options):
    """cases: strategies and balances."""
    tensors, grads = leaves(torch.float64, **shape or {})
    options |= {"freqs": FREQS, "score": SCORES[score]}
    of_all = {} if scale is None else {"query_scale": scale}
    expected = outcome(rope_attention, tensors, grads, **options, **of_all)
    for strategy, balance in cases:
        cutting = {"mesh": mesh, "balance": balance}
        if scale is not None:
            of_all = {"query_scale": distributed.shard(scale, dim=-1, **cutting)}
        mine = [distributed.shard(x, **cutting) for x in tensors]
        given = {**options, **of_all, **cutting, "strategy": strategy}
        found = outcome(distributed.rope_attention, mine, cut(grads, cutting), **given)
        assert_close([f"{strategy} {n}" for n in NAMES], found[:5], cut(expected[:5], cutting))
        if "sinks" in options:
            assert_sinks_close(mesh, found[5], expected[5])


ALL_WAYS = list(itertools.product(STRATEGIES, BALANCES))


# Two ranks cut every score's regions; with four there are keys of ranks that are no neighbours.
WITH_FOUR = ("plain", "rerope", "dual_chunk", "rows without keys")


@pytest.mark.parametrize(
    ("score", "size"),
    [("plain", 2), *((score, 4 if score in WITH_FOUR else 2) for score in SCORES)],
)
def test_equals_one_process(ranks, score, size):
    ranks.run(equals_one_process, size, score=score, cases=ALL_WAYS)


def test_every_option(ranks):
    ranks.run(
        equals_one_process,
        4,
        score="self_extend",
        cases=ALL_WAYS,
        shape={"batch": 2, "head_dim": 32, "head_dim_v": 24},
        log_n=7,
        softmax_scale=0.3,
        softcap=3.0,
        sliding_window=17,
        interleaved=True,
        rotary_offset=14,
        sinks=random(8).double(),
        scale=1 + random(2, SEQLEN).abs(),
    )


# Sequences that end within chunks, with them, together with all; single tokens and empty ones.
BOUNDARIES = (
    [0, 5, 7, 30, 48],
    [0, 6, 24, 36, 48],
    [0, 48],
    [0, 0, 1, 2, 2, 3, 40, 41, 48, 48],
)


def packed_equals_one_process(mesh, score, boundaries, strategies, of_each):
    """Against each sequence by itself; of_each: with frequencies of its own."""
    tensors, grads = leaves(torch.float64)
    scale, inv_freq = 1 + torch.rand(SEQLEN), torch.rand(len(boundaries) - 1, 8)
    inv_freq = inv_freq if of_each else inv_freq[0]
    options = {"score": SCORES[score], "log_n": 4, "sinks": random(8).double()}
    per_sequence = []
    for n, (first, last) in enumerate(itertools.pairwise(boundaries)):
        one = slice(first, last)
        own = RopeFreqs(inv_freq[n] if of_each else inv_freq)
        given = {"freqs": own, "query_scale": scale[one], **options}
        of_one = (grads[0][:, one], grads[1][..., one])
        per_sequence.append(outcome(rope_attention, [x[:, one] for x in tensors], of_one, **given))
    *rest, dsinks = zip(*per_sequence)
    expected = [torch.cat(x, 2 if n == 1 else 1) for n, x in enumerate(rest)]
    for strategy, balance in itertools.product(strategies, BALANCES):
        cutting = {"mesh": mesh, "balance": balance}
        found = outcome(
            distributed.rope_attention,
            [distributed.shard(x, **cutting)[0] for x in tensors],
            [x[0] for x in cut(grads, cutting)],
            freqs=RopeFreqs(inv_freq),
            query_scale=distributed.shard(scale, dim=0, **cutting),
            cu_seqlens=torch.tensor(boundaries),
            strategy=strategy,
            **cutting,
            **options,
        )
        assert_close(NAMES, found[:5], [x[0] for x in cut(expected, cutting)])
        assert_sinks_close(mesh, found[5], sum(dsinks))


@pytest.mark.parametrize("boundaries", BOUNDARIES, ids=str)
def test_packed_equals_one_process(ranks, boundaries):
    score = "dual_chunk" if boundaries == BOUNDARIES[0] else "self_extend"
    case = {"score": score, "boundaries": boundaries, "of_each": boundaries != BOUNDARIES[1]}
    ranks.run(packed_equals_one_process, 4, strategies=["gather", "ulysses"], **case)


def within_the_budget(mesh, dtype, cases, sinks=None, seqlen=128, device="cpu", **options):
    """Forward and backward no further from float64 than twice the error of one process.

    cases: strategies, backends and balances.
    """
    tensors, grads = (
        [x.to(device) for x in each] for each in leaves(dtype, seqlen=seqlen, heads_q=4)
    )
    options |= {"freqs": FREQS.to(device), "score": SCORES["leaky_rerope"]}
    exactly = [x.double() for x in (*tensors, *grads)]
    of_exact = None if sinks is None else sinks.double()
    exact = outcome(
        rope_attention, exactly[:3], exactly[3:], of_exact, backend="reference", **options
    )
    for strategy, backend, balance in cases:
        one = outcome(rope_attention, tensors, grads, sinks, backend=backend, **options)
        cutting = {"mesh": mesh, "balance": balance}
        mine = [distributed.shard(x, **cutting) for x in tensors]
        given = {**options, **cutting, "strategy": strategy, "backend": backend}
        found = outcome(distributed.rope_attention, mine, cut(grads, cutting), sinks, **given)
        for name, got, same, want in zip(NAMES, found, one, exact):
            whole = distributed.unshard(got, dim=2 if name == "lse" else 1, **cutting)
            assert_within_budget(f"{strategy} {balance} {name}", whole, same, want)
            same_call = strategy == "gather" and "sliding_window" not in options
            if same_call and device == "cpu" and name in ("out", "dq"):
                assert torch.equal(whole, same), f"{name}: other bits"
            if strategy != "ulysses" and dtype.itemsize == 2 and name != "lse":
                # Both round once: over n elements RMS errors spread by 1 / sqrt(2 n), six of them.
                ours, theirs = ((x.double() - want).square().mean().sqrt() for x in (whole, same))
                assert ours <= theirs * (1 + 6 / (2 * want.numel()) ** 0.5), name


WAYS = [("gather", None), ("ulysses", None), ("ring", None), ("ring", "reference")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(ranks, dtype):
    cases = [(*way, balance) for way in WAYS for balance in BALANCES]
    ranks.run(within_the_budget, 4, dtype=dtype, cases=cases)


def test_every_option_in_low_precision(ranks):
    cases = [(strategy, None, "zigzag") for strategy in STRATEGIES]
    options = {"log_n": 7, "softcap": 3.0, "sliding_window": 45, "sinks": random(4)}
    ranks.run(within_the_budget, 4, dtype=torch.float16, cases=cases, **options)
