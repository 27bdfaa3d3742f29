"""The ops `merge_fwd` and `merge_inplace` on a GPU: join results over disjoint sets of keys.

The result is the softmax over all keys, in one launch. Each input is read once and the result is
written once, except for log-sum-exps, which are small. `ops/attention/merge.py` defines the ops and
checks their arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._math.triton.launch import VECTOR_BYTES, Launch, chip_of, strides_of
from ..._torch.autograd import empty_rows
from ..._torch.layouts import cached_by_layout, layout_key

WARPS = 4


@triton.jit
def _lse_of(
    N: tl.constexpr, lses, row, written_row, valid, IN_PLACE: tl.constexpr, WIDE: tl.constexpr
):
    """Return the log-sum-exps of set N in these rows, (M,); invalid rows have no keys."""
    index = written_row if IN_PLACE and N == 0 else row
    return tl.load(lses[N] + index, mask=valid, other=float("-inf")).to(WIDE)


@triton.jit
def _rows_of(x, batch, seq, head, strides, N: tl.constexpr):
    """Return pointers to dim 0 of x, (M,), by the N-th three strides, which are in bytes."""
    offset = batch * strides[3 * N] + seq * strides[3 * N + 1] + head * strides[3 * N + 2]
    at = x.to(tl.pointer_type(tl.int8), bitcast=True) + offset
    return at.to(tl.pointer_type(x.dtype.element_ty), bitcast=True)


@triton.jit
def _share(weight, row_sum):
    """Return a set's share of the joint softmax: exactly 1 if it is the only set."""
    return tl.div_rn(weight, row_sum) if weight.dtype == tl.float32 else weight / row_sum


@triton.jit
def _cast(x, TYPE: tl.constexpr):
    """Convert by way of float32: not every chip converts float64 to 16 bits."""
    return x if x.dtype == TYPE else x.to(tl.float32).to(TYPE)


