"""Engines made of PyTorch, to compose attention from where no flash-attention runs; and calls."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from extrope_kernels.methods import rope
from extrope_kernels.ops.attention import AttentionCall, flash_attn, reference
from extrope_kernels.ops.attention.flash_attn.engines import Engine
from extrope_kernels.scores import PositionMap, Region, Score


def band_mask(seqlen_q: int, seqlen_k: int, left: int | None) -> Tensor:
    """(seqlen_q, seqlen_k) bool, aligned at the end."""
    i = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k)
    visible = j <= i
    return visible if left is None else visible & (j >= i - left)


def dense_forward(q, k, v, scale, mask, softcap=0.0) -> tuple[Tensor, Tensor]:
    """One sequence: (seqlen, heads, head_dim) -> out and lse (heads, seqlen), in float64."""
    weights, lse, _ = _softmax(q, k, scale, mask, softcap, None)
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hij,jhd->ihd", weights, v), lse


def dense_backward(
    dout, dlse, q, k, v, out, lse, scale, mask, softcap=0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights come from the lse that is given, delta from the out that is given."""
    group = q.shape[1] // k.shape[1]
    weights, _, slope = _softmax(q, k, scale, mask, softcap, lse.double())
    dout = dout.double()
    delta = (dout * out.double()).sum(-1).T
    if dlse is not None:
        delta = delta - dlse
    d_weights = torch.einsum("ihd,jhd->hij", dout, v.double().repeat_interleave(group, 1))
    d_scores = weights * (d_weights - delta[..., None]) * scale * slope
    dq = torch.einsum("hij,jhd->ihd", d_scores, k.double().repeat_interleave(group, 1))
    dk = torch.einsum("hij,ihd->jhd", d_scores, q.double())
    dv = torch.einsum("hij,ihd->jhd", weights, dout)
    return dq, *(x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))


def _softmax(q, k, scale, mask, softcap, lse):
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = torch.einsum("ihd,jhd->hij", q.double(), k) * scale
    slope = 1.0
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    scores = scores.masked_fill(~mask, -torch.inf)
    if lse is None:
        lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return weights, lse, slope


class TorchEngine(Engine):
    """Rows without keys, and what is behind the last packed sequence, hold NaN."""

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def __init__(
        self,
        name: str,
        functions=(dense_forward, dense_backward),
        *,
        dlse: bool = False,
    ):
        self.name, self.takes_dlse = name, dlse
        self._forward, self._backward = functions
        self.calls: list[int | None] = []  # left bounds

    def forward(self, q, k, v, softmax_scale, left, cu_seqlens, softcap):
        self.calls.append(left)
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.nan, dtype=wide)
        for rows, lse_rows in sequences(q, cu_seqlens):
            mask = band_mask(q[rows].shape[0], k[rows].shape[0], left)
            part, part_lse = self._forward(q[rows], k[rows], v[rows], softmax_scale, mask, softcap)
            out[rows] = part.masked_fill(~mask.any(1)[:, None, None], torch.nan).to(q.dtype)
            lse[lse_rows] = part_lse.to(wide)
        return out, lse

    def backward(self, dout, dlse, q, k, v, out, lse, softmax_scale, left, cu_seqlens, softcap):
        self.calls.append(left)
        assert dlse is None or self.takes_dlse
        assert lse.is_contiguous(), "flash-attention reads lse by its shape"
        grads = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (q, k, v)]
        for rows, lse_rows in sequences(q, cu_seqlens):
            mask = band_mask(q[rows].shape[0], k[rows].shape[0], left)
            saved = (q[rows], k[rows], v[rows], out[rows], lse[lse_rows])
            row_dlse = None if dlse is None else dlse[lse_rows]
            parts = self._backward(dout[rows], row_dlse, *saved, softmax_scale, mask, softcap)
            for grad, part in zip(grads, parts):
                grad[rows] = part.to(grad.dtype)
        return tuple(grads)


def sequences(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple]:
    """The index of every sequence that is not empty, in q and in lse."""
    if cu_seqlens is None:
        return [(b, b) for b in range(q.shape[0])]
    ends = cu_seqlens.tolist()
    spans = [slice(a, b) for a, b in pairwise(ends) if a < b]
    return [(span, (slice(None), span)) for span in spans]


# -------------------------------------------------------------------------------------------------
# Calls, and their comparison with the reference

N = 11
CU_SEQLENS = [0, 0, 3, 3, 14, 15, 20, 20]
ENGINES = {
    "dlse": TorchEngine("dlse", dlse=True),
    "no dlse": TorchEngine("no dlse"),
}


def make(
    starts,
    seqlen_q=N,
    seqlen_k=N,
    heads=(4, 2),
    cu_seqlens=None,
    dtype=torch.float64,
    head_dim=16,
    **options,
):
    """q, k, v, call, dout, dlse; packed with cu_seqlens. Every region has frames of its own."""
    generator = torch.Generator().manual_seed(len(starts) * 31 + seqlen_q)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = () if cu_seqlens else (2,)
    if cu_seqlens:
        seqlen_q = seqlen_k = cu_seqlens[-1]
    q = randn(*batch, seqlen_q, heads[0], head_dim)
    k, v = (randn(*batch, seqlen_k, heads[1], head_dim) for _ in range(2))
    packed = torch.tensor(cu_seqlens, dtype=torch.int32) if cu_seqlens else None
    call = call_of(starts, cu_seqlens=packed, head_dim=head_dim, **options)
    return q, k, v, call, randn(*q.shape), randn(*batch, heads[0], seqlen_q).double()


def call_of(starts, granularity=1, cu_seqlens=None, head_dim=16, **options):
    maps = [(PositionMap(offset=2 * r), PositionMap(divisor=1 + r)) for r in range(len(starts))]
    regions = tuple(Region(start, *sides) for start, sides in zip(starts, maps))
    return AttentionCall(
        inv_freq=rope(head_dim).inv_freq,
        cu_seqlens=cu_seqlens,
        score=Score("test", regions, granularity),
        softmax_scale=0.3,
        log_n=3.0,
        **options,
    )


def run(module, q, k, v, call, dout, dlse, **options):
    out, lse = module.forward(q, k, v, call, **options)
    dq, dk, dv = module.backward(dout, dlse, q, k, v, out, lse, call, **options)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}


def assert_agrees(engine, inputs, dlse=True):
    if not dlse:
        inputs = (*inputs[:-1], None)
    expected, got = run(reference, *inputs), run(flash_attn, *inputs, engine=engine)
    for name, x in got.items():
        assert x.is_contiguous(), name
        torch.testing.assert_close(x, expected[name], msg=lambda text: f"{name}: {text}")  # noqa: B023
