"""The ops of attention: schemas, fakes, gradients, and the backend for each device.

They know regions and position maps, no score method. `attention_fwd`, `attention_bwd` and `decode`
run the best backend for the tensors' device: csrc/cpu/attention and csrc/cpu/decode on a CPU,
Triton or the composition over flash-attn on a GPU. Ops with a suffix run that backend only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._shared.autograd import contiguous_rows, refuse_backward, register_backward
from .._shared.dtensor import replicated
from .._shared.dtypes import Scales, accumulator
from .._shared.layouts import cached_by_layout, layout_key
from .._shared.library import library, load_on_first_use, ops
from . import flash_attn, reference
from .call import AttentionCall, KVCache, lse_shape, read_call
from .checks import check_attention, check_decode, check_head_dim, check_slots, check_values
from .frequency_gradients import backward_with_frequencies
from .select_backend import select_backend

Tensors = tuple[Tensor | None, ...]
_CALL = (
    "Tensor inv_freq, Tensor? cu_seqlens, Tensor? log_decay, Tensor? sinks, Tensor? query_scale, "
    "Tensor? pair_maps, Tensor? q_start, Tensor? k_start, *, float[] numbers"
)
_INV_FREQ, _SINKS, _PAIR_MAPS = 3, 6, 8  # indices among the arguments of attention_fwd
# The numbers are those of AttentionCall. decode's cu_seqlens_q is the call's cu_seqlens; the cache
# decides q_start and k_start. k and v, if given, are written into the cache first.
_SCHEMAS = {
    "attention_fwd": f"(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse)",
    "attention_bwd": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_CALL}) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "decode": (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
        "Tensor inv_freq, Tensor? cu_seqlens_q, Tensor? log_decay, Tensor? sinks, "
        "Tensor? query_scale, Tensor? pair_maps, Tensor cache_seqlens, Tensor? block_table, "
        "Tensor? cache_leftpad, Tensor? k_scale, Tensor? v_scale, *, "
        "float[] numbers) -> (Tensor out, Tensor lse)"
    ),
}
_DECODE_TENSORS = 6  # of the call, from inv_freq to pair_maps


# -------------------------------------------------------------------------------------------------
# From a call to the backend that computes it


def forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return out and lse; differentiable. Refuses wrong calls before a kernel starts."""
    if _by_reference(q, backend):
        check_attention("attention", q, k, v, call)
        check_values("attention", call, len(q))
        return reference.forward(q, k, v, call)
    return _op("attention_fwd", backend)(
        q, k, v, *replicated(q, call.tensors), numbers=call.numbers
    )


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the contribution of these keys to dq, and of these queries to dk and dv.

    out, lse, dout, dlse: for all keys that the queries see; k and v may be a part of them.
    """
    given = (dout, dlse, q, k, v, out, lse)
    if _by_reference(q, backend):
        return reference.backward(*given, call)
    return _op("attention_bwd", backend)(*given, *call.tensors, numbers=call.numbers)


def decode(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache: KVCache,
    call: AttentionCall,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Write k and v into a cache, then attend over it; return out and lse. Refuses as `forward`."""
    if _by_reference(q, backend):
        check_decode("decode", q, k, v, cache, call)
        check_slots("decode", cache, call.cu_seqlens, len(q))
        return reference.decode(q, k, v, cache, call)
    of_call = call.tensors[:_DECODE_TENSORS]
    tensors = (q, cache.k, cache.v, k, v, *of_call, *cache.tensors)
    return _op("decode", backend)(*tensors, numbers=call.numbers)


def _by_reference(q: Tensor, backend: str | None) -> bool:
    """Return True for the reference, and float64 on a CPU, which the fused kernels lack."""
    return backend == "reference" or (backend in (None, "cpu") and q.dtype == torch.float64)


def _op(name: str, backend: str | None) -> Any:
    return getattr(ops, f"{name}_{backend}" if backend in ("triton", "flash_attn") else name)


# -------------------------------------------------------------------------------------------------
# From an op's arguments to a kernel


def _attention(q: Tensor, k: Tensor, v: Tensor, tensors: Tensors, numbers: Sequence[float]):
    """Rebuild and check the call."""
    call = read_call(tensors, numbers)
    key = (layout_key(q, k, v, *tensors), call.fixed)
    cached_by_layout(check_attention, key, "attention", q, k, v, call)
    check_values("attention", call, len(q))
    return call


