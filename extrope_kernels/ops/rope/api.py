"""The public functions of the rotation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...methods import RopeFreqs
from .._shared.autograd import call_unrecorded, note_writes
from .._shared.backends import missing, require
from .._shared.checks import REFUSALS, raise_as_value_error, refuse_flags, split_offset
from .._shared.direct import Direct, find_direct, is_plain
from .._shared.dtensor import replicated
from .._shared.library import ops
from . import norm as norm_reference
from . import reference
from .checks import INPLACE, check, check_norm, check_norm_eps, not_differentiable
from .decay import check_decay

RopeArgs = tuple[Tensor | None, ...]  # of the ops, after q and k
Options = dict[str, Any]  # of the ops, by keyword
Norm = tuple[Tensor | None, Tensor | None, float]  # q_norm_weight, k_norm_weight, norm_eps
BACKENDS = ("reference", "cpu", "triton", "cuda")


class _Ops(NamedTuple):
    fwd: str
    inplace: str
    direct: str


_ROPE = _Ops("rope_fwd", "rope_inplace", "rope")
_ROPE_NORM = _Ops("rope_norm_fwd", "rope_norm_inplace", "rope_norm")


def apply_rope(
    x: Tensor,
    freqs: RopeFreqs,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Rotate the pairs of dims of x by position * inv_freq (RoPE, https://arxiv.org/abs/2104.09864).

    (a, b) becomes attention_factor * (a cos t - b sin t, b cos t + a sin t) with t = position *
    inv_freq, exact at positions up to 2**29. Dims past 2 * len(inv_freq) pass through. XPOS's
    log_decay is applied as for queries; pass freqs.for_keys() for keys.

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; float32,
        bfloat16, float16 or float64; any strides with a contiguous last dimension.
    freqs: from `extrope_kernels.methods`, on x's device. inv_freq: (rotary_dim/2,), per sequence
        (batch, rotary_dim/2), or (batch or 1, heads or 1, rotary_dim/2).
    positions: None for 0, 1, 2, ... within each sequence; an int or a (batch,) tensor is added to
        those; (seqlen,), (batch, seqlen) or (total,) gives every token's own. int32, int64, float32
        or float64. A 1-D tensor whose length fits both is read as (seqlen,); write offsets as
        (batch, 1) where the two could be confused. With freqs.axes (mRoPE), (axes, batch or 1,
        seqlen) gives every token one position an axis, packed tokens with batch 1; all other
        positions are those of text, the same on every axis.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    interleaved: pair i is dims (2i, 2i + 1), as in GPT-J; else dims (i, i + rotary_dim/2), as in
        GPT-NeoX and in transformers' Llama.
    inverse: undo the rotation: minus the angle, one over the amplitude.
    inplace: overwrite x; for inference, x must not require grad.
    backend: "cpu", "cuda", "triton", "reference"; None for the best on x's device. A named backend
        never falls back.

    Returns: the rotated x, with x's shape and dtype; x itself when inplace. Differentiable to any
        order in x and in inv_freq.
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    """
    rotated, _ = _rotate(
        x, None, freqs, positions, cu_seqlens, interleaved, inverse, inplace, backend
    )
    return rotated


