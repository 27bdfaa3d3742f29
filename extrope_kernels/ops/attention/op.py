"""The ops of attention: schemas, fakes, gradients, and the backend for each device.

They know regions and position maps, no score method. `attention_fwd`, `attention_bwd` and `decode`
run the best backend for the tensors' device: csrc/cpu/attention and csrc/cpu/decode on a CPU,
Triton or the composition over flash-attn on a GPU. Ops with a suffix run that backend only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .._torch.autograd import (
    call_unrecorded,
    contiguous_rows,
    note_writes,
    refuse_backward,
    register_backward,
    wants_grad,
)
from .._torch.dtensor import replicated
from .._torch.layouts import cached_by_layout, layout_key
from .._torch.library import library, load_on_first_use, ops
from ..cache.call import KVCache, Scales, check_slots, refuse_aliases
from . import flash_attn, reference
from .call import (
    OPTIONS,
    AttentionCall,
    lse_shape,
    options_key,
    read_call,
    with_tensors,
)
from .checks import (
    check_attention,
    check_decode,
    check_head_dim,
    check_values,
)
from .frequency_gradients import backward_with_frequencies
from .select_backend import select_backend

_CALL = (
    "Tensor inv_freq, Tensor? cu_seqlens, Tensor? log_decay, Tensor? sinks, Tensor? query_scale, "
    "Tensor? pair_maps, Tensor? q_start, Tensor? k_start"
)
_OPTIONS = ", ".join(OPTIONS.values())
# decode's cu_seqlens_q is the call's cu_seqlens; the cache decides q_start and k_start. k and v, if
# given, are written into the cache first.
_SCHEMAS = {
    "attention_fwd": (
        f"(Tensor q, Tensor k, Tensor v, {_CALL}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)"
    ),
    "attention_bwd": (
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_CALL}, *, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "decode": (
        "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
        "Tensor inv_freq, Tensor? cu_seqlens_q, Tensor? log_decay, Tensor? sinks, "
        "Tensor? query_scale, Tensor? pair_maps, Tensor cache_seqlens, Tensor? block_table, "
        f"Tensor? cache_leftpad, Tensor? k_scale, Tensor? v_scale, *, {_OPTIONS}) "
        "-> (Tensor out, Tensor lse)"
    ),
}
_DIFFERENTIABLE = ("q", "k", "v", "inv_freq", "sinks")  # of attention_fwd


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
    args = (q, k, v, *replicated(q, call.tensors))
    return _run(_op("attention_fwd", backend), args, call.options)


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
    return _op("attention_bwd", backend)(*given, *call.tensors, **call.options)


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
        if k is not None:
            refuse_aliases("decode", cache)
        return reference.decode(q, k, v, cache, call)
    args = DecodeTensors(
        q, cache.k, cache.v, k, v, call.inv_freq, call.cu_seqlens, call.log_decay, call.sinks,
        call.query_scale, call.pair_maps, cache.seqlens, cache.block_table, cache.leftpad,
        *cache.scales,
    )  # fmt: skip
    found = _run(_op("decode", backend), args, call.options)
    if k is not None and not torch.compiler.is_compiling():
        note_writes(cache.k, cache.v)
    return found


def _by_reference(q: Tensor, backend: str | None) -> bool:
    """Return True for the reference, and float64 on a CPU, which the fused kernels lack."""
    return backend == "reference" or (backend in (None, "cpu") and q.dtype == torch.float64)


def _op(name: str, backend: str | None) -> Any:
    named = f"{name}_{backend}" if backend in ("triton", "flash_attn") else name
    return getattr(ops, named).default


def _run(op: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() or wants_grad(args):
        return op(*args, **options)
    return call_unrecorded(op, args, options)


# -------------------------------------------------------------------------------------------------
# From an op's arguments to a kernel


def _planned(given, args, tensors, options, check, build=None):
    """Return the call, and build(*args, call), the launches of a fused kernel.

    A call is read and checked, and its launches are built, once for the layouts of `given`, all of
    the op's tensors, and the options. args: of check and build, before the call. tensors: the
    call's. build: None for the reference, which has no limits of fused kernels.
    """
    key = (check, build, layout_key(*given), options_key(options))
    fixed, launches = cached_by_layout(_plan, key, args, tensors, options, check, build)
    return with_tensors(tensors, fixed), launches


def _plan(args, tensors, options, check, build):
    """Return what of a right call its layouts and options fix: `call.fixed`, and its launches."""
    call = read_call(tensors, options)
    check(*args, call, build is not None)
    return call.fixed, build(*args, call) if build else None


def _check_forward(q, k, v, call, fused, results=()):
    check_attention("attention", q, k, v, call, results=results)
    if fused:
        check_head_dim("attention", q, call.rotary_offset)
        check_head_dim("attention", v)


def _check_backward(dout, dlse, q, k, v, out, lse, call, fused):
    _check_forward(q, k, v, call, fused, results=(dout, dlse, out, lse))


def _check_decode(q, k, v, cache, call, fused):
    check_decode("decode", q, k, v, cache, call)
    if fused:
        check_head_dim("decode", q, call.rotary_offset)
        check_head_dim("decode", cache.v)


def _no_launches(*args):
    """Stand in for the launches of flash-attn's engines, which plan their own."""