def _fused(q: Tensor, k: Tensor, v: Tensor, tensors: Tensors, numbers: Sequence[float]):
    """Rebuild the call and check it for a fused kernel."""
    call = _attention(q, k, v, tensors, numbers)
    check_head_dim("attention", q)
    check_head_dim("attention", v)
    return call


def _fwd_reference(q, k, v, *tensors, numbers):
    return reference.forward(q, k, v, _attention(q, k, v, tensors, numbers))


def _bwd_reference(dout, dlse, q, k, v, out, lse, *tensors, numbers):
    call = _attention(q, k, v, tensors, numbers)
    return reference.backward(dout, dlse, q, k, v, out, lse, call)


def _fwd_triton(q, k, v, *tensors, numbers):
    from . import triton

    return triton.forward(q, k, v, _fused(q, k, v, tensors, numbers))


def _bwd_triton(dout, dlse, q, k, v, out, lse, *tensors, numbers):
    from . import triton

    return triton.backward(dout, dlse, q, k, v, out, lse, _fused(q, k, v, tensors, numbers))


def _fwd_flash_attn(q, k, v, *tensors, numbers):
    return flash_attn.forward(q, k, v, _fused(q, k, v, tensors, numbers))


def _bwd_flash_attn(dout, dlse, q, k, v, out, lse, *tensors, numbers):
    call = _fused(q, k, v, tensors, numbers)
    return flash_attn.backward(dout, dlse, q, k, v, out, lse, call)


def _fwd_cuda(q, k, v, *tensors, numbers):
    call = _fused(q, k, v, tensors, numbers)
    if select_backend() == "flash_attn":
        return flash_attn.forward(q, k, v, call)
    from . import triton

    return triton.forward(q, k, v, call)


def _bwd_cuda(dout, dlse, q, k, v, out, lse, *tensors, numbers):
    call, given = _fused(q, k, v, tensors, numbers), (dout, dlse, q, k, v, out, lse)
    if select_backend() == "flash_attn":
        return flash_attn.backward(*given, call)
    from . import triton

    return triton.backward(*given, call)


def _read_decode(_, k_cache, v_cache, k, v, *tensors, numbers) -> tuple[KVCache, AttentionCall]:
    """Rebuild the cache and the call from an op's arguments."""
    *cached, k_scale, v_scale = tensors[_DECODE_TENSORS:]
    cu_seqlens = tensors[1]
    appended = 0 if k is None or k.dim() != 4 else k.shape[1]
    new = (appended, None if k is None else cu_seqlens)
    cache = KVCache(k_cache, v_cache, *cached, Scales(k_scale, v_scale), *new)
    return cache, read_call(tensors[:_DECODE_TENSORS], numbers)


def _decode_call(*tensors, numbers) -> tuple[KVCache, AttentionCall]:
    """Rebuild and check the cache and the call."""
    q, _, _, k, v = tensors[:5]
    cache, call = _read_decode(*tensors, numbers=numbers)
    key = (layout_key(*tensors), call.fixed)
    cached_by_layout(check_decode, key, "decode", q, k, v, cache, call)
    check_slots("decode", cache, call.cu_seqlens, len(q))
    return cache, call


def _decode_reference(*tensors, numbers):
    q, _, _, k, v = tensors[:5]
    return reference.decode(q, k, v, *_decode_call(*tensors, numbers=numbers))


def _decode_triton(*tensors, numbers):
    from . import triton

    q, _, _, k, v = tensors[:5]
    cache, call = _decode_call(*tensors, numbers=numbers)
    check_head_dim("decode", q)
    check_head_dim("decode", cache.v)
    return triton.decode(q, k, v, cache, call)


# -------------------------------------------------------------------------------------------------
# Fakes and gradients


def _fwd_fake(q, k, v, *tensors, numbers):
    call = read_call(tensors, numbers)
    check_attention("attention", q, k, v, call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    return out, q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))


def _bwd_fake(dout, dlse, q, k, v, out, lse, *tensors, numbers):
    call = read_call(tensors, numbers)
    check_attention("attention", q, k, v, call)
    return tuple(x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))


def _decode_fake(*tensors, numbers):
    q, _, v_cache, k, v = tensors[:5]
    check_decode("decode", q, k, v, *_read_decode(*tensors, numbers=numbers))
    lse = q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))
    return q.new_empty((*q.shape[:-1], v_cache.shape[-1])), lse


