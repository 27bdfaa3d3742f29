"""The public functions of PermuteFormer's permutation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._shared.backends import missing, require
from .._shared.checks import refuse_flags, run_explained, split_offset
from .._shared.library import ops
from . import reference
from .power import check

BACKENDS = ("reference", "cpu", "triton", "cuda")


def permute(
    x: Tensor,
    permutations: Tensor,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Permute the dims of every head p times at position p (PermuteFormer, arXiv 2109.02377).

    x'_p[c] = x_p[pi^p(c)] with pi the head's permutation: a gather by the p-th power, exact at any
    position an int64 holds. The inverse, and so the gradient, is the gather by the power -p.

    x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens; float32,
        bfloat16, float16 or float64; any strides with a contiguous last dimension; head_dim up to
        1024.
    permutations: (heads or a divisor of it, head_dim) int64 on x's device, as from
        `head_permutations`; each serves that many consecutive heads. Every row must hold 0 to
        head_dim - 1 once. That is checked on the CPU; on a GPU a check would have to wait for the
        device, so there other rows give dims of the same head in an unspecified order.
    positions: None for 0, 1, 2, ... within each sequence; an int or a (batch,) tensor is added to
        those; (seqlen,), (batch, seqlen) or (total,) gives every token's own. int32 or int64;
        negative positions are powers of the inverse. A 1-D tensor whose length fits both is read
        as (seqlen,); write offsets as (batch, 1) where the two could be confused.
    cu_seqlens: (sequences + 1,) int32 or int64, the boundaries of packed sequences.
    inverse: undo the permutation: the power -p.
    backend: "cpu", "cuda", "triton", "reference"; None for the best on x's device. A named backend
        never falls back.

    Returns: the permuted x, with x's shape and dtype; differentiable to any order in x.
    Raises: ValueError or TypeError that names the argument; NotImplementedError when the named
        backend cannot run here.
    """
    return _permute(x, None, permutations, positions, cu_seqlens, inverse, backend)[0]


def permute_qk(
    q: Tensor,
    k: Tensor,
    permutations: Tensor,
    *,
    positions: Tensor | int | None = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Permute queries and keys in one launch; the q heads of a group share their k head's powers.

    q: (batch, seqlen, heads_q, head_dim), k: (batch, seqlen, heads_k, head_dim), or both
        (total, heads, head_dim) with cu_seqlens; heads_q a multiple of heads_k.
    permutations: (heads_k, head_dim) int64. Everything else as in `permute`.

    Returns: (q, k), permuted.
    """
    if not isinstance(k, Tensor):
        raise TypeError(f"permute: k must be a Tensor, got {type(k).__name__}")
    return _permute(q, k, permutations, positions, cu_seqlens, inverse, backend)


def backends() -> dict[str, str]:
    """What each backend says of itself here: "available", or why it is not."""
    return {name: missing(name) or "available" for name in BACKENDS}


def _permute(
    q: Tensor,
    k: Tensor | None,
    permutations: Tensor,
    positions: Tensor | int | None,
    cu_seqlens: Tensor | None,
    inverse: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    positions, offset = split_offset("permute", positions)
    refuse_flags("permute", inverse=inverse)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.dtype == torch.int64:
        cu_seqlens = cu_seqlens.to(torch.int32)
    tensors = (permutations, positions, cu_seqlens)
    # Every argument costs the dispatcher time.
    options: dict[str, Any] = {"offset": offset} if offset else {}
    if inverse:
        options["inverse"] = True
    return run_explained("permute", _run, _check, (q, k, tensors, options, backend))


def _run(
    q: Tensor,
    k: Tensor | None,
    tensors: tuple[Tensor | None, ...],
    options: dict[str, Any],
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    if backend is not None:
        require("permute", backend, BACKENDS, q.device.type)
    if backend == "reference":
        out_q, out_k = reference.permute_fwd(q, k, *tensors, **options)
    else:
        op = ops.permute_fwd_triton if backend == "triton" else ops.permute_fwd
        out_q, out_k = op(q, k, *tensors, **options)
    return out_q, out_k if k is not None else None


def _check(q: Tensor, k: Tensor | None, tensors: tuple[Tensor | None, ...], *_: object) -> None:
    check(q, k, *tensors)
