"""Device function that says at which position a token is, however positions are given."""

import triton
import triton.language as tl

from ..._shared.triton.tokens import sequence_of


@triton.jit
def token_positions(
    positions, axes, cu_seqlens, offset, position_axis, position_batch, position_seq, num_axes,
    num_sequences, search_steps, batch, seq, valid, TILE: tl.constexpr,
):  # fmt: skip
    """Sequence and position of each token: (tokens,), and (tokens, 1 or pairs) float64."""
    pair = tl.arange(0, TILE.pairs)
    sequence = batch
    position = seq.to(tl.float64)
    if cu_seqlens is not None:
        sequence = sequence_of(seq, cu_seqlens, num_sequences, search_steps)
        position = (seq - tl.load(cu_seqlens + sequence)).to(tl.float64)
    if TILE.positions_are_offsets:
        start = tl.load(positions + sequence * position_batch, mask=valid, other=0)
        position += start.to(tl.float64)
    elif positions is not None and axes is None:
        at = positions + batch * position_batch + seq * position_seq
        position = tl.load(at, mask=valid, other=0).to(tl.float64)
    position = position[:, None]
    if axes is not None:
        axis = tl.load(axes + pair, mask=pair < TILE.half, other=0)
        axis = tl.minimum(tl.maximum(axis, 0), num_axes - 1).to(tl.int64)  # one that exists
        at = positions + batch * position_batch + seq * position_seq
        at = at[:, None] + (axis * position_axis)[None, :]
        mask = valid[:, None] & (pair < TILE.half)[None, :]
        position = tl.load(at, mask=mask, other=0).to(tl.float64)
    return sequence, position + tl.cast(offset, tl.float64)
