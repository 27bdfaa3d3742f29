"""Who takes which keys: slots of the decode kernel go to sequences, splits and blocks of rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from decode_oracle import Case, make  # noqa: E402

from extrope_kernels import methods, scores  # noqa: E402
from extrope_kernels.ops._shared.attention_call import AttentionCall, score_options  # noqa: E402
from extrope_kernels.ops.decode.arguments import KVCache  # noqa: E402
from extrope_kernels.ops.decode.triton import configs, launch, plans  # noqa: E402
from extrope_kernels.ops.decode.triton.schedule import share_of  # noqa: E402
from extrope_kernels.testing import device  # noqa: E402


def call_of_rerope() -> AttentionCall:
    told = score_options(scores.rerope(7), stored=True)
    return AttentionCall(methods.rope(32).inv_freq.to(device()), **told)


@triton.jit
def _shares(seqlens, found, batch, slots, TILE: tl.constexpr):
    lengths = (batch, seqlens, seqlens, 0, 1 << 30)
    slot = tl.program_id(0)
    queries, bounds = (None, 1, 1), ((0, 0, 0), 1, None)
    sequence, split, splits = share_of(slot, slots, 2, lengths, queries, bounds, TILE)
    tl.store(found + slot * 3, sequence)
    tl.store(found + slot * 3 + 1, split)
    tl.store(found + slot * 3 + 2, splits)


@pytest.mark.parametrize("more", (0, 5, 33))
@pytest.mark.parametrize(
    "lengths", ((1000,), (0, 0), (100_000, *[100] * 63), (64, 65, 63, 1), (1 << 27,) * 130)
)
def test_slots_go_to_where_the_keys_are(lengths, more):
    """Every split of every sequence once, and no sequence has more than its share."""
    inputs = make(Case((1,)))
    slots = len(lengths) + more
    call = call_of_rerope()
    kv = KVCache(inputs.k_cache, inputs.v_cache, inputs.call["cache_seqlens"])
    tile = plans._decode_tile(inputs.q, kv, call, configs.INTERPRETED, True)
    found = torch.full((slots, 3), -1, dtype=torch.int32, device=device())
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device())
    _shares[(slots,)](seqlens, found, len(lengths), slots, TILE=tile)
    blocks = [-(-n // tile.block_n) for n in lengths]
    each = max(-(-sum(blocks) // max(more, 1)), 2)
    expected = [
        [sequence, split, splits]
        for sequence, n in enumerate(blocks)
        for splits in [max(-(-n // each), 1)]
        for split in range(splits)
    ]
    assert found[: len(expected)].tolist() == expected
    assert (found[len(expected) :, 0] == len(lengths)).all()


@triton.jit
def _packed_shares(seqlens, cu_seqlens, found, batch, slots, total, TILE: tl.constexpr):
    lengths = (batch, seqlens, seqlens, 1, 1 << 30)
    queries, bounds = (cu_seqlens, total, 3), ((0, 0, 0), 1, None)
    slot = tl.program_id(0)
    sequence, part, splits = share_of(slot, slots, 2, lengths, queries, bounds, TILE)
    tl.store(found + slot * 3, sequence)
    tl.store(found + slot * 3 + 1, part)
    tl.store(found + slot * 3 + 2, splits)


@pytest.mark.parametrize("more, tail", ((0, 20), (33, 0)))
@pytest.mark.parametrize(
    "counts, lengths",
    [
        ((1,), (1000,)),
        ((0, 2, 0), (64, 0, 8)),
        ((5, 1, 0, 200), (100_000, 70, 3, 500)),
        ((1,) * 130, (1 << 27,) * 130),
        ((300, 1), (1 << 27, 9)),
    ],
)
def test_blocks_of_rows_go_to_whose_they_are(counts, lengths, tail, more):
    """Every split of every block of rows once, what follows the last boundary too, and all fit."""
    inputs = make(Case((1,)))
    total = sum(counts) + tail
    call = call_of_rerope()
    ends = torch.tensor((0, *counts), device=device()).cumsum(0).int()
    call = replace(call, cu_seqlens=ends)
    kv = KVCache(inputs.k_cache, inputs.v_cache, inputs.call["cache_seqlens"])
    tile = plans._decode_tile(inputs.q, kv, call, configs.INTERPRETED, True)
    slots = min(-(-3 * total // tile.block_m) + len(counts) + 1, total) + more
    found = torch.full((slots, 3), -1, dtype=torch.int32, device=device())
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device())
    _packed_shares[(slots,)](seqlens, ends, found, len(lengths), slots, total, TILE=tile)
    expected = []
    for sequence, (count, keys) in enumerate(zip((*counts, tail), (*lengths, 0))):
        rows = -(-3 * count // tile.block_m)
        mine = found[found[:, 0] == sequence].tolist()
        splits = mine[0][2] if mine else 1
        assert 1 <= splits <= max(-(-(keys + count) // tile.block_n), 1)
        expected += [[sequence, part, splits] for part in range(rows * splits)]
    assert found[: len(expected)].tolist() == expected
    assert (found[len(expected) :, 0] > len(lengths)).all()


@pytest.mark.parametrize("page", (-1, 3))
def test_a_page_that_is_not_there_is_not_written(page):
    """On a GPU nobody looks at the values of block_table before the kernel starts."""
    room = torch.zeros(2, 5, 4, 2, 32, device=device())
    k_pool, v_pool = room[0, 1:4], room[1, 1:4]  # what lies on either side is another's
    new = torch.randn(2, 1, 2, 32, device=device())
    table = torch.tensor([[1], [page]], dtype=torch.int32, device=device())
    seqlens = torch.tensor([2, 3], dtype=torch.int32, device=device())
    kv = KVCache(k_pool, v_pool, seqlens, table, appended=1)
    launch.append(new, new, kv, call_of_rerope())
    assert room[:, 2, 2].eq(new[0, 0]).all()
    room[:, 2, 2] = 0
    assert room.eq(0).all()
