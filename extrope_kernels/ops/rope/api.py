"""The public functions of the rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._names import explains_wrong_calls
from ...methods import RopeFreqs
from .._tables.checks import (
    REFUSALS,
    check_boundaries,
    check_freqs,
    check_int,
    narrowed,
    raise_as_value_error,
    refuse_flags,
    split_offset,
)
from .._torch.autograd import call_unrecorded, note_writes, wants_grad
from .._torch.dtensor import replicated
from .._torch.library import missing, op_of, ops, require
from . import norm as norm_reference
from . import op as _op  # noqa: F401  (defines the ops)
from . import reference
from .call import (
    INPLACE,
    RopeTensors,
    check,
    check_decay,
    check_norm,
    check_norm_eps,
    not_differentiable,
)

Norm = tuple[Tensor | None, Tensor | None, float]  # q_norm_weight, k_norm_weight, norm_eps
BACKENDS = ("reference", "cpu", "triton", "cuda")


@explains_wrong_calls
def apply_rope(
    x: Tensor,
    freqs: RopeFreqs,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
    inverse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate the pairs of dims of x by position * inv_freq (RoPE, https://arxiv.org/abs/2104.09864).

    (a, b) becomes attention_factor * (a cos t - b sin t, b cos t + a sin t) with t = position *
    inv_freq, exact at positions up to 2**29. Other dims pass through. XPOS's
    log_decay is applied as for queries; for keys pass freqs.for_keys().

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; float32,
        bfloat16, float16 or float64; any strides with a contiguous last dimension.
    freqs: from `extrope_kernels.methods`, on x's device. inv_freq: (rotary_dim/2,), per sequence
        (batch, rotary_dim/2), or (batch or 1, heads or 1, rotary_dim/2).
    positions: None for 0, 1, 2, ... within each sequence; an int or a (batch,) tensor is added to
        those; (seqlen,), (batch, seqlen) or (total,) gives every token's own. int32, int64, float32
        or float64. A 1-D tensor whose length fits both is read as (seqlen,): write offsets as
        (batch, 1) if they could be confused. With freqs.axes (mRoPE), (axes, batch or 1, seqlen)
        gives every token one position per axis, packed tokens with batch 1; other shapes give the
        same position on every axis, as for text.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    interleaved: pair i is rotated dims (2i, 2i + 1), as in GPT-J; else (i, i + rotary_dim/2), as in
        GPT-NeoX and in transformers' Llama.
    rotary_offset: the first of the rotary_dim = 2 * len(inv_freq) dims that rotate, in their place:
        128 if the last 64 of 192 do, as in DeepSeek's latent attention.
    inverse: undo the rotation: minus the angle, one over the amplitude.
    inplace: overwrite x; for inference, x must not require grad.
    backend: "cpu", "cuda", "triton", "reference"; None for the best on x's device. A named backend
        never falls back.

    Returns: the rotated x, with x's shape and dtype; x itself when inplace. Differentiable to any
        order in x and in inv_freq.
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    """
    layout = (interleaved, rotary_offset)
    rotated, _ = _rotate(x, None, freqs, positions, cu_seqlens, layout, inverse, inplace, backend)
    return rotated


