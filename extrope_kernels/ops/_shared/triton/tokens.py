"""Device functions: pointers to the dims of tokens, and the sequences of tokens."""

import triton
import triton.language as tl


@triton.jit
def rows(base, batch, seq, head, batch_stride, seq_stride, head_stride, TILE: tl.constexpr):
    """Return pointers to dim 0 of (batch, seq, head); the factor align tells the alignment."""
    offset = batch * tl.cast(batch_stride, tl.int64) + seq * tl.cast(seq_stride, tl.int64)
    return base + (offset + tl.cast(head, tl.int64) * head_stride) * TILE.align


@triton.jit
def sequence_of(token, cu_seqlens, num_sequences, search_steps):
    """Return the last sequence that starts at or before each token, or the only one.

    In bounds whatever cu_seqlens holds.
    """
    low = token * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        started = tl.load(cu_seqlens + middle) <= token
        low = tl.where(started, middle, low)
        high = tl.where(started, high, middle)
    return low
