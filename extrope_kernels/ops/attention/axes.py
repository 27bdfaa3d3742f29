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
from .._shared.library import ops
from . import op
from .call import AttentionCall
from .flash_attn.bands import bands, cut
from .merge import merge_attention
from .rotation import positions as indices
from .rotation import row_scale

_ROTATED = Score("rope_attention", (Region(FIRST_KEY, UNROTATED, UNROTATED),))


def check_axes(
    op_name: str, freqs: RopeFreqs, positions: Tensor | None, k: Tensor, call: AttentionCall
) -> None:
    """Raise ValueError or TypeError for options that exclude positions of several axes."""
    if freqs.axes is None:
        raise ValueError(f"{op_name}: positions must come with freqs of several axes, got one axis")
    if not isinstance(positions, Tensor):
        got = type(positions).__name__
        raise TypeError(
            f"{op_name}: positions must be a Tensor for freqs of several axes, got {got}"
        )
    batch, seqlen = k.shape[0], k.shape[1]
    if positions.dim() != 3 or positions.shape[1] not in (1, batch) or positions.shape[2] != seqlen:
        raise ValueError(
            f"{op_name}: positions must be (axes, 1 or {batch}, {seqlen}) of all keys, "
            f"got shape {tuple(positions.shape)}"
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
            raise ValueError(f"{op_name}: positions of several axes go without {name}, got one")
    if call.granularity != 1:
        raise ValueError(f"{op_name}: positions of several axes need regions without chunks")
    if call.pair_maps is not None and call.pair_maps.shape[2] > 1:
        raise ValueError(f"{op_name}: positions of several axes need maps that all heads share")


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
    scale = row_scale(indices(q, k, call)[0], call, torch.float32)
    own = AttentionCall(
        call.inv_freq, score=_ROTATED, softmax_scale=call.softmax_scale, softcap=call.softcap,
        float32_results=True,
    )  # fmt: skip
    of_q = positions[..., positions.shape[-1] - q.shape[1] :]
    outs, lses = [], []
    for band in bands(call.starts, call.sliding_window, k.shape[1]):
        piece = cut(band, q, v, call, negative_right=False)
        if piece is None:
            continue
        region, (_, left, *_) = call.regions[band.region], piece.arguments
        q_r = _rotated(q, region.q_map, of_q, axes, call, call.attention_factor**2)
        k_r = _rotated(k, region.k_map, positions, axes, call, 1.0)
        given = own._replace(
            query_scale=None
            if scale is None
            else piece.rows(scale.expand(len(q), -1)).contiguous(),
            sliding_window=None if left is None else left + 1,
        )
        out, lse = op.forward(piece.rows(q_r), piece.keys(k_r), piece.keys(v), given, backend)
        outs.append(piece.put_rows(out))
        lses.append(piece.put_lse(lse))
    if call.sinks is not None:
        outs.append(outs[0].new_zeros(outs[0].shape))
        lses.append(call.sinks[:, None].expand(lses[0].shape).to(lses[0].dtype))
    out, lse = merge_attention(outs, lses) if len(outs) > 1 else (outs[0], lses[0])
    return out.to(call.results_dtype(q.dtype)), lse


def _rotated(
    x: Tensor, by: PositionMap, positions: Tensor, axes: Tensor, call: AttentionCall, factor: float
) -> Tensor:
    if by.row is None:
        places = by(positions)
    else:  # each pair is an axis
        divisor, offset = (y[0, :, None, None] for y in call.pair_maps[by.row])
        p = positions.double()[axes.long()]
        p = torch.remainder(p, by.modulus) if by.modulus else p
        places = ((p / divisor).floor() if by.floor else p / divisor) + offset
        axes = torch.arange(len(axes), dtype=torch.int32, device=axes.device)
    rope_args = (call.inv_freq, places, None, None, axes)
    options = {"attention_factor": factor, "interleaved": call.interleaved}
    return ops.rope_fwd(x, None, *rope_args, **options)[0]
