"""What the attention kernels share: the softmax, and constants of their launches.

maps.py has position maps, mask.py the mask and a program's block, rows.py rows in tiles. The
kernels are in forward.py, backward.py, rotate.py and decode.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....scores import UNROTATED, Region
from ....scores.base import PlainMap
from ..._math.triton.launch import VECTOR_BYTES, strides_of
from ..call import START_END, AttentionCall, with_tensors
from .configs import MOST_ROWS, Config
from .maps import map_of

LEAST_DIMS = 16  # least dims of a product
# Starts, windows and blocks of granularity reach no farther, so that int32 never overflows: not
# three times this. It is past all positions, of up to 2**27 tokens from a start on.
FARTHEST_INT32 = START_END + 2**27


# Functions: Triton compares a module's constexprs at every launch, which takes 1 us each.
@triton.constexpr_function
def log2_e():
    """Return log2(e)."""
    return math.log2(math.e)


@triton.constexpr_function
def ln_2():
    """Return ln(2)."""
    return math.log(2)


# -------------------------------------------------------------------------------------------------
# Logits and the softmax


@triton.jit
def tanh(x):
    """Return tanh of float32 to 4 units in the last place, for any small x too; NaN for NaN.

    The formula is x P(x**2) / Q(x**2) with the least relative error up to 8. Past 8, tanh is 1
    within 2 units.
    """
    x = tl.maximum(x, -8.0, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, 8.0, propagate_nan=tl.PropagateNan.ALL)
    z = x * x
    above = 2.951034887171507e-3 + z * 1.142848571105796e-5
    above = 0.999999855560219 + z * (1.292567607640252e-1 + z * above)
    below = 2.3815607146169673e-2 + z * (2.386703906359719e-4 + z * 2.4592200945999215e-7)
    below = 1.0 + z * (4.625889210608028e-1 + z * below)
    return x * above / below


@triton.jit
def softcap(qk, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Cap logits SCALE * qk, in units of SOFTCAP: logits are SOFTCAP * tanh(SCALE * qk / SOFTCAP).

    SOFTCAP 0 is none: the result is qk, logits in units of SCALE.
    """
    return tanh(qk * (SCALE / SOFTCAP)) if SOFTCAP > 0 else qk


@triton.jit
def softcap_backward(d_logits, logits, SOFTCAP: tl.constexpr):
    """Return the gradients of logits before the cap; logits: the result of `softcap`."""
    return d_logits * (1.0 - logits * logits) if SOFTCAP > 0 else d_logits  # tanh' = 1 - tanh**2


# The forward and decode share these, but not the end: there the forward multiplies by a reciprocal
# and takes a natural logarithm, while decode divides, and has base 2, in which its splits are
# merged. One function for both would change the bits of one.


@triton.jit
def weights_of_block(row_max, logits, UNIT: tl.constexpr):
    """Return (row_max, weights, rescale) after a block of keys; weights: (M, N), of its values.

    logits: (M, N), times UNIT > 0 of base 2; -inf where a row does not see the key. row_max: (M,),
    finite even without keys, so that exp2 never gets inf - inf. The caller multiplies its row_sum
    and weighted values so far by rescale, (M,), and adds the block's.
    """
    # The unit may follow the maximum, as it is positive; and multiply-add joins it to exp2.
    new_max = tl.maximum(row_max, tl.max(logits, 1) * UNIT)
    return new_max, tl.exp2(logits * UNIT - new_max[:, None]), tl.exp2(row_max - new_max)


@triton.jit
def add_sink(row_max, row_sum, sink):
    """Add a sink, a logit without a value, to rows; return (row_max, row_sum, rescale).

    The caller multiplies weighted values by rescale. All numbers have base 2; row_max is finite
    even without keys.
    """
    new_max = tl.maximum(row_max, sink)
    rescale = tl.exp2(row_max - new_max)
    # The test avoids NaN if the sink is infinite and takes all.
    weight = tl.where(sink == new_max, 1.0, tl.exp2(sink - new_max))
    return new_max, row_sum * rescale + weight, rescale


