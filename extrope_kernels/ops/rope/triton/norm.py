"""RMSNorm and the rotation after it in Triton: one launch for q and k, forward and backward.

The mean is over the dims of each head, or over those of all heads of a token (TOGETHER), by the
weight's size. R is the rotation with its amplitude, which under xPos depends on the position:

    rstd = 1 / sqrt(mean(x**2) + eps)        y = R (x * rstd * weight)

Backward, with g = R^T dy (minus R's angle, its amplitude), u = g * weight and n = x * rstd:

    dx = rstd * (u - n * mean(n * u))        dweight = sum over tokens (and heads) of g * n

A program has TILE.tokens tokens, and a share of the heads: [first, last) of program_heads. In place
it needs no barrier: nobody else reads its rows, and a pair is stored after both its dims are
loaded.

Names, of device.py but for store_parts:

TILE                a Tile: TILE.half pairs of dims rotate
TOKENS, PAIRS, REST TILE.tokens; TILE.half and TILE.rest, each rounded up to a power of two
WIDE                the dtype of the arithmetic behind the angles: float64 if TILE.wide, or float32
parts of a row      a and b, both dims of its pairs, (TOKENS, PAIRS), and rest, the dims that do not
                    rotate, (TOKENS, REST): 0 past the row's dims. Without such dims (TILE.rest 0),
                    rest is a copy of a, to be left out of sums and stores
load_head           load them as WIDE from pointers to dim 0 of each row, as far as rows are valid
store_parts         round them to the pointer's dtype, and store them as far as rows are valid
rows_of_head        pointers to dim 0 of a head's rows, (TOKENS,), by TileRows
decayed             amplitude * exp(SIGN * distance * log_decay), (TOKENS, PAIRS), or without
                    log_decay the amplitude, (1, 1)
scaled_cos_sin_of_head  cosines and sines of position * inv_freq of a head, or of all if they share
                    frequencies (not TILE.per_head), times such an amplitude: (TOKENS, PAIRS)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2

from ..._math.dtypes import accumulator
from ..._math.triton.launch import Launch
from ..._math.triton.pairs import store_parts
from ..._torch.layouts import cached_by_layout, layout_key
from ..call import (
    RopeTensors,
    check_norm,
    check_saved,
    check_values,
    refuse_expanded,
    refuse_shared,
    resolve,
)
from .device import (
    TileRows,
    build_launch,
    decayed,
    empty_outputs,
    load_head,
    load_positions,
    program_heads,
    program_tokens,
    rotation_numbers,
    rows_of_head,
    scaled_cos_sin_of_head,
)

# A backward's limit: without one, ptxas spills to fit one more block.
ALL_REGISTERS = 255


@triton.jit
def _sum_dims(a, b, rest, TILE: tl.constexpr):
    """Sum over the dims of a head: (TOKENS, 1)."""
    total = tl.sum(a + b, 1)
    if TILE.rest > 0:
        total += tl.sum(rest, 1)
    return total[:, None]


@triton.jit
def _load_weight(weight_ptr, TILE: tl.constexpr):
    """Load a head's contiguous weight as a row: (1, PAIRS) twice and (1, REST)."""
    row = tl.arange(0, 1)
    return load_head(weight_ptr + row, row == 0, TILE)


# -------------------------------------------------------------------------------------------------
# Forward


