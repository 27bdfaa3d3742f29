"""Engines made of PyTorch, to compose attention from where no flash-attention runs; and calls."""

from __future__ import annotations

import torch

from extrope_kernels.methods import rope
from extrope_kernels.ops.attention import AttentionCall, flash_attn, reference
from extrope_kernels.ops.attention.flash_attn.engines import Engine
from extrope_kernels.ops.attention.log_n import with_log_n
from extrope_kernels.scores import FIRST_KEY, UNROTATED, PositionMap, Region, Score

BAND = Score("band", (Region(FIRST_KEY, UNROTATED, UNROTATED),))


class TorchEngine(Engine):
    """The reference in float64, of a band and without a rotation.

    Rows without keys, and what is behind the last packed sequence, hold NaN.
    """

    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

    def __init__(self, name: str, *, dlse: bool = False):
        self.name, self.takes_dlse = name, dlse
        self.calls: list[int | None] = []  # left bounds

    def _call(self, softmax_scale, left, cu_seqlens, softcap) -> tuple[AttentionCall, slice]:
        """The call, and the tokens of packed sequences or the whole batch."""
        self.calls.append(left)
        window = None if left is None else left + 1
        options = {"softmax_scale": softmax_scale, "softcap": softcap, "sliding_window": window}
        call = AttentionCall(torch.ones(1), cu_seqlens, score=BAND, **options)
        return call, slice(None if cu_seqlens is None else int(cu_seqlens[-1]))

    def forward(self, q, k, v, *band):
        call, own = self._call(*band)
        found, found_lse = reference.forward(*(x[own].double() for x in (q, k, v)), call)
        out = torch.full(q.shape, torch.nan, dtype=q.dtype)
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = torch.full((*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.nan, dtype=wide)
        empty = (found_lse == -torch.inf).transpose(-1, -2)[..., None]
        out[own], lse[..., own] = (
            found.masked_fill(empty, torch.nan).to(q.dtype),
            found_lse.to(wide),
        )
        return out, lse

    def backward(self, dout, dlse, q, k, v, out, lse, *band):
        call, own = self._call(*band)
        assert dlse is None or self.takes_dlse
        assert lse.is_contiguous(), "flash-attention reads lse by its shape"
        dlse = None if dlse is None else dlse[..., own].double()
        given = (x[own].double() for x in (q, k, v, out))
        found = reference.backward(dout[own].double(), dlse, *given, lse[..., own].double(), call)
        grads = [torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (q, k, v)]
        for grad, part in zip(grads, found):
            grad[own] = part.to(grad.dtype)
        return tuple(grads)


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
    call = with_log_n("test", 3.0, q, k, call)
    return q, k, v, call, randn(*q.shape), randn(*batch, heads[0], seqlen_q).double()


def call_of(starts, granularity=1, cu_seqlens=None, head_dim=16, **options):
    maps = [(PositionMap(offset=2 * r), PositionMap(divisor=1 + r)) for r in range(len(starts))]
    regions = tuple(Region(start, *sides) for start, sides in zip(starts, maps))
    return AttentionCall(
        inv_freq=rope(head_dim).inv_freq,
        cu_seqlens=cu_seqlens,
        score=Score("test", regions, granularity),
        softmax_scale=0.3,
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
