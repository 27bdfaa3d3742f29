"""Region attention over an installed flash-attention: one call for each region, merged exactly.

A region of granularity 1 is a band of keys beside the diagonal. Without the last `shift` keys and
the first `shift` rows it is plain causal attention, which every flash-attention computes. The
backward of each region gets out and lse of all keys, so that the merge needs no backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..merge import merge_attention
from ..regions import Layout
from .bands import Band, Dense, bands, cut
from .engine_check import best_engine, examine
from .engines import Engine

_LANES = 8  # every engine takes multiples of 8 as head_dim


@torch.no_grad()
def forward(
    q: list[Tensor], k: list[Tensor], v: Tensor, layout: Layout, engine: Engine | None = None
) -> tuple[Tensor, Tensor]:
    """One call of the engine for each region, and a merge.

    q, k: a rotated frame for each region, (batch, seqlen_q, heads_q, head_dim) and
        (batch, seqlen_k, heads_k, head_dim), or (total, heads, head_dim) with layout.cu_seqlens;
        v like k[0]; float16 or bfloat16. layout.row_scale is multiplied onto q and rounded there.
    engine: None for the best that is installed.

    Returns: out like q[0] and lse (batch, heads_q, seqlen_q), or (heads_q, total), float32.
    Raises: NotImplementedError for a layout, dtype or machine that no engine takes.
    """
    engine, unit, pieces = _prepare(q, v, layout, engine)
    outs, lses = [], []
    for band, piece in pieces:
        q_r = _scaled(q[band.region], layout)
        k_r, values = piece.keys(k[band.region]), piece.keys(v)
        out, lse = engine.forward(piece.rows(q_r), k_r, values, *piece.arguments)
        outs.append(piece.put_rows(out))
        lses.append(piece.put_lse(lse if unit == 1.0 else lse * unit))
    if not outs:
        return _without_keys(q[0])
    if len(outs) == 1:
        return outs[0].contiguous(), lses[0]
    return merge_attention(outs, lses)


@torch.no_grad()
def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    engine: Engine | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of every frame of q and k, float32 and zero outside its region, and of v."""
    engine, unit, pieces = _prepare(q, v, layout, engine)
    wide = torch.promote_types(v.dtype, torch.float32)
    dq = [torch.zeros((), dtype=wide, device=x.device).expand(x.shape) for x in q]
    dk = [torch.zeros((), dtype=wide, device=x.device).expand(x.shape) for x in k]
    dv = torch.zeros((), dtype=wide, device=v.device).expand(v.shape)
    lse = lse if unit == 1.0 else lse / unit
    for band, piece in pieces:
        r = band.region
        q_r, k_r, values = _scaled(q[r], layout), k[r], v
        dout_r, out_r, dlse_r = dout, out, dlse
        if dlse is not None and not engine.takes_dlse(q_r):
            q_r, k_r, values = (F.pad(x, (0, _LANES)) for x in (q_r, k_r, values))
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
        dq[r] = _scaled(piece.put_rows(dq_r), layout)
        dk[r] = piece.put_keys(dk_r)
        dv = dv + piece.put_keys(dv_r)
    return [x.contiguous() for x in dq], [x.contiguous() for x in dk], dv.to(v.dtype).contiguous()


def _prepare(
    q: list[Tensor], v: Tensor, layout: Layout, engine: Engine | None
) -> tuple[Engine, float, list[tuple[Band, Dense]]]:
    """The engine, what turns its lse into a natural logarithm, and the calls to make."""
    if layout.granularity != 1 or len(layout.starts) > 2:
        raise NotImplementedError(
            "flash_attn: composes one or two regions of granularity 1, "
            f"got {len(layout.starts)} of granularity {layout.granularity}"
        )
    dtypes = Engine.dtypes if engine is None else engine.dtypes
    if v.dtype not in dtypes:
        raise NotImplementedError(f"flash_attn: v must be one of {list(dtypes)}, got {v.dtype}")
    engine = engine or best_engine(q[0])
    if q[0].numel() == 0 or v.numel() == 0:
        return engine, 1.0, []
    found = examine(engine, q[0])
    pieces = [
        (band, cut(band, q[0], v, layout, found.negative_right))
        for band in bands(layout, v.shape[-3])
    ]
    return engine, found.lse_unit, [(band, piece) for band, piece in pieces if piece is not None]


def _scaled(x: Tensor, layout: Layout) -> Tensor:
    if layout.row_scale is None:
        return x
    return (x * layout.row_scale[:, None, None]).to(x.dtype)


def _with_dlse(dout: Tensor, dlse: Tensor, out: Tensor, engine: Engine) -> tuple[Tensor, Tensor]:
    """dout and out with eight lanes more, so that rowsum(dout * out) falls by dlse.

    An engine without a gradient of lse computes that sum by itself. Where q, k and v have zeros in
    these lanes nothing else changes. Three lanes of bfloat16 hold dlse to 24 bits.
    """
    head_dim = dout.shape[-1]
    if head_dim + _LANES > engine.max_head_dim:
        raise NotImplementedError(
            f"flash_attn: the gradient of lse takes a head_dim up to "
            f"{engine.max_head_dim - _LANES} with {engine.name}, got {head_dim}"
        )
    rest, terms = dlse.transpose(-1, -2), []
    for _ in range(3):
        terms.append(rest.to(dout.dtype))
        rest = rest - terms[-1]
    lanes = F.pad(torch.stack(terms, dim=-1), (0, _LANES - len(terms)))
    return torch.cat((dout, lanes), dim=-1), F.pad(out, (0, _LANES), value=-1.0)


def _without_keys(q: Tensor) -> tuple[Tensor, Tensor]:
    rows = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros(q.shape), q.new_full(rows, -torch.inf, dtype=wide)
