"""PermuteFormer's attention on a GPU: flash-linear-attention's chunk kernels after a gather.

`fla.ops.simple_gla` (pip install flash-linear-attention, from 0.6 on) has this decay, a number per
head, and states of the same age. The sum of weights is one more column of v. Its products of
float32 are TF32's; float16 runs in float32, since sums of scores overflow it. Gradients are sums
of the same kind, so fla's forward makes them too: torch.compile needs an op, and an op cannot save
the tensors of fla's own autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._math.dtypes import without_autocast
from .permutations import Powers
from .scans import Call, Result, backward_by_scans, feature, permute

ALIGN = 8  # fla wants even dims in 16 bits, and loads rows of whole 16 bytes in vectors


@without_autocast
def forward(q: Tensor, k: Tensor, v: Tensor, powers: Powers, call: Call) -> Result:
    """Compute out and den for float32, bfloat16 or float16."""
    dtype, heads, dim, value_dim = q.dtype, q.shape[-2], k.shape[-1], v.shape[-1]
    q, k = permute(q, k, powers)
    if dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    v = functional.pad(v, (0, 1), value=1.0)
    out, state = _sums(feature(q), feature(k), v, call, keep_state=call.keep_state)
    out, den = out[..., :value_dim].float(), out[..., value_dim].float()
    if call.normalize:
        out = out / den[..., None]
    den = den.transpose(-1, -2).contiguous() if call.normalize else den.new_empty(0)
    kv = key_sum = den.new_empty(0)
    if state is not None:
        state = state[:, :: heads // call.heads, :dim]  # one of the heads that share a state
        kv, key_sum = state[..., :value_dim].contiguous(), state[..., value_dim].contiguous()
    return Result(out.contiguous(), den, kv, key_sum)


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
    """Return dq, dk and dv."""
    return backward_by_scans(dout, q, k, v, out, den, powers, call, _scan)


def _scan(q: Tensor, k: Tensor, v: Tensor, call: Call, reverse: bool) -> Tensor:
    """Scan as `backward_by_scans` asks."""
    dim = v.shape[-1]
    if not reverse or not call.causal:
        return _sums(q, k, v, call)[0][..., :dim]
    tokens = -3  # the last token first, the last sequence too
    q, k, v = (x.flip(tokens) for x in (q, k, v))
    if (bounds := call.cu_seqlens) is not None:
        call = Call(call.heads, call.decay, bounds[-1] - bounds.flip(0))
    return _sums(q, k, v, call)[0].flip(tokens)[..., :dim]


def _sums(
    q: Tensor, k: Tensor, v: Tensor, call: Call, keep_state: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return rows and states of the decayed sums of k v^T, padded, for the larger head count."""
    heads = max(x.shape[-2] for x in (q, k, v))
    q, k, v = (functional.pad(x, (0, -x.shape[-1] % ALIGN)) for x in (q, k, v))
    q, k, v = (x.repeat_interleave(heads // x.shape[-2], -2) for x in (q, k, v))
    if not call.causal:
        return _both_ways(q, k, v, call.cu_seqlens), None
    from fla.ops.simple_gla import chunk_simple_gla

    packed, log_decay, first = call.cu_seqlens is not None, None, None
    if call.decay is not None:
        log_decay = call.decay.double().log().float().repeat_interleave(heads // call.heads)
    if call.kv is not None:
        first = torch.cat([call.kv, call.key_sum[..., None]], -1)
        missing = (v.shape[-1] - first.shape[-1], q.shape[-1] - first.shape[-2])
        first = functional.pad(first, (0, missing[0], 0, missing[1]))
        first = first.repeat_interleave(heads // call.heads, 1)
    out, state = chunk_simple_gla(
        *((x[None] if packed else x).contiguous() for x in (q, k, v)),
        g_gamma=log_decay,
        scale=1.0,
        initial_state=first,
        output_final_state=keep_state,
        cu_seqlens=call.cu_seqlens.long() if packed else None,
    )
    return out[0] if packed else out, state


def _both_ways(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Attend without causality by two products per sequence, with sums in float32 between them."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state = torch.einsum("...jhd,...jhf->...hdf", k.float(), v.float())
        return torch.einsum("...ihd,...hdf->...ihf", q.float(), state)

    if cu_seqlens is None:
        return attend(q, k, v)
    parts = zip(*(x.split(cu_seqlens.diff().tolist()) for x in (q, k, v)))
    return torch.cat([attend(*part) for part in parts])
