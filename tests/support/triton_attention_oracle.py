"""Attention in Triton against dense masks in float64: calls, the formula and the comparison."""

from __future__ import annotations

import itertools

import torch
from attention_oracle import rounding_noise, worse
from extrope_kernels.ops._shared.attention_call import AttentionCall
from extrope_kernels.ops.attention.frames import rotate
from rope_oracle import DEVICE, INTERPRETED
from torch import Tensor

from extrope_kernels import methods
from extrope_kernels.ops.attention import reference
from extrope_kernels.ops.attention.triton import backward, forward
from extrope_kernels.scores import Score, query_scale
from extrope_kernels.testing import assert_within_budget


def call_of(score: Score, head_dim: int = 16, cu_seqlens=None, **options) -> AttentionCall:
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32, device=DEVICE)
    inv_freq = options.pop("inv_freq", methods.rope(head_dim).inv_freq).to(DEVICE)
    told = {"starts": tuple(score.starts), "granularity": score.granularity, "maps": score.maps}
    return AttentionCall(inv_freq, cu_seqlens, **{"softmax_scale": 0.2, **told, **options})


def inputs(seqlen_q, seqlen_k, heads_q=1, heads_k=1, head_dim=16, dtype=torch.float32, batch=(1,)):
    def randn(seqlen: int, heads: int) -> Tensor:
        return torch.randn(*batch, seqlen, heads, head_dim).to(DEVICE, dtype)

    return randn(seqlen_q, heads_q), randn(seqlen_k, heads_k), randn(seqlen_k, heads_k)


def positions_of(call: AttentionCall, seqlen_q: int, seqlen_k: int) -> list[int]:
    if call.cu_seqlens is None:
        return [row + seqlen_k - seqlen_q for row in range(seqlen_q)]
    bounds = call.cu_seqlens.tolist()
    return [row - begin for begin, end in itertools.pairwise(bounds) for row in range(begin, end)]


def regions_of(call: AttentionCall, seqlen_q: int, seqlen_k: int) -> Tensor:
    """(seqlen_q, seqlen_k): the region that holds each pair, -1 where i does not see j."""
    region = torch.full((seqlen_q, seqlen_k), -1)
    for row, position in enumerate(positions_of(call, seqlen_q, seqlen_k)):
        begin = 0 if call.cu_seqlens is None else row - position
        block = position // call.granularity * call.granularity
        for r, start in enumerate(call.starts):
            first = max(0, block + start)
            region[row, begin + first : begin + max(0, position + 1)] = r
    return region


def frames_in(q, k, call: AttentionCall, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """q and k as every region sees them, rounded as the kernels round them here."""
    if dtype != torch.bfloat16 or not INTERPRETED:
        return rotate(q.to(dtype), k.to(dtype), call)

    def truncated(x: Tensor) -> Tensor:  # the interpreter's bfloat16; with x's gradient
        cut = (x.detach().view(torch.int32) & -65536).view(torch.float32)
        return (x + (cut - x).detach()).to(dtype)

    return tuple([truncated(x) for x in side] for side in rotate(q.float(), k.float(), call))


def dense(q, k, v, call: AttentionCall, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """out and lse with all scores at once, products in `dtype`, the softmax at least in float32."""
    group = q.shape[-2] // v.shape[-2]
    region = regions_of(call, q.shape[-3], v.shape[-3]).to(v.device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.full((), -torch.inf, dtype=wide, device=v.device)
    for r, (q_r, k_r) in enumerate(zip(*frames_in(q, k, call, dtype))):
        products = torch.einsum("...ihd,...jhd->...hij", q_r, k_r.repeat_interleave(group, -2))
        logits = torch.where(region == r, products.to(wide) * call.softmax_scale, logits)
    if call.log_n is not None:
        i = torch.tensor(positions_of(call, q.shape[-3], v.shape[-3]), device=v.device)
        logits = logits * query_scale.log_n(i, call.log_n).to(wide)[:, None]
    empty = (region == -1).all(-1)
    logits = logits.masked_fill(empty[:, None], 0.0)
    weights = logits.softmax(-1).masked_fill(empty[:, None], 0.0).to(dtype)
    out = torch.einsum("...hij,...jhd->...ihd", weights, v.to(dtype).repeat_interleave(group, -2))
    return out, logits.logsumexp(-1).masked_fill(empty, -torch.inf)


def dense_gradients(dout, dlse, q, k, v, call, dtype) -> list[Tensor]:
    """Of q, k and v, by autograd."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = dense(*leaves, call, dtype)
    total = (out * dout.to(dtype)).sum()
    if dlse is not None:
        total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * dlse.to(lse.dtype)).sum()
    return list(torch.autograd.grad(total, leaves))


def compare(name: str, got: Tensor, same_dtype: Tensor, exact: Tensor, noise: float = 0.0) -> None:
    """The error budget and `noise`, and one of bfloat16 where the interpreter truncates to it."""
    truncates = INTERPRETED and got.dtype == torch.bfloat16
    finite = exact.masked_fill(exact == -torch.inf, 0.0)
    assert torch.equal(exact == -torch.inf, got == -torch.inf), name
    got = got.masked_fill(got == -torch.inf, 0.0)
    same_dtype = same_dtype.masked_fill(same_dtype == -torch.inf, 0.0).to(got.dtype)
    assert_within_budget(name, got, same_dtype, finite, 1.0 if truncates else 0.0, noise)


def check(q, k, v, call: AttentionCall, dlse: Tensor | None = None, dout: Tensor | None = None):
    """Forward and, with dout, backward against the dense formulas. Returns what the kernels did."""
    out, lse = forward(q, k, v, call)
    same, same_lse = dense(q, k, v, call, v.dtype)
    exact, exact_lse = dense(q, k, v, call, torch.float64)
    # Of the weights, as of those in the sums over queries that are dv.
    noise = rounding_noise("dv", exact, exact_lse, dout, q, k, v, call.softmax_scale)
    compare("out", out, same, exact, noise if out.dtype == torch.float32 else 0.0)
    compare("lse", lse, same_lse, exact_lse)
    if dout is None:
        return out, lse
    grads = backward(dout, dlse, q, k, v, out, lse, call)
    exact = dense_gradients(dout, dlse, q, k, v, call, torch.float64)
    spellings = (
        dense_gradients(dout, dlse, q, k, v, call, v.dtype),
        # Like the kernels, from the rounded out.
        reference.backward(dout, dlse, q, k, v, same.to(v.dtype), same_lse.float(), call),
    )
    same = worse(exact, *spellings)
    rotated = rotate(q.double(), k.double(), call)
    for name, grad, ref, ideal in zip(("dq", "dk", "dv"), grads, same, exact, strict=True):
        assert grad.dtype == v.dtype, name
        noise = rounding_noise(name, ideal, exact_lse, dout, *rotated, v, call.softmax_scale)
        compare(name, grad, ref, ideal, noise if grad.dtype == torch.float32 else 0.0)
    return out, lse, *grads


def check_backward(q, k, v, call: AttentionCall, with_dlse: bool = True) -> tuple:
    dout = torch.randn(q.shape).to(q)
    *batch, seqlen, heads, _ = q.shape
    dlse = torch.randn(*batch, heads, seqlen, device=DEVICE) if with_dlse else None
    return check(q, k, v, call, dlse, dout)
