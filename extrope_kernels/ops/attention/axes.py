"""Attention by positions of several axes, such as rows and columns of an image.

Every pair of dims follows one axis: a token has no single position that a kernel could compute by
itself. So queries and keys of each region are rotated first, and each region is a call of plain
attention, merged by its log-sum-exp. All ops used are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import FIRST_KEY, UNROTATED, PositionMap, Region, Score
from .._shared.checks import check_position_tensor, has_values
from .._shared.dtensor import replicated
from .._shared.library import ops
from . import op
from .call import AttentionCall
from .flash_attn.bands import bands, cut
from .merge import merge_attention
from .rotation import rotate_pairs

_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
_ROTATED = Score("rope_attention", (Region(FIRST_KEY, UNROTATED, UNROTATED),))


def check_axes(
    op_name: str, freqs: RopeFreqs, positions: Tensor, q: Tensor, k: Tensor, call: AttentionCall
) -> None:
    """Raise ValueError or TypeError for options that exclude positions of several axes."""
    if freqs.axes is None:
        raise ValueError(f"{op_name}: positions must come with freqs of several axes, got one axis")
    if not isinstance(positions, Tensor):
        got = type(positions).__name__
        raise TypeError(
            f"{op_name}: positions must be a Tensor for freqs of several axes, got {got}"
        )
    refused = {
        "cu_seqlens": call.cu_seqlens,
        "q_start": call.q_start,
        "k_start": call.k_start,
        "log_decay (XPOS)": call.log_decay,
        "keys_stored": call.keys_stored or None,
    }
    for name, value in refused.items():
        if value is not None:
            raise ValueError(
                f"{op_name}: {name} must be None with positions of several axes, got one"
            )
    check_position_tensor(op_name, positions, q, _DTYPES)
    if positions.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op_name}: positions must not require grad, got one that does")
    batch, seqlen = k.shape[0], k.shape[1]
    fits = positions.dim() == 3 and len(positions) and positions.shape[1] in (1, batch)
    if not fits or positions.shape[2] != seqlen:
        raise ValueError(
            f"{op_name}: positions must be (axes, 1 or {batch}, {seqlen}) of all keys, "
            f"got shape {tuple(positions.shape)}"
        )
    _check_pairs(op_name, freqs.axes, len(positions), call)
    if q.shape[1] > seqlen:
        raise ValueError(
            f"{op_name}: q must have at most k's {seqlen} tokens with positions of several axes, "
            f"got {q.shape[1]}"
        )
    if call.granularity != 1:
        raise ValueError(
            f"{op_name}: a score must have no chunks with positions of several axes, got some"
        )
    by_head = [x for x in (call.inv_freq, call.pair_maps) if x is not None and x.dim() > 2]
    if any(x.shape[-2] > 1 for x in by_head):
        raise ValueError(
            f"{op_name}: frequencies and maps must be the same for all heads with positions of "
            "several axes, got others"
        )


def _check_pairs(op_name: str, axes: Tensor, count: int, call: AttentionCall) -> None:
    """Check the axis of every pair; positions have `count` axes."""
    if not isinstance(axes, Tensor):
        raise TypeError(f"{op_name}: axes must be a Tensor, got {type(axes).__name__}")
    like = call.inv_freq
    wanted = (torch.int32, like.shape[-1:], like.device)
    if (axes.dtype, axes.shape, axes.device) != wanted or not axes.is_contiguous():
        raise ValueError(
            f"{op_name}: axes must be contiguous int32 ({like.shape[-1]},) on {like.device}, "
            f"got {axes.dtype} {tuple(axes.shape)} on {axes.device}"
        )
    if has_values(axes) and not (axes.min() >= 0 and axes.max() < count):
        raise ValueError(
            f"{op_name}: axes must be from 0 to {count - 1} for positions of {count} axes, "
            f"got {axes.tolist()}"
        )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Tensor,
    positions: Tensor,
    call: AttentionCall,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Return out and lse.

    positions: (axes, 1 or batch, seqlen_k); the queries' are the last ones.
    """
    if not (q.numel() and k.numel()):
        return op.forward(q, k, v, call, backend)  # nothing rotates
    own = AttentionCall(
        call.inv_freq, score=_ROTATED, softmax_scale=call.softmax_scale,
        softcap=call.softcap, float32_results=True,
    )  # fmt: skip
    first, scale = k.shape[1] - q.shape[1], call.query_scale
    of_q = positions[..., positions.shape[-1] - q.shape[1] :]
    outs, lses = [], []
    for band in bands(call.starts, call.sliding_window, k.shape[1]):
        piece = cut(band, q, v, call)
        if piece is None:
            continue
        region, (_, left, *_) = call.regions[band.region], piece.arguments
        q_r = _rotated(q, region.q_map, of_q, axes, call, call.attention_factor**2)
        k_r = _rotated(k, region.k_map, positions, axes, call, 1.0)
        # Later keys are seen as if the band began at the diagonal.
        given = own._replace(
            query_scale=None if scale is None else scale[..., piece.first_row :].contiguous(),
            q_start=_start(first + piece.first_row, q),
            k_start=_start(band.shift, q),
            sliding_window=None if left is None else left + 1,
        )
        out, lse = op.forward(piece.rows(q_r), piece.keys(k_r), piece.keys(v), given, backend)
        outs.append(piece.put_rows(out))
        lses.append(piece.put_lse(lse))
    if not outs:  # no query sees a key
        return op.forward(q, k, v, call, backend)
    if call.sinks is not None:
        outs.append(outs[0].new_zeros(outs[0].shape))
        alone = call.sinks[:, None].expand(lses[0].shape).to(lses[0].dtype)
        lses.extend(replicated(outs[0], (alone,)))
    out, lse = merge_attention(outs, lses) if len(outs) > 1 else (outs[0], lses[0])
    return out.to(call.results_dtype(q.dtype)), lse


def _start(position: int, x: Tensor) -> Tensor:
    return torch.full((1,), position, dtype=torch.int32, device=x.device)


def _rotated(
    x: Tensor, by: PositionMap, positions: Tensor, axes: Tensor, call: AttentionCall, factor: float
) -> Tensor:
    if by.row is None:
        places = by(positions)
    else:  # each pair is an axis
        divisor, offset = (y[0, :, None, None] for y in call.pair_maps[by.row])
        places = PositionMap(by.modulus, divisor, by.floor, offset)(positions[axes.long()])
        if places.requires_grad:  # the op has no gradient of positions
            by = replicated(x, (places.movedim(0, -1).unsqueeze(-2), call.inv_freq))
            return rotate_pairs(x, *by, call, factor)
        axes = torch.arange(len(axes), dtype=torch.int32, device=axes.device)
    rope_args = replicated(x, (call.inv_freq, places, None, None, axes))
    options = {"attention_factor": factor, "interleaved": call.interleaved}
    options["rotary_offset"] = call.rotary_offset
    return ops.rope_fwd(x, None, *rope_args, **options)[0]