def _forward(given, options, build=None, has_values=True):
    """Return the arguments of a backend's forward: q, k, v, the call and its launches.

    has_values: those of integer tensors are looked at, in every call, if that waits for no device.
    """
    q, k, v, *tensors = given
    call, launches = _planned(given, (q, k, v), tensors, options, _check_forward, build)
    if has_values:
        check_values("attention", call, len(q))
    return q, k, v, call, launches


def _backward(given, options, build=None, has_values=True):
    """Return those of a backend's backward: the op's first seven, the call and its launches."""
    args, tensors = given[:7], given[7:]
    call, launches = _planned(given, args, tensors, options, _check_backward, build)
    if has_values:
        check_values("attention", call, len(args[2]))
    return *args, call, launches


def _decode(given, options, build=None, has_values=True):
    """Return those of a backend's decode: q, k, v, the cache, the call and its launches."""
    x = DecodeTensors(*given)
    args, tensors = (x.q, x.k, x.v, x.cache()), x.of_call()
    call, launches = _planned(given, args, tensors, options, _check_decode, build)
    if x.k is not None:
        # The reference reads rows before it writes; Triton's first launch writes before the second
        # reads q, and no launch knows which slots another program has written.
        refuse_aliases("decode", args[-1], **({"q": x.q, "k": x.k, "v": x.v} if build else {}))
    if has_values:
        check_slots("decode", args[-1], call.cu_seqlens, len(x.q))
    return *args, call, launches


def _fwd_reference(*given, **options):
    *args, _ = _forward(given, options)
    return reference.forward(*args)


def _bwd_reference(*given, **options):
    *args, _ = _backward(given, options)
    return reference.backward(*args)


def _decode_reference(*given, **options):
    *args, _ = _decode(given, options)
    return reference.decode(*args)


def _fwd_triton(*given, **options):
    from . import triton

    return triton.forward(*_forward(given, options, triton.forward_launches, triton.INTERPRETED))


def _bwd_triton(*given, **options):
    from . import triton

    return triton.backward(*_backward(given, options, triton.backward_launches, triton.INTERPRETED))


def _decode_triton(*given, **options):
    from ..decode import triton

    return triton.decode(*_decode(given, options, triton.decode_launches, triton.INTERPRETED))


def _fwd_flash_attn(*given, **options):
    *args, _ = _forward(given, options, _no_launches)
    return flash_attn.forward(*args)


def _bwd_flash_attn(*given, **options):
    *args, _ = _backward(given, options, _no_launches)
    return flash_attn.backward(*args)


def _fwd_cuda(*given, **options):
    by_flash_attn = select_backend() == "flash_attn"
    return (_fwd_flash_attn if by_flash_attn else _fwd_triton)(*given, **options)


def _bwd_cuda(*given, **options):
    by_flash_attn = select_backend() == "flash_attn"
    return (_bwd_flash_attn if by_flash_attn else _bwd_triton)(*given, **options)


