"""DTensors go into the ops: batch and heads, and for the rotation the sequence, by their rules."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from extrope_kernels import (
    RopeFreqs,
    apply_rope,
    apply_rope_qk,
    merge_attention,
    rope_attention,
    scores,
)
from extrope_kernels.testing import make_qk

FREQS = RopeFreqs(10000.0 ** -(torch.arange(8) / 8))


def outcome(function, leaves, douts):
    leaves = [x.detach().requires_grad_() for x in leaves]
    outs = function(*leaves)
    used = [(out, dout) for out, dout in zip(outs, douts) if dout is not None]
    grads = torch.autograd.grad([x for x, _ in used], leaves, [x for _, x in used])
    return *(x.detach() for x in outs), *grads


def equals_plain(mesh, function, leaves, douts, placements, kept):
    """kept: q, which comes first, and out are sharded as q was given: nothing was gathered."""
    want = outcome(function, leaves, douts)
    given = [distribute_tensor(x, mesh, p) for x, p in zip(leaves, placements)]
    of_outs = [None if x is None else distribute_tensor(x, mesh, placements[0]) for x in douts]
    found = outcome(function, given, of_outs)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got.full_tensor(), expected, rtol=2e-6, atol=2e-6)
    if kept:
        assert found[0].placements == given[0].placements == found[len(douts)].placements


BY_DIM = [[Shard(0)], [Shard(2)], [Shard(1)], [Replicate()]]
BY_TWO = [Shard(0), Shard(2)]  # of a grid: rules of both dims at once


def of_sequences(*shape):
    return torch.linspace(0.5, 1.5, math.prod(shape)).view(*shape, 1) * FREQS.inv_freq


# What a call of 4 sequences, 8 tokens and 8 heads may be given beside q and k.
POSITIONS = torch.arange(32).view(4, 8) * 5 % 13
AXES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2], dtype=torch.int32)
GIVEN = {
    "nothing": ({}, {}),
    "positions of all": ({"positions": torch.arange(8) * 3}, {}),
    "positions": ({"positions": POSITIONS}, {}),
    "offsets": ({"positions": POSITIONS[:, 0]}, {"inv_freq": of_sequences(4)}),
    "axes": (
        {"positions": POSITIONS.expand(3, 4, 8) + torch.arange(3).view(3, 1, 1)},
        {"axes": AXES},
    ),
    "one row of axes": ({"positions": torch.arange(24).view(3, 1, 8)}, {"axes": AXES}),
    "frequencies of one row": ({}, {"inv_freq": of_sequences(1)}),
    "frequencies of each sequence": ({}, {"inv_freq": of_sequences(4, 1)}),
    "heads": ({}, {"inv_freq": of_sequences(4, 8)}),
    "heads of one": ({"positions": POSITIONS}, {"inv_freq": of_sequences(1, 8)}),
}


def rotates(mesh, placement, case, of_q=True, of_inv_freq=True):
    """of_q, of_inv_freq: whether their gradients are asked for."""
    options, freqs = GIVEN[case]
    q, k = make_qk(4, 8, 8, 8 if "heads" in case else 4, 16, torch.float32)
    freqs = {"inv_freq": FREQS.inv_freq, **freqs}
    leaves, placements = [q, k], [placement] * 2
    if of_inv_freq:
        leaves.append(freqs.pop("inv_freq"))
        placements.append([Replicate()] * mesh.ndim)

    def function(q, k, *inv_freq):
        return apply_rope_qk(q, k, RopeFreqs(*inv_freq, **freqs), **options)

    douts = [q + 1 if of_q else None, k + 1]
    kept = Shard(1) not in placement or options.get("positions", q).shape[-1] == 8
    equals_plain(mesh, function, leaves, douts, placements, kept and of_q)


@pytest.mark.parametrize("case", GIVEN)
def test_rotates(ranks, case):
    for placement in BY_DIM if case == "nothing" else [[Shard(1)]]:
        ranks.run(rotates, 4, placement=placement, case=case)
    ranks.run(rotates, (2, 2), placement=BY_TWO, case=case)


def test_rotates_without_some_gradients(ranks):
    for placement in BY_DIM:
        ranks.run(rotates, 4, placement=placement, case="positions", of_inv_freq=False)
        ranks.run(rotates, 4, placement=placement, case="nothing", of_q=False)


def offsets_stay_offsets(mesh):
    """Of 8 sequences of 2 tokens: a rank's own two offsets would be read as two positions."""
    q, k = make_qk(8, 2, 8, 4, 16, torch.float32)
    offsets = torch.arange(8) * 7 + 3

    def function(q, k):
        return apply_rope_qk(q, k, FREQS, positions=offsets)

    for placement in BY_DIM:
        equals_plain(mesh, function, [q, k], [q + 1, k + 1], [placement] * 2, kept=False)


def test_offsets_stay_offsets(ranks):
    ranks.run(offsets_stay_offsets, 4)


def rotates_packed(mesh, of_each):
    """Sharded by heads, with the gradient of inv_freq."""
    q, k = (x[0] for x in make_qk(1, 16, 8, 4, 16, torch.float32))
    cu_seqlens = torch.tensor([0, 5, 9, 16])
    offsets = torch.tensor([3, 7, 1])
    inv_freq = of_sequences(3) if of_each else FREQS.inv_freq

    def function(q, k, inv_freq):
        freqs = RopeFreqs(inv_freq)
        return apply_rope_qk(q, k, freqs, positions=offsets, cu_seqlens=cu_seqlens)

    placements = [[Shard(1)], [Shard(1)], [Replicate()]]
    equals_plain(mesh, function, [q, k, inv_freq], [q + 1, k + 1], placements, kept=True)


