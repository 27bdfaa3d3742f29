"""The rotation in Triton: one launch for q and k, forward and backward, in place or not.

A program has TILE.tokens tokens (TOKENS), and a share of the heads: [first, last) of program_heads.
It finds its tokens' positions, computes their cosines and sines, and rotates one head after the
other. With both dims of a pair as a and b:

    out_a = x_a * cos - x_b * sin        out_b = x_b * cos + x_a * sin

The backward rotates the gradients by minus the forward's angle (TILE.conjugate, which
cos_sin_of_head reads). If it is given the forward's inputs, it computes the gradient of the angles
too.

Names, of device.py but for the parts, which pairs.py loads and stores:

TILE                a Tile: TILE.half pairs of dims rotate
TOKENS, PAIRS       TILE.tokens; TILE.half, rounded up to a power of two
WIDE                the dtype of the arithmetic behind the angles: float64 if TILE.wide, else
                    float32. Angles themselves are float64
parts of a row      a and b, (TOKENS, PAIRS), and rest, the dims that do not rotate, (TOKENS,
                    rest_dims), which are copied; not stored where TILE.rest is 0, as in place
load_parts          load them from pointers to dim 0 of each row, as far as rows are valid
store_parts         round them to the pointer's dtype, and store them
rows_of_head        pointers to dim 0 of a head's rows, (TOKENS,), by TileRows
cos_sin_of_head     cosines and sines of position * inv_freq, (TOKENS, PAIRS), of a head, or of all
                    if they share frequencies
decayed             amplitude * exp(SIGN * distance * log_decay), (TOKENS, PAIRS), or without
                    log_decay the amplitude, (1, 1)
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..._math.dtypes import accumulator
from ..._math.triton.launch import Launch
from ..._math.triton.pairs import load_parts, store_parts
from ..._torch.layouts import cached_by_layout, layout_key
from ..call import (
    RopeTensors,
    Rotation,
    check_saved,
    check_values,
    refuse_expanded,
    refuse_shared,
    resolve,
)
from .device import (
    TileRows,
    build_launch,
    cos_sin_of_head,
    decayed,
    empty_outputs,
    load_positions,
    program_heads,
    program_tokens,
    rotation_numbers,
    rows_of_head,
)

# If every head has its own frequencies, a limit that no kernel reaches: without one, ptxas spills
# to fit one more block.
MOST_REGISTERS = 128


@triton.jit
def _rotate_head(x, out, saved, head, valid, cos, sin, angle_grad, TILE: tl.constexpr):
    """Rotate a head of x into out; return angle_grad plus the head's share of it.

    x, out, saved: TileRows: rows_of_head(x, head, TILE) are pointers to dim 0 of the head's rows,
        (TOKENS,). saved: of the forward's input if x is the gradient of its output; ptr None: no
        share.
    cos, sin, angle_grad: (TOKENS, PAIRS); cosines and sines times the amplitude.
    """
    WIDE: tl.constexpr = angle_grad.dtype
    x_a, x_b, rest = load_parts(rows_of_head(x, head, TILE), valid, TILE)
    x_a, x_b = x_a.to(WIDE), x_b.to(WIDE)
    out_a = x_a * cos - x_b * sin
    out_b = x_b * cos + x_a * sin
    store_parts(rows_of_head(out, head, TILE), (out_a, out_b, rest), valid, TILE)  # rounds once
    if saved.ptr is not None:
        # The forward y = R(t) s has dL/dt = <dy, R J s> = <R^T dy, J s>, where J (a, b) = (-b, a),
        # a rotation by a right angle, commutes with R. R^T dy is out: a cross product of each pair
        # is left. For an inverse call the caller changes the gradient's sign.
        s_a, s_b, _ = load_parts(rows_of_head(saved, head, TILE), valid, TILE)
        angle_grad += s_a.to(WIDE) * out_b - s_b.to(WIDE) * out_a
    return angle_grad


@triton.jit
def rotate_kernel(
    q_ptr, k_ptr,  # (batch, seqlen, heads, head_dim); k may be None
    q_out_ptr, k_out_ptr,  # like q and k, or q and k themselves
    q_saved_ptr, k_saved_ptr,  # the forward's inputs, if q and k are gradients of its outputs
    angle_grad_ptr,  # (batch, seqlen, heads_q if TILE.per_head else 1, half), contiguous, or None
    inv_freq_ptr,  # (sequences or 1, heads or 1, half)
    positions_ptr,  # (batch or 1, seqlen); (sequences,): of their first tokens; None: these are 0
    cu_seqlens_ptr, log_decay_ptr,  # (sequences + 1,) if packed; (half,): xPos; or None
    axes_ptr,  # (half,) or None: positions are (axes, batch or 1, seqlen), pair i reads axes[i]
    offset: tl.int64,  # added to all positions
    q_stride_batch, q_stride_seq, q_stride_head,  # all strides in groups of TILE.align elements
    k_stride_batch, k_stride_seq, k_stride_head,
    q_out_stride_batch, q_out_stride_seq, q_out_stride_head,
    k_out_stride_batch, k_out_stride_seq, k_out_stride_head,
    q_saved_stride_batch, q_saved_stride_seq, q_saved_stride_head,
    k_saved_stride_batch, k_saved_stride_seq, k_saved_stride_head,
    count, seqlen,  # tokens: count = batch * seqlen
    positions_stride_axis, positions_stride_batch, positions_stride_seq,
    num_sequences, search_steps,  # of cu_seqlens; steps of a binary search in it
    decay_origin: tl.float64,  # the position at which log_decay changes nothing
    amplitude: tl.float64,  # of all tokens and pairs
    TILE: tl.constexpr,
):  # fmt: skip
    """Rotate pairs of dims of q and k by position * inv_freq, and multiply them by amplitude.

    Axis 0 of the grid is tiles of tokens, axis 1 shares of the heads.
    """
    TOKENS: tl.constexpr = TILE.tokens  # Triton 3.6 takes no fields of TILE in shapes
    PAIRS: tl.constexpr = TILE.pairs
    HALF: tl.constexpr = TILE.half
    batch, seq, valid = program_tokens(count, seqlen, TILE)  # (TOKENS,): int64, int64, mask
    # sequence (TOKENS,), the batch if not packed; position (TOKENS, 1), or with axes (TOKENS,
    # PAIRS); float64
    sequence, position = load_positions(
        batch, seq, valid, positions_ptr, cu_seqlens_ptr, axes_ptr, offset, positions_stride_axis,
        positions_stride_batch, positions_stride_seq, num_sequences, search_steps, TILE,
    )  # fmt: skip
    # By xPos: decay_sign is 1, or -1 in an inverse call; k has the other sign.
    distance = position - decay_origin

    # The rows of head 0, in groups of TILE.align elements from the start: (TOKENS,) int64.
    q = TileRows(q_ptr, batch * q_stride_batch + seq * q_stride_seq, q_stride_head)
    q_out_row = batch * q_out_stride_batch + seq * q_out_stride_seq
    q_out = TileRows(q_out_ptr, q_out_row, q_out_stride_head)
    q_saved_row = batch * q_saved_stride_batch + seq * q_saved_stride_seq
    q_saved = TileRows(q_saved_ptr, q_saved_row, q_saved_stride_head)

    pair = tl.arange(0, PAIRS)
    mask = valid[:, None] & (pair < HALF)[None, :]
    zeros = tl.zeros((TOKENS, PAIRS), tl.float64 if TILE.wide else tl.float32)
    first, last = program_heads(TILE.heads_q)
    if TILE.per_head:
        # Every head has frequencies of its own: its cosines and sines, then q's and k's head. Both
        # have the same heads, and so the same gradient of angles.
        k = TileRows(k_ptr, batch * k_stride_batch + seq * k_stride_seq, k_stride_head)
        k_out_row = batch * k_out_stride_batch + seq * k_out_stride_seq
        k_out = TileRows(k_out_ptr, k_out_row, k_out_stride_head)
        k_saved_row = batch * k_saved_stride_batch + seq * k_saved_stride_seq
        k_saved = TileRows(k_saved_ptr, k_saved_row, k_saved_stride_head)
        q_amplitude = decayed(amplitude, distance, log_decay_ptr, TILE.decay_sign, TILE)
        k_amplitude = decayed(amplitude, distance, log_decay_ptr, -TILE.decay_sign, TILE)
        for head in range(first, last):
            cos, sin = cos_sin_of_head(inv_freq_ptr, sequence, position, head, valid, TILE)
            q_cos, q_sin = cos * q_amplitude, sin * q_amplitude
            angle_grad = _rotate_head(q, q_out, q_saved, head, valid, q_cos, q_sin, zeros, TILE)
            if k_ptr is not None:
                k_cos, k_sin = cos * k_amplitude, sin * k_amplitude
                angle_grad = _rotate_head(
                    k, k_out, k_saved, head, valid, k_cos, k_sin, angle_grad, TILE
                )
            if angle_grad_ptr is not None:
                grad_row = ((batch * seqlen + seq) * TILE.heads_q + head) * HALF
                tl.store(angle_grad_ptr + grad_row[:, None] + pair[None, :], angle_grad, mask=mask)
    else:
        # All heads share frequencies: cosines and sines once, then the heads of q, and those of k.
        cos, sin = cos_sin_of_head(inv_freq_ptr, sequence, position, 0, valid, TILE)
        q_amplitude = decayed(amplitude, distance, log_decay_ptr, TILE.decay_sign, TILE)
        q_cos, q_sin = cos * q_amplitude, sin * q_amplitude
        angle_grad = zeros
        for head in range(first, last):
            angle_grad = _rotate_head(
                q, q_out, q_saved, head, valid, q_cos, q_sin, angle_grad, TILE
            )
        if k_ptr is not None:  # its rows not before: they would stay in registers so far
            k = TileRows(k_ptr, batch * k_stride_batch + seq * k_stride_seq, k_stride_head)
            k_out_row = batch * k_out_stride_batch + seq * k_out_stride_seq
            k_out = TileRows(k_out_ptr, k_out_row, k_out_stride_head)
            k_saved_row = batch * k_saved_stride_batch + seq * k_saved_stride_seq
            k_saved = TileRows(k_saved_ptr, k_saved_row, k_saved_stride_head)
            k_amplitude = decayed(amplitude, distance, log_decay_ptr, -TILE.decay_sign, TILE)
            k_cos, k_sin = cos * k_amplitude, sin * k_amplitude
            first, last = program_heads(TILE.heads_k)
            for head in range(first, last):
                angle_grad = _rotate_head(
                    k, k_out, k_saved, head, valid, k_cos, k_sin, angle_grad, TILE
                )
        if angle_grad_ptr is not None:  # summed over all heads: one program has them all
            grad_row = (batch * seqlen + seq) * HALF
            tl.store(angle_grad_ptr + grad_row[:, None] + pair[None, :], angle_grad, mask=mask)


class Sides(NamedTuple):
    """q and k, and what goes with them, by their names in the kernel."""

    q_ptr: Tensor
    k_ptr: Tensor | None
    q_out_ptr: Tensor
    k_out_ptr: Tensor | None
    q_saved_ptr: Tensor | None = None  # the forward's inputs, if q and k are gradients
    k_saved_ptr: Tensor | None = None

    @property
    def in_place(self) -> bool:
        return self.q_out_ptr is self.q_ptr


def build_rotation_launch(sides: Sides, rotation: Rotation) -> Launch:
    """Work out the launch; with saved inputs it writes the gradient of the angles too."""
    # Sums over the heads stay in one program: no atomics, the same bits in every run.
    sums_heads = sides.q_saved_ptr is not None and not rotation.per_head
    return build_launch(
        rotate_kernel,
        sides._asdict(),
        *rotation_numbers(rotation),
        per_call=("offset",),
        one_program=sums_heads,  # all heads in one
        small_tiles=not sums_heads,  # few tokens in one, if the call has few
        copies_rest=not sides.in_place,
        maxnreg=MOST_REGISTERS if rotation.per_head else None,
    )


# -------------------------------------------------------------------------------------------------
# The ops


def rope_fwd(
    q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_fwd`; rope_args: RopeTensors; options: of `resolve`."""
    q_out, k_out = empty_outputs(q, k)
    _run(Sides(q, k, q_out, k_out), RopeTensors(*rope_args), **options)
    return q_out, q.new_empty(0) if k_out is None else k_out