@triton.jit
def _norm_rotate(
    x, valid, weight_ptr, out, inv_freq_ptr, sequence, position, amplitude,
    HEADS: tl.constexpr, TOGETHER: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate this program's share of the heads of x into out.

    x, out: TileRows, rows_of_head(x, head, TILE): pointers to dim 0 of the head's rows, (TOKENS,).
    weight_ptr: (head_dim,), or (HEADS * head_dim,) if TOGETHER; None: no norm.
    sequence, position: from load_positions, (TOKENS,) and (TOKENS, 1 or PAIRS) float64; amplitude:
        from `decayed`.
    """
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    TOKENS: tl.constexpr = TILE.tokens  # Triton 3.6 takes no fields of TILE in shapes
    HEAD_DIM: tl.constexpr = 2 * TILE.half + TILE.rest
    eps = tl.full((1, 1), EPS, WIDE)  # a plain number is a float32
    rstd = tl.full((TOKENS, 1), 1.0, WIDE)
    if TOGETHER:
        squares = tl.zeros((TOKENS, 1), WIDE)
        for head in range(0, HEADS):
            a, b, rest = load_head(rows_of_head(x, head, TILE), valid, TILE)
            squares += _sum_dims(a * a, b * b, rest * rest, TILE)
        rstd = 1.0 / tl.sqrt(squares / (HEADS * HEAD_DIM) + eps)
    if not TILE.per_head:
        cos, sin = scaled_cos_sin_of_head(
            inv_freq_ptr, sequence, position, amplitude, 0, valid, TILE
        )
    if weight_ptr is not None:
        w_a, w_b, w_rest = _load_weight(weight_ptr, TILE)
    first, last = program_heads(HEADS)
    for head in range(first, last):
        if TILE.per_head:
            cos, sin = scaled_cos_sin_of_head(
                inv_freq_ptr, sequence, position, amplitude, head, valid, TILE
            )
        a, b, rest = load_head(rows_of_head(x, head, TILE), valid, TILE)
        if weight_ptr is not None:
            if TOGETHER:
                w_a, w_b, w_rest = _load_weight(weight_ptr + head * HEAD_DIM, TILE)
            else:
                squares = _sum_dims(a * a, b * b, rest * rest, TILE)
                rstd = 1.0 / tl.sqrt(squares / HEAD_DIM + eps)
            a, b, rest = a * rstd * w_a, b * rstd * w_b, rest * rstd * w_rest
        parts = (a * cos - b * sin, b * cos + a * sin, rest)
        store_parts(rows_of_head(out, head, TILE), parts, valid, TILE)  # rounds once


@triton.jit
def norm_rotate_kernel(
    q_ptr, k_ptr,  # (batch, seqlen, heads, head_dim); k may be None
    q_out_ptr, k_out_ptr,  # like q and k, or q and k themselves
    q_weight_ptr, k_weight_ptr,  # see _norm_rotate
    inv_freq_ptr,  # (sequences or 1, heads or 1, half)
    positions_ptr,  # (batch or 1, seqlen); (sequences,): of their first tokens; None: these are 0
    cu_seqlens_ptr, log_decay_ptr,  # (sequences + 1,) if packed; (half,): xPos; or None
    axes_ptr,  # (half,) or None: positions are (axes, batch or 1, seqlen), pair i reads axes[i]
    offset: tl.int64,  # added to all positions
    q_stride_batch, q_stride_seq, q_stride_head,  # all strides in groups of TILE.align elements
    k_stride_batch, k_stride_seq, k_stride_head,
    q_out_stride_batch, q_out_stride_seq, q_out_stride_head,
    k_out_stride_batch, k_out_stride_seq, k_out_stride_head,
    count, seqlen,  # tokens: count = batch * seqlen
    positions_stride_axis, positions_stride_batch, positions_stride_seq,
    num_sequences, search_steps,  # of cu_seqlens; steps of a binary search in it
    decay_origin: tl.float64,  # the position at which log_decay changes nothing
    amplitude: tl.float64,  # of all tokens and pairs
    Q_TOGETHER: tl.constexpr, K_TOGETHER: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Norm and rotate q and k: axis 0 is tiles of tokens, axis 1 shares of the heads.

    In place, with TOGETHER a program has all heads, since it reads them before it overwrites one.
    """
    batch, seq, valid = program_tokens(count, seqlen, TILE)  # (TOKENS,): int64, int64, mask
    # sequence (TOKENS,), position (TOKENS, 1), or with axes (TOKENS, PAIRS); float64
    sequence, position = load_positions(
        batch, seq, valid, positions_ptr, cu_seqlens_ptr, axes_ptr, offset, positions_stride_axis,
        positions_stride_batch, positions_stride_seq, num_sequences, search_steps, TILE,
    )  # fmt: skip
    # By xPos: decay_sign is 1, or -1 in an inverse call; k has the other sign.
    distance = position - decay_origin
    q = TileRows(q_ptr, batch * q_stride_batch + seq * q_stride_seq, q_stride_head)
    q_out_row = batch * q_out_stride_batch + seq * q_out_stride_seq
    q_out = TileRows(q_out_ptr, q_out_row, q_out_stride_head)
    q_amplitude = decayed(amplitude, distance, log_decay_ptr, TILE.decay_sign, TILE)
    _norm_rotate(
        q, valid, q_weight_ptr, q_out, inv_freq_ptr, sequence, position, q_amplitude,
        TILE.heads_q, TOGETHER=Q_TOGETHER, EPS=EPS, TILE=TILE,
    )  # fmt: skip
    if k_ptr is not None:
        k = TileRows(k_ptr, batch * k_stride_batch + seq * k_stride_seq, k_stride_head)
        k_out_row = batch * k_out_stride_batch + seq * k_out_stride_seq
        k_out = TileRows(k_out_ptr, k_out_row, k_out_stride_head)
        k_amplitude = decayed(amplitude, distance, log_decay_ptr, -TILE.decay_sign, TILE)
        _norm_rotate(
            k, valid, k_weight_ptr, k_out, inv_freq_ptr, sequence, position,
            k_amplitude, TILE.heads_k, TOGETHER=K_TOGETHER, EPS=EPS, TILE=TILE,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Backward


@triton.jit
def _load_x_and_g(x, dy, head, valid, cos, sin, TILE: tl.constexpr):
    """Load a head of x and of g = R^T dy, three parts each, as WIDE. cos, sin: with amplitude."""
    dy_a, dy_b, g_rest = load_head(rows_of_head(dy, head, TILE), valid, TILE)
    x_a, x_b, x_rest = load_head(rows_of_head(x, head, TILE), valid, TILE)
    g_a, g_b = dy_a * cos - dy_b * sin, dy_b * cos + dy_a * sin  # R^T: sin is minus R's
    return x_a, x_b, x_rest, g_a, g_b, g_rest


@triton.jit
def _store_dweight(dweight_ptr, a, b, rest, TILE: tl.constexpr):
    """Store the sums over the rows of a head's (TOKENS, ...) parts as a row."""
    row = tl.arange(0, 1)
    sums = (tl.sum(a, 0)[None, :], tl.sum(b, 0)[None, :], tl.sum(rest, 0)[None, :])
    store_parts(dweight_ptr + row, sums, row == 0, TILE)


@triton.jit
def _norm_rotate_backward(
    dy, x, weight_ptr, dx, dweight_ptr,
    inv_freq_ptr, sequence, position, amplitude, valid,
    HEADS: tl.constexpr, TOGETHER: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of all heads of x, and this program's part of its weight's.

    dy, x, dx: TileRows.
    dweight_ptr: (programs, dims of the weight), to be summed over the programs.
    """
    WIDE: tl.constexpr = tl.float64 if TILE.wide else tl.float32
    TOKENS: tl.constexpr = TILE.tokens
    PAIRS: tl.constexpr = TILE.pairs
    REST: tl.constexpr = TILE.rest_dims
    HEAD_DIM: tl.constexpr = 2 * TILE.half + TILE.rest
    COUNT: tl.constexpr = HEADS * HEAD_DIM if TOGETHER else HEAD_DIM  # elements under the mean
    eps = tl.full((1, 1), EPS, WIDE)  # a plain number is a float32
    dweight_ptr += tl.program_id(0).to(tl.int64) * COUNT
    if not TILE.per_head:
        cos, sin = scaled_cos_sin_of_head(
            inv_freq_ptr, sequence, position, amplitude, 0, valid, TILE
        )
    w_a, w_b, w_rest = _load_weight(weight_ptr, TILE)

    # Sums of x**2 and of x * u, over all heads if TOGETHER: then they take a pass of their own.
    squares = tl.zeros((TOKENS, 1), WIDE)
    products = tl.zeros((TOKENS, 1), WIDE)
    if TOGETHER:
        for head in range(0, HEADS):
            if TILE.per_head:
                cos, sin = scaled_cos_sin_of_head(
                    inv_freq_ptr, sequence, position, amplitude, head, valid, TILE
                )
            w_a, w_b, w_rest = _load_weight(weight_ptr + head * HEAD_DIM, TILE)
            x_a, x_b, x_rest, g_a, g_b, g_rest = _load_x_and_g(x, dy, head, valid, cos, sin, TILE)
            squares += _sum_dims(x_a * x_a, x_b * x_b, x_rest * x_rest, TILE)
            products += _sum_dims(
                x_a * (g_a * w_a), x_b * (g_b * w_b), x_rest * (g_rest * w_rest), TILE
            )

    dw_a = tl.zeros((TOKENS, PAIRS), WIDE)
    dw_b = dw_a
    dw_rest = tl.zeros((TOKENS, REST), WIDE)
    for head in range(0, HEADS):
        if TILE.per_head:
            cos, sin = scaled_cos_sin_of_head(
                inv_freq_ptr, sequence, position, amplitude, head, valid, TILE
            )
        # With dims that pass unrotated, registers do not suffice to hold the weights.
        if TOGETHER:
            w_a, w_b, w_rest = _load_weight(weight_ptr + head * HEAD_DIM, TILE)
        elif TILE.rest > 0:
            w_a, w_b, w_rest = _load_weight(weight_ptr, TILE)
        x_a, x_b, x_rest, g_a, g_b, g_rest = _load_x_and_g(x, dy, head, valid, cos, sin, TILE)
        u_a, u_b, u_rest = g_a * w_a, g_b * w_b, g_rest * w_rest
        if not TOGETHER:
            squares = _sum_dims(x_a * x_a, x_b * x_b, x_rest * x_rest, TILE)
            products = _sum_dims(x_a * u_a, x_b * u_b, x_rest * u_rest, TILE)

        # n = x * rstd, dx = rstd * (u - n * mean(n * u))
        rstd = 1.0 / tl.sqrt(squares / COUNT + eps)  # (TOKENS, 1)
        mean = products * rstd / COUNT
        n_a, n_b, n_rest = x_a * rstd, x_b * rstd, x_rest * rstd
        dx_a, dx_b = rstd * (u_a - n_a * mean), rstd * (u_b - n_b * mean)
        dx_rest = rstd * (u_rest - n_rest * mean)
        store_parts(rows_of_head(dx, head, TILE), (dx_a, dx_b, dx_rest), valid, TILE)

        # dweight = sum of g * n. Rows past the last token have g = 0 and x = 0, but rstd, with eps
        # 0, is infinite there.
        gn_a = tl.where(valid[:, None], g_a * n_a, 0.0)
        gn_b = tl.where(valid[:, None], g_b * n_b, 0.0)
        if TOGETHER:
            gn_rest = tl.where(valid[:, None], g_rest * n_rest, 0.0)
            _store_dweight(dweight_ptr + head * HEAD_DIM, gn_a, gn_b, gn_rest, TILE)
        else:
            dw_a += gn_a
            dw_b += gn_b
            if TILE.rest > 0:
                dw_rest += tl.where(valid[:, None], g_rest * n_rest, 0.0)
    if not TOGETHER:
        _store_dweight(dweight_ptr, dw_a, dw_b, dw_rest, TILE)


@triton.jit
def _backward(
    dy, x, weight_ptr, dx, dweight_ptr, inv_freq_ptr, sequence, position, amplitude, valid,
    HEADS: tl.constexpr, TOGETHER: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Call _norm_rotate_backward, or without a weight apply R^T alone."""
    if weight_ptr is not None:
        _norm_rotate_backward(
            dy, x, weight_ptr, dx, dweight_ptr, inv_freq_ptr, sequence, position, amplitude, valid,
            HEADS, TOGETHER, EPS, TILE,
        )  # fmt: skip
    else:
        _norm_rotate(
            dy, valid, None, dx, inv_freq_ptr, sequence, position, amplitude,
            HEADS, TOGETHER=False, EPS=EPS, TILE=TILE,
        )  # fmt: skip


@triton.jit
def norm_rotate_backward_kernel(
    dq_out_ptr, dk_out_ptr,  # gradients of the forward's outputs, (batch, seqlen, heads, head_dim)
    dq_ptr, dk_ptr,  # of its inputs: written
    q_ptr, k_ptr,  # its inputs; everything of k may be None
    q_weight_ptr, k_weight_ptr,  # see _norm_rotate
    q_dweight_ptr, k_dweight_ptr,  # see _norm_rotate_backward; None without a weight
    inv_freq_ptr, positions_ptr, cu_seqlens_ptr, log_decay_ptr, axes_ptr, offset: tl.int64,
    dq_out_stride_batch, dq_out_stride_seq, dq_out_stride_head,  # in groups of TILE.align elements
    dk_out_stride_batch, dk_out_stride_seq, dk_out_stride_head,
    dq_stride_batch, dq_stride_seq, dq_stride_head,
    dk_stride_batch, dk_stride_seq, dk_stride_head,
    q_stride_batch, q_stride_seq, q_stride_head,
    k_stride_batch, k_stride_seq, k_stride_head,
    count, seqlen,
    positions_stride_axis, positions_stride_batch, positions_stride_seq,
    num_sequences, search_steps,
    decay_origin: tl.float64, amplitude: tl.float64,
    Q_TOGETHER: tl.constexpr, K_TOGETHER: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Turn gradients of the outputs into those of q and k: axis 0 is tiles of tokens.

    A program has all heads of its tokens. What rotates: see norm_rotate_kernel.
    """
    batch, seq, valid = program_tokens(count, seqlen, TILE)  # (TOKENS,): int64, int64, mask
    # sequence (TOKENS,), position (TOKENS, 1), or with axes (TOKENS, PAIRS); float64
    sequence, position = load_positions(
        batch, seq, valid, positions_ptr, cu_seqlens_ptr, axes_ptr, offset, positions_stride_axis,
        positions_stride_batch, positions_stride_seq, num_sequences, search_steps, TILE,
    )  # fmt: skip
    distance = position - decay_origin
    dq_out_row = batch * dq_out_stride_batch + seq * dq_out_stride_seq
    dq_out = TileRows(dq_out_ptr, dq_out_row, dq_out_stride_head)
    q = TileRows(q_ptr, batch * q_stride_batch + seq * q_stride_seq, q_stride_head)
    dq = TileRows(dq_ptr, batch * dq_stride_batch + seq * dq_stride_seq, dq_stride_head)
    q_amplitude = decayed(amplitude, distance, log_decay_ptr, TILE.decay_sign, TILE)
    _backward(
        dq_out, q, q_weight_ptr, dq, q_dweight_ptr, inv_freq_ptr, sequence, position, q_amplitude,
        valid, TILE.heads_q, Q_TOGETHER, EPS, TILE,
    )  # fmt: skip
    if dk_out_ptr is not None:
        dk_out_row = batch * dk_out_stride_batch + seq * dk_out_stride_seq
        dk_out = TileRows(dk_out_ptr, dk_out_row, dk_out_stride_head)
        k = TileRows(k_ptr, batch * k_stride_batch + seq * k_stride_seq, k_stride_head)
        dk = TileRows(dk_ptr, batch * dk_stride_batch + seq * dk_stride_seq, dk_stride_head)
        k_amplitude = decayed(amplitude, distance, log_decay_ptr, -TILE.decay_sign, TILE)
        _backward(
            dk_out, k, k_weight_ptr, dk, k_dweight_ptr, inv_freq_ptr, sequence, position,
            k_amplitude, valid, TILE.heads_k, K_TOGETHER, EPS, TILE,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# The ops


def rope_norm_fwd(
    q: Tensor, k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_norm_fwd`."""
    q_out, k_out = empty_outputs(q, k)
    _run({"q_ptr": q, "k_ptr": k, "q_out_ptr": q_out, "k_out_ptr": k_out}, *others, **options)
    return q_out, q.new_empty(0) if k_out is None else k_out


def rope_norm_inplace(q: Tensor, k: Tensor | None, *others: Tensor | None, **options) -> None:
    """Compute `torch.ops.extrope.rope_norm_inplace`."""
    _run({"q_ptr": q, "k_ptr": k, "q_out_ptr": q, "k_out_ptr": k}, *others, **options)


def rope_norm_bwd(
    grad_q: Tensor, grad_k: Tensor | None, *others: Tensor | None, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute `torch.ops.extrope.rope_norm_bwd`."""
    dq, dk = empty_outputs(grad_q, grad_k)
    q, k, q_weight, k_weight, *rope_args = others
    weights, rope = (q_weight, k_weight), RopeTensors(*rope_args)
    tensors = {
        "dq_out_ptr": grad_q, "dk_out_ptr": grad_k, "dq_ptr": dq, "dk_ptr": dk, "q_ptr": q,
        "k_ptr": k,
    }  # fmt: skip
    launch, offset = _launch_for(grad_q, grad_k, tensors, weights, rope, **options)
    # Each program writes a row: no atomics, the same bits in every run.
    programs, wide = launch.grid[0], accumulator(q.dtype)
    parts = [None if w is None else q.new_empty(programs, w.shape[0], dtype=wide) for w in weights]
    q_dweight, k_dweight = parts
    launch.run(
        **tensors, q_weight_ptr=q_weight, k_weight_ptr=k_weight, q_dweight_ptr=q_dweight,
        k_dweight_ptr=k_dweight,
        inv_freq_ptr=rope.inv_freq, positions_ptr=rope.positions, cu_seqlens_ptr=rope.cu_seqlens,
        log_decay_ptr=rope.log_decay, axes_ptr=rope.axes, offset=offset,
    )  # fmt: skip
    none = grad_q.new_empty(0, dtype=wide)
    dweights = (none.clone() if x is None else x.sum(0) for x in parts)
    return dq, grad_q.new_empty(0) if dk is None else dk, *dweights


def _run(
    tensors: dict[str, Tensor | None],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rope_args: Tensor | None,
    **options,
) -> None:
    """Norm and rotate q_ptr and k_ptr of tensors into q_out_ptr and k_out_ptr."""
    q, k, rope = tensors["q_ptr"], tensors["k_ptr"], RopeTensors(*rope_args)
    if tensors["q_out_ptr"] is q:
        refuse_shared(q, k)
    launch, offset = _launch_for(q, k, tensors, (q_weight, k_weight), rope, **options)
    launch.run(
        **tensors, q_weight_ptr=q_weight, k_weight_ptr=k_weight,
        inv_freq_ptr=rope.inv_freq, positions_ptr=rope.positions, cu_seqlens_ptr=rope.cu_seqlens,
        log_decay_ptr=rope.log_decay, axes_ptr=rope.axes, offset=offset,
    )  # fmt: skip


def _launch_for(
    x: Tensor,
    y: Tensor | None,
    tensors: dict[str, Tensor | None],
    weights: tuple[Tensor | None, Tensor | None],
    rope: RopeTensors,
    *,
    offset: int = 0,
    **options,
) -> tuple[Launch, int]:
    """Return the launch, and the offset of all positions.

    x, y: q and k, or in a backward the gradients of their outputs. tensors: those with heads, by
    their names in the kernel.
    """
    in_place = tensors.get("q_out_ptr") is x
    saved = () if tensors["q_ptr"] is x else (tensors["q_ptr"], tensors["k_ptr"])
    key = (in_place, layout_key(x, y, *saved, *weights, *rope), *options.items())
    launch = cached_by_layout(_build_launch, key, x, y, in_place, tensors, weights, rope, options)
    check_values(rope, offset, len(x))
    return launch, offset


def _build_launch(
    x: Tensor,
    y: Tensor | None,
    in_place: bool,
    tensors: dict[str, Tensor | None],
    weights: tuple[Tensor | None, Tensor | None],
    rope: RopeTensors,
    options: dict,
) -> Launch:
    """Check the call, then build its launch."""
    options, backward = dict(options), "dq_ptr" in tensors
    eps = options.pop("norm_eps", 1e-6)
    # Checks them. adjoint: R^T in place of R.
    _, rotation = resolve(x, y, *rope, adjoint=backward, **options)
    check_norm(x, y, *weights, eps)
    if backward:
        check_saved(x, y, tensors["q_ptr"], tensors["k_ptr"], packed=rope.cu_seqlens is not None)
    if in_place:
        refuse_expanded(x, y)  # their elements must not share memory
    q_together, k_together = (w is not None and w.shape[0] != x.shape[-1] for w in weights)
    #                      a tile's size follows   registers     heads of a program, its tokens
    # forward              the pairs of a head     as it needs   a share (but see below), few
    # backward, spilling   half of all dims        255           all, many
    # backward else        the pairs of a head     255           all, many
    #
    # With as many tokens in a tile as the forward's, a backward would spill where dims pass from
    # thread to thread, that is except for float32 in halves.
    spills = backward and (rotation.interleaved or x.itemsize == 2)
    return build_launch(
        norm_rotate_backward_kernel if backward else norm_rotate_kernel,
        tensors,
        *rotation_numbers(rotation),
        constants={"Q_TOGETHER": q_together, "K_TOGETHER": k_together, "EPS": float(eps)},
        per_call=("offset",),
        # The mean square of all heads is read before any of them is overwritten: by one program.
        one_program=backward or (in_place and (q_together or k_together)),
        small_tiles=not backward,
        pairs_in_registers=next_power_of_2(x.shape[-1]) // 2 if spills else 0,
        maxnreg=ALL_REGISTERS if backward else None,
    )
