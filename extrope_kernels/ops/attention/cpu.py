"""Attention over regions on the CPU, by the compiled kernels (csrc/cpu/attention.cpp).

The two core ops take the frames of q and k, one a region, and what `Layout` says. They have no fake
and no gradient of their own: the public ops wrap them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _ext
from .regions import Layout, Turns

_BY = (
    "Tensor? row_scale, Tensor? cu_seqlens, int[] starts, int granularity, float softmax_scale, "
    "Tensor[] q_turns, Tensor[] k_turns, bool interleaved"
)

_library = torch.library.Library("extrope", "FRAGMENT")
_library.define(f"region_attn_fwd(Tensor[] q, Tensor[] k, Tensor v, {_BY}) -> (Tensor, Tensor)")
_library.define(
    "region_attn_bwd(Tensor dout, Tensor? dlse, Tensor[] q, Tensor[] k, Tensor v, Tensor out, "
    f"Tensor lse, {_BY}) -> (Tensor[], Tensor[], Tensor)"
)


def forward(q: list[Tensor], k: list[Tensor], v: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attend to the keys of every region.

    q: a tensor a region, (batch, seqlen_q, heads_q, head_dim), or (total, ...) with
        layout.cu_seqlens; float32, bfloat16 or float16. With layout.turns all are raw q, and those
        of k raw k in float32.
    k, v: (batch, seqlen_k, heads_k, head_dim).
    out: like q; lse: (batch, heads_q, seqlen_q), or (heads_q, total); float32.
    """
    _load()
    return torch.ops.extrope.region_attn_fwd(q, k, v, *_by(layout))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: list[Tensor],
    k: list[Tensor],
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of `forward`: dq and dk in float32, a tensor a region, and dv like v.

    layout.turns: in float32 alone; dq and dk are then one tensor each, those of raw q and k.
    """
    _load()
    return torch.ops.extrope.region_attn_bwd(dout, dlse, q, k, v, out, lse, *_by(layout))


def _by(layout: Layout):
    turns = layout.turns or Turns([], [], False)
    return (
        layout.row_scale,
        layout.cu_seqlens,
        list(layout.starts),
        layout.granularity,
        layout.softmax_scale,
        turns.q,
        turns.k,
        turns.interleaved,
    )


def _load() -> None:
    if (reason := _ext.load("cpu")) is not None:
        raise RuntimeError(f"region_attn: the CPU library cannot be used: {reason}")
