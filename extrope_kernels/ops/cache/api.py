"""The public function of the fused append to a key/value cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._names import explains_wrong_calls
from ...methods import RopeFreqs
from ...scores.base import UNROTATED, Score
from .._math.maps import columns_of
from .._tables import specs
from .._tables.checks import (
    REFUSALS,
    check_freqs,
    check_int,
    raise_as_value_error,
    refuse_flags,
)
from .._tables.decay import check_new_keys
from .._torch.autograd import call_unrecorded, note_writes
from .._torch.library import op_of, require
from . import op as _op  # noqa: F401  (defines the op)
from . import reference
from .call import KEYS, cache_lengths, check, check_values, read_append

BACKENDS = ("reference", "cpu", "triton")
_OP = "rope_append_kvcache"


@explains_wrong_calls
def rope_append_kvcache(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs | None,
    *,
    score: Score | None = None,
    cache_seqlens: Tensor | int | None = None,
    block_table: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
    backend: str | None = None,
) -> Tensor | None:
    """Rotate new queries and keys, and write keys and values into a cache: one launch.

    The rotation is RoPE (https://arxiv.org/abs/2104.09864). For inference. A norm of queries and
    keys comes before: `apply_rope_qk(..., freqs, q_norm_weight=..., inplace=True)` norms and
    rotates, and then this function writes with freqs None.

    q, k, v: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens or
        slot_mapping; float32, bfloat16, float16 or float64; any strides with a contiguous last
        dimension, so views of one packed projection need no copy. q and k have one head_dim, v may
        have another; k and v have the cache's heads. q may be None.
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), or with block_table or slot_mapping
        (num_blocks, block_size, heads_k, head_dim); any strides with a contiguous last dimension.
        Slots without a new token do not change. In k's dtype, or float8_e4m3fn with k_scale and
        v_scale.
    freqs: from `extrope_kernels.methods`, on k's device, as for `apply_rope` but without axes
        (mRoPE); None rotates nothing.
    score: a score method such as `scores.rerope(window)`: keys are rotated by `score.stored`, as
        `rope_attention_with_kvcache` expects them. That attention rotates queries itself. XPOS's
        log_decay then needs a method that stores keys by blocks.
    cache_seqlens: (batch,) int32 or int64, or one int for all: the slots in use. New tokens follow
        them, in slots and in positions.
    block_table: (batch, max_blocks) int32: the blocks of each sequence, in order.
    slot_mapping: instead of both: (batch, seqlen) or (total,), int32 or int64, the slot of each
        token, block * block_size + slot in the block. -1 writes nothing.
    positions: (seqlen,), (batch, seqlen) or (total,): the position of each token, independent of
        its slot. Needed with slot_mapping without cache_seqlens.
    cu_seqlens: (batch + 1,) int32, the boundaries of packed sequences. Tokens past the last one are
        padding, and not written unless slot_mapping gives them slots.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    k_scale, v_scale: (heads_k,) float32, positive, for a cache in float8_e4m3fn: keys and values
        are divided by their head's scale, rounded to nearest even, and clamped at 448 either way.
    interleaved, rotary_offset: as for `apply_rope`.
    backend: "cpu", "triton", "reference"; None for the best on k's device. A named backend
        never falls back.

    Returns: q, rotated; with a score or without freqs q itself.
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
    inv_freq = log_decay = None
    if freqs is not None or score is not None:
        inv_freq, log_decay = _rope_args(freqs, score, options)
        if freqs is not None and freqs.log_decay is not None:
            at = (cache_seqlens, cache_leftpad, cu_seqlens, positions)
            check_new_keys(_OP, freqs, score, k, *at)
    rotates_q = freqs is not None and score is None
    if q is not None and not rotates_q:  # the op does not see it
        specs.check(_OP, specs.for_rows(KEYS, k.dim() == 3), (k, cu_seqlens, q))
    tensors = (
        q if rotates_q else None, k, v, k_cache, v_cache, inv_freq, cache_seqlens, block_table,
        slot_mapping, positions, cu_seqlens, cache_leftpad, log_decay, k_scale, v_scale,
    )  # fmt: skip
    _refuse_gradients(q, *tensors[1:5])
    if backend is not None:
        require(_OP, backend, BACKENDS, k.device.type)
    if torch.compiler.is_compiling():
        out = _run(tensors, options, backend)
    else:
        try:
            out = _run(tensors, options, backend)
        except REFUSALS as error:
            call = read_append(*tensors, **options)
            check(_OP, call)
            check_values(_OP, call)
            raise_as_value_error(error, "rope_append", _OP)
            raise
    return out if q is not None and rotates_q else q


def _rope_args(
    freqs: RopeFreqs | None, score: Score | None, options: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the op's inv_freq and log_decay; put the rest into its options."""
    check_freqs(_OP, freqs)
    assert freqs is not None  # the check has refused it
    if freqs.axes is not None:
        raise ValueError(
            f"{_OP}: freqs must have no axes (mRoPE), got some; apply_rope_qk takes them, and keys "
            "that it has rotated are written with freqs=None"
        )
    if score is None:
        factor, origin = freqs.attention_factor, freqs.decay_origin
        options |= {"attention_factor": factor, "decay_origin": origin}
        return freqs.inv_freq, freqs.log_decay
    if not isinstance(score, Score):
        raise TypeError(f"{_OP}: score must be a Score or None, got {type(score).__name__}")
    if freqs.log_decay is not None and not score.stored.modulus:
        raise ValueError(
            f"{_OP}: freqs must have no log_decay (XPOS) with {score.name}, whose amplitudes grow "
            "with the position, got one"
        )
    if score.stored == UNROTATED:
        return None, None
    options |= columns_of([score.stored])
    return freqs.inv_freq, freqs.log_decay


def _run(tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Tensor:
    if backend == "reference":
        return reference.rope_append(*tensors, **options)
    op = op_of("rope_append", backend)
    if torch.compiler.is_compiling():
        return op(*tensors, **options)
    out = call_unrecorded(op, tensors, options)
    note_writes(*tensors[3:5])
    return out


def _refuse_gradients(*tensors: Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in zip(("q", "k", "v", "k_cache", "v_cache"), tensors):
        if isinstance(x, Tensor) and x.requires_grad:
            raise ValueError(
                f"{_OP}: {name} must not require grad, got one that does; the op is for inference"
            )
