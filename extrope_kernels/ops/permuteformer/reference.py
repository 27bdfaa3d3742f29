"""PermuteFormer in plain PyTorch, all scores at once: the oracle, O(seqlen**2), differentiable.

Implementations of attention have `forward(q, k, v, powers, call) -> Result` and
`backward(dout, q, k, v, out, den, powers, call) -> (dq, dk, dv)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._math.dtypes import accumulator, without_autocast
from .permutations import Powers
from .scans import Call, Result, backward_by_scans, feature, permute


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, powers: Powers, call: Call) -> Result:
    """Compute sum_j s_ij v_j / sum_j s_ij with s_ij = decay**(i - j) <phi(q_i), phi(k_j)>."""
    packed, wide = call.cu_seqlens is not None, accumulator(q.dtype)
    q, k = permute(q, k, powers)
    if packed:
        q, k, v = q[None], k[None], v[None]
    rows, keys, values = (x.to(wide) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (feature(rows), feature(keys), values))
    heads, first = q.shape[1], None
    scores = torch.einsum("bhid,bhjd->bhij", q, _expand(k, heads))
    scores = scores * _expand(_decays(call, q.shape[2], q), heads)
    out, den = torch.einsum("bhij,bhjf->bhif", scores, _expand(v, heads)), scores.sum(-1)
    if call.kv is not None:
        first = torch.cat([call.kv, call.key_sum.unsqueeze(-1)], -1).to(wide)
        before = seen(rows, first, call.decay).transpose(1, 2)
        out, den = out + before[..., :-1], den + before[..., -1]
    if call.normalize:
        out = out / den[..., None]
    out = out.transpose(1, 2).contiguous()
    none = out.new_empty(0, dtype=wide)
    kv = key_sum = none
    if call.keep_state:
        after = next_state(first, keys, functional.pad(values, (0, 1), value=1.0), call.decay)
        kv, key_sum = after[..., :-1].contiguous(), after[..., -1].contiguous()
    if packed:
        out, den = out[0], den[0]
    return Result(out, den.contiguous() if call.normalize else none, kv, key_sum)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    den: Tensor | None,
    powers: Powers,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, for an op; `forward` has its own derivatives."""
    return backward_by_scans(dout, q, k, v, out, den, powers, call, _scan)


def _scan(q: Tensor, k: Tensor, v: Tensor, call: Call, reverse: bool) -> Tensor:
    wide, packed = accumulator(q.dtype), call.cu_seqlens is not None
    if packed:
        q, k, v = q[None], k[None], v[None]
    heads = max(x.shape[2] for x in (q, k, v))
    q, k, v = (_expand(x.transpose(1, 2).to(wide), heads) for x in (q, k, v))
    decays = _expand(_decays(call, q.shape[2], q), heads)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (decays.mT if reverse else decays)
    out = torch.einsum("bhij,bhjf->bhif", scores, v).transpose(1, 2)
    return out[0] if packed else out


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _decays(call: Call, seqlen: int, like: Tensor) -> Tensor:
    """Return (1, heads, seqlen, seqlen): decay**(i - j) where row i sees j, else 0."""
    i = torch.arange(seqlen, device=like.device)
    distance = i[:, None] - i
    seen = distance >= 0 if call.causal else distance == distance
    if call.cu_seqlens is not None:
        sequence = torch.searchsorted(call.cu_seqlens, i.to(torch.int32), right=True)
        seen = seen & (sequence[:, None] == sequence)
    if call.decay is None:
        return seen.to(like.dtype).expand(1, call.heads, -1, -1)
    powers = call.decay.to(like.dtype)[:, None, None] ** distance.abs()
    return torch.where(seen, powers, 0.0)[None]


# -------------------------------------------------------------------------------------------------
# States by PyTorch's operations, O(seqlen), with gradients of any order


@without_autocast
def state_of(k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """Return the state after these tokens: (batch, heads, head_dim, head_dim_v).

    k: (batch, seqlen, heads_k, head_dim), permuted; decay: (heads,).
    """
    heads = k.shape[2] if decay is None else decay.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (feature(k), v))
    if decay is not None:
        age = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
        k = k * (decay.to(k.dtype) ** age[:, None])[..., None]
    return torch.einsum("bjhd,bjhe->bhde", k, v)


def next_state(first: Tensor | None, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """Return the state after these tokens and those before them, whose state is `first`."""
    after = state_of(k, v, decay)
    if first is None:
        return after
    over_all = 1.0 if decay is None else (decay.to(k.dtype) ** k.shape[1])[:, None, None]
    return after + over_all * first


@without_autocast
def seen(q: Tensor, state: Tensor, decay: Tensor | None) -> Tensor:
    """Read an earlier state by the queries: (batch, seqlen, heads, head_dim_v)."""
    heads = max(q.shape[2], state.shape[1])
    q = feature(q).repeat_interleave(heads // q.shape[2], 2)
    if decay is not None:
        after = torch.arange(1, q.shape[1] + 1, device=q.device)
        decays = decay.to(q.dtype).repeat_interleave(heads // decay.shape[0])
        q = q * (decays ** after[:, None])[..., None]
    return torch.einsum("bihd,bhde->bihe", q, state.repeat_interleave(heads // state.shape[1], 1))
