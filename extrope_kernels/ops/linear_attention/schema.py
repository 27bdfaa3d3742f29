"""The ops `linear_attn_fwd`, `_bwd` and `_step`: schemas, fakes, derivatives, and who runs them.

They take queries and keys that are permuted already. `linear_attn_fwd` runs what is best on the
tensors' device, `linear_attn_fwd_triton` Triton alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._shared import backends as _backends
from .._shared.autograd import contiguous_rows, refuse_backward, register_backward
from .._shared.dtypes import accumulator
from .._shared.library import library, ops
from . import cpu, reference
from .checks import check, check_decay_values, check_dims, check_state
from .scan import Others, Scan, Scanned, gradients

NAME = "linear_attn"
# An Autograd kernel sees the positional tensors alone, hence all tensors before the *.
_OPTIONS = "Tensor? decay=None, Tensor? cu_seqlens=None, *, bool causal=True, bool normalize=True"
_SCHEMAS = {
    "fwd": f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor out, Tensor den)",
    "bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? den, "
        f"{_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "step": (
        "(Tensor q, Tensor k, Tensor v, Tensor? kv=None, Tensor? key_sum=None, "
        "Tensor? decay=None, *, bool normalize=True) -> (Tensor out, Tensor kv, Tensor key_sum)"
    ),
}
_IMPLEMENTATIONS = {
    "": {"CPU": "cpu", "CUDA": "gpu"},
    "_triton": {"CPU": "triton", "CUDA": "triton"},  # on a CPU: the interpreter
}


def _scan(q, k, v, decay=None, cu_seqlens=None, *, causal=True, normalize=True) -> Scan:
    check(NAME, q, k, v, decay, cu_seqlens, causal)
    heads = k.shape[-2] if decay is None else decay.shape[0]
    return Scan(heads, decay, cu_seqlens, causal, normalize=normalize)


def _fwd_fake(q, k, v, decay=None, cu_seqlens=None, **options):
    how = _scan(q, k, v, decay, cu_seqlens, **options)
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    return out, q.new_empty(rows if how.normalize else 0, dtype=accumulator(q.dtype))


def _bwd_fake(dout, q, k, v, out, den, decay=None, cu_seqlens=None, **options):
    _scan(q, k, v, decay, cu_seqlens, **options)
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _step_fake(q, k, v, kv=None, key_sum=None, decay=None, *, normalize=True):
    heads = _step_scan(q, k, v, kv, key_sum, decay, normalize).heads
    shape = (k.shape[0], heads, k.shape[-1])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    state = q.new_empty((*shape, v.shape[-1]), dtype=accumulator(q.dtype))
    return out, state, q.new_empty(shape, dtype=accumulator(q.dtype))


def _step_scan(q, k, v, kv, key_sum, decay, normalize) -> Scan:
    check(NAME, q, k, v, decay, None)
    heads = k.shape[-2] if decay is None else decay.shape[0]
    if kv is not None:
        check_state(NAME, kv, key_sum, k, v, heads)
    given = {"first_state": kv, "first_sum": key_sum, "keep_state": True}
    return Scan(heads, decay, normalize=normalize, **given)


def _resolve(q, k, v, others: Others, **options) -> Scan:
    return _scan(q, k, v, others.decay, others.cu_seqlens, **options)


def _resolve_step(q, k, v, others: Others, *, normalize=True) -> Scan:
    return _step_scan(q, k, v, others.first_state, others.first_sum, others.decay, normalize)


def plan(implementation, q, k, v, decay=None, cu_seqlens=None, **options):
    """Who runs a forward, and the scan that it is; what is wrong with it raises."""
    how = _scan(q, k, v, decay, cu_seqlens, **options)
    check_decay_values(NAME, how.decay)
    return _pick(implementation, q, v), how


def _run(implementation, resolve, q, k, v, others: Others, options) -> Scanned:
    """The scan that resolve(q, k, v, others, **options) makes of an op's arguments."""
    if implementation == "cpu" or q.dtype == torch.float64:
        how = resolve(q, k, v, others, **options)
        check_decay_values(NAME, others.decay)
        return _pick(implementation, q, v).scan(q, k, v, how)
    check_decay_values(NAME, others.decay)
    from . import triton

    return triton.scan_resolved(resolve, q, k, v, others, options)


def _fwd(implementation, q, k, v, decay=None, cu_seqlens=None, **options):
    return _run(implementation, _resolve, q, k, v, Others(decay, cu_seqlens), options)[:2]


def _bwd(implementation, dout, q, k, v, out, den, decay=None, cu_seqlens=None, **options):
    how = _scan(q, k, v, decay, cu_seqlens, **options)
    run = _pick(implementation, q, v)
    return gradients(run.scan, run.row_dots, dout, q, k, v, out, den, how)


def _step(implementation, q, k, v, kv=None, key_sum=None, decay=None, *, normalize=True):
    others = Others(decay, first_state=kv, first_sum=key_sum)
    options = {"normalize": normalize}
    scanned = _run(implementation, _resolve_step, q, k, v, others, options)
    return scanned.out, scanned.state, scanned.sum


def _pick(implementation: str, q: Tensor, v: Tensor):
    """The module that scans: float64 and a CPU without the compiled library go to the oracle."""
    if implementation != "triton" and q.dtype == torch.float64:
        return reference
    if implementation == "cpu" and _backends.missing("cpu"):
        return reference
    check_dims(NAME, q, v)
    if implementation == "cpu":
        return cpu
    if q.dtype == torch.float64:  # the sums would be float32
        raise ValueError(f"{NAME}: backend='triton' takes up to float32, got {q.dtype}")
    from . import triton

    return triton


def save(ctx, args, options, outputs, *more):
    """What a backward needs of (q, k, v, decay, cu_seqlens), out and den, and `more`."""
    for label, x in zip(("decay", "cu_seqlens"), args[3:]):
        if x is not None and x.requires_grad:
            raise ValueError(f"{NAME}: {label} has no gradient, got one that requires grad")
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs[1])
    kept = outputs if options.get("normalize", True) else (None, None)
    ctx.save_for_backward(*args[:3], *kept, *args[3:], *more)


def _register_backward(suffix: str) -> None:
    """Derivatives of first order in q, k and v; the reference backend has the higher ones."""
    fwd, bwd, step = (getattr(ops, f"{NAME}_{kind}{suffix}").default for kind in _SCHEMAS)

    def backward(ctx, dout, _):
        if dout is None:
            return None, None, None
        return bwd(contiguous_rows(dout), *ctx.saved_tensors, **ctx.options)

    register_backward(library, fwd, save, backward)
    only_first = f"{NAME}: the kernels have first derivatives only; use backend='reference'"
    refuse_backward(library, bwd, only_first)
    refuse_backward(library, step, f"{NAME}: a step is for inference and has no gradient")


def _define() -> None:
    kernels = {"fwd": (_fwd_fake, _fwd), "bwd": (_bwd_fake, _bwd), "step": (_step_fake, _step)}
    for suffix, implementations in _IMPLEMENTATIONS.items():
        for kind, schema in _SCHEMAS.items():
            op = f"{NAME}_{kind}{suffix}"
            fake, kernel = kernels[kind]
            library.define(op + schema, tags=(torch.Tag.needs_fixed_stride_order,))
            torch.library.register_fake(f"{library.ns}::{op}", fake, lib=library)
            for key, implementation in implementations.items():
                library.impl(op, functools.partial(kernel, implementation), key)
        _register_backward(suffix)


_define()
