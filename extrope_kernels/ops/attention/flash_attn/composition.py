"""Attention over an installed flash-attention: one call for each region, merged exactly.

A region of granularity 1 is a band of keys beside the diagonal. Without the last `shift` keys and
the first `shift` rows it is plain causal attention, which every flash-attention computes. The
backward of each region gets out and lse over all keys: so the merge needs no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._math.dtypes import accumulator
from ..call import AttentionCall, lse_shape
from ..merge import merge_attention
from ..places import rotate, unrotate
from .bands import Band, Dense, bands, cut
from .engines import Engine, best_engine

_DIMS = 8  # every engine takes a head_dim that is a multiple of 8


@torch.no_grad()
def forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, engine: Engine | None = None
) -> tuple[Tensor, Tensor]:
    """Attend by one engine call per region, and merge.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
        (total, heads, head_dim) with call.cu_seqlens; v like k; float16 or bfloat16. Factors of
        single queries (query_scale) multiply the rotated q, which is rounded again.
    engine: None for the best one installed.

    Returns: out like q and lse (batch, heads_q, seqlen_q), or (heads_q, total), float32.
    Raises: NotImplementedError for regions, a dtype or a machine that no engine takes.
    """
    engine, pieces = _prepare(q, v, call, engine)
    frames, scale = rotate(q, k, call), call.query_scale
    outs, lses = [], []
    for band, piece in pieces:
        q_r, k_r = (x[band.region] for x in frames)
        q_r, k_r, values = _scaled(q_r, scale), piece.keys(k_r), piece.keys(v)
        out, lse = engine.forward(piece.rows(q_r), k_r, values, *piece.arguments)
        outs.append(piece.put_rows(out))
        lses.append(piece.put_lse(lse))
    if call.sinks is not None or not outs:
        out, lse = _without_keys(q, call.sinks)
        outs.append(out)
        lses.append(lse)
    # The engine has rounded each to 16 bits, even for float32_results.
    outs = [out.to(call.results_dtype(q.dtype)) for out in outs]
    if len(outs) == 1:
        return outs[0].contiguous(), lses[0].contiguous()
    return merge_attention(outs, lses)


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    engine: Engine | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients of q, k and v, like reference.backward."""
    engine, pieces = _prepare(q, v, call, engine)
    frames, scale = rotate(q, k, call), call.query_scale
    wide = accumulator(v.dtype)
    dq, dk = (
        [torch.zeros((), dtype=wide, device=x.device).expand(x.shape) for x in side]
        for side in frames
    )
    dv = torch.zeros((), dtype=wide, device=v.device).expand(v.shape)
    for band, piece in pieces:
        r = band.region
        q_r, k_r, values = _scaled(frames[0][r], scale), frames[1][r], v
        dout_r, out_r, dlse_r = dout, out, dlse
        if dlse is not None and not engine.takes_dlse:
            q_r, k_r, values = (F.pad(x, (0, _DIMS)) for x in (q_r, k_r, values))
            dout_r, out_r = _with_dlse(dout, dlse, out, engine)
            dlse_r = None
        grads = engine.backward(
            piece.rows(dout_r),
            None if dlse_r is None else piece.row_lse(dlse_r),
            piece.rows(q_r),
            piece.keys(k_r),
            piece.keys(values),
            piece.rows(out_r),
            piece.row_lse(lse),
            *piece.arguments,
        )
        dq_r, dk_r, dv_r = (x[..., : v.shape[-1]].to(wide) for x in grads)
        dq[r] = _scaled(piece.put_rows(dq_r), scale)
        dk[r] = piece.put_keys(dk_r)
        dv = dv + piece.put_keys(dv_r)
    dq, dk = ([x.contiguous() for x in grads] for grads in (dq, dk))
    return *unrotate(dq, dk, q, k, call), dv.to(call.results_dtype(v.dtype)).contiguous()


def _prepare(
    q: Tensor, v: Tensor, call: AttentionCall, engine: Engine | None
) -> tuple[Engine, list[tuple[Band, Dense]]]:
    """Return the engine and the calls to make."""
    if call.q_start is not None or call.k_start is not None:
        raise NotImplementedError("flash_attn: q_start and k_start must be None, got one")
    if v.shape[-1] != q.shape[-1]:
        raise NotImplementedError(
            f"flash_attn: v must have q's head_dim {q.shape[-1]}, got {v.shape[-1]}"
        )
    if call.granularity != 1:
        raise NotImplementedError(
            f"flash_attn: a score's granularity must be 1, got {call.granularity}"
        )
    dtypes = Engine.dtypes if engine is None else engine.dtypes
    if v.dtype not in dtypes:
        raise NotImplementedError(f"flash_attn: v must be one of {list(dtypes)}, got {v.dtype}")
    engine = engine or best_engine(q)
    if q.numel() == 0 or v.numel() == 0:
        return engine, []
    found = bands(call.starts, call.sliding_window, v.shape[-3])
    pieces = [(band, cut(band, q, v, call)) for band in found]
    return engine, [(band, piece) for band, piece in pieces if piece is not None]


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else (x * scale[..., None, None]).to(x.dtype)


def _with_dlse(dout: Tensor, dlse: Tensor, out: Tensor, engine: Engine) -> tuple[Tensor, Tensor]:
    """Append eight dims to dout and out, so that rowsum(dout * out) falls by dlse.

    An engine without a gradient of lse computes that sum itself. q, k and v have zeros in these
    dims, so nothing else changes. Three dims of bfloat16 hold dlse to 24 bits.
    """
    head_dim = dout.shape[-1]
    if head_dim + _DIMS > engine.max_head_dim:
        raise NotImplementedError(
            f"flash_attn: head_dim must be at most {engine.max_head_dim - _DIMS} for the gradient "
            f"of lse with {engine.name}, got {head_dim}"
        )
    rest, terms = dlse.transpose(-1, -2), []
    for _ in range(3):
        terms.append(rest.to(dout.dtype))
        rest = rest - terms[-1]
    more = F.pad(torch.stack(terms, dim=-1), (0, _DIMS - len(terms)))
    return torch.cat((dout, more), dim=-1), F.pad(out, (0, _DIMS), value=-1.0)


def _without_keys(q: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attend to no key, or only to the sinks: one more set for the merge."""
    if sinks is None:
        sinks = q.new_full((q.shape[-2],), -torch.inf, dtype=accumulator(q.dtype))
    return q.new_zeros(q.shape[-1:]).expand(q.shape), sinks[:, None].expand(lse_shape(q))
