"""RMSNorm and the rotation after it in Triton: one launch for q and k, forward and backward.

y = R (x * scale * weight), R the rotation and scale = 1 / sqrt(mean(x**2) + eps); the mean is over
each head, or over all heads of a token (TOGETHER). With g = R^T dy, u = g * weight, n = x * scale:

    dx = scale * (u - n * mean(n * u))        dweight = sum over tokens (and heads) of g * n
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..._shared.dtypes import accumulator
from ..._shared.layouts import cached_by_layout, layout_key
from ..._shared.triton.fp8 import parts_of_codes
from ..._shared.triton.launch import chip_of
from ..._shared.triton.pairs import store_parts
from ..checks import check_norm, refuse_overlap
from ..rotation import resolve
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
    scaled,
    settle,
    token_positions,
)

# A backward's limit: without one, ptxas spills to fit one more block.
ALL_REGISTERS = 255


@triton.jit
def _row_sum(a, b, rest, TILE: tl.constexpr):
    """Sum over the dims of a head: (TOKENS, 1)."""
    total = tl.sum(a + b, 1)
    if TILE.rest > 0:
        total += tl.sum(rest, 1)
    return total[:, None]


@triton.jit
def _load_weights(weight, head, TOGETHER: tl.constexpr, TILE: tl.constexpr):
    """Load (1, dims) parts of the weights of a head."""
    if TOGETHER:
        weight += head * (2 * TILE.half + TILE.rest)
    one = tl.arange(0, 1)
    return load_head(weight + one, one == 0, TILE)


@triton.jit
def _head_angles(angles, head, valid, SIGN: tl.constexpr, TILE: tl.constexpr):
    cos, sin = head_cos_sin(angles, head, valid, TILE)
    return scaled(cos, sin, angles, SIGN, TILE)


# -------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def norm_rotate_heads(
    x, weight, out, tokens, to, angles, codes_scale,
    HEADS: tl.constexpr, SIGN: tl.constexpr, TOGETHER: tl.constexpr, ROTATES: tl.constexpr,
    EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate this program's share of the heads of x into out.

    weight: None for no norm. to: like tokens, their places in out. codes_scale: scale of the heads
    if out is fp8, else None. SIGN: as for `scaled`.
    """
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    TOKENS: tl.constexpr = TILE.tokens
    DIMS: tl.constexpr = 2 * TILE.half + TILE.rest
    valid = tokens[2]
    eps = tl.full((1, 1), EPS, WIDE)  # a plain number is a float32
    scale = tl.full((TOKENS, 1), 1.0, WIDE)
    if TOGETHER:
        squares = tl.zeros((TOKENS, 1), WIDE)
        for head in range(0, HEADS):
            a, b, rest = load_head(head_rows(x, tokens, head, TILE), valid, TILE)
            squares += _row_sum(a * a, b * b, rest * rest, TILE)
        scale = 1.0 / tl.sqrt(squares / (HEADS * DIMS) + eps)
    zero = tl.cast(0, tl.int64)
    if ROTATES:
        cos, sin = _head_angles(angles, zero, valid, SIGN, TILE)
    if weight is not None:
        wa, wb, wrest = _load_weights(weight, zero, False, TILE)
    first, last = program_heads(HEADS)
    for head in range(first, last):
        head = tl.cast(head, tl.int64)
        if ROTATES and TILE.per_head:
            cos, sin = _head_angles(angles, head, valid, SIGN, TILE)
        a, b, rest = load_head(head_rows(x, tokens, head, TILE), valid, TILE)
        if weight is not None:
            if TOGETHER:
                wa, wb, wrest = _load_weights(weight, head, True, TILE)
            else:
                mean = _row_sum(a * a, b * b, rest * rest, TILE) / DIMS
                scale = 1.0 / tl.sqrt(mean + eps)
            a, b, rest = a * scale * wa, b * scale * wb, rest * scale * wrest
        if ROTATES:
            a, b = a * cos - b * sin, b * cos + a * sin
        parts = (a, b, rest)
        if codes_scale is not None:
            dtype: tl.constexpr = x[0].dtype.element_ty
            parts = parts_of_codes(parts, tl.load(codes_scale + head), dtype, TILE)
        store_parts(head_rows(out, to, head, TILE), parts, to[2], TILE)


# -------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _add_rows(to, x, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr):
    """Store the sum over the rows of x in COUNT elements from FIRST on."""
    DIMS: tl.constexpr = x.shape[1]
    dim = tl.arange(0, DIMS)
    tl.store(to + FIRST + STEP * dim, tl.sum(x, 0), mask=dim < COUNT)


@triton.jit
def _store_sums(to, a, b, rest, TILE: tl.constexpr):
    """Store this program's part of the gradients of a head's weights."""
    STEP: tl.constexpr = 2 if TILE.interleaved else 1
    SECOND: tl.constexpr = 1 if TILE.interleaved else TILE.half
    _add_rows(to, a, 0, STEP, TILE.half)
    _add_rows(to, b, SECOND, STEP, TILE.half)
    if TILE.rest > 0:
        _add_rows(to, rest, 2 * TILE.half, 1, TILE.rest)


