"""The rotation by given cosines and sines in Triton: one launch for q and k."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.launch import strides_of
from ..cos_sin import check
from .device import (
    Launch,
    empty_outputs,
    launch,
    program_heads,
    program_tokens,
    rotate_head,
    settle,
)

NUMBERS = ("count", "seqlen", "cos_batch", "cos_seq", "sin_batch", "sin_seq")


@triton.jit(do_not_specialize=NUMBERS)
def cos_sin_kernel(
    heads, cos, sin, count, seqlen, cos_batch, cos_seq, sin_batch, sin_seq,
    TILE: tl.constexpr,
):  # fmt: skip
    """Rotate: axis 0 is tiles of tokens, axis 1 shares of the heads. k may be None."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    q, k, q_out, k_out = heads
    tokens = program_tokens(count, seqlen, TILE)
    batch, seq, valid = tokens
    pair = tl.arange(0, TILE.pairs)
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    at_cos = cos + (batch * cos_batch + seq * cos_seq)[:, None] + pair[None, :]
    at_sin = sin + (batch * sin_batch + seq * sin_seq)[:, None] + pair[None, :]
    c = tl.load(at_cos, mask=mask, other=0.0).to(WIDE)  # (TOKENS, PAIRS)
    s = tl.load(at_sin, mask=mask, other=0.0).to(WIDE)
    if TILE.conjugate:
        s = -s
    first, last = program_heads(TILE.heads_q)
    for head in range(first, last):
        rotate_head(q, q_out, tokens, head, c, s, TILE)
    if k is not None:
        first, last = program_heads(TILE.heads_k)
        for head in range(first, last):
            rotate_head(k, k_out, tokens, head, c, s, TILE)


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
    by = {"interleaved": False, "conjugate": False, **options, "half": cos.shape[2]}
    return settle(tensors, by, (*strides_of(cos)[:2], *strides_of(sin)[:2]))