def rope_inplace(q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options) -> None:
    """Compute `torch.ops.extrope.rope_inplace`."""
    _run(Sides(q, k, q, k), RopeTensors(*rope_args), **options)


def rope_bwd(
    grad_q: Tensor, grad_k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_bwd`."""
    q_saved, k_saved, *rope_args = others
    dq, dk = empty_outputs(grad_q, grad_k)
    sides = Sides(grad_q, grad_k, dq, dk, q_saved, k_saved)
    angle_grad = _run(sides, RopeTensors(*rope_args), adjoint=True, **options)
    if angle_grad is None:
        angle_grad = grad_q.new_empty(0, dtype=accumulator(grad_q.dtype))
    return dq, grad_q.new_empty(0) if dk is None else dk, angle_grad


def _run(
    sides: Sides, rope: RopeTensors, *, adjoint: bool = False, offset: int = 0, **options
) -> Tensor | None:
    """Rotate q and k; return the gradient of the angles if inputs were saved.

    adjoint: q and k are gradients, and rotate by minus the angle.
    """
    q, k, _, _, q_saved, k_saved = sides
    if sides.in_place:
        refuse_shared(q, k)
    key = (adjoint, sides.in_place, layout_key(q, k, q_saved, k_saved, *rope), *options.items())
    launch, shape = cached_by_layout(_build_launch, key, adjoint, sides, rope, options)
    check_values(rope, offset, len(q))
    angle_grad = None if q_saved is None else q.new_empty(shape, dtype=accumulator(q.dtype))
    if angle_grad is not None and q.numel() == 0:  # tokens without heads
        angle_grad.zero_()
    launch.run(
        **sides._asdict(), angle_grad_ptr=angle_grad,
        inv_freq_ptr=rope.inv_freq, positions_ptr=rope.positions, cu_seqlens_ptr=rope.cu_seqlens,
        log_decay_ptr=rope.log_decay, axes_ptr=rope.axes, offset=offset,
    )  # fmt: skip
    return angle_grad


def _build_launch(
    adjoint: bool, sides: Sides, rope: RopeTensors, options: dict
) -> tuple[Launch, tuple[int, ...]]:
    """Check the call, then build its launch; return also the shape of its angles' gradient."""
    q, k, _, _, q_saved, k_saved = sides
    inputs, rotation = resolve(q, k, *rope, adjoint=adjoint, **options)  # inputs: q, k in 4 dims
    if sides.in_place:
        refuse_expanded(q, k)
    check_saved(q, k, q_saved, k_saved, packed=rope.cu_seqlens is not None)
    launch = build_rotation_launch(sides, rotation)
    batch, seqlen, heads, _ = inputs[0].shape
    return launch, (batch, seqlen, heads if rotation.per_head else 1, rotation.rotary_dim // 2)
