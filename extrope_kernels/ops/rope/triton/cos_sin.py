"""The rotation by given cosines and sines in Triton: one launch for q and k."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.launch import strides_of
from ..._shared.triton.pairs import load_parts, store_parts
from ..cos_sin import check
from .device import (
    Launch,
    build_launch,
    empty_outputs,
    launch,
    program_heads,
    program_tokens,
    stride_names,
)

NUMBERS = (
    *("count", "seqlen", "cos_stride_batch", "cos_stride_seq", "sin_stride_batch"),
    "sin_stride_seq",
)


@triton.jit
def _rotate_heads(
    x_ptr, x_row, x_stride_head, out_ptr, out_row, out_stride_head, valid, cos, sin,
    HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate this program's share of the heads.

    x_row, out_row: (TOKENS,) int64, where the rows of head 0 begin, in groups of ALIGN elements.
    """
    ALIGN: tl.constexpr = TILE.align
    first, last = program_heads(HEADS)
    for head in range(first, last):
        head = tl.cast(head, tl.int64)  # head * stride may pass 32 bits
        # Times ALIGN, from groups to elements: so the compiler knows that rows are aligned.
        x_at = (x_row + head * x_stride_head) * ALIGN
        out_at = (out_row + head * out_stride_head) * ALIGN
        a, b, rest = load_parts(x_ptr + x_at, valid, TILE)  # (TOKENS, PAIRS) twice
        a, b = a.to(cos.dtype), b.to(cos.dtype)
        parts = (a * cos - b * sin, b * cos + a * sin, rest)
        store_parts(out_ptr + out_at, parts, valid, TILE)


@triton.jit(do_not_specialize=(*NUMBERS, *stride_names("q", "k", "q_out", "k_out")))
def cos_sin_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr,  # (batch, seqlen, heads, head_dim); k may be None
    cos_ptr, sin_ptr,  # (batch or 1, seqlen, half)
    q_stride_batch, q_stride_seq, q_stride_head,
    k_stride_batch, k_stride_seq, k_stride_head,
    q_out_stride_batch, q_out_stride_seq, q_out_stride_head,
    k_out_stride_batch, k_out_stride_seq, k_out_stride_head,
    count, seqlen,  # tokens: count = batch * seqlen
    cos_stride_batch, cos_stride_seq, sin_stride_batch, sin_stride_seq,
    TILE: tl.constexpr,
):  # fmt: skip
    """Rotate: axis 0 is tiles of tokens, axis 1 shares of the heads.

    Strides of q, k, ... count groups of TILE.align elements, those of cos and sin elements.
    """
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    batch, seq, valid = program_tokens(count, seqlen, TILE)  # (TOKENS,): int64, int64, mask
    pair = tl.arange(0, TILE.pairs)
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    cos_row = batch * cos_stride_batch + seq * cos_stride_seq
    sin_row = batch * sin_stride_batch + seq * sin_stride_seq
    cos = tl.load(cos_ptr + cos_row[:, None] + pair[None, :], mask=mask, other=0.0).to(WIDE)
    sin = tl.load(sin_ptr + sin_row[:, None] + pair[None, :], mask=mask, other=0.0).to(WIDE)
    if TILE.conjugate:
        sin = -sin  # a backward rotates by minus the angle
    q_row = batch * q_stride_batch + seq * q_stride_seq
    q_out_row = batch * q_out_stride_batch + seq * q_out_stride_seq
    _rotate_heads(
        q_ptr, q_row, q_stride_head, q_out_ptr, q_out_row, q_out_stride_head, valid, cos, sin,
        TILE.heads_q, TILE,
    )  # fmt: skip
    if k_ptr is not None:
        k_row = batch * k_stride_batch + seq * k_stride_seq
        k_out_row = batch * k_out_stride_batch + seq * k_out_stride_seq
        _rotate_heads(
            k_ptr, k_row, k_stride_head, k_out_ptr, k_out_row, k_out_stride_head, valid, cos, sin,
            TILE.heads_k, TILE,
        )  # fmt: skip


def rope_cos_sin(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, **options: bool
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_cos_sin`."""
    q_out, k_out = empty_outputs(q, k)
    tensors = (q, k, q_out, k_out)
    key = (layout_key(q, k, cos, sin), *options.items())
    prepared = cached_by_layout(_build_launch, key, tensors, cos, sin, options)
    if prepared is not None:
        launch(cos_sin_kernel, prepared, tensors, cos, sin)
    return q_out, q.new_empty(0) if k_out is None else k_out


def _build_launch(
    tensors: tuple[Tensor | None, ...], cos: Tensor, sin: Tensor, options: dict[str, bool]
) -> Launch | None:
    """Check the call, then build its launch; None if there is nothing to rotate."""
    check(*tensors[:2], cos, sin)
    constants = {"interleaved": False, "conjugate": False, **options, "half": cos.shape[2]}
    return build_launch(tensors, constants, (*strides_of(cos)[:2], *strides_of(sin)[:2]))
