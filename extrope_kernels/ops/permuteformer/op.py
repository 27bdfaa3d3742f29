"""The ops of PermuteFormer: schemas, fakes, derivatives, and their backend by device.

On a CPU the compiled kernels run (csrc/cpu/permute, csrc/cpu/linear_attention), on a GPU
flash-linear-attention. The reference runs if those are missing, and in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._math.dtypes import accumulator
from .._torch.autograd import (
    batching_rule,
    contiguous_rows,
    empty_rows,
    refuse_backward,
    register_backward,
)
from .._torch.library import declare, define, library, missing, ops
from . import cpu, fla, reference
from .checks import check, check_dims, check_powers, check_state, check_values
from .permutations import Powers, cycles, source_dims
from .scans import Call, Result, gather

# An Autograd kernel sees only positional tensors, hence all tensors come before the *. In the
# attention offset has no integer default, which AOTInductor of PyTorch 2.13 could not leave out;
# None means 0. permute_fwd, which C++ implements, still has one.
_POWERS = "Tensor permutations, Tensor? positions=None, "
_SCHEMAS = {
    "permute_fwd": (
        f"(Tensor q, Tensor? k, {_POWERS}Tensor? cu_seqlens=None, "
        "*, SymInt offset=0, bool inverse=False) -> (Tensor, Tensor)"
    ),
    "permuteformer_fwd": (
        f"(Tensor q, Tensor k, Tensor v, {_POWERS}Tensor? decay=None, Tensor? cu_seqlens=None, "
        "*, SymInt? offset=None, bool causal=True, bool normalize=True) -> (Tensor out, Tensor den)"
    ),
    "permuteformer_bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor? den, "
        f"{_POWERS}Tensor? decay=None, Tensor? cu_seqlens=None, "
        "*, SymInt? offset=None, bool causal=True, bool normalize=True) "
        "-> (Tensor dq, Tensor dk, Tensor dv)"
    ),
    "permuteformer_step": (
        f"(Tensor q, Tensor k, Tensor v, {_POWERS}Tensor? kv=None, Tensor? key_sum=None, "
        "Tensor? decay=None, *, SymInt? offset=None, bool normalize=True) "
        "-> (Tensor out, Tensor kv, Tensor key_sum)"
    ),
}
_NAME = "permuteformer"


# -------------------------------------------------------------------------------------------------
# The permutation


def _permute_fake(q, k, permutations, positions=None, cu_seqlens=None, *, offset=0, inverse=False):
    check_powers("permute", q, k, permutations, positions, cu_seqlens)
    return empty_rows(q), q.new_empty(0) if k is None else empty_rows(k)


_TOKENS = 4096  # permuted at once: a dim's source takes eight bytes


def _permute_by_gather(
    q, k, permutations, positions=None, cu_seqlens=None, *, offset=0, inverse=False
):
    powers = Powers(permutations, positions, cu_seqlens, offset)
    check_powers("permute", q, k, permutations, positions, cu_seqlens)
    check_values("permute", q.shape[0], powers)
    packed = cu_seqlens is not None
    inputs = [x[None] if packed else x for x in (q, k) if x is not None]
    outputs = [torch.empty_like(x) for x in inputs]
    at, found = powers.of_tokens(inputs[0].shape), cycles(permutations)
    for first in range(0, inputs[0].shape[1], _TOKENS):
        rows = slice(first, first + _TOKENS)
        dims = source_dims(found, at[:, rows], inverse)
        for x, out in zip(inputs, outputs):
            out[:, rows] = gather(x[:, rows], dims)
    outputs = [out[0] if packed else out for out in outputs]
    return outputs[0], outputs[1] if k is not None else q.new_empty(0)


def _save_permute(ctx, args, options, outputs):
    ctx.has_k = args[1] is not None
    ctx.options = {**options, "inverse": not options.get("inverse", False)}
    ctx.save_for_backward(*args[2:])


def _backward_of_permute(ctx, grad_q, grad_k):
    """Permute by the inverse, which is the transpose: derivatives of any order."""
    grad_k = contiguous_rows(grad_k) if ctx.has_k else None
    dq, dk = ops.permute_fwd(contiguous_rows(grad_q), grad_k, *ctx.saved_tensors, **ctx.options)
    return dq, dk if ctx.has_k else None


# -------------------------------------------------------------------------------------------------
# Attention


def _powers(permutations, positions, cu_seqlens, offset: int | None) -> Powers:
    return Powers(permutations, positions, cu_seqlens, 0 if offset is None else offset)


def _call(q, k, v, powers: Powers, decay, causal=True, normalize=True, results=()) -> Call:
    check(_NAME, q, k, v, decay, powers.cu_seqlens, causal, results)
    check_powers(_NAME, q, k, *powers[:3])
    if normalize and any(x is None for x in results):
        raise ValueError(f"{_NAME}: out and den must be given with normalize=True, got None")
    heads = k.shape[-2] if decay is None else decay.shape[0]
    return Call(heads, decay, powers.cu_seqlens, causal, normalize)


def implementation(q: Tensor, v: Tensor):
    """Select the module that attends; the reference if nothing else can run here."""
    if q.dtype == torch.float64 or (q.numel() == 0 and q.is_cuda):
        return reference
    name, module = ("fla", fla) if q.is_cuda else ("cpu", cpu)
    if missing(name, q.device.type):
        return reference
    check_dims(_NAME, q, v)
    return module


def _run(q, k, v, powers: Powers, call: Call) -> Result:
    module = implementation(q, v)
    if module is not cpu:  # the CPU kernels check for themselves
        check_values(_NAME, q.shape[0], powers, call.decay)
    return module.forward(q, k, v, powers, call)


def _fwd(
    q, k, v, permutations, positions=None, decay=None, cu_seqlens=None, *, offset=None, **options
):
    powers = _powers(permutations, positions, cu_seqlens, offset)
    out, den, *_ = _run(q, k, v, powers, _call(q, k, v, powers, decay, **options))
    return out, den


def _fwd_fake(
    q, k, v, permutations, positions=None, decay=None, cu_seqlens=None, *, offset=None, **options
):
    powers = _powers(permutations, positions, cu_seqlens, offset)
    call = _call(q, k, v, powers, decay, **options)
    rows = (q.shape[1], q.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[2], q.shape[1])
    wide = accumulator(q.dtype)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]), dtype=wide)
    return out, q.new_empty(rows if call.normalize else 0, dtype=wide)


def _bwd(
    dout, q, k, v, out, den, permutations, positions=None, decay=None, cu_seqlens=None,
    *, offset=None, **options,
):  # fmt: skip
    powers = _powers(permutations, positions, cu_seqlens, offset)
    call = _call(q, k, v, powers, decay, **options, results=(dout, out, den))
    check_values(_NAME, q.shape[0], powers, decay)
    return implementation(q, v).backward(dout, q, k, v, out, den, powers, call)


def _bwd_fake(
    dout, q, k, v, out, den, permutations, positions=None, decay=None, cu_seqlens=None,
    *, offset=None, **options,
):  # fmt: skip
    powers = _powers(permutations, positions, cu_seqlens, offset)
    _call(q, k, v, powers, decay, **options, results=(dout, out, den))
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, args, options, outputs):
    q, k, v, permutations, *more = args
    positions, decay, cu_seqlens = (*more, None, None, None)[:3]
    if decay is not None and decay.requires_grad:
        raise ValueError(f"{_NAME}: decay must not require grad, got one that does")
    ctx.options = options
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs[1])
    kept = outputs if options.get("normalize", True) else (None, None)
    ctx.save_for_backward(q, k, v, *kept, permutations, positions, decay, cu_seqlens)


def _backward(ctx, dout, _):
    if dout is None:
        return None, None, None
    return ops.permuteformer_bwd(contiguous_rows(dout), *ctx.saved_tensors, **ctx.options)


def _step(
    q, k, v, permutations, positions=None, kv=None, key_sum=None, decay=None,
    *, offset=None, normalize=True,
):  # fmt: skip
    powers = _powers(permutations, positions, None, offset)
    call = _step_call(q, k, v, powers, kv, key_sum, decay, normalize)
    found = _run(q, k, v, powers, call)
    return found.out.to(q.dtype), found.kv, found.key_sum


def _step_call(q, k, v, powers: Powers, kv, key_sum, decay, normalize) -> Call:
    heads = _call(q, k, v, powers, decay).heads
    if kv is not None:
        check_state(_NAME, kv, key_sum, k, v, heads)
    return Call(heads, decay, None, True, normalize, kv, key_sum, keep_state=True)


def _step_fake(
    q, k, v, permutations, positions=None, kv=None, key_sum=None, decay=None,
    *, offset=None, normalize=True,
):  # fmt: skip
    powers = _powers(permutations, positions, None, offset)
    heads = _step_call(q, k, v, powers, kv, key_sum, decay, normalize).heads
    shape = (k.shape[0], heads, k.shape[-1])
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    state = q.new_empty((*shape, v.shape[-1]), dtype=accumulator(q.dtype))
    return out, state, q.new_empty(shape, dtype=accumulator(q.dtype))


# -------------------------------------------------------------------------------------------------


def _define() -> None:
    fakes = {
        "permuteformer_fwd": _fwd_fake,
        "permuteformer_bwd": _bwd_fake,
        "permuteformer_step": _step_fake,
    }
    gather = _permute_by_gather
    schema = _SCHEMAS["permute_fwd"]
    define("permute_fwd", schema, _permute_fake, {"reference": gather}, on_gpu=gather)
    for name, fake in fakes.items():
        declare(name, _SCHEMAS[name], fake)
    permute, forward, backward, step = (getattr(ops, name).default for name in _SCHEMAS)
    register_backward(library, permute, _save_permute, _backward_of_permute)
    # Sequences that start at one position are one batch.
    shared = batching_rule(permute, 2, lambda tensors: all(x is None for x in tensors[1:]))
    torch.library.register_vmap(permute, shared, lib=library)
    register_backward(library, forward, _save, _backward)
    only_first = f"{_NAME}: the kernels have first derivatives only; use backend='reference'"
    refuse_backward(library, backward, only_first)
    refuse_backward(library, step, f"{_NAME}: a step is for inference and has no gradient")
    for key in ("CPU", "CUDA"):
        library.impl("permuteformer_fwd", _fwd, key)
        library.impl("permuteformer_bwd", _bwd, key)
        library.impl("permuteformer_step", _step, key)


_define()
