"""What the tests of the composition over flash-attention share: engines, calls, a comparison."""

from __future__ import annotations

import math

import torch
from attention_engines import TorchEngine, aten_backward, aten_forward
from extrope_kernels.ops._shared.attention_call import AttentionCall

from extrope_kernels.methods import rope
from extrope_kernels.ops.attention import flash_attn, reference
from extrope_kernels.scores import UNROTATED, PositionMap

N = 11
CU_SEQLENS = [0, 0, 3, 3, 14, 15, 20, 20]
ENGINES = {
    "shifts": TorchEngine("shifts", negative_right=True, dlse=True),
    "cuts": TorchEngine("cuts"),
    "base 2": TorchEngine("base 2", lse_unit=math.log(2.0)),
    "base 2, shifts": TorchEngine("base 2, shifts", lse_unit=math.log(2.0), negative_right=True),
    "aten": TorchEngine("aten", (aten_forward, aten_backward)),
}


def make(starts, seqlen_q=N, seqlen_k=N, heads=(4, 2), cu_seqlens=None, dtype=torch.float64):
    """q, k, v, call, dout, dlse; packed with cu_seqlens. Every region has frames of its own."""
    generator = torch.Generator().manual_seed(len(starts) * 31 + seqlen_q)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = () if cu_seqlens else (2,)
    if cu_seqlens:
        seqlen_q = seqlen_k = cu_seqlens[-1]
    q = randn(*batch, seqlen_q, heads[0], 16)
    k, v = (randn(*batch, seqlen_k, heads[1], 16) for _ in range(2))
    packed = torch.tensor(cu_seqlens, dtype=torch.int32) if cu_seqlens else None
    call = call_of(starts, cu_seqlens=packed)
    return q, k, v, call, randn(*q.shape), randn(*batch, heads[0], seqlen_q).double()


def call_of(starts, granularity=1, cu_seqlens=None):
    maps = [
        number
        for region in range(len(starts))
        for side in (PositionMap(offset=2 * region), PositionMap(divisor=1 + region))
        for number in side
    ]
    return AttentionCall(
        inv_freq=rope(16).inv_freq,
        cu_seqlens=cu_seqlens,
        starts=starts,
        granularity=granularity,
        maps=(*maps, *UNROTATED),
        softmax_scale=0.3,
        log_n=3.0,
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
