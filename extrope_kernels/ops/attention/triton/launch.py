"""From PyTorch tensors to launches of the attention kernels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..._shared.triton.launch import chip_of, layouts_of, planned
from ..call import AttentionCall
from .frames import placed
from .plans import backward_plans, forward_plans


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of every region, in two launches.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
    (total, heads, head_dim) with call.cu_seqlens; v like k, of any head_dim; all contiguous in the
    last dimension. Returns out like q, of v's head_dim, and the natural log of the sum of
    exponentials, float32 (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    call = _contiguous(call)
    plan = planned(forward_plans, _key((q, k, v), call), q, k, v, call)
    rope_args = call.inv_freq, call.log_decay, call.cu_seqlens
    k_frames = empty(plan.k_frames, k.dtype, k.device) if plan.k_frames[0] else None
    if plan.rotate is not None:  # keys alone: what belongs to queries is None
        plan.rotate(None, k, None, k_frames, *rope_args, None, call.k_start, None)
    out = empty(plan.out, call.results_dtype(q.dtype), q.device)
    lse = empty(plan.lse, torch.float32, q.device)
    if plan.attend is not None:
        q_frame = None if plan.q_frame is None else empty(plan.q_frame, q.dtype, q.device)
        of_queries = call.q_start, call.k_start, call.query_scale, call.sinks
        plan.attend(q, k, k_frames, v, out, lse, q_frame, *rope_args, *of_queries)
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of raw q and k, and of v, in their dtypes or float32, in four launches.

    dout: like out, contiguous in the last dimension; dlse: like lse, or None; the rest as in
    `forward`.
    """
    call = _contiguous(call)
    lse = lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    given = dout, dlse, q, k, v, out, lse
    plan = planned(backward_plans, _key(given, call), *given, call)
    device, cu_seqlens = q.device, call.cu_seqlens
    starts = call.q_start, call.k_start
    rope_args = call.inv_freq, call.log_decay, cu_seqlens, *starts, call.query_scale
    q_frames = empty(plan.q_frames, q.dtype, device)
    k_frames = empty(plan.k_frames, k.dtype, device)
    delta = empty_like(lse, torch.float32)
    dq_frames = empty(plan.q_frames, torch.float32, device)
    dk_frames = empty(plan.dk_frames, torch.float32, device)
    dq, dk, dv = (empty_like(x, call.results_dtype(x.dtype)) for x in (q, k, v))
    keys = k, k_frames, v
    if plan.rotate is not None:
        plan.rotate(q, k, q_frames, k_frames, *rope_args)
    if plan.dq is not None:
        plan.dq(q_frames, *keys, out, dout, dlse, lse, delta, dq_frames, cu_seqlens, *starts)
    if plan.dkv is not None:
        plan.dkv(q_frames, *keys, dout, lse, delta, dk_frames, dv, cu_seqlens, *starts)
    if plan.unrotate is not None:
        plan.unrotate(dq, dk, dq_frames, dk_frames, *rope_args)
    return dq, dk, dv


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous; takes PyTorch half the time that a shape of its own does."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _key(tensors: tuple[Tensor | None, ...], call: AttentionCall) -> Hashable:
    """All that plans depend on."""
    return (
        chip_of(tensors[-1]),
        layouts_of(*tensors, call.inv_freq, call.cu_seqlens, call.log_decay),
        layouts_of(call.sinks, call.query_scale, call.q_start, call.k_start),
        call.score,
        call.stored,
        call.softmax_scale,
        call.log_n,
        call.attention_factor,
        call.interleaved,
        call.softcap,
        call.sliding_window,
        call.float32_results,
    )


def _contiguous(call: AttentionCall) -> AttentionCall:
    """The call, of which kernels take small tensors without strides."""
    # Costs less than a loop, which every launch would wait for.
    if call.sinks is None and call.query_scale is None and not placed(call):
        return call
    names = ("sinks", "query_scale", "q_start", "k_start")
    small = {name: getattr(call, name) for name in names}
    return replace(call, **{name: x.contiguous() for name, x in small.items() if x is not None})
