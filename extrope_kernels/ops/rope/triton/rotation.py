"""The rotation in Triton: one launch for q and k, forward and backward, in place or not.

A program has a tile of tokens and a share of the heads. It finds its tokens' positions, computes
their cosines and sines, and rotates one head after the other by them.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ..._shared.dtypes import accumulator
from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.launch import chip_of
from ..checks import refuse_overlap
from ..rotation import Rotation, resolve
from .device import (
    POSITION_NUMBERS,
    Launch,
    Rope,
    as_inputs,
    empty_outputs,
    head_cos_sin,
    head_rows,
    launch,
    launch_constants,
    load_head,
    program_heads,
    program_tokens,
    rotate_head,
    scaled,
    settle,
    token_positions,
)

# If every head has its own frequencies, a limit that no kernel reaches: without one, ptxas spills
# to fit one more block.
MOST_REGISTERS = 128


@triton.jit
def _rotate_and_derive(x, out, saved, tokens, head, cos, sin, grad, TILE: tl.constexpr):
    """Rotate a head; return grad plus the head's share of the gradient of the angles.

    The share is the cross product of each pair of x, a gradient, and saved, the forward's input.
    """
    a, b = rotate_head(x, out, tokens, head, cos, sin, TILE)
    if saved is not None:
        saved_a, saved_b, _ = load_head(head_rows(saved, tokens, head, TILE), tokens[2], TILE)
        grad += saved_a * b - saved_b * a
    return grad


@triton.jit(do_not_specialize=("offset", *POSITION_NUMBERS))
def rotate_kernel(
    heads, angle_grad, rope,
    offset, count, seqlen, position_axis, position_batch, position_seq, num_sequences, search_steps,
    decay_origin: tl.float64, amplitude: tl.float64, TILE: tl.constexpr,
):  # fmt: skip
    """Rotate: axis 0 is tiles of tokens, axis 1 shares of the heads. rope: a Rope.

    k, q_saved, k_saved and angle_grad may be None; angle_grad: (count, heads_q or 1, half).
    """
    q, k, q_out, k_out, q_saved, k_saved = heads
    TOKENS: tl.constexpr = TILE.tokens  # Triton 3.6 takes no fields of TILE in shapes
    PAIRS: tl.constexpr = TILE.pairs
    tokens = program_tokens(count, seqlen, TILE)
    batch, seq, valid = tokens  # (TOKENS,)
    sequence, position = token_positions(
        tokens, rope, offset, position_axis, position_batch, position_seq, num_sequences,
        search_steps, TILE,
    )  # fmt: skip
    far = position - decay_origin
    angles = (rope.inv_freq, sequence, position, far, rope.log_decay, amplitude)
    grad = tl.zeros((TOKENS, PAIRS), tl.float64 if TILE.wide else tl.float32)
    pair = tl.arange(0, PAIRS)
    mask = valid[:, None] & (pair < TILE.half)[None, :]
    first, last = program_heads(TILE.heads_q)

    if TILE.per_head:  # q and k then have the same heads
        for head in range(first, last):
            head = tl.cast(head, tl.int64)
            cos, sin = head_cos_sin(angles, head, valid, TILE)
            c, s = scaled(cos, sin, angles, 1.0, TILE)
            of_head = _rotate_and_derive(q, q_out, q_saved, tokens, head, c, s, grad, TILE)
            if k is not None:
                c, s = scaled(cos, sin, angles, -1.0, TILE)
                of_head = _rotate_and_derive(k, k_out, k_saved, tokens, head, c, s, of_head, TILE)
            if angle_grad is not None:
                row = (batch * seqlen + seq) * TILE.heads_q + head
                at = angle_grad + (row * TILE.half)[:, None] + pair[None, :]
                tl.store(at, of_head, mask=mask)
    else:
        cos, sin = head_cos_sin(angles, tl.cast(0, tl.int64), valid, TILE)  # (TOKENS, PAIRS)
        c, s = scaled(cos, sin, angles, 1.0, TILE)
        for head in range(first, last):
            grad = _rotate_and_derive(q, q_out, q_saved, tokens, head, c, s, grad, TILE)
        if k is not None:
            first, last = program_heads(TILE.heads_k)
            c, s = scaled(cos, sin, angles, -1.0, TILE)
            for head in range(first, last):
                grad = _rotate_and_derive(k, k_out, k_saved, tokens, head, c, s, grad, TILE)
        if angle_grad is not None:
            at = angle_grad + ((batch * seqlen + seq) * TILE.half)[:, None] + pair[None, :]
            tl.store(at, grad, mask=mask)


def build_rotation_launch(
    tensors: Sequence[Tensor | None], in_place: bool, rotation: Rotation
) -> Launch | None:
    """Work out the launch on q, k, their outputs and saved inputs; None if nothing rotates.

    With saved inputs it writes the gradient of the angles too.
    """
    # Sums over the heads stay in one program: no atomics, the same bits in every run.
    sums_heads = tensors[4] is not None and not rotation.per_head
    # AMD's compiler knows no such limit.
    limited = rotation.per_head and isinstance(chip_of(tensors[0]), int)
    return settle(
        tensors,
        *launch_constants(rotation),
        one_program=sums_heads,
        may_be_few=not sums_heads,
        copies_rest=not in_place,
        **({"maxnreg": MOST_REGISTERS} if limited else {}),
    )


# -------------------------------------------------------------------------------------------------
# The ops


def rope_fwd(
    q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_fwd`."""
    q_out, k_out = empty_outputs(q, k)
    _run(False, (q, k, q_out, k_out, None, None), Rope(*rope_args), **options)
    return q_out, q.new_empty(0) if k_out is None else k_out