@pytest.mark.parametrize("of_each", [False, True])
def test_rotates_packed(ranks, of_each):
    ranks.run(rotates_packed, 4, of_each=of_each)


def norms_and_rotates(mesh, placement, case):
    q, k = make_qk(4, 8, 8, 4, 16, torch.float32)
    leaves, placements = [q, k], [placement, placement]
    sizes = (128, 64) if case == "over heads" else (16, 16)
    leaves += [torch.linspace(0.5, 1.5, size) for size in sizes]
    placements += [[Replicate()] * mesh.ndim] * 2
    positions = torch.arange(8) * 3

    def function(q, k, *weights):
        weights = {"q_norm_weight": weights[0], "k_norm_weight": weights[1]}
        return apply_rope_qk(q, k, FREQS, positions=positions, **weights)

    kept = case == "each head" or placement != [Shard(2)]
    equals_plain(mesh, function, leaves, [q + 1, k + 1], placements, kept)


@pytest.mark.parametrize("case", ["each head", "over heads"])
def test_norms_and_rotates(ranks, case):
    for placement in BY_DIM:
        ranks.run(norms_and_rotates, 4, placement=placement, case=case)


def attends_by_learned_frequencies(mesh, placement):
    q, k = make_qk(4, 8, 8, 4, 16, torch.float32)
    sinks, score = torch.linspace(-1, 1, 8), scores.dpe(3, [1 + n % 3 for n in range(8)])

    def function(q, k, v, inv_freq):
        return (rope_attention(q, k, v, RopeFreqs(inv_freq), score, sinks=sinks),)

    leaves = [q, k, k + 1, FREQS.inv_freq]
    placements = [*[placement] * 3, [Replicate()]]
    equals_plain(mesh, function, leaves, [q + 1], placements, kept=False)


def test_attends_by_learned_frequencies(ranks):
    for placement in ([Shard(0)], [Shard(2)]):
        ranks.run(attends_by_learned_frequencies, 4, placement=placement)


def merges(mesh):
    """Of DTensors it is PyTorch's operations, whose rules are PyTorch's."""
    first, second = make_qk(4, 8, 8, 8, 16, torch.float32)
    lses = torch.linspace(-3, 3, 2 * 4 * 8 * 8).view(2, 4, 8, 8)
    for of_out, of_lse in ((Shard(0), Shard(0)), (Shard(1), Shard(2)), (Shard(2), Shard(1))):
        leaves, placements = [first, second, *lses], [[of_out]] * 2 + [[of_lse]] * 2

        def function(*leaves):
            return merge_attention(leaves[:2], leaves[2:])

        equals_plain(mesh, function, leaves, [first + 1, None], placements, kept=True)
        given = [distribute_tensor(x.clone(), mesh, p) for x, p in zip(leaves, placements)]
        out, _ = merge_attention(given[:2], given[2:], inplace=True)
        torch.testing.assert_close(out.full_tensor(), merge_attention([first, second], lses)[0])


def test_merges(ranks):
    ranks.run(merges, 4)


def attends_by_what_is_given(mesh, placement, rows):
    """Numbers of sequences, or one for all, of their tokens and of heads, and a gradient of lse."""
    q, k = make_qk(4, 8, 8, 4, 16, torch.float32)
    lse_of = torch.linspace(-1, 1, 4 * 8 * 8).view(4, 8, 8)
    starts = torch.tensor([4, 0, 9, 2], dtype=torch.int32)
    options = {"query_scale": 1 + POSITIONS / 13, "q_start": starts + 3, "k_start": starts}
    if rows == 1:
        options["q_start"], options["k_start"] = starts[:1] + 3, starts[:1]

    def function(q, k, v, weight):
        out, lse = rope_attention(
            q, k, v, RopeFreqs(of_sequences(rows)), scores.rerope(3), return_lse=True,
            sinks=torch.linspace(-1, 1, 8), **options,
        )  # fmt: skip
        return out + (lse * weight).transpose(1, 2).unsqueeze(-1), lse

    of_lse = [{Shard(1): Shard(2), Shard(2): Shard(1)}.get(p, p) for p in placement]
    placements = [*[placement] * 3, of_lse]
    leaves = [q, k, k + 1, lse_of]
    kept = Shard(1) not in placement
    equals_plain(mesh, function, leaves, [q + 1, None], placements, kept)


def test_attends_by_what_is_given(ranks):
    for placement in (*BY_DIM, BY_TWO, [Shard(2), Replicate()]):
        size = 4 if len(placement) == 1 else (2, 2)
        ranks.run(attends_by_what_is_given, size, placement=placement, rows=4)
    ranks.run(attends_by_what_is_given, (2, 2), placement=BY_TWO, rows=1)


def heads_that_do_not_divide(mesh):
    """Queries would part from their keys: they are gathered."""
    q, k = make_qk(4, 8, 10, 5, 16, torch.float32)

    def function(q, k, v):
        return (rope_attention(q, k, v, FREQS, scores.rerope(3)),)

    equals_plain(mesh, function, [q, k, k + 1], [q + 1], [[Shard(2)]] * 3, kept=False)
    x = distribute_tensor(q, mesh, [Shard(0)])
    assert apply_rope(x, FREQS, positions=5).placements == (Shard(0),)


def test_heads_that_do_not_divide(ranks):
    ranks.run(heads_that_do_not_divide, 4)
