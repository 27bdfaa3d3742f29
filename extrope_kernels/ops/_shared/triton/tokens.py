"""Device functions: where the dims of tokens are, and which sequence tokens belong to."""

import triton
import triton.language as tl


@triton.jit
def rows(base, batch, seq, head, batch_stride, seq_stride, head_stride, TILE: tl.constexpr):
    """Pointers to dim 0 of (batch, seq, head); the factor align shows the compiler alignment."""
    offset = batch * tl.cast(batch_stride, tl.int64) + seq * tl.cast(seq_stride, tl.int64)
    return base + (offset + tl.cast(head, tl.int64) * head_stride) * TILE.align


@triton.jit
def sequence_of(token, cu_seqlens, num_sequences, search_steps):
    """Last sequence to start at or before each token, or the one; in bounds whatever cu_seqlens
    holds.
    """
    low = token * 0
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        started = tl.load(cu_seqlens + middle) <= token
        low = tl.where(started, middle, low)
        high = tl.where(started, high, middle)
    return low