# -------------------------------------------------------------------------------------------------
# The host: launches, and the constants of compiled kernels


class ModelConstants(NamedTuple):
    """What a model and a score method fix, as constants of a kernel."""

    heads_q: int
    heads_k: int
    head_dim: int  # of q and k
    head_dim_v: int
    half: int  # pairs of dims that rotate
    freq_heads: int  # heads of k with frequencies of their own; 1: all share
    interleaved: bool  # a pair's two dims are neighbours
    rotary_offset: int  # the first dim of the first pair
    starts: tuple[int, ...]  # start of each region, counted from the query's block
    granularity: int
    window: int  # most keys that a query sees, or 0: all
    from_key_0: bool  # region 0 begins at key 0 for every query
    q_stored: tuple | None  # the map by which queries come rotated, see `map_of`; None: raw
    q_maps: tuple[tuple, ...]  # one per region, see `map_of`
    sees_given_k: tuple[bool, ...]  # by region: its keys are k itself, not a rotated copy
    k_copy: tuple[int, ...]  # by region: the number of its rotated copy
    k_copies: int
    softmax_scale: float
    softcap: float  # or 0: none
    logit_unit: float  # results of `softcap`, times this, are logits of base 2; > 0
    attention_factor_sq: float


class Blocks(NamedTuple):
    """The sizes of a kernel's blocks, and what it may know of strides.

    A row may come in two tiles: two products of half the depth take fewer registers than one, and
    head_dim 96 becomes 64 and 32 dims, not 128.
    """

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    chunk_m: int  # rows of queries to rotate at a time between two regions; divides block_m
    d0: int  # dims of a row's first tile of q or k, a power of two
    d1: int  # dims of its second: the rest of head_dim, rounded up to a power of two; or 0
    dv0: int  # the same for v and out
    dv1: int
    tiles_are_pairs: bool  # dim i of the first tile and dim i of the second are a rotated pair
    align: int  # elements; divides all strides
    contiguous: bool  # the given tensors have no gaps between tokens


def constants_of(
    config: Config, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *others: Tensor
) -> tuple[ModelConstants, Blocks]:
    """Return a kernel's constants; others: more tensors that have strides."""
    given, window = (q, k, v, *others), call.sliding_window
    for x in given:  # offsets within a block are int32
        if x.stride(-3) * MOST_ROWS >= 2**31 and x.shape[-3] > 1:
            raise ValueError(
                f"attention: tokens must lie less than {2**31 // MOST_ROWS} elements apart, "
                f"got strides {x.stride()}"
            )
    regions, copies = regions_of(k, call), key_maps(k, call)
    half, scale = call.inv_freq.shape[-1], call.scale(q.shape[-1])
    d0, d1 = _dims_of_tiles(q.shape[-1], config.halves)
    dv0, dv1 = _dims_of_tiles(v.shape[-1], config.halves)
    model = ModelConstants(
        heads_q=q.shape[-2],
        heads_k=k.shape[-2],
        head_dim=q.shape[-1],
        head_dim_v=v.shape[-1],
        half=half,
        freq_heads=freq_heads_of(call),
        interleaved=call.interleaved,
        rotary_offset=call.rotary_offset,
        starts=tuple(max(-FARTHEST_INT32, min(region.start, FARTHEST_INT32)) for region in regions),
        granularity=min(call.granularity, FARTHEST_INT32),
        window=0 if window is None else min(window, FARTHEST_INT32),
        from_key_0=window is None and regions[0].start <= -FARTHEST_INT32,
        q_stored=None if call.q_stored == UNROTATED else map_of(call.q_stored),
        q_maps=tuple(map_of(region.q_map) for region in regions),
        sees_given_k=tuple(region.k_map not in copies for region in regions),
        k_copy=tuple(copies.index(x.k_map) if x.k_map in copies else 0 for x in regions),
        k_copies=len(copies),
        softmax_scale=scale,
        softcap=call.softcap,
        logit_unit=(call.softcap or scale) * log2_e(),
        attention_factor_sq=call.attention_factor**2,
    )
    blocks = Blocks(
        block_m=config.block_m,
        block_n=config.block_n,
        chunk_m=min(config.rotated, config.block_m),
        d0=d0,
        d1=d1,
        dv0=dv0,
        dv1=dv1,
        tiles_are_pairs=not call.interleaved and (d0, d1) == (half, half),
        align=alignment_of(*given),
        contiguous=all(
            x.stride()[-3:] == (x.shape[-2] * x.shape[-1], x.shape[-1], 1) for x in given
        ),
    )
    return model, blocks


