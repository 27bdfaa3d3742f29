"""The dot product of each row of two tensors, which the gradient of the normaliser needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._shared.triton.launch import Plan, chip_of, layouts_of, planned
from .plans import Shape, rows_of
from .rows import Rows

WARPS = 4
BLOCK = 4096  # numbers that a program loads at once of each tensor: 32 registers a thread
RUN_TIME_SCALARS = ("blocks", "seqlen")


@triton.jit
def _load(x, batch, head, seq, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    dim = tl.arange(0, BLOCK_D)
    base = x.pointer + (tl.cast(batch, tl.int64) * x.batch + tl.cast(head, tl.int64) * x.head)
    inside = valid[:, None] & (dim < DIM)[None, :]
    rows = base + (seq.to(tl.int64) * x.seq)[:, None] + dim[None, :]
    return tl.load(rows, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def row_dots_kernel(
    x, y, dots, blocks, seqlen,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Axis 0: blocks of tokens, then the batch; axis 1: heads."""
    batch, head = tl.program_id(0) // blocks, tl.program_id(1)
    seq = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = seq < seqlen
    products = _load(x, batch, head, seq, valid, DIM, BLOCK_D)
    products *= _load(y, batch, head, seq, valid, DIM, BLOCK_D)
    to = dots + (tl.cast(batch, tl.int64) * x.heads + head) * seqlen
    tl.store(to + seq, tl.sum(products, 1), mask=valid)


class _Launch(NamedTuple):
    plan: Plan | None  # where there are rows
    x: Shape
    y: Shape
    dots: Shape


def row_dots(x: Tensor, y: Tensor, packed: bool) -> Tensor:
    """<x, y> over the last dimension, (batch, heads, seqlen) or (heads, total), float32.

    x, y: of one shape, contiguous in the last dimension.
    """
    launch = planned(_launch, (chip_of(x), layouts_of(x, y)), x, y)
    dots = torch.empty(launch.dots, dtype=torch.float32, device=x.device)
    if launch.plan is not None:
        launch.plan(Rows(x, *launch.x), Rows(y, *launch.y), dots)
    return dots


def _launch(x: Tensor, y: Tensor) -> _Launch:
    seqlen, heads, dim = x.shape[-3:]
    block_d = triton.next_power_of_2(dim)
    block_m = BLOCK // block_d
    blocks, batch = triton.cdiv(seqlen, block_m), x.shape[:-3].numel()
    plan = None
    if batch * blocks * heads > 0:
        plan = Plan(
            row_dots_kernel,
            (batch * blocks, heads),
            x,
            blocks=blocks,
            seqlen=seqlen,
            DIM=dim,
            BLOCK_M=block_m,
            BLOCK_D=block_d,
            num_warps=WARPS,
        )
    return _Launch(plan, rows_of(x), rows_of(y), (*x.shape[:-3], heads, seqlen))
