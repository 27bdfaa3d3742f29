"""The ops `merge_fwd` and `merge_inplace` on a GPU: one launch, planned once for each layout.

Each input is read once and the result written once, but for log-sum-exps, which are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.launch import (
    VECTOR_BYTES,
    Plan,
    alignment,
    chip_of,
    layouts_of,
    planned,
    strides_of,
)
from ..._shared.triton.tokens import rows
from ..merge import check

WARPS = 4
_ALL = tl.constexpr(tl.PropagateNan.ALL)


class Tile(NamedTuple):
    """What the kernel is compiled for, beside types and alignment."""

    sets: int
    block_m: int  # tokens of a program
    head_dim: int
    block_d: int  # head_dim, rounded up to a power of two
    align: int  # elements; divides all strides of outs
    in_place: bool  # the first set is what is written to
    wide: bool  # computes in float64


@triton.jit
def _lse_of(n: tl.constexpr, lses, lse, row, merged, valid, TILE: tl.constexpr):
    """Log-sum-exps of set n in these rows; what is no row has no keys."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    FIRST: tl.constexpr = 1 if TILE.in_place else 0
    if n < FIRST:
        found = tl.load(lse + merged, mask=valid, other=float("-inf"))
    else:
        found = tl.load(lses[n - FIRST] + row, mask=valid, other=float("-inf"))
    return found.to(WIDE)


@triton.jit
def _share(weight, row_sum):
    """Of the joint softmax: exactly 1 where there is one set alone."""
    return tl.div_rn(weight, row_sum) if weight.dtype == tl.float32 else weight / row_sum


@triton.jit
def _cast(x, TYPE: tl.constexpr):
    """By way of float32: not every chip goes from float64 to 16 bits."""
    return x if x.dtype == TYPE else x.to(tl.float32).to(TYPE)


@triton.jit(
    do_not_specialize=("lse_batch", "lse_head", "lse_seq", "tokens", "seqlen"),
    do_not_specialize_on_alignment=("lse",),  # of a part of a sequence, as a ring writes to
)
def merge_kernel(
    outs,
    lses,
    out,
    lse,
    strides,
    out_batch,
    out_seq,
    out_head,
    lse_batch,
    lse_head,
    lse_seq,
    tokens,
    seqlen,
    TILE: tl.constexpr,
):
    """Axis 0: blocks of tokens, counted through batch and seqlen; axis 1: heads.

    outs, lses: of the sets; lses contiguous, and without the one that is written to; strides: three
    of each of outs, one set after the other.
    """
    BLOCK_M: tl.constexpr = TILE.block_m
    BLOCK_D: tl.constexpr = TILE.block_d
    SETS: tl.constexpr = TILE.sets
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    first = tl.program_id(0).to(tokens.dtype) * BLOCK_M
    valid = tl.arange(0, BLOCK_M) < tokens - first
    token = first + tl.arange(0, BLOCK_M)
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = (batch * tl.num_programs(1) + head) * seqlen + seq
    merged = batch * lse_batch + head * lse_head + seq * lse_seq

    row_max = tl.full((BLOCK_M,), float("-inf"), WIDE)
    for n in tl.static_range(SETS):
        found = _lse_of(n, lses, lse, row, merged, valid, TILE)
        row_max = tl.maximum(row_max, found, propagate_nan=_ALL)
    empty = row_max == float("-inf")
    origin = tl.where(empty, 0.0, row_max)
    row_sum = tl.zeros((BLOCK_M,), WIDE)
    for n in tl.static_range(SETS):
        row_sum += tl.exp(_lse_of(n, lses, lse, row, merged, valid, TILE) - origin)
    row_sum = tl.where(empty, 1.0, row_sum)

    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = dim < TILE.head_dim
    acc = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    for n in tl.static_range(SETS):
        found = _lse_of(n, lses, lse, row, merged, valid, TILE)
        share = _share(tl.exp(found - origin), row_sum)
        keys = (found != float("-inf"))[:, None]
        from_ = rows(
            outs[n], batch, seq, head, strides[3 * n], strides[3 * n + 1], strides[3 * n + 2], TILE
        )
        x = tl.load(from_[:, None] + dim, mask=keys & inside, other=0.0)
        acc += share[:, None] * _cast(x, WIDE)

    written = valid
    if TILE.in_place:
        written = valid & (empty == 0)
        tl.debug_barrier()  # other warps may still have to read what is written below
    to = rows(out, batch, seq, head, out_batch, out_seq, out_head, TILE)
    tl.store(to[:, None] + dim, _cast(acc, out.dtype.element_ty), mask=written[:, None] & inside)
    joint = tl.where(tl.abs(row_max) == float("inf"), row_max, row_max + tl.log(row_sum))
    tl.store(lse + merged, joint.to(lse.dtype.element_ty), mask=valid)


def merge_fwd(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Same arguments and results as `torch.ops.extrope.merge_fwd`."""
    if not outs:
        check(outs, lses, inplace=False)
    out, lse = torch.empty_like(outs[0]), lses[0].new_empty(lses[0].shape)
    _launch(outs, lses, out, lse, in_place=False)
    return out, lse


def merge_inplace(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Same arguments as `torch.ops.extrope.merge_inplace`."""
    _launch((out, *outs), (lse, *lses), out, lse, in_place=True)


def _launch(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, in_place: bool
) -> None:
    key = (chip_of(out), layouts_of(*outs, *lses, out, lse), len(outs), in_place)
    launch = planned(_plan, key, outs, lses, out, lse, in_place)
    if launch is not None:
        launch(tuple(outs), tuple([x.contiguous() for x in lses[in_place:]]), out, lse)


def _plan(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, in_place: bool
) -> Plan | None:
    check(outs, lses, in_place)
    for i, x in enumerate(outs):
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(
                f"merge_attention: outs[{i}] must be contiguous in its last dimension, "
                f"got strides {x.stride()}"
            )
    if lse.numel() == 0 or (in_place and len(outs) == 1):
        return None
    packed = out.dim() == 3
    batch, (seqlen, heads, head_dim) = 1 if packed else out.shape[0], out.shape[-3:]
    strides = [(0, *strides_of(x))[-4:-1] for x in (*outs, out)]
    block_d = triton.next_power_of_2(max(head_dim, 1))
    least = min(x.itemsize for x in outs)
    tile = Tile(
        sets=len(outs),
        # Two vectors a thread of each set keep its loads in flight.
        block_m=max(1, 4 * WARPS * 32 * VECTOR_BYTES // out.itemsize // block_d),
        head_dim=head_dim,
        block_d=block_d,
        align=alignment(least, (n for each in strides for n in each), (x[1] for x in strides)),
        in_place=in_place,
        wide=torch.float64 in (out.dtype, lse.dtype),
    )
    *of_sets, of_out = [tuple(n // tile.align for n in each) for each in strides]
    of_lse = (0, *strides_of(lse))[-3:]
    return Plan(
        merge_kernel,
        (triton.cdiv(batch * seqlen, tile.block_m), heads),
        out,
        strides=tuple(n for each in of_sets for n in each),
        out_batch=of_out[0],
        out_seq=of_out[1],
        out_head=of_out[2],
        lse_batch=of_lse[0],
        lse_head=of_lse[1],
        lse_seq=of_lse[2],
        tokens=batch * seqlen,
        seqlen=seqlen,
        TILE=tile,
        num_warps=WARPS,
    )
