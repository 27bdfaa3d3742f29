"""PermuteFormer in plain PyTorch, all scores at once: the oracle, O(seqlen**2), any derivatives.

Implementations of attention have `forward(q, k, v, powers, call) -> Result` and
`backward(dout, q, k, v, out, den, powers, call) -> (dq, dk, dv)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .._shared.dtypes import accumulator, without_autocast
from .permutations import Powers, cycles, source_dims

FEATURE_EPS = 1e-3  # of the feature map phi(x) = relu(x) + FEATURE_EPS (authors' code)


@dataclass(frozen=True)
class Call:
    """How q, k and v attend."""

    heads: int  # states: each serves a group of heads of q, or shares a head of k with others
    decay: Tensor | None = None  # (heads,) in (0, 1]; None: 1
    cu_seqlens: Tensor | None = None  # (sequences + 1,) int32
    causal: bool = True
    normalize: bool = True  # divide a row by the sum of its scores
    kv: Tensor | None = None  # the state before the first token, see PermuteFormerState
    key_sum: Tensor | None = None
    keep_state: bool = False


class Result(NamedTuple):
    """out (..., heads_q, value_dim) in q's dtype, and what was asked for besides, else empty."""

    out: Tensor
    den: Tensor  # (batch, heads_q, seqlen): the sum of each row's scores
    kv: Tensor  # the state after the last token
    key_sum: Tensor


