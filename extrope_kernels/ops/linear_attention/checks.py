"""What a call may be given: errors that name the argument, before anything runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.checks import check_cu_seqlens, check_rows
from .._shared.dtypes import accumulator

MAX_DIM = 256  # of the fused kernels: a state and its operands have to fit on chip


def check(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool = True,
) -> None:
    """Raise ValueError or TypeError, naming `name` and the argument, for what has no meaning."""
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


def check_dims(name: str, q: Tensor, v: Tensor) -> None:
    """The fused kernels' own limit."""
    for label, x in (("head_dim", q), ("v's head_dim", v)):
        if x.shape[-1] > MAX_DIM:
            raise ValueError(
                f"{name}: {label} must be at most {MAX_DIM} (backend='reference' takes any), "
                f"got {x.shape[-1]}"
            )


def check_state(name: str, state: Tensor, key_sum: Tensor, k: Tensor, v: Tensor, heads: int):
    """A state of `heads` heads that fits k and v."""
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


def check_decay_values(name: str, decay: Tensor | None) -> None:
    """On the CPU only: a GPU's values would have to be waited for."""
    if decay is None or decay.device.type != "cpu":
        return
    values = decay.tolist()  # as numbers: on so few, four operations would take seven times as long
    if not all(0 < value <= 1 for value in values):
        raise ValueError(f"{name}: decay must lie in (0, 1], got {values}")


def _check_decay(name: str, decay: Tensor, q: Tensor, heads_k: int, causal: bool) -> None:
    if not isinstance(decay, Tensor):
        raise TypeError(f"{name}: decay must be a Tensor, got {type(decay).__name__}")
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
