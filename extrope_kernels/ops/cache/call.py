"""`KVCache`, the cache of every op that reads or writes one, and `Append`, a write into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ...scores.base import PairRow, PlainMap, check_map
from .._math.dtypes import FP8
from .._math.maps import SCHEMA, maps_of
from .._math.positions import sequence_of_token
from .._tables.specs import ANY, DENSE, FLOAT32, INT32, LIKE, Spec


class Scales(NamedTuple):
    """Scales of a cache's keys and values, (heads_k,) float32 each; None if it is not fp8."""

    k: Annotated[Tensor | None, Spec("k_scale", "heads_k", FLOAT32, strides=DENSE)] = None
    v: Annotated[Tensor | None, Spec("v_scale", "heads_k", FLOAT32, strides=DENSE)] = None


class KVCache(NamedTuple):
    """The cached keys, rotated by `score.stored`, and values of every sequence."""

    # (num_blocks, block_size, ...) if paged
    k: Annotated[Tensor, Spec("k_cache", "batch max_len heads_k head_dim", (LIKE, FP8))]
    v: Annotated[Tensor, Spec("v_cache", "batch max_len heads_k head_dim_v", (LIKE, FP8))]
    # Slots in use, left padding included.
    seqlens: Annotated[Tensor | None, Spec("cache_seqlens", "batch", INT32)]
    block_table: Annotated[Tensor | None, Spec("block_table", "batch max_blocks", INT32)] = None
    # The slot of position 0.
    leftpad: Annotated[Tensor | None, Spec("cache_leftpad", "batch", INT32)] = None
    scales: Scales = Scales()  # for a cache in float8_e4m3fn
    appended: int = 0  # tokens that this call writes after seqlens
    cu_seqlens_new: Tensor | None = None  # boundaries of new tokens, if packed
    # Instead of block_table: page * page_size + slot of each new token, -1 for nowhere.
    slot_mapping: Annotated[
        Tensor | None, Spec("slot_mapping", "batch seqlen", (torch.int32, torch.int64), strides=ANY)
    ] = None

    @classmethod
    def of(
        cls,
        k_cache: Tensor,
        v_cache: Tensor,
        cache_seqlens: Tensor | None,
        block_table: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        slot_mapping: Tensor | None = None,
        *,
        new: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> KVCache:
        """Describe a cache by an op's arguments.

        new: the keys that the call writes, or None; cu_seqlens: their boundaries, if packed.
        """
        each = isinstance(new, Tensor) and not new.is_nested and new.dim() >= 3
        appended = new.shape[-3] if each and cu_seqlens is None else 0
        scales, packed = Scales(k_scale, v_scale), None if new is None else cu_seqlens
        given = (cache_seqlens, block_table, cache_leftpad, scales, appended, packed, slot_mapping)
        return cls(k_cache, v_cache, *given)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors besides k and v, in the order of the op's arguments."""
        return (self.seqlens, self.block_table, self.leftpad, *self.scales)

    @property
    def paged(self) -> bool:
        return self.block_table is not None or self.slot_mapping is not None

    @property
    def writes(self) -> bool:
        return self.appended > 0 or self.cu_seqlens_new is not None

    @property
    def capacity(self) -> int:
        """The number of slots per sequence."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k.shape[1]

    def ends(self) -> Tensor:
        """Return the slots in use after this call's writes: (batch,) int64."""
        if self.cu_seqlens_new is None:
            return self.seqlens.long() + self.appended
        return self.seqlens.long() + self.cu_seqlens_new.diff()

    def lengths(self) -> Tensor:
        """Return the number of keys of each sequence: (batch,) int64."""
        return self.ends() if self.leftpad is None else self.ends() - self.leftpad

    def rows(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices of the first two dimensions of k and v for (batch, n) slots."""
        sequence = torch.arange(slots.shape[0], device=slots.device)[:, None]
        if self.block_table is None:
            return sequence, slots
        page_size = self.k.shape[1]
        return self.block_table[sequence, slots // page_size].long(), slots % page_size


class KeyRotation(NamedTuple):
    """How new keys rotate before a cache stores them, and queries beside them."""

    inv_freq: Tensor | None = None  # None: not at all
    positions: Tensor | None = None  # None: those that follow the slots in use
    cu_seqlens: Tensor | None = None
    log_decay: Tensor | None = None
    stored: PlainMap | None = None  # the map by which a score method stores keys
    attention_factor: float = 1.0
    interleaved: bool = False
    rotary_offset: int = 0
    decay_origin: float = 0.0


class Append(NamedTuple):
    """A call of `rope_append`."""

    q: Tensor | None  # only where it rotates: with frequencies, and without a score method
    k: Tensor
    v: Tensor
    cache: KVCache
    rotation: KeyRotation

    @property
    def packed(self) -> bool:
        return self.k.dim() == 3

    @property
    def batch(self) -> int:
        return 1 if self.packed else self.k.shape[0]

    @property
    def seqlen(self) -> int:
        return self.k.shape[-3]

    @property
    def sequences(self) -> int:
        cu_seqlens = self.rotation.cu_seqlens
        return self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def sequence_and_place(self) -> tuple[Tensor, Tensor]:
        """Return each token's sequence and its index in that one's new tokens: (batch, seqlen)."""
        index, cu_seqlens = (
            torch.arange(self.seqlen, device=self.k.device),
            self.cache.cu_seqlens_new,
        )
        if cu_seqlens is None:
            sequence = torch.arange(self.batch, device=self.k.device)[:, None]
            return sequence.expand(-1, self.seqlen), index.expand(self.batch, -1)
        sequence = sequence_of_token(cu_seqlens, self.seqlen)
        return sequence[None], (index - cu_seqlens[sequence])[None]

    def token_positions(self) -> Tensor:
        """Return `positions`, or those that follow the slots in use: (batch, seqlen) int64."""
        if self.rotation.positions is not None:
            return self.rotation.positions
        sequence, place = self.sequence_and_place()
        first = self.cache.seqlens.long()
        if self.cache.leftpad is not None:
            first = first - self.cache.leftpad
        return first[sequence] + place

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mask of written tokens, and their blocks and slots: (batch, seqlen) each."""
        cache, page_size = self.cache, self.cache.k.shape[1]
        if cache.slot_mapping is not None:
            slot = cache.slot_mapping.long().view(self.batch, self.seqlen)
            return slot >= 0, slot // max(page_size, 1), slot % max(page_size, 1)
        sequence, place = self.sequence_and_place()
        slot = cache.seqlens.long()[sequence] + place
        written = (slot >= 0) & (slot < cache.capacity)
        if cache.cu_seqlens_new is not None:
            written = written & (place < cache.cu_seqlens_new.diff()[sequence])
        if cache.block_table is None:
            return written, sequence, slot
        page = torch.where(written, slot // page_size, 0)
        return written, cache.block_table[sequence, page].long(), slot % page_size


def read_append(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    inv_freq: Tensor | None,
    cache_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    log_decay: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    **options: Any,
) -> Append:
    """Return the call of the op's arguments."""
    if not isinstance(k, Tensor):
        raise TypeError(f"rope_append: k must be a Tensor, got {type(k).__name__}")
    planes = (k_cache, v_cache, cache_seqlens, block_table, cache_leftpad, k_scale, v_scale)
    cache = KVCache.of(*planes, slot_mapping, new=k, cu_seqlens=cu_seqlens)
    numbers = {name: x for name, x in options.items() if name not in SCHEMA}
    numbers["rotary_offset"] = numbers.get("rotary_offset") or 0
    stored = _stored(options)
    rotation = KeyRotation(inv_freq, positions, cu_seqlens, log_decay, stored, **numbers)
    return Append(q, k, v, cache, rotation)


def _stored(options: Mapping[str, Sequence[Any] | None]) -> Any:
    """Return the map by which a score method stores keys, or None."""
    if options.get("map_kinds") is None:
        return None
    (stored,) = maps_of("rope_append", {name: options.get(name) for name in SCHEMA}, 1)
    if isinstance(stored, PairRow):
        raise ValueError(
            "rope_append: map_kinds must be of a map that all pairs share, got one of pairs"
        )
    check_map("rope_append", stored)
    return stored
