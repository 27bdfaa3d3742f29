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
from .._shared.autograd import call_unrecorded
from .._shared.checks import refuse_flags, run_explained
from .._shared.dtensor import replicated
from .._shared.library import ops
from .._shared.options import refuse_unknown, takes_options_of, tensor_or_pair
from . import flash_attn, reference
from .checks import check, check_boundaries
from .decay import check_decay

BACKENDS = ("reference", "cpu", "triton", "flash_attn")


@tensor_or_pair
def attend(
    score: Score,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    *,
    softmax_scale: float | None = None,
    log_n: float | None = None,
    query_scale: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    q_start: Tensor | int | None = None,
    k_start: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    keys_stored: bool = False,
    op: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run any score method; the rest is as for `rerope_attention`.

    op: the name that errors begin with; that of the score by default.
    keys_stored: keys come as a cache keeps them, rotated to `score.stored`, not raw.
    """
    op = op or score.name
    refuse_unknown(op, unknown)
    if type(interleaved) is not bool or type(return_lse) is not bool:
        refuse_flags(op, interleaved=interleaved, return_lse=return_lse)
    check_freqs(op, freqs)
    if freqs.log_decay is not None and freqs.steepest_decay:
        check_decay(op, score, freqs, (q, k), (q_start, k_start), cu_seqlens)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    rope_args: tuple[Any, ...] = (freqs.inv_freq, cu_seqlens, freqs.log_decay)
    # Rare, and every argument costs the dispatcher time.
    if sinks is not None or query_scale is not None or q_start is not None or k_start is not None:
        starts = (_start(op, "q_start", q_start, q), _start(op, "k_start", k_start, q))
        rope_args += given_up_to_last(sinks, query_scale, *starts)
    if type(q) is not Tensor:
        rope_args = replicated(q, rope_args)
    options = score_options(score, stored=keys_stored)
    options |= rope_options(op, freqs, softmax_scale, log_n, interleaved, softcap, sliding_window)
    args = (op, (q, k, v, *rope_args), options, backend, return_lse)
    out, lse = run_explained("attention", run, _check, args, function=op)
    return (out, lse) if return_lse else out


public = takes_options_of(attend, internal=("keys_stored", "op"))


def _start(op: str, name: str, start: Tensor | int | None, q: Tensor) -> Tensor | None:
    """A start as the tensor that ops take."""
    if start is None or isinstance(start, Tensor):
        return start
    if isinstance(start, bool) or not isinstance(start, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int or a Tensor, got {type(start).__name__}")
    if not 0 <= start < 2**31:
        raise ValueError(f"{op}: {name} must be between 0 and 2**31, got {start}")
    return torch.full((1,), start, dtype=torch.int32, device=q.device)


def run(
    op: str,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    backend: str | None,
    return_lse: bool = True,
) -> tuple[Tensor, Any]:
    """out and lse, which may be None where it is not wanted.

    tensors: of the ops, in their order.
    """
    q, k, v, *_ = tensors
    if backend is not None:
        _backends.require(op, backend, BACKENDS, q.device.type, missing)
    if backend == "reference" or (backend in (None, "cpu") and q.dtype == torch.float64):
        call = _check(op, tensors, options)
        if not torch.compiler.is_compiling():
            check_boundaries(op, call.cu_seqlens, q)
        return reference.forward(q, k, v, call)
    recorded = torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors)
    )
    suffix = f"_{backend}" if backend in ("triton", "flash_attn") else ""
    attention_fwd = getattr(ops, f"attention_fwd{suffix}")
    if recorded:
        return attention_fwd(*tensors, **options)
    return call_unrecorded(attention_fwd, tensors, options)


def _check(op: str, tensors: tuple[Any, ...], options: dict[str, Any], *_: object) -> AttentionCall:
    q, k, v, *rope_args = tensors
    call = AttentionCall(*rope_args, **options)
    check(op, q, k, v, call)
    return call


def missing(backend: str, device: str | None = None) -> str | None:
    """None when `backend` can run here, else the reason in one line."""
    return flash_attn.missing() if backend == "flash_attn" else _backends.missing(backend, device)


missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def backends() -> dict[str, str]:
    """What each backend says of itself here: "available", or why it is not."""
    return {name: missing(name) or "available" for name in BACKENDS}
