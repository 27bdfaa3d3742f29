"""The fused append to a key/value cache: norm, rotation and the write of keys and values.

The CPU library registers its kernel for the op `rope_append` (csrc/cpu/append/bind.cpp); on a GPU
the op runs Triton's. `rope_append_triton` always runs Triton's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores.base import SAME, UNROTATED, PairMap, Score
from .._shared import backends as _backends
from .._shared.autograd import call_unrecorded, note_writes, refuse_backward
from .._shared.checks import (
    REFUSALS,
    check_freqs,
    check_int,
    check_real,
    raise_as_value_error,
    refuse_flags,
    share_memory,
)
from .._shared.decay import check_new_keys, check_numbers
from .._shared.dtypes import quantize
from .._shared.library import library, load_on_first_use, ops
from .._shared.maps import SCHEMA, columns_of
from .._shared.positions import cache_lengths
from .append_checks import Append, check, check_values
from .norm import rms_norm, rope_norm_fwd
from .op import triton_kernels

BACKENDS = ("reference", "cpu", "triton")
_OP = "rope_append_kvcache"


def rope_append_kvcache(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs | None,
    *,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    positions: Tensor | None = None,
    score: Score | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    interleaved: bool = False,
    rotary_offset: int = 0,
    backend: str | None = None,
) -> Tensor | None:
    """Norm and rotate new queries and keys, and write keys and values into a cache: one launch.

    It covers everything between the projections and the attention of a decode step or a prefill
    chunk. The norm is RMSNorm (https://arxiv.org/abs/1910.07467), the rotation RoPE
    (https://arxiv.org/abs/2104.09864); each runs if its arguments are given. For inference.

    q, k, v: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens or
        slot_mapping; float32, bfloat16, float16 or float64; any strides with a contiguous last
        dimension, so views of one packed projection need no copy. q and k have one head_dim, v may
        have another; k and v have the cache's heads. q may be None.
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), or with block_table or slot_mapping
        (num_blocks, block_size, heads_k, head_dim); any strides with a contiguous last dimension.
        Slots without a new token do not change. In k's dtype, or float8_e4m3fn with k_scale and
        v_scale.
    freqs: from `extrope_kernels.methods`, on k's device, as for `apply_rope`; None rotates nothing.
    cache_seqlens: (batch,) int32 or int64, or one int for all: the slots in use. New tokens follow
        them, in slots and in positions.
    block_table: (batch, max_blocks) int32: the blocks of each sequence, in order.
    slot_mapping: instead of both: (batch, seqlen) or (total,), int32 or int64, the slot of each
        token, block * block_size + slot in the block. -1 writes nothing.
    cu_seqlens: (batch + 1,) int32, the boundaries of packed sequences. Tokens past the last one are
        padding, and not written unless slot_mapping gives them slots.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    positions: (seqlen,), (batch, seqlen) or (total,), or by axes as for `apply_rope`: the position
        of each token, independent of its slot. Needed with slot_mapping without cache_seqlens.
    score: a score method such as `scores.rerope(window)`: keys are rotated by `score.stored`, as
        `rope_attention_with_kvcache` expects them. Queries come back only normed, since that
        attention rotates them itself. XPOS's log_decay then needs a method that stores keys by
        blocks.
    k_scale, v_scale: (heads_k,) float32, positive, for a cache in float8_e4m3fn: keys and values
        are divided by their head's scale, rounded to nearest even, and clamped at 448 either way.
    q_norm_weight, k_norm_weight, norm_eps: as for `apply_rope_qk`; None leaves that tensor without
        a norm.
    interleaved, rotary_offset: as for `apply_rope`.
    backend: "cpu", "triton", "reference"; None for the best on k's device. A named backend
        never falls back.

    Returns: q, normed and rotated; None without q.
    Raises: ValueError or TypeError that names the argument, before anything is written;
        NotImplementedError if the named backend cannot run here. On a GPU the values of integer
        tensors are not checked; tokens outside the cache are not written.
    """
    if not isinstance(k, Tensor):
        raise TypeError(f"{_OP}: k must be a Tensor, got {type(k).__name__}")
    refuse_flags(_OP, interleaved=interleaved)
    if cache_seqlens is not None:
        cache_seqlens = cache_lengths(_OP, cache_seqlens, k, cu_seqlens)
    options: dict[str, Any] = {"interleaved": True} if interleaved else {}
    check_int(_OP, "rotary_offset", rotary_offset)
    if rotary_offset != 0:
        options["rotary_offset"] = rotary_offset
    if type(norm_eps) is not float or norm_eps != Append.norm_eps:
        check_real(_OP, "norm_eps", norm_eps)
        options["norm_eps"] = norm_eps
    inv_freq = log_decay = axes = None
    if freqs is not None or score is not None:
        inv_freq, log_decay, axes = _rope_args(freqs, score, options)
        if freqs is not None and freqs.log_decay is not None:
            at = (cache_seqlens, cache_leftpad, cu_seqlens, positions)
            check_new_keys(_OP, freqs, score, k, *at)
    tensors = (
        q, k, v, k_cache, v_cache, q_norm_weight, k_norm_weight, inv_freq, cache_seqlens,
        block_table, slot_mapping, cu_seqlens, cache_leftpad, positions, log_decay, axes, k_scale,
        v_scale,
    )  # fmt: skip
    if score is not None and isinstance(score.stored, PairMap):
        tensors = _placed_by_pair(score, tensors, options)
    if backend is not None:
        _backends.require(_OP, backend, BACKENDS, k.device.type)
    if torch.compiler.is_compiling():
        out = _run(tensors, options, backend)
    else:
        try:
            out = _run(tensors, options, backend)
        except REFUSALS as error:
            call = Append(*tensors, **options)
            check(_OP, call)
            check_values(_OP, call)
            raise_as_value_error(error, "rope_append", _OP)
            raise
    return None if q is None else out


def _rope_args(
    freqs: RopeFreqs | None, score: Score | None, options: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the op's inv_freq, log_decay and axes; put the rest into its options."""
    check_freqs(_OP, freqs)
    check_numbers(_OP, freqs)
    if freqs.inv_freq is None:
        raise TypeError(f"{_OP}: inv_freq must be a Tensor, got NoneType")
    if score is None:
        factor, origin = freqs.attention_factor, freqs.decay_origin
        options |= {"attention_factor": factor, "decay_origin": origin}
        return freqs.inv_freq, freqs.log_decay, freqs.axes
    if not isinstance(score, Score):
        raise TypeError(f"{_OP}: score must be a Score or None, got {type(score).__name__}")
    if freqs.axes is not None:
        raise ValueError(f"{_OP}: freqs must have no axes (mRoPE), got some")
    by_pair = isinstance(score.stored, PairMap)
    if freqs.log_decay is not None and (by_pair or not score.stored.modulus):
        raise ValueError(
            f"{_OP}: freqs must have no log_decay (XPOS) with {score.name}, whose amplitudes grow "
            "with the position, got one"
        )
    if score.stored == UNROTATED:
        return None, None, None
    options |= columns_of([SAME if by_pair else score.stored])
    return freqs.inv_freq, freqs.log_decay, None


def _placed_by_pair(
    score: Score, tensors: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, ...]:
    """Replace positions by stored ones of `score`, with an axis for each pair."""
    call, shape = Append(*tensors, **options), score.stored.divisor.shape
    check(_OP, call)
    check_values(_OP, call)
    pairs = call.inv_freq.shape[-1]
    if shape != (pairs,):
        raise ValueError(
            f"{_OP}: {score.name} must store keys by a map of {pairs} pairs, got {shape[0]}"
        )
    places = score.stored_at(call.token_positions()).detach().movedim(-1, 0)
    places = places if places.dim() == 3 else places[:, None]
    axes = torch.arange(pairs, dtype=torch.int32, device=call.k.device)
    given = dict(zip((x.name for x in fields(Append)), tensors))
    return tuple((given | {"positions": places, "log_decay": None, "axes": axes}).values())


def _run(tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Tensor:
    _refuse_gradients(tensors)
    k_cache, v_cache = tensors[3:5]
    compiling = torch.compiler.is_compiling()
    if not compiling and share_memory(k_cache, v_cache):
        raise ValueError(
            f"{_OP}: k_cache and v_cache must be two tensors, got two that share memory"
        )
    if backend == "reference":
        with torch.no_grad():  # weights of a norm would make the caches part of a graph
            return reference(*tensors, **options)
    op = ops.rope_append_triton if backend == "triton" else ops.rope_append
    if compiling:
        return op(*tensors, **options)
    out = call_unrecorded(op, tensors, options)
    note_writes(k_cache, v_cache)
    return out


def _refuse_gradients(tensors: tuple[Any, ...]) -> None:
    """Refuse tensors that require gradients, except a model's norm weights."""
    if not torch.is_grad_enabled():
        return
    for name, x in zip(("q", "k", "v", "k_cache", "v_cache"), tensors):
        if x is not None and x.requires_grad:
            raise ValueError(
                f"{_OP}: {name} must not require grad, got one that does; the op is for inference"
            )


# -------------------------------------------------------------------------------------------------
# In plain PyTorch


def reference(*tensors: Tensor | None, **options) -> Tensor:
    """Compute `torch.ops.extrope.rope_append`."""
    call = Append(*tensors, **options)
    check("rope_append", call)
    check_values("rope_append", call)
    q, k = _rotated(call)
    written, block, slot = call.rows()
    written = written & (block >= 0) & (block < call.k_cache.shape[0])  # a GPU's are not checked
    at = block[written], slot[written]
    shape = (call.batch, call.seqlen)
    for cache, x, scale in zip((call.k_cache, call.v_cache), (k, call.v), call.scales):
        rows = x.reshape(*shape, *x.shape[-2:])[written]
        cache.index_put_(at, rows if scale is None else quantize(rows, scale))
    return call.k.new_empty(0) if q is None else q


def _rotated(call: Append) -> tuple[Tensor | None, Tensor]:
    if call.rotates_q:
        return _rotate(call, call.q, call.token_positions())
    q = None if call.q is None else _norm(call.q, call.q_norm_weight, call)
    if call.map is None or call.map == UNROTATED:
        return q, _norm(call.k, call.k_norm_weight, call)
    return q, _rotate(call, None, call.map(call.token_positions()))[1]


def _norm(x: Tensor, weight: Tensor | None, call: Append) -> Tensor:
    return rms_norm(x, weight, call.norm_eps).to(x.dtype) if weight is not None else x.clone()


def _rotate(call: Append, q: Tensor | None, positions: Tensor) -> tuple[Tensor | None, Tensor]:
    """Rotate k, and q unless a score method rotates it later."""
    options = {
        "norm_eps": call.norm_eps,
        "attention_factor": call.attention_factor,
        "interleaved": call.interleaved,
        "rotary_offset": call.rotary_offset,
        "decay_origin": call.decay_origin,
    }
    decay, tensors = call.log_decay, (q, call.k, call.q_norm_weight, call.k_norm_weight)
    if q is None:  # k takes its place, and decays the other way
        tensors = (call.k, None, call.k_norm_weight, None)
        decay = None if decay is None else -decay
    cu_seqlens = call.cu_seqlens
    if cu_seqlens is not None:  # padding is rotated like the last sequence
        cu_seqlens = torch.cat((cu_seqlens[:-1], cu_seqlens.new_tensor([call.seqlen])))
    rope_args = (call.inv_freq, positions, cu_seqlens, decay, call.axes)
    by_slots = call.packed and call.cu_seqlens is None
    if by_slots:
        tensors = (*(x if x is None else x[None] for x in tensors[:2]), *tensors[2:])
    found = rope_norm_fwd(*tensors, *rope_args, **options)
    found = tuple(x[0] for x in found if x.dim() == 4) if by_slots else found
    return (None, found[0]) if q is None else found


# -------------------------------------------------------------------------------------------------
# The op

# The map, if there is one, is that by which a score method stores keys; q then stays unrotated.
_MAP = ", ".join(SCHEMA.values()).replace("int[] map_kinds", "int[]? map_kinds=None")
_SCHEMA = (
    "(Tensor? q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor? q_norm_weight, Tensor? k_norm_weight, Tensor? inv_freq, Tensor? cache_seqlens=None, "
    "Tensor? block_table=None, Tensor? slot_mapping=None, Tensor? cu_seqlens=None, "
    "Tensor? cache_leftpad=None, Tensor? positions=None, Tensor? log_decay=None, "
    "Tensor? axes=None, Tensor? k_scale=None, Tensor? v_scale=None, *, "
    f"{_MAP}, float norm_eps=1e-6, float attention_factor=1.0, "
    "bool interleaved=False, int? rotary_offset=None, float decay_origin=0.0) -> Tensor"
)


def _fake(*tensors, **options):
    call = Append(*tensors, **options)
    check("rope_append", call)
    return call.k.new_empty(0) if call.q is None else torch.empty_like(call.q)


def _define() -> None:
    for suffix in ("", "_triton"):
        name = f"rope_append{suffix}"
        library.define(name + _SCHEMA, tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"{library.ns}::{name}", _fake, lib=library)
        op = getattr(ops, name).default
        message = "rope_append: is for inference and has no gradient"
        refuse_backward(library, op, message, lambda tensors: tensors[3:5])
    by_triton = triton_kernels("append", ("rope_append",))["rope_append"]
    library.impl("rope_append_triton", by_triton, "CUDA")
    library.impl("rope_append_triton", by_triton, "CPU")  # the interpreter
    library.impl("rope_append", by_triton, "CUDA")
    load_on_first_use({"cpu": {"rope_append": reference}})


_define()