def rope_inplace(q: Tensor, k: Tensor | None, *rope_args: Tensor | None, **options) -> None:
    """Compute `torch.ops.extrope.rope_inplace`."""
    _run(False, (q, k, q, k, None, None), Rope(*rope_args), **options)


def rope_bwd(
    grad_q: Tensor, grad_k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_bwd`."""
    dq, dk = empty_outputs(grad_q, grad_k)
    tensors = (grad_q, grad_k, dq, dk, *others[:2])
    angle_grad = _run(True, tensors, Rope(*others[2:]), **options)
    if angle_grad is None:
        angle_grad = grad_q.new_empty(0, dtype=accumulator(grad_q.dtype))
    return dq, grad_q.new_empty(0) if dk is None else dk, angle_grad


def _run(
    adjoint: bool, tensors: tuple[Tensor | None, ...], rope: Rope, *, offset: int = 0, **options
) -> Tensor | None:
    """Rotate q and k of tensors, (q, k, their outputs, their saved inputs).

    Returns the gradient of the angles if inputs were saved.
    """
    q, k, out, _, *saved = tensors
    key = (adjoint, out is q, layout_key(q, k, *saved, *rope), *options.items())
    prepared, angles = cached_by_layout(_build_launch, key, adjoint, tensors, rope, options)
    angle_grad = None if saved[0] is None else q.new_empty(angles, dtype=accumulator(q.dtype))
    if prepared is not None:
        launch(rotate_kernel, prepared, tensors, angle_grad, rope, offset)
    elif angle_grad is not None:
        angle_grad.zero_()
    return angle_grad


def _build_launch(
    adjoint: bool, tensors: tuple[Tensor | None, ...], rope: Rope, options: dict
) -> tuple[Launch | None, tuple[int, ...]]:
    """Check the call, then build its launch; return also the shape of its angles' gradient."""
    q, k, *others = tensors
    inputs, rotation = resolve(q, k, *rope, adjoint=adjoint, **options)
    in_place = others[0] is q
    if in_place:
        refuse_overlap(q, k)
    pairs = ((q, k), others[:2], others[2:])
    prepared = build_rotation_launch(
        [x for xs in pairs for x in as_inputs(xs, inputs)], in_place, rotation
    )
    batch, seqlen, heads, _ = inputs[0].shape
    return prepared, (batch, seqlen, heads if rotation.per_head else 1, rotation.rotary_dim // 2)
