"""Triton kernels over a cache: calls, angles at any position, splits and slots, no lengths read."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from support.decode_oracle import SCORES, Case, check, make  # noqa: E402
from support.score_examples import PLAIN, example_of  # noqa: E402
from support.triton_attention import decode  # noqa: E402

from extrope_kernels import methods, scores  # noqa: E402
from extrope_kernels.ops._math.triton.sincos import cos_sin, fixed_angle  # noqa: E402
from extrope_kernels.ops.attention import AttentionCall  # noqa: E402
from extrope_kernels.ops.attention.triton import configs  # noqa: E402
from extrope_kernels.ops.cache.call import KVCache  # noqa: E402
from extrope_kernels.ops.decode import triton as in_triton  # noqa: E402
from extrope_kernels.ops.decode.triton.decode import constants_of  # noqa: E402
from extrope_kernels.ops.decode.triton.schedule import (  # noqa: E402
    CacheLengths,
    grid_of,
    work_of_program,
)
from extrope_kernels.testing import device  # noqa: E402

WIDE = example_of(scores.rerope(20))
ALL = {
    "appended": True,
    "sinks": True,
    "softcap": 2.0,
    "sliding_window": 29,
    "query_scale": True,
    "log_n": 16,
}
PAGED = {"heads_q": 6, "page_size": 21, "leftpad": (3, 25)}


@pytest.mark.parametrize("seqlen_q, dtype", ((1, torch.float32), (4, torch.float16)))
@pytest.mark.parametrize("score", SCORES)
def test_every_score_method(score, seqlen_q, dtype):
    check(Case((70, 9), seqlen_q, dtype=dtype, **PAGED, **SCORES[score]), "triton")


@pytest.mark.parametrize("seqlen_q", (1, 4))
@pytest.mark.parametrize(
    "changes",
    (
        {"head_dim": 24, "rotary_dim": 6, "interleaved": True, "attention_factor": 1.2},
        {"head_dim": 48, "rotary_dim": 16, "rotary_offset": 32},
        {"freqs_per_sequence": True, "head_dim_v": 8, "softmax_scale": 0.3},
        ALL,
        {**ALL, "fp8": True, "dtype": torch.float16, "rotary_dim": 12, "rotary_offset": 18},
    ),
    ids=range(5),
)
def test_options(changes, seqlen_q):
    check(Case((70, 9), seqlen_q, **PAGED, **SCORES["leaky_rerope"], **changes), "triton")


@triton.jit
def _angles(inv_freq, positions, cos_out, sin_out, scale: tl.float64, N: tl.constexpr):
    n = tl.arange(0, N)
    angle = tl.load(positions + n)[:, None] * fixed_angle(tl.load(inv_freq + n), scale)[None]
    cos, sin = cos_sin(angle)
    place = n[:, None] * N + n[None, :]
    tl.store(cos_out + place, cos)
    tl.store(sin_out + place, sin)


@pytest.mark.parametrize("scale", (1.0, 0.25, 1 / 3, 16.0))
@pytest.mark.parametrize("largest", (10, 1_000, 1_000_000, 2**30))
def test_angles_are_as_exact_far_out_as_near(largest, scale):
    n = 64
    inv_freq = methods.rope(2 * n).inv_freq.to(device())
    positions = torch.randint(0, largest, (n,), device=device())
    cos, sin = (torch.empty(n, n, device=device()) for _ in range(2))
    _angles[(1,)](inv_freq, positions, cos, sin, scale, N=n)
    angle = positions[:, None].double() * (inv_freq.double() * scale)
    # float64 itself is this far off at 2**30 radians.
    bound = 1.5e-7 + 2.0**-52 * largest * scale
    assert (cos.double() - angle.cos()).abs().max() < bound
    assert (sin.double() - angle.sin()).abs().max() < bound


@pytest.mark.parametrize("frequency", (math.pi, 3.2, 7.0, 100.0))
def test_frequencies_past_half_a_turn(frequency):
    inv_freq = torch.full((16,), frequency, device=device())
    positions = torch.arange(16, device=device())
    cos, sin = (torch.empty(16, 16, device=device()) for _ in range(2))
    _angles[(1,)](inv_freq, positions, cos, sin, 1.0, N=16)
    angle = positions[:, None].double() * inv_freq.double()
    assert (cos.double() - angle.cos()).abs().max() < 2e-7
    assert (sin.double() - angle.sin()).abs().max() < 2e-7


SMALL = {"heads_q": 1, "heads_k": 1}
# A sink counts where splits are merged, not in each; values of another head_dim are merged.
JOINING = {"sinks": True, "softcap": 2.0, "query_scale": True, "head_dim_v": 40}
SPLIT = {
    "one long": ((90, 3, 0), {"leftpad": (0, 3, 0), "page_size": 7, "heads_q": 2, "heads_k": 1}),
    "long last": ((1, 0, 70), {"leftpad": (1, 0, 0), **SMALL}),
    "empty": ((0, 0), {}),
    "alike": ((35, 34), {"page_size": 7}),
    "keys out of sight": ((130, 5), {"example": example_of(scores.blockwise_causal(40)), **SMALL}),
    "keys out of the window": ((130, 5), {"sliding_window": 16}),
    "a window of one": ((130, 5), {"sliding_window": 1}),
    "what joins a row": ((90, 3, 0, 17), {"page_size": 7, **JOINING}),
}


@pytest.mark.parametrize("seqlen_q", (1, pytest.param(3, marks=pytest.mark.thorough)))
@pytest.mark.parametrize("name", SPLIT)
def test_splits(name, seqlen_q, many_splits):
    many_splits()
    lengths, changes = SPLIT[name]
    check(Case(lengths, seqlen_q, **{"example": WIDE, **changes}), "triton")


@pytest.mark.parametrize("most", (1, 2, 7, 40))
def test_any_number_of_splits(most, many_splits):
    """And more sequences than are counted at once."""
    many_splits(most)
    check(Case((97, 3), 5, example=WIDE), "triton")
    if most == 2:
        sizes = {**SMALL, "head_dim": 8, "rotary_dim": 8}
        check(Case((50, *[1] * 128, 40), example=PLAIN, **sizes), "triton")


def test_splits_merge_in_their_order_whoever_comes_last(many_splits):
    many_splits()
    inputs = make(Case((80, 3), heads_q=1, heads_k=1, head_dim=16, rotary_dim=16))
    first, again = inputs.run("triton"), inputs.run("triton")
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_a_nan_reaches_the_log_sum_exp(many_splits):
    many_splits()
    inputs = make(Case((90,), heads_q=3, heads_k=1))
    inputs.q[..., 1, 0] = torch.nan
    out, lse = inputs.run("triton")
    of_head = torch.tensor([[False], [True], [False]], device=lse.device)
    assert torch.equal(lse.isnan()[0], of_head)
    assert torch.equal(out[0, 0].isnan(), of_head.expand(3, out.shape[-1]))


def test_a_frequency_that_is_no_number_reaches_rows_with_keys_alone(many_splits):
    """Its NaN is in the region of a row's own key: other splits of the row do not have it."""
    many_splits()
    inputs = make(Case((90, 2, 0), 3, example=WIDE, leftpad=(0, 3, 0)))
    _, clean = inputs.run("triton")
    inputs.freqs.inv_freq[2] = torch.nan
    out, lse = inputs.run("triton")
    sees = clean.isfinite()  # (batch, heads, seqlen)
    assert 0 < sees.sum() < sees.numel()
    assert torch.equal(lse.isnan(), sees)
    assert torch.equal(out.isnan(), sees.transpose(1, 2)[..., None].expand_as(out))


