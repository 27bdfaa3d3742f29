"""The kernel that runs before a scan: what the others ask of its decay and its sequences."""

import triton
import triton.language as tl

# What changes from call to call must not make Triton compile again.
RUN_TIME_SCALARS = ("decay_stride", "heads", "num_sequences")
BLOCK = 128  # heads, or sequences, at once


@triton.jit(do_not_specialize=RUN_TIME_SCALARS)
def prepare_kernel(
    decay, log2_decay, cu_seqlens, part_starts, decay_stride, heads, num_sequences,
    PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: log2_decay (heads,) float32, and part_starts (sequences + 1,) int32, how many
    parts of PART tokens there are before those of each sequence.
    """
    if decay is not None:
        for first in tl.range(0, heads, BLOCK):
            head = first + tl.arange(0, BLOCK)
            valid = head < heads
            rate = tl.load(decay + head * decay_stride, mask=valid, other=1.0)
            # Near 1 a logarithm in float32 keeps few digits, and distances multiply what it lost.
            rate = tl.log2(rate.to(tl.float64))
            tl.store(log2_decay + head, rate.to(tl.float32), mask=valid)
    if cu_seqlens is not None:
        tl.store(part_starts, 0)
        before = 0
        for first in tl.range(0, num_sequences, BLOCK):
            sequence = first + tl.arange(0, BLOCK)
            valid = sequence < num_sequences
            begin = tl.load(cu_seqlens + sequence, mask=valid, other=0)
            end = tl.load(cu_seqlens + sequence + 1, mask=valid, other=0)
            parts = tl.cdiv(tl.maximum(end - begin, 0), PART)
            tl.store(part_starts + 1 + sequence, before + tl.cumsum(parts, 0), mask=valid)
            before += tl.sum(parts)
