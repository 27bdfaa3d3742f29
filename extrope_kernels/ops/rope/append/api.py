"""The public function of the fused step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....methods import RopeFreqs
from ....scores import UNROTATED, Score
from ..._shared import backends as _backends
from ..._shared.autograd import call_unrecorded, note_writes
from ..._shared.checks import check_real, refuse_flags, run_explained
from ..._shared.decay import check_new_keys
from ..._shared.direct import find_direct, is_plain
from ..._shared.lengths import cache_lengths
from ..._shared.library import ops
from . import reference
from .arguments import Append
from .checks import check, check_values

RopeArgs = tuple[Tensor | None, Tensor | None, Tensor | None]

_OP = "rope_append_kvcache"
BACKENDS = ("reference", "cpu", "triton", "cuda")


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
    backend: str | None = None,
) -> Tensor | None:
    """Norm and rotate new queries and keys, and write keys and values into a cache: one launch.

    What lies between the projections and the attention of a decode step or a prefill chunk. The
    norm is RMSNorm (https://arxiv.org/abs/1910.07467), the rotation RoPE
    (https://arxiv.org/abs/2104.09864), each where its arguments are given. For inference.

    q, k, v: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens or
        slot_mapping; float32, bfloat16, float16 or float64; any strides with a contiguous last
        dimension, so views of one packed projection are taken as they are. q and k have one
        head_dim, v may have another; k and v have the cache's heads. q may be None.
    k_cache, v_cache: (batch, max_len, heads_k, head_dim), or with block_table or slot_mapping
        (num_blocks, block_size, heads_k, head_dim); any strides with a contiguous last dimension.
        What no token goes to stays as it is. In k's dtype, or float8_e4m3fn with k_scale and
        v_scale.
    freqs: from `extrope_kernels.methods`, on k's device, as for `apply_rope`; None rotates nothing.
    cache_seqlens: (batch,) int32, or one int for all: the slots in use. The new tokens go behind
        them, and have the positions that follow.
    block_table: (batch, max_blocks) int32: the blocks of each sequence in their order.
    slot_mapping: instead of both: (batch, seqlen) or (total,), int32 or int64, the slot of each
        token, block * block_size + place in the block. -1 is written nowhere.
    cu_seqlens: (batch + 1,) int32, the boundaries of packed sequences. What is past the last one is
        padding and written nowhere, unless slot_mapping says so.
    cache_leftpad: (batch,) int32: the first slot in use, whose position is 0.
    positions: (seqlen,), (batch, seqlen) or (total,), or by axes as for `apply_rope`: where each
        token is, whatever its slot. Needed where slot_mapping comes without cache_seqlens.
    score: of a score method, `scores.rerope(window)` or another: keys are rotated to where the
        attention with a cache of that name has them, and queries, which it rotates itself, come
        back normed alone. XPOS's log_decay is then taken by methods that store keys by blocks.
    k_scale, v_scale: (heads_k,) float32, positive, of a cache in float8_e4m3fn: keys and values are
        written over their head's scale, rounded to nearest even, at most 448 either way.
    q_norm_weight, k_norm_weight, norm_eps: as for `apply_rope_qk`; None leaves that tensor without
        a norm.
    interleaved: as for `apply_rope`.
    backend: "cpu", "cuda", "triton", "reference"; None for the best on k's device. A named backend
        never falls back.

    Returns: q, normed and rotated; None without q.
    Raises: ValueError or TypeError that names the argument, before anything is written;
        NotImplementedError when the named backend cannot run here. On a GPU the values of integer
        tensors are not looked at, and what does not fit the cache is not written.
    """
    if not isinstance(k, Tensor):
        raise TypeError(f"{_OP}: k must be a Tensor, got {type(k).__name__}")
    if type(interleaved) is not bool:
        refuse_flags(_OP, interleaved=interleaved)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = cache_lengths(_OP, cache_seqlens, k, cu_seqlens)
    options: dict[str, Any] = {"interleaved": True} if interleaved else {}
    if type(norm_eps) is not float or norm_eps != 1e-6:
        check_real(_OP, "norm_eps", norm_eps)
        options["norm_eps"] = norm_eps
    rope_args: RopeArgs = (None, None, None)
    if freqs is not None or score is not None:
        rope_args = _rope_args(freqs, score, options)
        if freqs is not None and freqs.log_decay is not None:
            at = (cache_seqlens, cache_leftpad, cu_seqlens, positions)
            check_new_keys(_OP, freqs, score, k, *at)
    inv_freq, log_decay, axes = rope_args
    tensors = (
        q, k, v, k_cache, v_cache, q_norm_weight, k_norm_weight, inv_freq, cache_seqlens,
        block_table, slot_mapping, cu_seqlens, cache_leftpad, positions, log_decay, axes, k_scale,
        v_scale,
    )  # fmt: skip
    return run_explained("rope_append", _run, _check, (tensors, options, backend), function=_OP)


def _rope_args(freqs: RopeFreqs | None, score: Score | None, options: dict[str, Any]) -> RopeArgs:
    """inv_freq, log_decay and axes of the op; the rest goes into its options."""
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"{_OP}: freqs must be a RopeFreqs, got {type(freqs).__name__}")
    if freqs.inv_freq is None:
        raise TypeError(f"{_OP}: inv_freq must be a Tensor, got NoneType")
    if score is None:
        factor = freqs.attention_factor
        if type(factor) is not float or factor != 1.0:
            options["attention_factor"] = factor
        if freqs.log_decay is not None and freqs.decay_origin:
            options["decay_origin"] = freqs.decay_origin
        return freqs.inv_freq, freqs.log_decay, freqs.axes
    if not isinstance(score, Score):
        raise TypeError(f"{_OP}: score must be a Score or None, got {type(score).__name__}")
    check_freqs(_OP, freqs)
    if freqs.log_decay is not None and not score.stored.modulus:
        raise ValueError(
            f"{_OP}: freqs must have no log_decay (XPOS) with {score.name}, whose amplitudes grow "
            "with the position, got one"
        )
    if score.stored == UNROTATED:
        return None, None, None
    options["stored"] = score.stored.numbers()
    return freqs.inv_freq, freqs.log_decay, None


def _run(tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Tensor | None:
    if backend is not None:
        _backends.require(_OP, backend, BACKENDS, tensors[1].device.type)
    if torch.is_grad_enabled():
        _refuse_gradients(tensors)
    if (backend is None or backend == "cpu") and not torch.compiler.is_compiling():
        q, k, v, k_cache, v_cache = tensors[:5]
        direct = find_direct("rope_append", k, q)
        if direct is not None and all(map(is_plain, (q, v, k_cache, v_cache))):
            out = None if q is None else torch.empty_like(q)
            numbers = _numbers(**options) if options else _USUAL_NUMBERS
            if direct((out,), numbers, tensors):
                note_writes(k_cache, v_cache)
                return out
    out = _call(tensors, options, backend)
    return None if tensors[0] is None else out


def _call(tensors: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Tensor:
    if backend == "reference":
        return reference.rope_append(*tensors, **options)
    op = ops.rope_append_triton if backend == "triton" else ops.rope_append
    given = given_up_to_last(*tensors)
    if torch.compiler.is_compiling():
        return op(*given, **options)
    out = call_unrecorded(op, given, options)
    note_writes(*tensors[3:5])
    return out


def _numbers(
    stored: Sequence[float] = Append.stored,
    norm_eps: float = Append.norm_eps,
    attention_factor: float = Append.attention_factor,
    interleaved: bool = Append.interleaved,
    decay_origin: float = Append.decay_origin,
) -> tuple[float, ...]:
    """The op's options as its direct function takes them."""
    return norm_eps, attention_factor, interleaved, decay_origin, *stored


_USUAL_NUMBERS = _numbers()


def _check(tensors: tuple[Any, ...], options: dict[str, Any], *_: object) -> None:
    call = Append(*tensors, **options)
    check(_OP, call)
    check_values(_OP, call)


def _refuse_gradients(tensors: tuple[Any, ...]) -> None:
    """Of what a caller may have forgotten to detach; a model's norm weights require grad as they
    are.
    """
    for name, x in zip(("q", "k", "v", "k_cache", "v_cache"), tensors):
        if x is not None and x.requires_grad:
            raise ValueError(f"{_OP} is for inference, got {name} that requires grad")


def check_freqs(op: str, freqs: RopeFreqs) -> None:
    """Frequencies of one axis."""
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"{op}: freqs must be a RopeFreqs, got {type(freqs).__name__}")
    if freqs.axes is not None:
        raise ValueError(f"{op}: freqs must have no axes (mRoPE), got some")


def given_up_to_last(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Positional arguments without the trailing ones that are None, as the op's defaults are."""
    for count in range(len(tensors), 0, -1):
        if tensors[count - 1] is not None:
            return tensors[:count]
    return ()
