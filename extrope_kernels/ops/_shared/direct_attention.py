"""Attention, with and without a cache, past PyTorch's dispatcher: see direct.py.

csrc/cpu/runtime/direct_attention.h has the other side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_call import lse_shape
from .direct import find_direct, is_plain


def attend_directly(
    name: str,
    tensors: tuple[Any, ...],
    options: dict[str, Any],
    out: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None] | None:
    """out, and lse if it is wanted; None for a call that the dispatcher has to see.

    tensors: the op's, in its order; the first of them are q, keys and values.
    out: takes the result.
    """
    q, _, v = tensors[:3]
    direct = find_direct(name, q, q if out is None else None)
    if direct is None or not all(map(is_plain, tensors[1:5])) or min(q.dim(), v.dim()) < 3:
        return None
    if out is None:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(lse_shape(q), dtype=torch.float32) if return_lse else None
    return (out, lse) if direct((out, lse), _numbers(**options), tensors) else None


def _numbers(
    starts: Sequence[int],
    granularity: int,
    maps: Sequence[float],
    softmax_scale: float | None = None,
    log_n: float | None = None,
    attention_factor: float = 1.0,
    interleaved: bool = False,
    softcap: float = 0.0,
    sliding_window: int | None = None,
) -> tuple[float | None, ...]:
    """The op's options as its direct function takes them."""
    single = (softmax_scale, log_n, attention_factor, interleaved, softcap, sliding_window)
    return (granularity, *single, *starts, *maps)
