"""From a public function's arguments to an op, or to the reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...methods import RopeFreqs
from ...scores import Score
from .._shared import backends as _backends
from .._shared.attention_call import (
    AttentionCall,
    check_freqs,
    given_up_to_last,
    rope_options,
    score_options,
)
from .._shared.autograd import call_unrecorded, note_writes
from .._shared.checks import refuse_flags, run_explained
from .._shared.decay import check_new_keys
from .._shared.library import ops
from .._shared.options import refuse_unknown, takes_options_of, tensor_or_pair
from .._shared.positions import cache_lengths
from . import reference
from .arguments import KVCache, parse
from .checks import check_decode, check_values

Tensors = tuple[Any, ...]  # of the ops, in their order
Options = dict[str, Any]
BACKENDS = ("reference", "cpu", "triton")


@tensor_or_pair
def attend_with_kvcache(
    score: Score,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    freqs: RopeFreqs,
    *,
    cache_seqlens: Tensor | int,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    query_scale: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    op: str | None = None,
    out: Tensor | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run any score method over a cache; the rest is as for `rerope_attention_with_kvcache`.

    op: the name that errors begin with; that of the score by default.
    out: takes the result, whatever its strides.
    """
    op = op or score.name
    refuse_unknown(op, unknown)
    if type(interleaved) is not bool or type(return_lse) is not bool:
        refuse_flags(op, interleaved=interleaved, return_lse=return_lse)
    check_freqs(op, freqs)
    if freqs.log_decay is not None and not score.stored.modulus:
        raise ValueError(
            f"{op}: freqs must have no log_decay (XPOS), whose amplitudes grow with the position, "
            "got one"
        )
    if not isinstance(cache_seqlens, Tensor):
        cache_seqlens = cache_lengths(op, cache_seqlens, q, cu_seqlens_q, "cu_seqlens_q")
    if freqs.log_decay is not None:
        check_new_keys(op, freqs, score, k, cache_seqlens, cache_leftpad, cu_seqlens_q)
    rope_args = (freqs.inv_freq, cache_seqlens, block_table, cache_leftpad)
    more: Tensors = (freqs.log_decay, sinks, query_scale, cu_seqlens_q)
    if k_scale is not None or v_scale is not None:
        more += (k_scale, v_scale)
    tensors: Tensors = (q, k_cache, v_cache, k, v, *rope_args, *given_up_to_last(*more))
    options = score_options(score, stored=True)
    options |= rope_options(op, freqs, softmax_scale, log_n, interleaved, softcap, sliding_window)
    args = (op, tensors, options, backend, out, return_lse)
    found, lse = run_explained("decode", _run, _check, args, function=op)
    if out is not None and found is not out:
        found = out.copy_(found)
    return (found, lse) if return_lse else found


public = takes_options_of(attend_with_kvcache, internal=("op", "out"))


def _run(
    op: str,
    tensors: Tensors,
    options: Options,
    backend: str | None,
    out: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    q = tensors[0]
    compiling = torch.compiler.is_compiling()
    if backend is not None:
        _backends.require(op, backend, BACKENDS, q.device.type)
    if torch.is_grad_enabled() and (compiling or torch._C._any_requires_grad(*tensors[:5])):
        _refuse_gradients(op, tensors)
    if backend == "reference" or (backend in (None, "cpu") and q.dtype == torch.float64):
        cache, call = _check(op, tensors, options)
        return reference.decode(q, tensors[3], tensors[4], cache, call)
    decode = ops.decode_triton if backend == "triton" else ops.decode
    if compiling:
        return decode(*tensors, **options)
    found = call_unrecorded(decode, tensors, options)
    if tensors[3] is not None:
        note_writes(*tensors[1:3])
    return found


def _check(
    op: str, tensors: Tensors, options: Options, *_: object
) -> tuple[KVCache, AttentionCall]:
    cache, call = parse(*tensors, **options)
    check_decode(op, tensors[0], tensors[3], tensors[4], cache, call)
    check_values(op, cache, call.cu_seqlens, len(tensors[0]))
    return cache, call


def _refuse_gradients(op: str, tensors: Tensors) -> None:
    for name, x in zip(("q", "k_cache", "v_cache", "k", "v"), tensors):
        if x is not None and x.requires_grad:
            raise ValueError(f"{op} is for inference, got {name} that requires grad")


def backends() -> dict[str, str]:
    """What each backend says of itself here: "available", or why it is not."""
    return {name: _backends.missing(name) or "available" for name in BACKENDS}