def _dims_of_tiles(head_dim: int, halves: bool) -> tuple[int, int]:
    """Return the dims of both tiles of a row."""
    whole = max(LEAST_DIMS, triton.next_power_of_2(head_dim))
    first = whole // 2
    if not halves or first < LEAST_DIMS:
        return whole, 0
    return first, max(LEAST_DIMS, triton.next_power_of_2(head_dim - first))


def alignment_of(*tensors: Tensor) -> int:
    """Return how many elements, up to 16 bytes, divide these strides and contiguous ones."""
    strides = (n for x in tensors for n in (*strides_of(x)[:-1], x.shape[-1]))
    return math.gcd(VECTOR_BYTES // tensors[0].itemsize, *strides)


def regions_of(k: Tensor, call: AttentionCall) -> list[Region]:
    """Return the regions that may hold keys."""
    placed = call.q_start is not None or call.k_start is not None
    return call.trimmed(FARTHEST_INT32 if placed else k.shape[-3])


def key_maps(k: Tensor, call: AttentionCall) -> list[PlainMap]:
    """Return the distinct maps that keys must be rotated to, without the one of the given keys."""
    maps = [region.k_map for region in regions_of(k, call)]
    return list(dict.fromkeys(x for x in maps if x != call.stored))


def programs_of(x: Tensor, size: int, call: AttentionCall) -> tuple[int, int]:
    """Return (programs, blocks of each head) if a program has `size` tokens of one head of x."""
    seqlen, heads, _ = x.shape[-3:]
    if call.cu_seqlens is None:
        blocks, batch = triton.cdiv(seqlen, size), x.shape[0]
    else:
        blocks, batch = seqlen // size + call.cu_seqlens.shape[0] - 1, 1
    return (blocks * heads * batch if seqlen > 0 else 0), blocks


def sequence_numbers(q: Tensor, k: Tensor, call: AttentionCall) -> dict[str, int]:
    """Return the numbers of a launch that say where sequences are, in q and k; see `Sequences`."""
    sequences = 0 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return {
        "q_start_stride": sequence_stride(call.q_start),
        "k_start_stride": sequence_stride(call.k_start),
        "num_sequences": sequences,
        "search_steps": sequences.bit_length(),
        "seqlen_q": q.shape[-3],
        "seqlen_k": k.shape[-3],
    }


def sequence_stride(x: Tensor | None, dims: int = 1) -> int:
    """Return x's stride between sequences; 0 if they share x: all do if it has fewer dims."""
    return 0 if x is None or x.dim() < dims or x.shape[0] == 1 else x.stride(0)


def with_contiguous_rows(call: AttentionCall) -> AttentionCall:
    """Return the call with contiguous tensors: kernels read most of them without strides."""
    if all(x is None or x.is_contiguous() for x in call.tensors):
        return call
    return with_tensors([None if x is None else x.contiguous() for x in call.tensors], call.fixed)


def freq_heads_of(call: AttentionCall) -> int:
    """Return how many heads of k have their own frequencies; 1: all share."""
    return call.inv_freq.shape[-2] if call.inv_freq.dim() == 3 else 1