def apply_rope_qk(
    q: Tensor,
    k: Tensor,
    freqs: RopeFreqs,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    inplace: bool = False,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys in one launch; XPOS's decay is applied upward to q and downward to k.

    With weights, RMSNorm (https://arxiv.org/abs/1910.07467) comes first, in the same pass:
    x / sqrt(mean(x**2) + norm_eps) * weight over all of head_dim, then the rotation of its first
    dims. It is computed in float32 (float64 for float64 tensors) and rounded once, after the
    rotation.

    q: (batch, seqlen, heads_q, head_dim), k: (batch, seqlen, heads_k, head_dim), or both
        (total, heads, head_dim) with cu_seqlens. Everything else as in `apply_rope`.
    q_norm_weight, k_norm_weight: contiguous, float32, bfloat16, float16 or float64, whatever q's
        dtype. (head_dim,) norms each head, as Qwen3; (heads * head_dim,), head after head, norms
        all heads of a token together, as OLMo 2. None leaves that tensor without a norm. For
        Gemma's (1 + w) pass 1 + w.float(), which stays in float32 here as it does there.
    norm_eps: added to the mean square, >= 0.

    Returns: (q, k), rotated. With weights q, k and the weights have first derivatives, inv_freq
    none.
    """
    if k is None:
        raise TypeError("rope: k must be a Tensor, got NoneType")
    if type(norm_eps) is not float or not norm_eps >= 0:
        check_norm_eps(norm_eps)
    norm = None
    if not (q_norm_weight is k_norm_weight is None):
        norm = (q_norm_weight, k_norm_weight, norm_eps)
    return _rotate(q, k, freqs, positions, cu_seqlens, interleaved, inverse, inplace, backend, norm)


def backends() -> dict[str, str]:
    """What each backend says of itself here: "available", or why it is not."""
    return {name: missing(name) or "available" for name in BACKENDS}


def _rotate(
    q: Tensor,
    k: Tensor | None,
    freqs: RopeFreqs,
    positions: Tensor | int | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    inverse: bool,
    inplace: bool,
    backend: str | None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    if not isinstance(freqs, RopeFreqs):
        raise TypeError(f"rope: freqs must be a RopeFreqs, got {type(freqs).__name__}")
    if not (type(interleaved) is type(inverse) is type(inplace) is bool):
        refuse_flags("rope", interleaved=interleaved, inverse=inverse, inplace=inplace)
    # What follows is kept flat, and every argument that is not needed left out: on a short sequence
    # the call costs more than the rotation.
    options: Options = {}
    if positions is not None and type(positions) is not Tensor:
        positions, options["offset"] = split_offset("rope", positions)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    rope_args: RopeArgs = (freqs.inv_freq,)
    if not (positions is cu_seqlens is freqs.log_decay is None):
        rope_args = (freqs.inv_freq, positions, cu_seqlens, freqs.log_decay)
        if freqs.axes is not None and positions is not None:
            rope_args = (*rope_args, freqs.axes)
    factor = freqs.attention_factor
    if type(factor) is not float or factor != 1.0:
        options["attention_factor"] = factor
    if interleaved:
        options["interleaved"] = True
    if inverse:
        options["inverse"] = True
    if freqs.log_decay is not None:
        options["decay_origin"] = freqs.decay_origin
        wants_grad = torch.is_grad_enabled() and getattr(freqs.log_decay, "requires_grad", False)
        if wants_grad and backend != "reference":
            raise ValueError(not_differentiable("log_decay"))
        check_decay(freqs, q, positions, options.get("offset", 0), packed=cu_seqlens is not None)
    if type(q) is not Tensor:
        rope_args = replicated(q, rope_args)
    names, op_args = _ROPE, rope_args
    if norm is not None:
        names, op_args = _ROPE_NORM, (*norm[:2], *rope_args)
        options["norm_eps"] = norm[2]
    run = _inplace if inplace else _out_of_place
    compiling = torch.compiler.is_compiling()
    if compiling:
        return run(names, q, k, op_args, options, backend, compiling)
    try:
        return run(names, q, k, op_args, options, backend, compiling)
    except REFUSALS as error:
        check(q, k, *rope_args, attention_factor=freqs.attention_factor)
        if norm is not None:
            check_norm(q, k, *norm)
        raise_as_value_error(error, "rope")
        raise


def _wants_grad(q: Tensor, k: Tensor | None, op_args: RopeArgs) -> bool:
    if not torch.is_grad_enabled():
        return False
    if q.requires_grad or (k is not None and k.requires_grad):
        return True
    # The weights of a norm and inv_freq, as far as they are there, come first. A generator would
    # take a twentieth of the whole call.
    for x in op_args[:3]:  # noqa: SIM110
        if x is not None and x.requires_grad:
            return True
    return False


def _out_of_place(
    names: _Ops,
    q: Tensor,
    k: Tensor | None,
    op_args: RopeArgs,
    options: Options,
    backend: str | None,
    compiling: bool,
) -> tuple[Tensor, Tensor]:
    recorded = compiling or _wants_grad(q, k, op_args)
    direct = None if recorded else _find_direct(names.direct, q, k, q, backend)
    if direct is not None:
        outs = (torch.empty_like(q), None if k is None else torch.empty_like(k))
        if direct(outs, _numbers(**options), (q, k, *op_args)):
            return outs
    op = _op(names.fwd, backend, q)
    if recorded or backend == "reference":
        out_q, out_k = op(q, k, *op_args, **options)
    else:
        out_q, out_k = call_unrecorded(op, (q, k, *op_args), options)
    return out_q, out_k if k is not None else None


def _inplace(
    names: _Ops,
    q: Tensor,
    k: Tensor | None,
    op_args: RopeArgs,
    options: Options,
    backend: str | None,
    compiling: bool,
) -> tuple[Tensor, Tensor]:
    op = _op(names.inplace, backend, q)
    if _wants_grad(q, k, op_args):
        raise ValueError(INPLACE)
    if k is q:
        raise ValueError("rope: inplace=True needs q and k of their own, got one tensor for both")
    if compiling or backend == "reference":
        op(q, k, *op_args, **options)
        return q, k
    direct = _find_direct(names.direct, q, k, None, backend)
    if direct is None or not direct((q, k), _numbers(**options), (q, k, *op_args)):
        call_unrecorded(op, (q, k, *op_args), options)
    note_writes(q) if k is None else note_writes(q, k)
    return q, k


def _find_direct(
    name: str, q: Tensor, k: Tensor | None, like: Tensor | None, backend: str | None
) -> Direct | None:
    if backend is not None and backend != "cpu":
        return None
    direct = find_direct(name, q, like)
    return direct if is_plain(k) else None


def _numbers(
    attention_factor: float = 1.0,
    offset: int = 0,
    interleaved: bool = False,
    inverse: bool = False,
    decay_origin: float = 0.0,
    norm_eps: float = 0.0,
) -> tuple[float, ...]:
    """The op's options as its direct function takes them."""
    return attention_factor, offset, interleaved, inverse, decay_origin, norm_eps


def _op(name: str, backend: str | None, q: Tensor) -> Callable[..., Any]:
    """What a named backend means, once it is known to run on q."""
    if backend is None:
        return getattr(ops, name)
    require("rope", backend, BACKENDS, q.device.type)
    if backend == "cuda" and "norm" in name:
        raise NotImplementedError(
            "rope: backend 'cuda' has no norm before the rotation; backend='triton' has"
        )
    if backend == "reference":
        return getattr(norm_reference if "norm" in name else reference, name)
    return getattr(ops, f"{name}_triton" if backend == "triton" else name)
