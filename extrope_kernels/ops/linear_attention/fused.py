"""The op `permuteformer_fwd`: permutation and linear attention in one, on the CPU.

The permuted queries and keys never exist in memory. The backward permutes them, and is made of the
ops that exist: on a CPU memory that is written once and read once costs more than the attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.autograd import contiguous_rows, register_backward
from .._shared.library import library, ops
from . import cpu, schema

_SCHEMA = (
    "permuteformer_fwd(Tensor q, Tensor k, Tensor v, Tensor permutations, Tensor? positions, "
    "Tensor? decay, Tensor? cu_seqlens, *, SymInt offset=0, bool causal=True, bool normalize=True) "
    "-> (Tensor out, Tensor den)"
)


def _permute(q, k, permutations, positions, cu_seqlens, **how) -> tuple[Tensor, Tensor]:
    return ops.permute_fwd(q, k, permutations, positions, cu_seqlens, **how)


def _fwd_fake(q, k, v, permutations, positions, decay, cu_seqlens, *, offset=0, **options):
    q, k = _permute(q, k, permutations, positions, cu_seqlens, offset=offset)
    return ops.linear_attn_fwd(q, k, v, decay, cu_seqlens, **options)


def _fwd(q, k, v, permutations, positions, decay, cu_seqlens, *, offset=0, **options):
    run, how = schema.plan("cpu", q, k, v, decay, cu_seqlens, **options)
    if run is cpu:
        return cpu.scan(q, k, v, how, permutations, positions, offset)[:2]
    q, k = _permute(q, k, permutations, positions, cu_seqlens, offset=offset)
    return run.scan(q, k, v, how)[:2]


def _save(ctx, args, options, outputs):
    options = dict(options)
    ctx.offset = options.pop("offset", 0)
    schema.save(ctx, (*args[:3], *args[5:]), options, outputs, *args[3:5])


def _backward(ctx, dout, _):
    if dout is None:
        return None, None, None
    q, k, v, out, den, decay, cu_seqlens, permutations, positions = ctx.saved_tensors
    positioned = (permutations, positions, cu_seqlens)
    q, k = _permute(q, k, *positioned, offset=ctx.offset)
    dq, dk, dv = ops.linear_attn_bwd(
        contiguous_rows(dout), q, k, v, out, den, decay, cu_seqlens, **ctx.options
    )
    return *_permute(dq, dk, *positioned, offset=ctx.offset, inverse=True), dv


library.define(_SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
torch.library.register_fake(f"{library.ns}::permuteformer_fwd", _fwd_fake, lib=library)
library.impl("permuteformer_fwd", _fwd, "CPU")
register_backward(library, ops.permuteformer_fwd.default, _save, _backward)
