"""Errors of PermuteFormer's functions: each names the function and the argument."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.checks import (
    check_boundaries,
    check_cu_seqlens,
    check_dense,
    check_matching,
    check_position_tensor,
    check_rows,
    has_values,
)
from .._shared.dtypes import accumulator
from .._shared.positions import position_kind
from .permutations import Powers

MAX_DIM = 256  # attention's limit, except the reference's: a state must fit on chip
MAX_PERMUTED_DIM = 1024  # as kMaxPermutedDim in csrc/cpu/permute/kernel.h


def check_powers(name: str, q: Tensor, k: Tensor | None, powers: Powers) -> None:
    """Check q, k (or q alone), their permutations and positions."""
    permutations, positions, cu_seqlens, _ = powers
    packed = cu_seqlens is not None
    check_rows(name, "q", q, packed)
    if k is not None:
        check_rows(name, "k", k, packed)
        check_matching(name, q, k)
    if packed:
        check_cu_seqlens(name, cu_seqlens, q)
    _check_permutations(name, permutations, q, k)
    if positions is not None:
        check_position_tensor(name, positions, q, (torch.int32, torch.int64))
        shape = torch.Size((1, *q.shape)) if packed else q.shape
        sequences = cu_seqlens.shape[0] - 1 if packed else shape[0]
        if position_kind(positions, shape, sequences) is None:
            raise ValueError(
                f"{name}: positions must be ({shape[1]},), ({shape[0]}, {shape[1]}) or "
                f"({sequences},) offsets, got shape {tuple(positions.shape)}"
            )


def _check_permutations(name: str, permutations: Tensor, q: Tensor, k: Tensor | None) -> None:
    if not isinstance(permutations, Tensor):
        raise TypeError(f"{name}: permutations must be a Tensor, got {type(permutations).__name__}")
    heads, head_dim = q.shape[-2:]
    if not 1 <= head_dim <= MAX_PERMUTED_DIM:
        raise ValueError(f"{name}: head_dim must be from 1 to {MAX_PERMUTED_DIM}, got {head_dim}")
    if permutations.dtype != torch.int64:
        raise ValueError(f"{name}: permutations must be int64, got {permutations.dtype}")
    if permutations.device != q.device:
        raise ValueError(
            f"{name}: permutations must be on q's device {q.device}, got {permutations.device}"
        )
    shape = tuple(permutations.shape)
    rows = shape[0] if len(shape) == 2 else 0
    if rows == 0 or shape[1] != head_dim or heads % rows != 0:
        raise ValueError(
            f"{name}: permutations must be (heads, {head_dim}) with heads a divisor of "
            f"{heads}, got {shape}"
        )
    if k is not None and k.shape[-2] != rows:
        raise ValueError(
            f"{name}: permutations must have a row for each of the {k.shape[-2]} k heads, "
            f"got {rows} rows"
        )
    if permutations.stride(-1) != 1 and head_dim > 1:
        raise ValueError(
            f"{name}: permutations must be contiguous in its last dimension, "
            f"got strides {permutations.stride()}"
        )


def check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool = True,
) -> None:
    """Check the arguments of attention except permutations and positions."""
    packed = cu_seqlens is not None
    for label, x in (("q", q), ("k", k), ("v", v)):
        check_rows(name, label, x, packed)
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: {label} must be {q.dtype} on {q.device} like q, "
                f"got {x.dtype} on {x.device}"
            )
    if k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{name}: k must have q's shape {tuple(q.shape)} but for the heads, "
            f"got {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{name}: v must have k's shape {tuple(k.shape)} but for head_dim, got {tuple(v.shape)}"
        )
    heads_q, heads_k = q.shape[-2], k.shape[-2]
    if heads_k == 0 or heads_q == 0 or heads_q % heads_k:
        raise ValueError(f"{name}: k's heads must divide q's {heads_q} heads, got {heads_k}")
    if q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(f"{name}: head_dim must be at least 1, got {q.shape[-1]}, {v.shape[-1]}")
    if packed:
        check_cu_seqlens(name, cu_seqlens, q)
    if decay is not None:
        _check_decay(name, decay, q, heads_k, causal)


def _check_decay(name: str, decay: Tensor, q: Tensor, heads_k: int, causal: bool) -> None:
    check_dense(name, "decay", decay)
    if not causal:
        raise ValueError(f"{name}: decay must be None with causal=False, got a Tensor")
    if decay.dtype not in (torch.float32, torch.float64) or decay.device != q.device:
        raise ValueError(
            f"{name}: decay must be float32 or float64 on {q.device}, "
            f"got {decay.dtype} on {decay.device}"
        )
    if tuple(decay.shape) not in ((heads_k,), (q.shape[-2],)):
        raise ValueError(
            f"{name}: decay must be ({heads_k},), one for each head of k, or ({q.shape[-2]},), "
            f"of q, got {tuple(decay.shape)}"
        )


def check_dims(name: str, q: Tensor, v: Tensor) -> None:
    """Refuse heads with more than MAX_DIM dims."""
    for label, x in (("head_dim", q), ("v's head_dim", v)):
        if x.shape[-1] > MAX_DIM:
            raise ValueError(
                f"{name}: {label} must be at most {MAX_DIM} (backend='reference' takes any), "
                f"got {x.shape[-1]}"
            )


def check_state(name: str, state: Tensor, key_sum: Tensor, k: Tensor, v: Tensor, heads: int):
    """Check that a state of `heads` heads fits k and v."""
    wide = accumulator(k.dtype)
    shape = (k.shape[0], heads, k.shape[-1])
    for label, x, expected in (("kv", state, (*shape, v.shape[-1])), ("k", key_sum, shape)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: state.{label} must be a Tensor, got {type(x).__name__}")
        if tuple(x.shape) != expected or x.dtype != wide or x.device != k.device:
            raise ValueError(
                f"{name}: state.{label} must be {wide} {expected} on {k.device}, "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if not x.is_contiguous():
            raise ValueError(f"{name}: state.{label} must be contiguous, got strides {x.stride()}")


def check_values(
    name: str, tokens: int, powers: Powers | None = None, decay: Tensor | None = None
) -> None:
    """Check the values of integers and decays, on the CPU only: on a GPU it would wait."""
    permutations, _, cu_seqlens, _ = powers or Powers(None)
    if permutations is not None and has_values(permutations):
        dim = permutations.shape[-1]
        wrong = (permutations.sort(-1).values != torch.arange(dim, device="cpu")).any(-1)
        if wrong.any():
            raise ValueError(
                f"{name}: permutations must hold 0 to {dim - 1} once in every row, "
                f"row {wrong.nonzero()[0].item()} does not"
            )
    if cu_seqlens is not None:
        check_boundaries(name, cu_seqlens, tokens)
    if decay is not None and has_values(decay):
        values = decay.tolist()
        if not all(0 < value <= 1 for value in values):
            raise ValueError(f"{name}: decay must lie in (0, 1], got {values}")
