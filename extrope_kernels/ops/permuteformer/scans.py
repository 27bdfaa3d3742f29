"""Shared by the implementations: the call, the permutation by a gather, gradients by scans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .._math.dtypes import accumulator, without_autocast
from .permutations import Powers, cycles, source_dims

FEATURE_EPS = 1e-3  # in the feature map phi(x) = relu(x) + FEATURE_EPS (authors' code)


@dataclass(frozen=True)
class Call:
    """Options of the attention over q, k and v."""

    heads: int  # states: each serves a group of heads of q, or shares a head of k with others
    decay: Tensor | None = None  # (heads,) in (0, 1]; None: 1
    cu_seqlens: Tensor | None = None  # (sequences + 1,) int32
    causal: bool = True
    normalize: bool = True  # divide a row by the sum of its scores
    kv: Tensor | None = None  # the state before the first token, see PermuteFormerState
    key_sum: Tensor | None = None
    keep_state: bool = False


class Result(NamedTuple):
    """out (..., heads_q, value_dim); the others are empty unless asked for.

    All are in float32, or float64 for float64 tensors: a backward takes out . dout, which is wrong
    by more than a gradient's own rounding where out has been rounded to 16 bits.
    """

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
    """Gather dims (batch or 1, seqlen, rows, head_dim) of x (batch, seqlen, heads, head_dim)."""
    grouped = x.unflatten(2, (dims.shape[2], x.shape[2] // dims.shape[2]))
    return grouped.gather(-1, dims.unsqueeze(3).expand(grouped.shape)).flatten(2, 3)


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
    """Return dq, dk and dv by the forward's own sums, without the feature map.

    scan(q, k, v, call, reverse): out_i = sum_j decay**|i - j| <q_i, k_j> v_j over j <= i, or j >= i
    in reverse, or all j if not causal. The normaliser is the sum over one more dim of v, of ones.
    """
    dtype, wide = q.dtype, accumulator(q.dtype)
    q, k = permute(q.to(wide), k.to(wide), powers)
    phi_q, phi_k, values, dout = feature(q), feature(k), v.to(wide), dout.to(wide)
    if call.normalize:
        values = functional.pad(values, (0, 1), value=1.0)
        delta = (dout * out).sum(-1, keepdim=True)
        dout = torch.cat([dout, -delta], -1) / den.transpose(-1, -2).unsqueeze(-1)
    dq = scan(dout, values, phi_k, call, False)
    dk = scan(values, dout, phi_q, call, True)
    dv = scan(phi_k, phi_q, dout, call, True)[..., : v.shape[-1]]
    dk, dv = (x.unflatten(-2, (k.shape[-2], -1)).sum(-2) for x in (dk, dv))
    dq, dk = dq.masked_fill(q <= 0, 0.0), dk.masked_fill(k <= 0, 0.0)
    dq, dk = permute(dq, dk, powers, inverse=True)
    # Contiguous, as the fake says.
    return dq.to(dtype).contiguous(), dk.to(dtype).contiguous(), dv.to(dtype).contiguous()


def default_decay(k: Tensor) -> Tensor:
    """Return the authors' r_h = sigmoid(2 + 3 h / heads)."""
    heads = k.shape[-2]
    head = torch.arange(heads, dtype=accumulator(k.dtype), device=k.device)
    return torch.sigmoid(2 + 3 * head / heads)


def feature(x: Tensor) -> Tensor:
    """Return the feature map phi(x)."""
    return torch.relu(x) + FEATURE_EPS