@explains_wrong_calls
def apply_rope_qk(
    q: Tensor,
    k: Tensor,
    freqs: RopeFreqs,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    rotary_offset: int = 0,
    inverse: bool = False,
    inplace: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in one launch; XPOS's decay is applied upward to q and downward to k.

    With weights, RMSNorm (https://arxiv.org/abs/1910.07467) comes first, in the same pass:
    x / sqrt(mean(x**2) + norm_eps) * weight over all of head_dim, then the rotation. It is
    computed in float32 (float64 for float64 tensors) and rounded once, after the
    rotation.

    q: (batch, seqlen, heads_q, head_dim), or (total, heads_q, head_dim) with cu_seqlens.
    k: as q, with heads_k heads.
    freqs, positions, cu_seqlens, interleaved, rotary_offset, inverse, inplace, backend: as in
        `apply_rope`.
    q_norm_weight, k_norm_weight: contiguous, float32, bfloat16, float16 or float64, whatever q's
        dtype. (head_dim,) norms each head, as Qwen3; (heads * head_dim,), head after head, norms
        all heads of a token together, as OLMo 2. None leaves that tensor without a norm. For
        Gemma's (1 + w) pass 1 + w.float(), which stays in float32 here as it does there.
    norm_eps: added to the mean square, >= 0.

    Returns: (q, k), rotated. With weights q, k and the weights have first derivatives, inv_freq
        none.
    Raises: as `apply_rope`.
    """
    if k is None:
        raise TypeError("rope: k must be a Tensor, got NoneType")
    check_norm_eps(norm_eps)
    has_norm = q_norm_weight is not None or k_norm_weight is not None
    norm = (q_norm_weight, k_norm_weight, norm_eps) if has_norm else None
    layout = (interleaved, rotary_offset)
    return _rotate(q, k, freqs, positions, cu_seqlens, layout, inverse, inplace, backend, norm)


def backends() -> dict[str, str]:
    """Return "available" for each backend, or why it is not."""
    return {name: missing(name) or "available" for name in BACKENDS}


def _rotate(
    q: Tensor,
    k: Tensor | None,
    freqs: RopeFreqs,
    positions: Tensor | int | None,
    cu_seqlens: Tensor | None,
    layout: tuple[bool, int],
    inverse: bool,
    inplace: bool,
    backend: str | None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    check_freqs("rope", freqs)
    interleaved, rotary_offset = layout
    check_int("rope", "rotary_offset", rotary_offset)
    refuse_flags("rope", interleaved=interleaved, inverse=inverse, inplace=inplace)
    positions, offset = split_offset("rope", positions)
    cu_seqlens = narrowed(cu_seqlens)
    if freqs.log_decay is not None:
        if wants_grad((freqs.log_decay,)) and backend != "reference":
            raise ValueError(not_differentiable("log_decay"))
        check_decay(freqs, q, positions, offset, cu_seqlens)
    rope_args = (freqs.inv_freq, positions, cu_seqlens, freqs.log_decay, freqs.axes)
    if type(q) is not Tensor:
        rope_args = replicated(q, rope_args)
    options: dict[str, Any] = {
        "attention_factor": freqs.attention_factor,
        "offset": offset,
        "interleaved": interleaved,
        "inverse": inverse,
        "decay_origin": freqs.decay_origin,
    }
    name: str = "rope"
    weights: tuple[Tensor | None, ...] = ()
    if rotary_offset != 0:
        options["rotary_offset"] = rotary_offset
    if norm is not None:
        name, weights = "rope_norm", norm[:2]
        options["norm_eps"] = norm[2]
    args = (q, k, *weights, *rope_args)
    run = _in_place if inplace else _out_of_place
    if torch.compiler.is_compiling():
        return run(name, args, options, backend)
    try:
        return run(name, args, options, backend)
    except REFUSALS as error:  # kernels check their arguments too; this gives the full message
        check(q, k, RopeTensors(*rope_args), **options)
        check_boundaries("rope", cu_seqlens, len(q))
        if norm is not None:
            check_norm(q, k, *norm)
        raise_as_value_error(error, "rope")
        raise


def _out_of_place(
    name: str, args: tuple[Any, ...], options: dict[str, Any], backend: str | None
) -> tuple[Tensor, Tensor]:
    op = _find(f"{name}_fwd", backend, args[0])
    if backend == "reference" or torch.compiler.is_compiling() or wants_grad(args):
        out_q, out_k = op(*args, **options)
    else:
        out_q, out_k = call_unrecorded(op, args, options)
    return out_q, out_k if args[1] is not None else None


def _in_place(
    name: str, args: tuple[Any, ...], options: dict[str, Any], backend: str | None
) -> tuple[Tensor, Tensor]:
    op = _find(f"{name}_inplace", backend, args[0])
    if wants_grad(args):
        raise ValueError(INPLACE)
    q, k = args[:2]
    if k is q:
        raise ValueError("rope: inplace=True needs q and k of their own, got one tensor for both")
    if backend == "reference" or torch.compiler.is_compiling():
        op(*args, **options)
        return q, k
    call_unrecorded(op, args, options)
    note_writes(q) if k is None else note_writes(q, k)
    return q, k


def _find(name: str, backend: str | None, q: Tensor) -> Callable[..., Any]:
    """Return the op, or a named backend's function if it runs on q."""
    if backend is None:
        return getattr(ops, name)
    require("rope", backend, BACKENDS, q.device.type)
    if backend == "cuda" and "norm" in name:
        raise NotImplementedError(
            "rope: backend 'cuda' has no norm before the rotation; backend='triton' has"
        )
    if backend == "reference":
        return getattr(norm_reference if "norm" in name else reference, name)
    return op_of(name, backend)