@triton.jit
def _load_gradients(grad, saved, tokens, head, cos, sin, TILE: tl.constexpr):
    """Load g, the gradients rotated back, and x, each in three parts."""
    a, b, grest = load_head(head_rows(grad, tokens, head, TILE), tokens[2], TILE)
    xa, xb, xrest = load_head(head_rows(saved, tokens, head, TILE), tokens[2], TILE)
    return a * cos - b * sin, b * cos + a * sin, grest, xa, xb, xrest


@triton.jit
def _backward_heads(
    grad, out, saved, weight, parts, tokens, angles,
    HEADS: tl.constexpr, SIGN: tl.constexpr, TOGETHER: tl.constexpr, EPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all heads of one tensor, and this program's part of its weights'."""
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    TOKENS: tl.constexpr = TILE.tokens
    PAIRS: tl.constexpr = TILE.pairs
    REST: tl.constexpr = TILE.rest_dims
    DIMS: tl.constexpr = 2 * TILE.half + TILE.rest
    COUNT: tl.constexpr = HEADS * DIMS if TOGETHER else DIMS
    valid = tokens[2]
    zero = tl.cast(0, tl.int64)
    eps = tl.full((1, 1), EPS, WIDE)
    parts += tl.program_id(0).to(tl.int64) * (HEADS * DIMS if TOGETHER else DIMS)
    cos, sin = _head_angles(angles, zero, valid, SIGN, TILE)
    wa, wb, wrest = _load_weights(weight, zero, False, TILE)
    squares = tl.zeros((TOKENS, 1), WIDE)
    products = tl.zeros((TOKENS, 1), WIDE)
    if TOGETHER:
        for head in range(0, HEADS):
            head = tl.cast(head, tl.int64)
            if TILE.per_head:
                cos, sin = _head_angles(angles, head, valid, SIGN, TILE)
            wa, wb, wrest = _load_weights(weight, head, True, TILE)
            ga, gb, grest, a, b, rest = _load_gradients(grad, saved, tokens, head, cos, sin, TILE)
            squares += _row_sum(a * a, b * b, rest * rest, TILE)
            products += _row_sum(a * (ga * wa), b * (gb * wb), rest * (grest * wrest), TILE)
    sum_a = tl.zeros((TOKENS, PAIRS), WIDE)
    sum_b = sum_a
    sum_rest = tl.zeros((TOKENS, REST), WIDE)
    for head in range(0, HEADS):
        head = tl.cast(head, tl.int64)
        if TILE.per_head:
            cos, sin = _head_angles(angles, head, valid, SIGN, TILE)
        # With dims that pass unrotated, registers do not suffice to hold the weights.
        if TOGETHER or TILE.rest > 0:
            wa, wb, wrest = _load_weights(weight, head, TOGETHER, TILE)
        ga, gb, grest, a, b, rest = _load_gradients(grad, saved, tokens, head, cos, sin, TILE)
        ua, ub, urest = ga * wa, gb * wb, grest * wrest
        if not TOGETHER:
            squares = _row_sum(a * a, b * b, rest * rest, TILE)
            products = _row_sum(a * ua, b * ub, rest * urest, TILE)
        scale = 1.0 / tl.sqrt(squares / COUNT + eps)
        mean = products * scale / COUNT
        a, b, rest = a * scale, b * scale, rest * scale
        dx = (scale * (ua - a * mean), scale * (ub - b * mean), scale * (urest - rest * mean))
        store_parts(head_rows(out, tokens, head, TILE), dx, valid, TILE)
        # Invalid rows have gradients of 0; their x is 0 too, but its scale may be infinite.
        ga, gb = tl.where(valid[:, None], ga * a, 0.0), tl.where(valid[:, None], gb * b, 0.0)
        if TOGETHER:
            grest = tl.where(valid[:, None], grest * rest, 0.0)
            _store_sums(parts + head * DIMS, ga, gb, grest, TILE)
        else:
            sum_a += ga
            sum_b += gb
            if TILE.rest > 0:
                sum_rest += tl.where(valid[:, None], grest * rest, 0.0)
    if not TOGETHER:
        _store_sums(parts, sum_a, sum_b, sum_rest, TILE)


# -------------------------------------------------------------------------------------------------
# The kernel and its launch


@triton.jit
def _one_tensor(
    x, out, saved, weight, parts, tokens, angles,
    HEADS: tl.constexpr, SIGN: tl.constexpr, TOGETHER: tl.constexpr, EPS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Process q or k: backward if there are parts."""
    if parts is not None:
        _backward_heads(
            x, out, saved, weight, parts, tokens, angles, HEADS, SIGN, TOGETHER, EPS, TILE
        )
    else:
        norm_rotate_heads(
            x, weight, out, tokens, tokens, angles, None, HEADS, SIGN, TOGETHER, True, EPS, TILE
        )


@triton.jit(do_not_specialize=("offset", *POSITION_NUMBERS))
def norm_rotate_kernel(
    heads, q_weight, k_weight, q_parts, k_parts, rope,
    offset, count, seqlen, position_axis, position_batch, position_seq, num_sequences, search_steps,
    decay_origin: tl.float64, amplitude: tl.float64, Q_TOGETHER: tl.constexpr,
    K_TOGETHER: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate: axis 0 is tiles of tokens, axis 1 shares of the heads. rope: a Rope.

    With q_parts or k_parts it is the backward of that tensor. Its programs take all heads, and each
    writes a row of (programs, dims of the weight) parts: sums for the gradients of the weights.
    """
    q, k, q_out, k_out, q_saved, k_saved = heads
    tokens = program_tokens(count, seqlen, TILE)
    sequence, position = token_positions(
        tokens, rope, offset, position_axis, position_batch, position_seq, num_sequences,
        search_steps, TILE,
    )  # fmt: skip
    far = position - decay_origin
    angles = (rope.inv_freq, sequence, position, far, rope.log_decay, amplitude)
    _one_tensor(
        q, q_out, q_saved, q_weight, q_parts, tokens, angles, TILE.heads_q, 1.0, Q_TOGETHER, EPS,
        TILE,
    )  # fmt: skip
    if k is not None:
        _one_tensor(
            k, k_out, k_saved, k_weight, k_parts, tokens, angles, TILE.heads_k, -1.0, K_TOGETHER,
            EPS, TILE,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The ops


def rope_norm_fwd(
    q: Tensor, k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_norm_fwd`."""
    q_out, k_out = empty_outputs(q, k)
    _run((q, k, q_out, k_out, None, None), *others, **options)
    return q_out, q.new_empty(0) if k_out is None else k_out


def rope_norm_inplace(q: Tensor, k: Tensor | None, *others: Tensor | None, **options) -> None:
    """Compute `torch.ops.extrope.rope_norm_inplace`."""
    _run((q, k, q, k, None, None), *others, **options)


def rope_norm_bwd(
    grad_q: Tensor, grad_k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_norm_bwd`."""
    dq, dk = empty_outputs(grad_q, grad_k)
    parts = _run((grad_q, grad_k, dq, dk, *others[:2]), *others[2:], **options)
    none = grad_q.new_empty(0, dtype=accumulator(grad_q.dtype))
    dweights = (none.clone() if x is None else x.sum(0) for x in parts)
    return dq, grad_q.new_empty(0) if dk is None else dk, *dweights


def _run(
    tensors: tuple[Tensor | None, ...], *others: Tensor | None, offset: int = 0, **options
) -> list[Tensor | None]:
    """Norm and rotate q and k of tensors: (q, k, their outputs, their saved inputs).

    Returns a backward's sums for the gradients of the weights: (programs, dims).
    """
    q, k, out, _, *saved = tensors
    weights, rope = others[:2], Rope(*others[2:])
    key = (out is q, layout_key(q, k, *saved, *weights, *rope), *options.items())
    prepared = cached_by_layout(_build_launch, key, tensors, weights, rope, options)
    programs, wide = 0 if prepared is None else prepared.grid[0], accumulator(q.dtype)
    parts = [
        None if w is None or saved[0] is None else q.new_empty(programs, w.shape[0], dtype=wide)
        for w in weights
    ]
    if prepared is not None:
        launch(norm_rotate_kernel, prepared, tensors, *weights, *parts, rope, offset)
    return parts


def _build_launch(
    tensors: tuple[Tensor | None, ...],
    weights: tuple[Tensor | None, ...],
    rope: Rope,
    options: dict,
) -> Launch | None:
    """Check the call, then build its launch; None if there is nothing to rotate."""
    (q, k, *others), options = tensors, dict(options)
    eps, backward = options.pop("norm_eps", 1e-6), others[2] is not None
    inputs, rotation = resolve(q, k, *rope, adjoint=backward, **options)
    check_norm(q, k, *weights, eps)
    in_place = others[0] is q
    if in_place:
        refuse_overlap(q, k)
    together = [w is not None and w.shape[0] != q.shape[-1] for w in weights]
    # A backward with as many tokens would spill if dims pass, except float32 in halves.
    spills = backward and (rotation.interleaved or q.itemsize == 2)
    limited = backward and isinstance(chip_of(q), int)  # AMD's compiler knows no such limit
    pairs = ((q, k), others[:2], others[2:])
    return settle(
        [x for xs in pairs for x in as_inputs(xs, inputs)],
        *launch_constants(rotation),
        # The mean square of all heads is read before any of them is overwritten: by one program.
        one_program=backward or (in_place and any(together)),
        may_be_few=not backward,
        width=next_power_of_2(q.shape[-1]) // 2 if spills else 0,
        Q_TOGETHER=together[0],
        K_TOGETHER=together[1],
        EPS=float(eps),
        **({"maxnreg": ALL_REGISTERS} if limited else {}),
    )
