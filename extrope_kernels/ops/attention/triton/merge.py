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

from ..._math.triton.launch import VECTOR_BYTES, chip_of, strides_of
from ..._torch.autograd import empty_rows

WARPS = 4


@triton.jit
def _lse_of(
    N: tl.constexpr, lses, lse, row, merged, valid, IN_PLACE: tl.constexpr, WIDE: tl.constexpr
):
    """Return the log-sum-exps of set N in these rows, (M,); invalid rows have no keys."""
    FIRST: tl.constexpr = 1 if IN_PLACE else 0
    if N < FIRST:
        found = tl.load(lse + merged, mask=valid, other=float("-inf"))
    else:
        found = tl.load(lses[N - FIRST] + row, mask=valid, other=float("-inf"))
    return found.to(WIDE)


@triton.jit
def _rows(x, batch, seq, head, strides, N: tl.constexpr):
    """Return pointers to dim 0, (M,); strides in bytes show the compiler alignment."""
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


@triton.jit(
    do_not_specialize=("lse_batch", "lse_head", "lse_seq", "tokens", "seqlen"),
    do_not_specialize_on_alignment=("lse",),  # a ring writes to parts of a sequence
)
def merge_kernel(
    outs, lses, out, lse, strides, lse_batch, lse_head, lse_seq, tokens, seqlen,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_DIM: tl.constexpr, IN_PLACE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Merge a block of rows. Axis 0: blocks of tokens over batch and seqlen; axis 1: heads.

    outs, lses: the sets' results; lses are contiguous, and exclude the one that is written to.
    strides: in bytes, by batch, seq and head, of each of outs and of out. 16 divides them wherever
    rows allow it, so no new length compiles the kernel again.
    """
    SETS: tl.constexpr = len(outs)
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
        found = _lse_of(n, lses, lse, row, merged, valid, IN_PLACE, WIDE)
        row_max = tl.maximum(row_max, found, propagate_nan=tl.PropagateNan.ALL)
    empty = row_max == float("-inf")
    origin = tl.where(empty, 0.0, row_max)
    row_sum = tl.zeros((BLOCK_M,), WIDE)
    for n in tl.static_range(SETS):
        row_sum += tl.exp(_lse_of(n, lses, lse, row, merged, valid, IN_PLACE, WIDE) - origin)
    row_sum = tl.where(empty, 1.0, row_sum)

    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = dim < HEAD_DIM
    acc = tl.zeros((BLOCK_M, BLOCK_D), WIDE)
    for n in tl.static_range(SETS):
        found = _lse_of(n, lses, lse, row, merged, valid, IN_PLACE, WIDE)
        share = _share(tl.exp(found - origin), row_sum)
        keys = (found != float("-inf"))[:, None]
        from_ = _rows(outs[n], batch, seq, head, strides, n)
        x = tl.load(from_[:, None] + dim, mask=keys & inside, other=0.0)  # (M, D)
        acc += share[:, None] * _cast(x, WIDE)

    written = valid
    if IN_PLACE:
        written = valid & (empty == 0)
        tl.debug_barrier()  # other warps may not have read yet what the stores below overwrite
    to = _rows(out, batch, seq, head, strides, SETS)
    tl.store(to[:, None] + dim, _cast(acc, out.dtype.element_ty), mask=written[:, None] & inside)
    joint = tl.where(tl.abs(row_max) == float("inf"), row_max, row_max + tl.log(row_sum))
    tl.store(lse + merged, joint.to(lse.dtype.element_ty), mask=valid)


def merge_fwd(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge into new tensors; arguments and results are those of `torch.ops.extrope.merge_fwd`."""
    out, lse = empty_rows(outs[0]), lses[0].new_empty(lses[0].shape)
    _launch(outs, lses, out, lse, in_place=False)
    return out, lse


def merge_inplace(out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    """Merge into `out` and `lse`; arguments are those of `torch.ops.extrope.merge_inplace`."""
    _launch((out, *outs), (lse, *lses), out, lse, in_place=True)


def _launch(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor, in_place: bool
) -> None:
    chip_of(out)  # raises for devices without kernels
    for i, x in enumerate(outs):
        if x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
            raise ValueError(
                f"merge_attention: outs[{i}] must be contiguous in its last dimension, "
                f"got strides {x.stride()}"
            )
    if lse.numel() == 0 or (in_place and len(outs) == 1):
        return
    batch, (seqlen, heads, head_dim) = 1 if out.dim() == 3 else out.shape[0], out.shape[-3:]
    strides = [n * x.itemsize for x in (*outs, out) for n in (0, *strides_of(x))[-4:-1]]
    block_d = triton.next_power_of_2(max(head_dim, 1))
    # Two vectors of each set per thread keep enough loads in flight.
    block_m = max(1, 4 * WARPS * 32 * VECTOR_BYTES // out.itemsize // block_d)
    tokens, wide = batch * seqlen, torch.float64 in (out.dtype, lse.dtype)
    with torch.cuda.device_of(out):
        merge_kernel[triton.cdiv(tokens, block_m), heads](
            tuple(outs), tuple(x.contiguous() for x in lses[in_place:]), out, lse, tuple(strides),
            *(0, *strides_of(lse))[-3:], tokens, seqlen, BLOCK_M=block_m, BLOCK_D=block_d,
            HEAD_DIM=head_dim, IN_PLACE=in_place, WIDE=tl.float64 if wide else tl.float32,
            num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
