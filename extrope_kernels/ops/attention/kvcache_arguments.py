"""Where cached keys and values lie, and what a call on them may be given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import DTYPES, check_rotation
from .frames import Call

NAME = "rerope_attention_with_kvcache"


@dataclass(frozen=True)
class KVCache:
    """Keys, rotated to their stored position, and values of every sequence."""

    k: Tensor  # (batch, max_len, heads_k, head_dim), or (pages, page_size, ...) with block_table
    v: Tensor
    seqlens: Tensor  # (batch,) int32: slots in use, the left padding among them
    block_table: Tensor | None = None  # (batch, max_pages) int32
    leftpad: Tensor | None = None  # (batch,) int32: the slot of position 0
    appended: int = 0  # to be added to seqlens

    @property
    def capacity(self) -> int:
        """How many slots a sequence has."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    def lengths(self) -> Tensor:
        """(batch,) int64: the number of keys of each sequence."""
        ends = self.seqlens.long() + self.appended
        return ends if self.leftpad is None else ends - self.leftpad

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the first two dimensions of k and v for (batch, n) slots."""
        sequence = torch.arange(slots.shape[0], device=slots.device)[:, None]
        if self.block_table is None:
            return sequence, slots
        page_size = self.k.shape[1]
        return self.block_table[sequence, slots // page_size].long(), slots % page_size


def check(q: Tensor, cache: KVCache, call: Call) -> None:
    """Raise ValueError or TypeError that names the argument, for what has no meaning."""
    _check_rows("q", q, None)
    _check_cache(cache, q)
    heads_q, heads_k = q.shape[2], cache.k.shape[2]
    if heads_k == 0 or heads_q % heads_k:
        raise ValueError(f"{NAME}: k_cache's heads must divide q's {heads_q} heads, got {heads_k}")
    check_rotation(NAME, call, q, q.shape[0])


def check_new(k: Tensor, v: Tensor, cache: KVCache, call: Call) -> None:
    """The same for keys and values that are to be written into the cache."""
    for label, x in (("k", k), ("v", v)):
        _check_rows(label, x, k)
        if x.shape != k.shape:
            raise ValueError(
                f"{NAME}: v must have k's shape {tuple(k.shape)}, got {tuple(x.shape)}"
            )
    _check_cache(cache, k)
    if k.shape[2] != cache.k.shape[2]:
        raise ValueError(
            f"{NAME}: k must have k_cache's {cache.k.shape[2]} heads, got {k.shape[2]}"
        )
    for label, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        if any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape)):
            raise ValueError(
                f"{NAME}: {label} must not be expanded to be written to, got strides {x.stride()}"
            )
    check_rotation(NAME, call, k, k.shape[0])


def check_lengths(cache: KVCache) -> None:
    """What only the values of the integer tensors show: on a CPU, where looking costs nothing."""
    ends = cache.seqlens.long() + cache.appended
    if ends.numel() and not (ends.min() >= cache.appended and ends.max() <= cache.capacity):
        raise ValueError(
            f"{NAME}: cache_seqlens must be between 0 and the cache's {cache.capacity} slots"
            + (f", {cache.appended} new tokens included" if cache.appended else "")
            + f", got {cache.seqlens.tolist()}"
        )
    if cache.leftpad is not None and cache.leftpad.numel() and cache.leftpad.min() < 0:
        raise ValueError(f"{NAME}: cache_leftpad must be >= 0, got {cache.leftpad.tolist()}")
    if cache.block_table is None:
        return
    pages = torch.arange(cache.block_table.shape[1])
    used = cache.block_table[pages * cache.k.shape[1] < ends[:, None]]
    if used.numel() and not (used.min() >= 0 and used.max() < cache.k.shape[0]):
        raise ValueError(
            f"{NAME}: block_table must name pages between 0 and {cache.k.shape[0] - 1}, "
            f"got {used.tolist()}"
        )


def _check_cache(cache: KVCache, x: Tensor) -> None:
    """x: (batch, tokens, heads, head_dim), queries or new keys."""
    batch, paged = x.shape[0], cache.block_table is not None
    _check_rows("k_cache", cache.k, x)
    _check_rows("v_cache", cache.v, x)
    if cache.v.shape != cache.k.shape:
        raise ValueError(
            f"{NAME}: v_cache must have k_cache's shape {tuple(cache.k.shape)}, "
            f"got {tuple(cache.v.shape)}"
        )
    if cache.k.shape[3] != x.shape[3] or not (paged or cache.k.shape[0] == batch):
        expected = ("num_blocks, block_size" if paged else f"{batch}, max_len") + ", heads_k"
        raise ValueError(
            f"{NAME}: k_cache must be ({expected}, {x.shape[3]}), got {tuple(cache.k.shape)}"
        )
    _check_ints("cache_seqlens", cache.seqlens, (batch,), x)
    if cache.leftpad is not None:
        _check_ints("cache_leftpad", cache.leftpad, (batch,), x)
    if paged:
        _check_ints("block_table", cache.block_table, (batch, None), x)
        if cache.k.shape[1] == 0:
            raise ValueError(f"{NAME}: k_cache must have a block_size >= 1, got 0")


def _check_rows(label: str, x: Tensor, like: Tensor | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{NAME}: {label} must be a Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{NAME}: {label} must have 4 dimensions, got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(
            f"{NAME}: {label} must be float32, bfloat16, float16 or float64, got {x.dtype}"
        )
    if like is not None and (x.dtype != like.dtype or x.device != like.device):
        raise ValueError(
            f"{NAME}: {label} must be {like.dtype} on {like.device} like the other tensors, "
            f"got {x.dtype} on {x.device}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1 and x.numel() > 0:
        raise ValueError(
            f"{NAME}: {label} must be contiguous in its last dimension, got strides {x.stride()}"
        )


def _check_ints(label: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{NAME}: {label} must be a Tensor, got {type(x).__name__}")
    fits = x.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, x.shape))
    if x.dtype != torch.int32 or not fits or x.device != like.device:
        wanted = ", ".join("max_blocks" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{NAME}: {label} must be int32 ({wanted}{',' * (len(shape) == 1)}) on {like.device}, "
            f"got {x.dtype} {tuple(x.shape)} on {x.device}"
        )
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(
            f"{NAME}: {label} must be contiguous in its last dimension, got strides {x.stride()}"
        )