@triton.jit
def merge_kernel(
    out, lse,  # (batch, seqlen, heads, head_dim), or (total, heads, head_dim); (batch, heads,
    # seqlen), or (heads, total), float32 or float64: to write
    outs, lses,  # the sets' own, tuples, lses contiguous; IN_PLACE, out and lse are the first
    strides,  # tuple of int: by batch, seq and head, of each of outs, then of out. In bytes: 16
    # divides them wherever rows allow it, so no new length compiles the kernel again
    lse_stride_batch, lse_stride_head, lse_stride_seq,  # of lse, in elements
    tokens, seqlen,  # tokens of all sequences, and of each
    BLOCK_M: tl.constexpr,  # tokens of a program
    BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr,  # BLOCK_D: HEAD_DIM, rounded up to a power of 2
    IN_PLACE: tl.constexpr,
    WIDE: tl.constexpr,  # the type to compute in: float32 or float64
):  # fmt: skip
    """Merge a block of rows. Axis 0: blocks of tokens over batch and seqlen; axis 1: heads."""
    SETS: tl.constexpr = len(outs)
    first = tl.program_id(0).to(tokens.dtype) * BLOCK_M
    valid = tl.arange(0, BLOCK_M) < tokens - first
    token = first + tl.arange(0, BLOCK_M)  # (M,), as all rows below
    batch = (token // seqlen).to(tl.int64)
    seq = (token % seqlen).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = (batch * tl.num_programs(1) + head) * seqlen + seq  # of contiguous lses
    written_row = batch * lse_stride_batch + head * lse_stride_head + seq * lse_stride_seq

    # The joint softmax of the sets: a set's logit is its log-sum-exp. `empty` rows have no keys.
    row_max = tl.full((BLOCK_M,), float("-inf"), WIDE)
    for n in tl.static_range(SETS):
        set_lse = _lse_of(n, lses, row, written_row, valid, IN_PLACE, WIDE)
        row_max = tl.maximum(row_max, set_lse, propagate_nan=tl.PropagateNan.ALL)
    empty = row_max == float("-inf")
    origin = tl.where(empty, 0.0, row_max)
    row_sum = tl.zeros((BLOCK_M,), WIDE)
    for n in tl.static_range(SETS):
        row_sum += tl.exp(_lse_of(n, lses, row, written_row, valid, IN_PLACE, WIDE) - origin)
    row_sum = tl.where(empty, 1.0, row_sum)

    # The sum of outs, each times its set's share. Rows without keys in a set may hold anything.
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = dim < HEAD_DIM
    acc = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    for n in tl.static_range(SETS):
        set_lse = _lse_of(n, lses, row, written_row, valid, IN_PLACE, WIDE)
        share = _share(tl.exp(set_lse - origin), row_sum)
        has_keys = (set_lse != float("-inf"))[:, None]
        set_rows = _rows_of(outs[n], batch, seq, head, strides, n)
        x = tl.load(set_rows[:, None] + dim, mask=has_keys & inside, other=0.0)  # (M, D)
        acc += share[:, None] * _cast(x, WIDE)

    written = valid
    if IN_PLACE:
        written = valid & (empty == 0)
        tl.debug_barrier()  # other warps may not have read yet what the stores below overwrite
    out_rows = _rows_of(out, batch, seq, head, strides, SETS)
    mask = written[:, None] & inside
    tl.store(out_rows[:, None] + dim, _cast(acc, out.dtype.element_ty), mask=mask)
    joint = tl.where(tl.abs(row_max) == float("inf"), row_max, row_max + tl.log(row_sum))
    tl.store(lse + written_row, joint.to(lse.dtype.element_ty), mask=valid)


# -------------------------------------------------------------------------------------------------
# The launch


def merge_fwd(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge into new tensors; arguments and results are those of `torch.ops.extrope.merge_fwd`."""
    out, lse = empty_rows(outs[0]), lses[0].new_empty(lses[0].shape)
    _run(out, lse, tuple(outs), tuple(x.contiguous() for x in lses), in_place=False)
    return out, lse


def merge_inplace(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Merge into `out` and `lse`; arguments are those of `torch.ops.extrope.merge_inplace`."""
    if outs:
        its_lses = (x.contiguous() for x in lses)
        _run(out, lse, (out, *outs), (lse, *its_lses), in_place=True)


def _run(
    out: Tensor, lse: Tensor, outs: tuple[Tensor, ...], lses: tuple[Tensor, ...], in_place: bool
) -> None:
    key = in_place, layout_key(out, lse, *outs)  # by now lses are contiguous, of lse's dtype
    launch = cached_by_layout(_build_launch, key, out, lse, outs, in_place)
    launch.run(out=out, lse=lse, outs=outs, lses=lses)


def _build_launch(out: Tensor, lse: Tensor, outs: tuple[Tensor, ...], in_place: bool) -> Launch:
    chip_of(out)  # raises for devices without kernels
    for i, x in enumerate(outs):
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(
                f"merge_attention: outs[{i}] must be contiguous in its last dimension, "
                f"got strides {x.stride()}"
            )
    batch, (seqlen, heads, head_dim) = 1 if out.dim() == 3 else out.shape[0], out.shape[-3:]
    lse_stride_batch, lse_stride_head, lse_stride_seq = (0, *strides_of(lse))[-3:]
    block_d = triton.next_power_of_2(max(head_dim, 1))
    # Four vectors of each set per thread keep enough loads in flight.
    block_m = max(1, 4 * WARPS * 32 * VECTOR_BYTES // out.itemsize // block_d)
    tokens, wide = batch * seqlen, torch.float64 in (out.dtype, lse.dtype)
    return Launch(
        merge_kernel,
        (triton.cdiv(tokens, block_m), heads),
        numbers={
            "strides": tuple(
                n * x.itemsize for x in (*outs, out) for n in (0, *strides_of(x))[-4:-1]
            ),
            "lse_stride_batch": lse_stride_batch,
            "lse_stride_head": lse_stride_head,
            "lse_stride_seq": lse_stride_seq,
            "tokens": tokens,
            "seqlen": seqlen,
        },
        constants={
            "BLOCK_M": block_m,
            "BLOCK_D": block_d,
            "HEAD_DIM": head_dim,
            "IN_PLACE": in_place,
            "WIDE": tl.float64 if wide else tl.float32,
        },
        options={"num_warps": WARPS, "enable_fp_fusion": True},
    )