def test_packed_queries_are_split(many_splits):
    """Chunks and single tokens in one call; a sequence has no query, another no key before it."""
    many_splits()
    lengths, counts, leftpad = (60, 17, 3, 5, 0), (1, 5, 0, 3, 1), (2, 0, 1, 0, 0)
    packed = {"counts": counts, "tail": 3, "leftpad": leftpad, "freqs_per_sequence": True}
    check(Case(lengths, heads_q=2, heads_k=1, head_dim_v=24, sinks=True, **packed), "triton")


def test_splits_of_packed_queries_have_places_of_their_own(many_splits):
    """Those of each block of rows, in the order of items; none writes where another's are."""
    many_splits()
    inputs = make(Case((60, 17), counts=(15, 1), heads_q=6))
    kv = KVCache(inputs.k_cache, inputs.v_cache, inputs.call["cache_seqlens"])
    call = call_of(scores.rerope(7), cu_seqlens=inputs.call["cu_seqlens_q"])
    given = inputs.q, None, None, kv, call
    launches = in_triton.decode_launches(*given)
    kept = []

    def run(scratch, **tensors):
        kept.append(scratch)
        launches.attend.run(scratch=scratch, **tensors)

    in_triton.decode(*given, launches._replace(attend=SimpleNamespace(run=run)))
    counters, size = launches[3:]
    # (items, heads of k, rows of a block) log-sum-exps, behind outputs of 32 dims
    places = kept[0][counters + (size - counters) * 32 // 33 :].view(-1, 2, 16)
    written = ~places.isnan()
    # Four splits of the first sequence's 16, 16 and 13 rows, and two of the second's 3.
    rows = torch.tensor([16] * 8 + [13] * 4 + [3] * 2 + [0] * (len(written) - 14), device=device())
    assert torch.equal(written.sum(-1), rows[:, None].expand(-1, 2))
    assert torch.equal(written, written.cumprod(-1).bool())  # from each item's first place on


def call_of(score: scores.Score, head_dim: int = 32, **options) -> AttentionCall:
    inv_freq = methods.rope(head_dim).inv_freq.to(device())
    return AttentionCall(inv_freq, score=score, rotated="k", **options)


def test_lengths_past_the_cache_are_cut():
    """On a GPU nobody looks at lengths: too long ones must not be read or written past the end."""
    k = torch.randn(2, 20, 1, 16, device=device())
    buffer = torch.full((4, 20, 1, 16), torch.nan, device=device())
    buffer[1:3] = k
    cache = buffer[1:3]
    seqlens = torch.tensor([18, 25], dtype=torch.int32, device=device())
    call = call_of(scores.rerope(8), 16)
    kv = KVCache(cache, cache.clone(), seqlens)
    new = torch.zeros(2, 4, 1, 16, device=device())
    decode(new, new, new, kv._replace(appended=4), call)
    assert not cache[0, 18:].any() and torch.equal(cache[1], k[1])
    assert buffer[3].isnan().all()
    out, _ = decode(k[:, :1], None, None, kv, call)
    assert out.isfinite().all()


def test_every_tile_is_a_candidate_or_has_none():
    """Candidates are timed on a card and one becomes the tile: decode's must be among them."""
    folder = Path(configs.__file__).parent
    tiles, candidates = (
        json.loads((folder / name).read_text()) for name in ("configs.json", "candidates.json")
    )
    for kernel in ("one_token", "chunk", "one_token_fp8", "chunk_fp8"):
        for chip, rows in candidates[kernel].items():
            for dim, several in rows.items():
                found = configs.config(kernel, int(dim), 2, int(chip))
                assert found in [configs.Config(**leaf) for leaf in several], (kernel, chip, dim)
                assert 3 <= len(several) <= 6
    assert set(tiles) == set(candidates)


# -------------------------------------------------------------------------------------------------
# Who takes which keys: items go to sequences, splits and blocks of rows


@triton.jit
def _packed_work(
    seqlens, cu_seqlens, found, batch, num_items, total, MODEL: tl.constexpr, BLOCKS: tl.constexpr
):
    lengths = CacheLengths(seqlens, seqlens, cu_seqlens, batch, total, 1, 1 << 30)
    item, sequence, row_block, split, splits = work_of_program(num_items, 2, lengths, MODEL, BLOCKS)
    tl.store(found + item * 4, sequence)
    tl.store(found + item * 4 + 1, row_block)
    tl.store(found + item * 4 + 2, split)
    tl.store(found + item * 4 + 3, splits)


@pytest.mark.parametrize("window", (None, 64))
@pytest.mark.parametrize("more, tail", ((0, 20), (33, 0)))
@pytest.mark.parametrize(
    "counts, lengths",
    [
        ((1,), (1000,)),
        ((0, 2, 0), (64, 0, 8)),
        ((5, 1, 0, 200), (100_000, 70, 3, 500)),
        pytest.param((1,) * 130, (1 << 27,) * 130, marks=pytest.mark.thorough),
        pytest.param((300, 1), (1 << 27, 9), marks=pytest.mark.thorough),
    ],
)
def test_blocks_of_rows_go_to_whose_they_are(counts, lengths, tail, more, window):
    """Every split of every block of rows once, what follows the last boundary too, and all fit.

    No more splits than blocks of keys that are seen: under a window few, however long the cache.
    """
    inputs = make(Case((1,)))
    total = sum(counts) + tail
    call = call_of(scores.rerope(7))
    ends = torch.tensor((0, *counts), device=device()).cumsum(0).int()
    call = call._replace(cu_seqlens=ends, sliding_window=window)
    kv = KVCache(inputs.k_cache, inputs.v_cache, inputs.call["cache_seqlens"])
    model, blocks = constants_of(inputs.q, kv, call, configs.INTERPRETED, True)
    model = model._replace(group=3)
    items = min(-(-3 * total // blocks.block_m) + len(counts) + 1, total) + more
    found = torch.full((items, 4), -1, dtype=torch.int32, device=device())
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device())
    sizes = (len(lengths), items, total)
    _packed_work[(items,)](seqlens, ends, found, *sizes, MODEL=model, BLOCKS=blocks)
    expected = []
    for sequence, (count, keys) in enumerate(zip((*counts, tail), (*lengths, 0))):
        row_blocks = -(-3 * count // blocks.block_m)
        mine = found[found[:, 0] == sequence].tolist()
        splits = mine[0][3] if mine else 1
        seen = keys + count if window is None else min(keys + count, window + count - 1)
        assert 1 <= splits <= max(-(-seen // blocks.block_n), 1)
        expected += [
            [sequence, *part, splits] for part in product(range(row_blocks), range(splits))
        ]
    assert found[: len(expected)].tolist() == expected
    # Long enough for the items that are left, and these are enough for a split of the longest.
    blocks_of_longest = -(-3 * counts[lengths.index(max(lengths))] // blocks.block_m)
    if window is None and more >= max(len(lengths), blocks_of_longest) and max(lengths) >= 1000:
        assert max(splits for *_, splits in expected) > 1
    assert (found[len(expected) :, 0] > len(lengths)).all()


def test_without_splits_a_sequence_is_one_item():
    """A cache too short for two splits has no programs for more."""
    inputs = make(Case((70, 9)))
    kv = KVCache(inputs.k_cache, inputs.v_cache, inputs.call["cache_seqlens"])
    grid = grid_of(inputs.q, kv, call_of(scores.rerope(7)), 16, 16)
    assert kv.capacity < 512 and not grid.splits
    assert grid.num_items == 2


@pytest.mark.parametrize("page", (-1, 3))
def test_a_page_that_is_not_there_is_not_written(page):
    """On a GPU nobody looks at the values of block_table before the kernel starts."""
    room = torch.zeros(2, 5, 4, 2, 32, device=device())
    k_pool, v_pool = room[0, 1:4], room[1, 1:4]  # what lies on either side is another's
    new = torch.randn(2, 1, 2, 32, device=device())
    table = torch.tensor([[1], [page]], dtype=torch.int32, device=device())
    seqlens = torch.tensor([2, 3], dtype=torch.int32, device=device())
    kv = KVCache(k_pool, v_pool, seqlens, table, appended=1)
    decode(new, new, new, kv, call_of(scores.rerope(7)))
    assert room[:, 2, 2].eq(new[0, 0]).all()
    room[:, 2, 2] = 0
    assert room.eq(0).all()
