"""PermuteFormer's attention on a GPU: flash-linear-attention's chunk kernels after a gather.

`fla.ops.simple_gla` (pip install flash-linear-attention, from 0.6 on) has this decay, a number a
head, and states of the same age. The sum of weights is one more column of v. Its products of
float32 are TF32's; float16 runs in float32, as sums of scores are too large for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._shared.dtypes import without_autocast
from . import reference
from .permutations import Powers
from .reference import Call, Result, feature

# fla wants even dims in 16 bits, and loads rows in vectors where they are multiples of 16 bytes.
ALIGN = 8


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, powers: Powers, call: Call) -> Result:
    """Differentiable in q, k and v, to first order when causal."""
    dtype, dim, value_dim = q.dtype, q.shape[-1], v.shape[-1]
    q, k = reference.permute(q, k, powers)
    wide = torch.float32 if dtype == torch.float16 or not call.causal else dtype
    q, k, v = (x.to(wide) for x in (q, k, v))
    q, k = (functional.pad(feature(x), (0, -dim % ALIGN)) for x in (q, k))
    v = functional.pad(v, (0, ALIGN - value_dim % ALIGN), value=1.0)
    k, v = (x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in (k, v))
    out, state = (_causal if call.causal else _both_ways)(q, k, v, call)
    out, den = out[..., :value_dim], out[..., value_dim : value_dim + 1]
    if call.normalize:
        out = out.float() / den.float()
    none = out.new_empty(0, dtype=torch.float32)
    kv, key_sum = none, none
    if state is not None:
        state = state[:, :: q.shape[-2] // call.heads, :dim]
        kv = state[..., :value_dim].contiguous()
        key_sum = state[..., value_dim].contiguous()
    return Result(out.to(dtype).contiguous(), none, kv, key_sum)


def _causal(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    from fla.ops.simple_gla import chunk_simple_gla

    heads, packed = q.shape[-2], call.cu_seqlens is not None
    log_decay = first = None
    if call.decay is not None:
        log_decay = call.decay.double().log().float().repeat_interleave(heads // call.heads)
    if call.kv is not None:
        ones = v.shape[-1] - call.kv.shape[-1]
        first = torch.cat([call.kv, *[call.key_sum[..., None]] * ones], -1)
        first = functional.pad(first, (0, 0, 0, q.shape[-1] - first.shape[-2]))
        first = first.repeat_interleave(heads // call.heads, 1)
    out, state = chunk_simple_gla(
        *((x[None] if packed else x).contiguous() for x in (q, k, v)),
        g_gamma=log_decay,
        scale=1.0,
        initial_state=first,
        output_final_state=call.keep_state,
        cu_seqlens=call.cu_seqlens.long() if packed else None,
    )
    return out[0] if packed else out, state


def _both_ways(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, None]:
    """Two products, a sequence at a time: no kernel of fla."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.einsum("...jhd,...jhf->...hdf", k, v)
        return torch.einsum("...ihd,...hdf->...ihf", q, state)

    if call.cu_seqlens is None:
        return attend(q, k, v), None
    lengths = call.cu_seqlens.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (q, k, v)))
    return torch.cat([attend(*part) for part in parts]), None
