"""Shared code of the attention kernels: tiles, rows, position maps, blocks of keys, the softmax.

A row has the head_dim elements of one token and head. It may come in two parts, of Tile.dims and
Tile.more_dims: two products of half the depth take fewer registers than one, and head_dim 96
becomes 64 and 32 dims, not 128. Without more_dims the second part is never used.

Shapes in comments: M is BLOCK_M, rows of queries; N is BLOCK_N, rows of keys; D is the dims of a
part. Times Tile.factor, logits have base 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....scores import Region
from ....scores.base import PairRow, PlainMap
from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.angles import cos_sin, fixed_angle
from ..._shared.triton.exp import exp
from ..._shared.triton.launch import INTERPRETED, VECTOR_BYTES, strides_of
from ..call import AttentionCall
from .configs import MOST_ROWS, Config

LEAST_DIMS = 16  # least dims of a product
# Starts, windows and blocks of granularity reach no farther, so that int32 never overflows: not
# three times this. It is past all positions, of up to 2**27 tokens from a start below 2**29 on.
FARTHEST = 2**29 + 2**27
_LARGEST = 2**31 - 1  # largest int32 position
_NO_CAP = 1 << 62  # not None: before 3.8, Triton takes no None within a tuple


# Functions: Triton compares a module's constexprs at every launch, which takes 1 us each.
@triton.constexpr_function
def log2_e():
    """Return log2(e)."""
    return math.log2(math.e)


@triton.constexpr_function
def ln_2():
    """Return ln(2)."""
    return math.log(2)


@triton.constexpr_function
def no_logit():
    """Return a number below any logit; it is finite, so empty rows need no care before the end."""
    return -1e30


# -------------------------------------------------------------------------------------------------
# Launches, and the constants of compiled kernels


class Launch(NamedTuple):
    """A launch without its tensors."""

    grid: tuple[int, ...]
    sizes: tuple[int, ...]  # the kernel's integers, in its order
    options: dict[str, Any]  # its constexprs, and Triton's launch options


def launch_for(
    make: Callable[..., Any], given: tuple[Tensor | None, ...], call: AttentionCall, *more: Any
) -> Any:
    """Return make(*given, call, *more), cached by the layouts of all these tensors."""
    layouts = layout_key(*given, *call.tensors)
    return cached_by_layout(make, (layouts, call.fixed, more), *given, call, *more)


class Tile(NamedTuple):
    """A model's settings and the sizes of blocks.

    A launch has two tiles with different dims: for rows of q and k, and for rows of v and out.
    """

    block_m: int  # rows of queries
    block_n: int  # rows of keys
    rotated: int  # rows of queries to rotate at a time between two regions; divides block_m
    heads_q: int
    heads_k: int
    head_dim: int
    dims: int  # dims of the first part of a row, a power of two
    more_dims: int  # dims of the second: the rest of head_dim, rounded up to a power of two; or 0
    half: int  # pairs of dims that rotate
    rope_heads: tuple[int, int]  # see `rope_heads_of`
    interleaved: bool
    paired: bool  # the two parts of a row are the two dims of its pairs
    starts: tuple[int, ...]  # start of each region, counted from the query's block
    granularity: int
    window: int  # most keys that a query sees, or 0: all
    from_first_key: bool  # region 0 has no lower end
    q_maps: tuple[tuple, ...]  # one per region, see `map_of`
    k_copy: tuple[int, ...]  # one per region: its rotated copy of the keys, or -1: the given keys
    k_copies: int
    softmax_scale: float
    softcap: float  # or 0: none
    factor: float  # turns results of `bounded` into logits of base 2
    amplitude: float
    per_log_n: float  # 1 / ln(log_n), or 0: none
    align: int  # elements; divides all strides
    contiguous: bool  # the given tensors have no gaps between tokens
    widen: bool  # widen operands to float32 for products: the interpreter has no bfloat16


def tiles_of(
    setting: Config, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, *others: Tensor
) -> tuple[Tile, Tile]:
    """Return tiles for rows of q and k, and of v; others: more tensors that have strides."""
    given, window = (q, k, v, *others), call.sliding_window
    regions, copies = regions_of(k, call), key_maps(k, call)
    half, dims = call.inv_freq.shape[-1], _parts(q.shape[-1], setting.halves)
    for x in given:
        if x.stride(-3) * MOST_ROWS >= 2**31 and x.shape[-3] > 1:
            raise ValueError(
                f"attention: tokens must lie less than {2**31 // MOST_ROWS} elements apart, "
                f"got strides {x.stride()}"
            )
    tile = Tile(
        block_m=setting.block_m,
        block_n=setting.block_n,
        rotated=min(setting.rotated, setting.block_m),
        heads_q=q.shape[-2],
        heads_k=k.shape[-2],
        head_dim=q.shape[-1],
        dims=dims[0],
        more_dims=dims[1],
        half=half,
        rope_heads=rope_heads_of(call),
        interleaved=call.interleaved,
        paired=not call.interleaved and dims == (half, half),
        starts=tuple(max(-FARTHEST, min(region.start, FARTHEST)) for region in regions),
        granularity=min(call.granularity, FARTHEST),
        window=0 if window is None else min(window, FARTHEST),
        from_first_key=window is None and regions[0].start <= -FARTHEST,
        q_maps=tuple(map_of(region.q_map) for region in regions),
        k_copy=tuple(copies.index(x.k_map) if x.k_map in copies else -1 for x in regions),
        k_copies=len(copies),
        softmax_scale=call.scale(q.shape[-1]),
        softcap=call.softcap,
        factor=(call.softcap or call.scale(q.shape[-1])) * log2_e(),
        amplitude=call.attention_factor**2,
        per_log_n=0.0 if call.log_n is None else 1 / math.log(call.log_n),
        align=alignment_of(*given),
        contiguous=all(
            x.stride()[-3:] == (x.shape[-2] * x.shape[-1], x.shape[-1], 1) for x in given
        ),
        widen=INTERPRETED and q.dtype == torch.bfloat16,
    )
    dims = _parts(v.shape[-1], setting.halves)
    return tile, tile._replace(head_dim=v.shape[-1], dims=dims[0], more_dims=dims[1])


def _parts(head_dim: int, halves: bool) -> tuple[int, int]:
    """Return the dims of both parts of a row."""
    whole = max(LEAST_DIMS, triton.next_power_of_2(head_dim))
    first = whole // 2
    if not halves or first < LEAST_DIMS:
        return whole, 0
    return first, max(LEAST_DIMS, triton.next_power_of_2(head_dim - first))


def alignment_of(*tensors: Tensor) -> int:
    """Return how many elements, up to 16 bytes, divide these strides and contiguous ones."""
    strides = (n for x in tensors for n in (*strides_of(x)[:-1], x.shape[-1]))
    return math.gcd(VECTOR_BYTES // tensors[0].itemsize, *strides)


def groups_of(x: Tensor, align: int) -> tuple[int, ...]:
    """Return strides by batch, seq and head, in groups of `align` elements: see Rows."""
    return tuple(n // align for n in (*(0,) * (4 - x.dim()), *strides_of(x)[:-1]))


def regions_of(k: Tensor, call: AttentionCall) -> list[Region]:
    """Return the regions that may hold keys."""
    placed = call.q_start is not None or call.k_start is not None
    return call.trimmed(FARTHEST if placed else k.shape[-3])


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


def sequences_of(call: AttentionCall) -> tuple[int, int]:
    """Return (number of packed sequences, or 0; steps of a search for one)."""
    sequences = 0 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    return sequences, sequences.bit_length()


def sequence_stride(x: Tensor | None, dims: int) -> int:
    """Return the stride between sequences; 0 if they share x or lack the first of `dims`."""
    return 0 if x is None or x.dim() < dims or x.shape[0] == 1 else x.stride(0)


def with_contiguous_rows(call: AttentionCall) -> AttentionCall:
    """Return the call with contiguous rows in its small tensors, which kernels read as such."""
    rows = {name: getattr(call, name) for name in ("sinks", "query_scale", "pair_maps")}
    if call.inv_freq.dim() == 3:
        rows["inv_freq"] = call.inv_freq
    return call._replace(**{name: x.contiguous() for name, x in rows.items() if x is not None})


def rope_heads_of(call: AttentionCall) -> tuple[int, int]:
    """Return how many heads of k have their own frequencies and maps of pairs; 1: all share."""
    of_freq = call.inv_freq.shape[-2] if call.inv_freq.dim() == 3 else 1
    return of_freq, 1 if call.pair_maps is None else call.pair_maps.shape[-2]


# -------------------------------------------------------------------------------------------------
# Position maps: from a token's position to its cosines and sines


def map_of(position_map: PlainMap) -> tuple:
    """Return a map as (modulus, divisor, factor, whole, fraction, cap), for device functions.

    A position p becomes min(p % modulus // divisor + whole, cap), a whole number. This times
    factor, plus fraction, is the result. Modulus 0: none; divisor 0: all positions become 0.

    A map of pairs has divisor -1, factor 1 with floor and 0 without, and its row as whole. These
    are plain tuples: Triton 3.6 takes no named ones within a tuple.
    """
    modulus = position_map.modulus if position_map.modulus <= _LARGEST else 0
    if isinstance(position_map, PairRow):
        return modulus, -1, float(position_map.floor), position_map.row, 0.0, _NO_CAP
    _, divisor, floor, offset, cap = position_map
    constant = math.isinf(divisor) or (floor and divisor > _LARGEST)
    integral = float(offset).is_integer()
    slow = not (constant or floor) and (divisor != 1 or not integral)
    offset = max(-(2.0**53), min(offset, 2.0**53))
    return (
        0 if constant else modulus,
        0 if constant else int(divisor) if floor else 1,
        1 / divisor if slow else 1.0,
        int(offset) if integral and not slow else 0,
        0.0 if integral and not slow else float(offset),
        int(max(-(2.0**53), cap)) if cap < 2.0**53 else _NO_CAP,
    )


@triton.jit
def _index(position, MAP: tl.constexpr):
    """Return the map's whole number, int64: (tokens, 1), or (1, 1) if all tokens share one."""
    if MAP[1] == 0:
        index = tl.zeros((1, 1), tl.int64)
    else:
        index = position[:, None]
        # In 64 bits, a GPU calls a function for every division.
        if MAP[0] > 0:
            index = index % MAP[0]
        if MAP[1] > 1:
            index = index // MAP[1]
        index = index.to(tl.int64)
    if MAP[3] != 0:
        index += MAP[3]
    NO_CAP: tl.constexpr = 1 << 62
    if MAP[5] < NO_CAP:
        index = tl.minimum(index, MAP[5])
    return index


@triton.jit
def freqs_of(inv_freq, head, TILE: tl.constexpr):
    """Return a pointer to the frequencies of a head of k."""
    if TILE.rope_heads[0] > 1:
        inv_freq += head * TILE.half
    return inv_freq


@triton.jit
def _angle_of_pairs(position, freq, maps, MAP: tl.constexpr, TILE: tl.constexpr):
    """Return angles by a divisor and an offset of each pair: (tokens, pairs) int64."""
    OFFSETS: tl.constexpr = TILE.rope_heads[1] * TILE.half  # they follow the divisors of all heads
    LARGEST: tl.constexpr = 2147483520.0  # the largest float32 within int32
    pair_maps, pair, head = maps
    at = pair_maps + MAP[3] * 2 * OFFSETS + pair
    if TILE.rope_heads[1] > 1:
        at += head * TILE.half
    divisor = tl.load(at, mask=pair < TILE.half, other=1.0)[None, :]
    offset = tl.load(at + OFFSETS, mask=pair < TILE.half, other=0.0)[None, :]
    index = position[:, None]
    if MAP[0] > 0:
        index = index % MAP[0]
    if MAP[2] == 1.0:
        index = index // tl.minimum(divisor, LARGEST).to(tl.int32)
        angle = index.to(tl.int64) * fixed_angle(freq, 1.0)
    else:
        angle = index.to(tl.int64) * fixed_angle(freq, 1.0 / divisor)
    return angle + fixed_angle(freq, offset)


@triton.jit
def _angle(position, freq, maps, MAP: tl.constexpr, TILE: tl.constexpr):
    """Return angles: (tokens, pairs) int64, or (1, pairs)."""
    if MAP[1] < 0:
        angle = _angle_of_pairs(position, freq, maps, MAP, TILE)
    else:
        angle = _index(position, MAP) * fixed_angle(freq, MAP[2])
        if MAP[4] != 0.0:
            angle += fixed_angle(freq, MAP[4])
    return angle


@triton.jit
def _mapped(position, MAP: tl.constexpr):
    """Return the mapped position, float64: (tokens, 1) or (1, 1)."""
    return _index(position, MAP).to(tl.float64) * MAP[2] + MAP[4]


@triton.jit
def map_cos_sin(
    position, freq, decay, maps, MAP: tl.constexpr, ORIGIN: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return cosine and sine, float32, that rotate tokens to the positions of MAP.

    ORIGIN: the map by which tokens already come rotated, or None. position: (tokens,) int32.
    freq: (1 or tokens, pairs). decay: None, or the logarithm of the amplitude per position, (1,
    pairs) float64. maps: (pair_maps, numbers of the pairs (pairs,), the head of k).

    The results have as many rows as the maps need.
    """
    angle = _angle(position, freq, maps, MAP, TILE)
    if ORIGIN is not None:
        angle -= _angle(position, freq, maps, ORIGIN, TILE)
    cos, sin = cos_sin(angle)
    if decay is not None:
        moved = _mapped(position, MAP)
        if ORIGIN is not None:
            moved -= _mapped(position, ORIGIN)
        amplitude = exp(moved * decay).to(tl.float32)
        cos *= amplitude
        sin *= amplitude
    return cos, sin


@triton.jit
def nth_cos_sin(
    position, freq, decay, maps, N: tl.constexpr, MAPS: tl.constexpr, ORIGIN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Call map_cos_sin with the N-th of MAPS: before 3.8, Triton passes a tuple's item by name."""
    MAP: tl.constexpr = MAPS[N]
    return map_cos_sin(position, freq, decay, maps, MAP, ORIGIN, TILE)


@triton.jit
def log_n_scale(position, PER_LOG_N: tl.constexpr):
    """Return max(1, ln(position + 1) / ln(log_n)): (tokens, 1) float32."""
    scale = tl.full((position.shape[0], 1), 1.0, tl.float32)
    if PER_LOG_N > 0.0:
        log = tl.log((tl.maximum(position, 0) + 1).to(tl.float32))
        scale = tl.maximum(log * PER_LOG_N, 1.0)[:, None]
    return scale


# -------------------------------------------------------------------------------------------------
# Rows


class Rows(NamedTuple):
    """A tensor by batch, seq, head and dim. Strides count groups of Tile.align elements."""

    pointer: tl.tensor
    batch: tl.tensor
    seq: tl.tensor
    head: tl.tensor


@triton.jit
def rows_of(pointer, batch, seq, head, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Return the rows of a given tensor; strides known to the compiler save address registers."""
    HEAD: tl.constexpr = TILE.head_dim // TILE.align
    SEQ: tl.constexpr = HEADS * HEAD
    if TILE.contiguous:  # noqa: SIM108
        given = Rows(pointer, batch, SEQ, HEAD)
    else:
        given = Rows(pointer, batch, seq, head)
    return given


@triton.jit
def copy_of(pointer, seqlen, N, COPIES: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr):
    """Return the N-th of COPIES in a contiguous (batch, seqlen, COPIES, HEADS, head_dim)."""
    HEAD: tl.constexpr = TILE.head_dim // TILE.align
    SEQ: tl.constexpr = COPIES * HEADS * HEAD
    return Rows(pointer + N * HEADS * TILE.head_dim, tl.cast(seqlen, tl.int64) * SEQ, SEQ, HEAD)


@triton.jit
def keys_of(
    k, batch, seq, head, k_rotated, seqlen_k, REGION: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Return the keys of a region: the given ones, or a rotated copy."""
    if TILE.k_copy[REGION] < 0:
        keys = rows_of(k, batch, seq, head, TILE.heads_k, TILE)
    else:
        keys = copy_of(
            k_rotated, seqlen_k, TILE.k_copy[REGION], TILE.k_copies, TILE.heads_k, TILE
        )  # fmt: skip
    return keys


@triton.jit
def row_base(x, batch, seq, head, TILE: tl.constexpr):
    """Return a pointer to dim 0 of a row; the factor align shows the compiler alignment."""
    offset = tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head
    return x.pointer + (offset + tl.cast(seq, tl.int64) * x.seq) * TILE.align


@triton.jit
def pointers_to(
    x, base, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr
):
    """Return pointers to dims FIRST to FIRST + DIMS of rows from `base` on: (ROWS, DIMS)."""
    # int32 is enough within a block: the launcher checks that.
    row = tl.arange(0, ROWS) * (tl.cast(x.seq, tl.int32) * TILE.align)
    return base + (row[:, None] + (FIRST + tl.arange(0, DIMS))[None, :])


@triton.jit
def inside_of(
    count, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return the mask of pointers before head_dim and, if MASKED, before row `count`."""
    row = tl.arange(0, ROWS)[:, None]
    dim = (FIRST + tl.arange(0, DIMS))[None, :]
    if not MASKED:
        inside = dim < TILE.head_dim
    elif TILE.head_dim >= FIRST + DIMS:
        inside = row < count
    else:
        inside = (row < count) & (dim < TILE.head_dim)
    return inside


@triton.jit
def load_part(
    x, base, count, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load dims FIRST to FIRST + DIMS of rows from `base` on; 0 past the ends, see inside_of."""
    pointers = pointers_to(x, base, FIRST, DIMS, ROWS, TILE)
    if MASKED or TILE.head_dim < FIRST + DIMS:
        inside = inside_of(count, FIRST, DIMS, ROWS, MASKED, TILE)
        part = tl.load(pointers, mask=inside, other=0.0)
    else:
        part = tl.load(pointers)
    return part.to(tl.float32) if TILE.widen else part


@triton.jit
def load_rows(x, base, count, ROWS: tl.constexpr, MASKED: tl.constexpr, TILE: tl.constexpr):
    """Load ROWS rows from `base` on; 0 past head_dim and, if MASKED, past `count` rows."""
    first = load_part(x, base, count, 0, TILE.dims, ROWS, MASKED, TILE)
    second = first
    if TILE.more_dims > 0:
        second = load_part(x, base, count, TILE.dims, TILE.more_dims, ROWS, MASKED, TILE)
    return first, second


@triton.jit
def _store_part(
    x, base, part, count, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    pointers = pointers_to(x, base, FIRST, DIMS, ROWS, TILE)
    inside = inside_of(count, FIRST, DIMS, ROWS, True, TILE)
    tl.store(pointers, part.to(x.pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_rows(x, base, rows, count, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Round once and store the first `count` rows."""
    _store_part(x, base, rows[0], count, 0, TILE.dims, ROWS, TILE)
    if TILE.more_dims > 0:
        _store_part(x, base, rows[1], count, TILE.dims, TILE.more_dims, ROWS, TILE)


@triton.jit
def load_values(pointer, count, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Load values from `pointer` on, (SIZE,); 0 past `count`, if MASKED."""
    index = tl.arange(0, SIZE)
    if MASKED:
        values = tl.load(pointer + index, mask=index < count, other=0.0)
    else:
        values = tl.load(pointer + index)
    return values


@triton.jit
def zero_rows(ROWS: tl.constexpr, TILE: tl.constexpr):
    """Return ROWS float32 rows of zeros."""
    DIMS: tl.constexpr = TILE.dims
    MORE: tl.constexpr = TILE.more_dims if TILE.more_dims > 0 else 1
    return tl.zeros((ROWS, DIMS), tl.float32), tl.zeros((ROWS, MORE), tl.float32)


@triton.jit
def times(rows, factor):
    """Multiply each row by its factor."""
    return rows[0] * factor[:, None], rows[1] * factor[:, None]


@triton.jit
def dots(x, y, TILE: tl.constexpr):
    """Return x @ y.T in float32, for operands of any type."""
    result = tl.dot(x[0], tl.trans(y[0]), input_precision="ieee")
    if TILE.more_dims > 0:
        result = tl.dot(x[1], tl.trans(y[1]), result, input_precision="ieee")
    return result


@triton.jit
def add_weighted(sums, weights, rows, TILE: tl.constexpr):
    """Return sums + weights @ rows in float32, with weights rounded to the rows' type."""
    weights = weights.to(rows[0].dtype)
    first = tl.dot(weights, rows[0], sums[0], input_precision="ieee")
    second = sums[1]
    if TILE.more_dims > 0:
        second = tl.dot(weights, rows[1], second, input_precision="ieee")
    return first, second


# -------------------------------------------------------------------------------------------------
# Blocks of queries and keys, and their parts in a region
#
# Along a block of queries, a region's first key and the end of its keys both rise. Along a block of
# keys, the first query that sees a key in a region and the end of these queries rise, too. Both
# ways, a range [low, high) is cut into full blocks, which every row sees whole, and masked blocks
# before and after.


@triton.jit
def _sequence_of(slot, cu_seqlens, num_sequences, search_steps, SIZE: tl.constexpr):
    """Return the sequence of a slot for a block.

    The slots of sequence s begin at cu_seqlens[s] // SIZE + s. This leaves enough slots for its
    blocks, and at least one.
    """
    low = slot * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle) // SIZE + middle <= slot
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def place(
    blocks, heads, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, SIZE: tl.constexpr
):
    """Find this program's batch, head, block within its sequence, and that sequence's extent.

    Returns (batch, sequence, head, block, blocks of the sequence, first row, seqlen_q, seqlen_k).
    A program without a block gets block 0 of a sequence without rows, so it does nothing.
    """
    slot = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    head = rest % heads
    if cu_seqlens is None:
        return rest // heads, rest // heads, head, slot, blocks, 0, seqlen_q, seqlen_k
    else:
        sequence = _sequence_of(slot, cu_seqlens, num_sequences, search_steps, SIZE)
        first_row = tl.load(cu_seqlens + sequence)
        seqlen = tl.load(cu_seqlens + sequence + 1) - first_row
        block = slot - (first_row // SIZE + sequence)
        count = tl.maximum(seqlen + SIZE - 1, 0) // SIZE
        idle = block >= count
        seqlen = tl.where(idle, 0, seqlen)
        block = tl.where(idle, 0, block)
        count = tl.where(idle, 1, count)
        return rest // heads, sequence, head, block, count, first_row, seqlen, seqlen


@triton.jit
def origin_of(sequence, q_start, k_start, q_start_stride, k_start_stride, seqlen_q, seqlen_k):
    """Return how far a sequence's first query lies after its first key, and that key's position."""
    shift = seqlen_k - seqlen_q
    origin = 0
    if k_start is not None:
        origin = tl.load(k_start + sequence * k_start_stride)
    if q_start is not None:
        shift = tl.load(q_start + sequence * q_start_stride) - origin
    return shift, origin


class Queries(NamedTuple):
    """A block of queries. Positions are counted from the sequence's first key."""

    batch: tl.tensor
    sequence: tl.tensor
    head: tl.tensor
    first_row: tl.tensor  # first row of the sequence
    row: tl.tensor  # first row of the block
    left: tl.tensor  # rows of the sequence from there on
    top: tl.tensor  # position of the first row
    bottom: tl.tensor  # position of the last row
    seqlen_k: tl.tensor
    origin: tl.tensor  # position of the first key: blocks of granularity count from position 0


@triton.jit
def place_queries(
    blocks, cu_seqlens, num_sequences, search_steps, q_start, k_start, q_start_stride,
    k_start_stride, seqlen_q, seqlen_k, TILE: tl.constexpr,
):  # fmt: skip
    """Find this program's block of queries; the longest come first."""
    BLOCK_M: tl.constexpr = TILE.block_m
    batch, sequence, head, block, count, first_row, seqlen_q, seqlen_k = place(
        blocks, TILE.heads_q, cu_seqlens, num_sequences, search_steps, seqlen_q, seqlen_k, BLOCK_M
    )
    first = (count - 1 - block) * BLOCK_M
    shift, origin = origin_of(
        sequence, q_start, k_start, q_start_stride, k_start_stride, seqlen_q, seqlen_k
    )
    top = first + shift
    bottom = tl.minimum(top + BLOCK_M, seqlen_q + shift) - 1
    return Queries(
        batch, sequence, head, first_row, first_row + first, seqlen_q - first, top, bottom,
        seqlen_k, origin,
    )  # fmt: skip


@triton.jit
def split(low, all_low, all_high, high, SIZE: tl.constexpr):
    """Cut [low, high) into blocks of SIZE; every row sees [all_low, all_high) of it.

    Returns the numbers of masked blocks before the full ones, of full blocks, and of all masked
    blocks. A masked block before the full ones may reach past `high`.
    """
    before = (tl.maximum(all_low - low, 0) + SIZE - 1) // SIZE
    full = tl.maximum(all_high - (low + before * SIZE), 0) // SIZE
    after = tl.maximum(high - (low + (before + full) * SIZE), 0)
    return before, full, before + (after + SIZE - 1) // SIZE


@triton.jit
def nth_block(index, cut, MASKED: tl.constexpr, SIZE: tl.constexpr):
    """Return the start of a range's index-th masked, or full, block, and the rows left there."""
    low, before, full, _, high = cut
    if MASKED:
        at = low + (index + tl.where(index < before, 0, full)) * SIZE
    else:
        at = low + (before + index) * SIZE
    return at, high - at


@triton.jit
def first_key(position, seqlen_k, origin, REGION: tl.constexpr, TILE: tl.constexpr):
    """Return the first key that `position` sees in REGION; for REGION = regions, the keys' end."""
    key = tl.minimum(position + 1, seqlen_k)
    if len(TILE.starts) > REGION:
        block = (position + origin) // TILE.granularity * TILE.granularity
        first = block - origin + TILE.starts[REGION]
        if TILE.window > 0:
            first = tl.maximum(first, position + 1 - TILE.window)
        key = tl.minimum(key, first)
    return tl.maximum(key, 0)


@triton.jit
def cut_keys(at, REGION: tl.constexpr, TILE: tl.constexpr):
    """Cut the range of keys that a block of queries sees into blocks.

    Returns (first key, the numbers of `split`, end).
    """
    low = 0
    all_low = 0
    if not (REGION == 0 and TILE.from_first_key):
        low = first_key(at.top, at.seqlen_k, at.origin, REGION, TILE)
        all_low = first_key(at.bottom, at.seqlen_k, at.origin, REGION, TILE)
    all_high = first_key(at.top, at.seqlen_k, at.origin, REGION + 1, TILE)
    high = first_key(at.bottom, at.seqlen_k, at.origin, REGION + 1, TILE)
    before, full, masked = split(low, all_low, all_high, high, TILE.block_n)
    return low, before, full, masked, high


@triton.jit
def seen_keys(start, low, high, REGION: tl.constexpr, TILE: tl.constexpr):
    """Return a mask of the keys from `start` on, (M, N): row i sees keys low[i] to high[i]."""
    BLOCK_N: tl.constexpr = TILE.block_n
    key = (start + tl.arange(0, BLOCK_N))[None, :]
    seen = key < high[:, None]
    if not (REGION == 0 and TILE.from_first_key):
        seen = seen & (key >= low[:, None])
    return seen


# -------------------------------------------------------------------------------------------------
# The softmax outside its loops over keys, with caps and sinks


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
def capped(logits, softcap):
    """Return softcap * tanh(logits / softcap); both are natural, or both of base 2."""
    return softcap * tanh(logits * (1.0 / softcap))


@triton.jit
def bounded(products, TILE: tl.constexpr):
    """Return logits divided by TILE.factor: the hyperbolic tangent with a cap, else the product."""
    if TILE.softcap > 0:
        products = tanh(products * (TILE.softmax_scale / TILE.softcap))
    return products


@triton.jit
def before_the_cap(d_logits, logits, TILE: tl.constexpr):
    """Return gradients of logits before the cap, from gradients after it and bounded logits."""
    return d_logits * (1.0 - logits * logits) if TILE.softcap > 0 else d_logits


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


@triton.jit
def finish_softmax(row_max, row_sum, sinks, head):
    """Return (factor of weighted values, argument of `lse_of`) for rows and their sink."""
    empty = row_sum == 0.0
    if sinks is None:
        row_sum = tl.where(empty, 1.0, row_sum)
        factor = 1.0 / row_sum
        alone = float("-inf")
    else:
        alone = tl.load(sinks + head)
        row_max, row_sum, rescale = add_sink(row_max, row_sum, alone * log2_e())
        # The sum is 0 for rows without keys if the sink is -inf.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
        factor = rescale / row_sum
    return factor, (row_max, row_sum, empty, alone)


@triton.jit
def lse_of(rows):
    """Return log-sum-exps; a row without keys gets the sink's own bits."""
    row_max, row_sum, empty, alone = rows
    return tl.where(empty, alone, row_max * ln_2() + tl.log(row_sum))
