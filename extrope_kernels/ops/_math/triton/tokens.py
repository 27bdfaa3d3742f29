"""A device function that finds the sequences of packed tokens."""

import triton
import triton.language as tl


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