class DecodeTensors(NamedTuple):
    """The tensors of `decode`, in the order of its schema."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    k: Tensor | None
    v: Tensor | None
    inv_freq: Tensor
    cu_seqlens_q: Tensor | None
    log_decay: Tensor | None
    sinks: Tensor | None
    query_scale: Tensor | None
    pair_maps: Tensor | None
    cache_seqlens: Tensor
    block_table: Tensor | None
    cache_leftpad: Tensor | None
    k_scale: Tensor | None
    v_scale: Tensor | None

    def cache(self) -> KVCache:
        appended = 0 if self.k is None or self.k.dim() != 4 else self.k.shape[1]
        return KVCache(
            self.k_cache,
            self.v_cache,
            self.cache_seqlens,
            self.block_table,
            self.cache_leftpad,
            Scales(self.k_scale, self.v_scale),
            appended,
            None if self.k is None else self.cu_seqlens_q,
        )

    def of_call(self) -> tuple[Tensor | None, ...]:
        """Return AttentionCall.tensors without q_start and k_start."""
        return (
            self.inv_freq, self.cu_seqlens_q, self.log_decay, self.sinks, self.query_scale,
            self.pair_maps,
        )  # fmt: skip


# -------------------------------------------------------------------------------------------------
# Fakes and gradients


def _fwd_fake(q, k, v, *tensors, **options):
    call = read_call(tensors, options)
    check_attention("attention", q, k, v, call)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=call.results_dtype(q.dtype))
    return out, q.new_empty(lse_shape(q), dtype=accumulator(q.dtype))


def _bwd_fake(dout, dlse, q, k, v, out, lse, *tensors, **options):
    call = read_call(tensors, options)
    check_attention("attention", q, k, v, call, results=(dout, dlse, out, lse))
    return tuple(x.new_empty(x.shape, dtype=call.results_dtype(x.dtype)) for x in (q, k, v))


def _decode_fake(*tensors, **options):
    x = DecodeTensors(*tensors)
    if x.k is not None and x.k_cache is x.v_cache:  # the kernel tells of other views of one cache
        raise ValueError("decode: k_cache and v_cache must be two tensors to be written to")
    check_decode("decode", x.q, x.k, x.v, x.cache(), read_call(x.of_call(), options))
    lse = x.q.new_empty(lse_shape(x.q), dtype=accumulator(x.q.dtype))
    return x.q.new_empty((*x.q.shape[:-1], x.v_cache.shape[-1])), lse


def _register_gradient(suffix: str) -> None:
    """Register the gradients of `attention_fwd{suffix}`; only raw tensors are saved."""
    fwd = getattr(ops, f"attention_fwd{suffix}").default
    bwd = getattr(ops, f"attention_bwd{suffix}").default

    names = [x.name for x in fwd._schema.arguments if not x.kwarg_only]

    def save(ctx, args, options, outputs):
        for name, x in zip(names, args):
            if x is not None and x.requires_grad and name not in _DIFFERENTIABLE:
                raise ValueError(
                    f"attention: {name} must not require grad, got one that does; "
                    "backend='reference' has its gradient"
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
        # The first two arguments that are recorded are not the op's.
        needs = dict(zip(names, ctx.needs_input_grad[2:]))
        grads: dict[str, Tensor | None] = {}
        if needs["inv_freq"]:

            def of_call(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
                return bwd(dout, dlse, q, k, v, out, lse, *call.tensors, **call.options)

            call = read_call(tensors, ctx.options)
            of_rows, grads["inv_freq"] = backward_with_frequencies(of_call, q, k, call)
        else:
            of_rows = bwd(dout, dlse, q, k, v, out, lse, *tensors, **ctx.options)
        grads |= dict(zip(("q", "k", "v"), of_rows))
        if needs["sinks"]:
            given = dict(zip(names, (q, k, v, *tensors)))
            grads["sinks"] = grad_of_sinks(given["sinks"], dout, dlse, out, lse)
        return tuple(grads.get(name) for name in names)

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


def _written(tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the caches if decode appends to them, else nothing."""
    x = DecodeTensors(*tensors)
    return () if x.k is None else (x.k_cache, x.v_cache)


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