def _register_gradient(suffix: str) -> None:
    """Register the gradients of `attention_fwd{suffix}`; only raw tensors are saved."""
    fwd = getattr(ops, f"attention_fwd{suffix}").default
    bwd = getattr(ops, f"attention_bwd{suffix}").default

    def save(ctx, args, options, outputs):
        for n, x in enumerate(args[3:], start=3):
            if x is not None and x.requires_grad and n not in (_INV_FREQ, _SINKS, _PAIR_MAPS):
                raise ValueError(
                    f"attention: {fwd._schema.arguments[n].name} must not require grad, got one "
                    "that does; backend='reference' has its gradient"
                )
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:3], *outputs, *args[3:])

    def backward(ctx, dout, dlse):
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return None, None, None
        # Round float32_results, as autograd does on the way to the 16-bit op.
        out = out.to(q.dtype)
        dout = torch.zeros_like(out) if dout is None else contiguous_rows(dout.to(q.dtype))
        dlse = None if dlse is None else dlse.contiguous()
        of_freq = of_sinks = of_maps = None
        needs = ctx.needs_input_grad[2:]  # after the two arguments that every recorded op has
        if needs[_INV_FREQ] or any(needs[_PAIR_MAPS : _PAIR_MAPS + 1]):

            def of_call(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
                return bwd(dout, dlse, q, k, v, out, lse, *call.tensors, numbers=call.numbers)

            call = read_call(tensors, ctx.options["numbers"])
            grads, of_freq, of_maps = backward_with_frequencies(of_call, q, k, call)
        else:
            grads = bwd(dout, dlse, q, k, v, out, lse, *tensors, **ctx.options)
        if any(needs[_SINKS : _SINKS + 1]):
            of_sinks = grad_of_sinks(tensors[_SINKS - 3], dout, dlse, out, lse)
        return *grads, of_freq, None, None, of_sinks, None, of_maps

    register_backward(library, fwd, save, backward)
    only_first = "the fused kernels have first derivatives only; use backend='reference'"
    refuse_backward(library, bwd, f"attention: {only_first}")


def grad_of_sinks(
    sinks: Tensor, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> Tensor:
    """Return the gradient of a call's sinks (heads_q,), from its outputs and their gradients.

    out, dout: (batch, seqlen_q, heads_q, head_dim), or packed (total, heads_q, head_dim); lse,
    dlse: (batch, heads_q, seqlen_q) or (heads_q, total), of all logits and the sink.
    """
    # Not vecdot: autocast, which graphs keep for their backward, would round it.
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    if dlse is not None:
        delta = delta - dlse
    # A row without keys whose sink is -inf (off) has no share: both are -inf.
    share = torch.exp((sinks[:, None] - lse).masked_fill(lse == -torch.inf, -torch.inf))
    found = -share * delta
    return found.movedim(-2, 0).flatten(1).sum(1).to(sinks.dtype)


def _written(args: Tensors) -> Tensors:
    """Return the caches if decode appends to them, else nothing."""
    return () if args[3] is None else args[1:3]


def _define() -> None:
    fakes = {"attention_fwd": _fwd_fake, "attention_bwd": _bwd_fake, "decode": _decode_fake}
    kernels = {  # on a CPU: the interpreter, and fake engines
        "attention_fwd_triton": _fwd_triton,
        "attention_bwd_triton": _bwd_triton,
        "decode_triton": _decode_triton,
        "attention_fwd_flash_attn": _fwd_flash_attn,
        "attention_bwd_flash_attn": _bwd_flash_attn,
    }
    for name in (*_SCHEMAS, *kernels):
        schema = name.removesuffix("_triton").removesuffix("_flash_attn")
        library.define(name + _SCHEMAS[schema], tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{library.ns}::{name}", fakes[schema], lib=library)
    for name, kernel in kernels.items():
        library.impl(name, kernel, "CPU")
        library.impl(name, kernel, "CUDA")
    library.impl("attention_fwd", _fwd_cuda, "CUDA")
    library.impl("attention_bwd", _bwd_cuda, "CUDA")
    library.impl("decode", _decode_triton, "CUDA")
    for suffix in ("", "_triton", "_flash_attn"):
        _register_gradient(suffix)
    for name in ("decode", "decode_triton"):
        refused = "decode: is for inference and has no gradient"
        refuse_backward(library, getattr(ops, name).default, refused, _written)
    references = {
        "attention_fwd": _fwd_reference,
        "attention_bwd": _bwd_reference,
        "decode": _decode_reference,
    }
    load_on_first_use({"cpu": references})


_define()
