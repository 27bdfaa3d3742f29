"""From PyTorch tensors to launches of the attention kernels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ..._shared.attention_call import AttentionCall
from ..._shared.attention_checks import refuse_softmax_options
from ..._shared.triton.launch import chip_of, layouts_of, planned
from .plans import backward_plans, forward_plans


def forward(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """One softmax over the keys of every region, in two launches; checks what it is given.

    q, k: raw, (batch, seqlen_q, heads_q, head_dim) and (batch, seqlen_k, heads_k, head_dim), or
    (total, heads, head_dim) with call.cu_seqlens; v like k; all contiguous in the last dimension.
    Returns out like q and the natural log of the sum of exponentials, float32
    (batch, heads_q, seqlen_q) or (heads_q, total).
    """
    refuse_softmax_options("attention", call)
    plan = planned(forward_plans, _key((q, k, v), call), q, k, v, call)
    rope_args = call.inv_freq, call.log_decay, call.cu_seqlens
    k_frames = empty(plan.k_frames, k.dtype, k.device) if plan.k_frames[0] else None
    if plan.rotate is not None:
        plan.rotate(None, k, None, k_frames, *rope_args)
    out = empty(q.shape, q.dtype, q.device)
    lse = empty(plan.lse, torch.float32, q.device)
    if plan.attend is not None:
        plan.attend(q, k, k_frames, v, out, lse, *rope_args)
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
    """The gradients of raw q and k, and of v, in their dtypes, in four launches.

    dout: like out, contiguous in the last dimension; dlse: like lse, or None; the rest as in
    `forward`.
    """
    refuse_softmax_options("attention", call)
    lse = lse.contiguous()
    if dlse is not None:
        dlse = dlse.contiguous()
    given = dout, dlse, q, k, v, out, lse
    plan = planned(backward_plans, _key(given, call), *given, call)
    device, cu_seqlens = q.device, call.cu_seqlens
    rope_args = call.inv_freq, call.log_decay, cu_seqlens
    q_frames = empty(plan.q_frames, q.dtype, device)
    k_frames = empty(plan.k_frames, k.dtype, device)
    delta = empty(lse.shape, torch.float32, device)
    dq_frames = empty(plan.q_frames, torch.float32, device)
    dk_frames = empty(plan.dk_frames, torch.float32, device)
    dq, dk, dv = (empty(x.shape, x.dtype, device) for x in (q, k, v))
    keys = k, k_frames, v
    if plan.rotate is not None:
        plan.rotate(q, k, q_frames, k_frames, *rope_args)
    if plan.dq is not None:
        plan.dq(q_frames, *keys, out, dout, dlse, lse, delta, dq_frames, cu_seqlens)
    if plan.dkv is not None:
        plan.dkv(q_frames, *keys, dout, lse, delta, dk_frames, dv, cu_seqlens)
    if plan.unrotate is not None:
        plan.unrotate(dq, dk, dq_frames, dk_frames, *rope_args)
    return dq, dk, dv


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _key(tensors: tuple[Tensor | None, ...], call: AttentionCall) -> Hashable:
    """All that plans, and the checks before them, depend on."""
    return (
        chip_of(tensors[-1]),
        layouts_of(*tensors, call.inv_freq, call.cu_seqlens, call.log_decay),
        tuple(call.starts),
        call.granularity,
        tuple(call.maps),
        call.softmax_scale,
        call.log_n,
        call.attention_factor,
        call.interleaved,
    )