def permute(
    q: Tensor, k: Tensor | None, powers: Powers, inverse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Gather the dims of q and k by the powers of permutations."""
    packed = powers.cu_seqlens is not None
    shape = torch.Size((1, *q.shape)) if packed else q.shape
    dims = source_dims(cycles(powers.permutations), powers.of_tokens(shape), inverse)
    q_perm = gather(q[None] if packed else q, dims).view_as(q)
    return q_perm, None if k is None else gather(k[None] if packed else k, dims).view_as(k)


def gather(x: Tensor, dims: Tensor) -> Tensor:
    """x: (batch, seqlen, heads, head_dim); dims: (batch or 1, seqlen, rows, head_dim)."""
    grouped = x.unflatten(2, (dims.shape[2], x.shape[2] // dims.shape[2]))
    return grouped.gather(-1, dims.unsqueeze(3).expand(grouped.shape)).flatten(2, 3)


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, powers: Powers, call: Call) -> Result:
    """out_i = sum_j s_ij v_j / sum_j s_ij with s_ij = decay**(i - j) <phi(q_i), phi(k_j)>."""
    packed, wide, dtype = call.cu_seqlens is not None, accumulator(q.dtype), q.dtype
    q, k = permute(q, k, powers)
    if packed:
        q, k, v = q[None], k[None], v[None]
    q, k, v = (x.transpose(1, 2).to(wide) for x in (q, k, v))
    q, k, heads = feature(q), feature(k), q.shape[1]
    scores = torch.einsum("bhid,bhjd->bhij", q, _expand(k, heads))
    scores = scores * _expand(_decays(call, q.shape[2], q), heads)
    out, den = torch.einsum("bhij,bhjf->bhif", scores, _expand(v, heads)), scores.sum(-1)
    if call.kv is not None:
        before = q * _expand(_decay_of_first(call, q), heads)[..., None]
        out = out + before @ _expand(call.kv, heads).to(wide)
        den = den + (before * _expand(call.key_sum, heads)[:, :, None].to(wide)).sum(-1)
    if call.normalize:
        out = out / den[..., None]
    out = out.transpose(1, 2).to(dtype).contiguous()
    none = out.new_empty(0, dtype=wide)
    kv, key_sum = _last(k, v, call) if call.keep_state else (none, none)
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
    """dq, dk and dv as an op has them; `forward` has derivatives of its own."""
    return backward_by_scans(dout, q, k, v, out, den, powers, call, _scan)


@without_autocast
def backward_by_scans(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    den: Tensor | None,
    powers: Powers,
    call: Call,
    scan: Callable[..., Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv by the sums that the forward is made of, without the feature map.

    scan(q, k, v, call, reverse): out_i = sum_j decay**|i - j| <q_i, k_j> v_j over j <= i, or j >= i
    in reverse, or all j when not causal. The normaliser is the sum over one more dim of v, of ones.
    """
    q, k = permute(q, k, powers)
    phi_q, phi_k, values = feature(q), feature(k), v
    if call.normalize:
        values = functional.pad(v, (0, 1), value=1.0)
        wide = dout.to(den.dtype)
        delta = (wide * out).sum(-1, keepdim=True)
        dout = (torch.cat([wide, -delta], -1) / den.transpose(-1, -2).unsqueeze(-1)).to(q.dtype)
    dq = scan(dout, values, phi_k, call, False)
    dk = scan(values, dout, phi_q, call, True)
    dv = scan(phi_k, phi_q, dout, call, True)[..., : v.shape[-1]]
    dk, dv = (x.unflatten(-2, (k.shape[-2], -1)).sum(-2) for x in (dk, dv))
    dq, dk = dq.masked_fill(q <= 0, 0.0), dk.masked_fill(k <= 0, 0.0)
    dq, dk = permute(dq, dk, powers, inverse=True)
    # Contiguous, as the fake says.
    return dq.to(q.dtype).contiguous(), dk.to(q.dtype).contiguous(), dv.to(q.dtype).contiguous()


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


def default_decay(k: Tensor) -> Tensor:
    """The authors' r_h = sigmoid(2 + 3 h / heads)."""
    heads = k.shape[-2]
    head = torch.arange(heads, dtype=torch.float32, device=k.device)
    return torch.sigmoid(2 + 3 * head / heads)


def feature(x: Tensor) -> Tensor:
    return torch.relu(x) + FEATURE_EPS


def _expand(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _decays(call: Call, seqlen: int, like: Tensor) -> Tensor:
    """(1, heads, seqlen, seqlen): decay**(i - j) where row i sees j, else 0."""
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


def _decay_of_first(call: Call, q: Tensor) -> Tensor:
    """(1, heads, seqlen): decay**(i + 1), for what came before the first token."""
    i = torch.arange(1, q.shape[2] + 1, device=q.device)
    if call.decay is None:
        return torch.ones_like(i, dtype=q.dtype).expand(1, call.heads, -1)
    return (call.decay.to(q.dtype)[:, None] ** i)[None]


def _last(k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The state after the last token."""
    k, v = _expand(k, call.heads), _expand(v, call.heads)
    seqlen = k.shape[2]
    decay = k.new_ones(call.heads) if call.decay is None else call.decay.to(k.dtype)
    age = torch.arange(seqlen - 1, -1, -1, device=k.device)
    decayed = k * (decay[:, None] ** age)[..., None]
    kv, key_sum = decayed.transpose(-1, -2) @ v, decayed.sum(2)
    if call.kv is not None:
        over_all = (decay**seqlen)[:, None]
        kv = kv + over_all[..., None] * call.kv.to(k.dtype)
        key_sum = key_sum + over_all * call.key_sum.to(k.dtype)
    return kv, key_sum


# -------------------------------------------------------------------------------------------------
# States by PyTorch's operations, O(seqlen): they have gradients of any order


@without_autocast
def state_of(k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """(batch, heads, head_dim, head_dim_v): what these tokens leave behind their last one.

    k: (batch, seqlen, heads_k, head_dim), permuted; decay: (heads,).
    """
    heads = k.shape[2] if decay is None else decay.shape[0]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (feature(k), v))
    if decay is not None:
        age = torch.arange(k.shape[1] - 1, -1, -1, device=k.device)
        k = k * (decay.to(k.dtype) ** age[:, None])[..., None]
    return torch.einsum("bjhd,bjhe->bhde", k, v)


@without_autocast
def seen(q: Tensor, state: Tensor, decay: Tensor | None) -> Tensor:
    """(batch, seqlen, heads, head_dim_v): what queries read of a state before the first of them."""
    heads = max(q.shape[2], state.shape[1])
    q = feature(q).repeat_interleave(heads // q.shape[2], 2)
    if decay is not None:
        after = torch.arange(1, q.shape[1] + 1, device=q.device)
        decays = decay.to(q.dtype).repeat_interleave(heads // decay.shape[0])
        q = q * (decays ** after[:, None])[..., None]
    return torch.einsum("bihd,bhde->bihe", q, state.repeat_interleave(heads // state.shape[1], 1))
