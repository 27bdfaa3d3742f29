"""What an append to a key/value cache is given, and the checks of it before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...scores.base import PairRow, check_map
from .._math.maps import SCHEMA, maps_of
from .._math.positions import sequence_of_token
from .._tables.checks import check_cu_seqlens, check_dense, check_matching, check_rows
from ..rope import checks as rope_checks
from .call import KeyRotation, KVCache, Scales, check_cache, check_new, check_slots


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
    of_one = cu_seqlens is None and not k.is_nested and k.dim() >= 3
    appended = k.shape[-3] if of_one else 0
    places = (cache_seqlens, block_table, cache_leftpad, Scales(k_scale, v_scale))
    cache = KVCache(k_cache, v_cache, *places, appended, cu_seqlens, slot_mapping)
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


def check(op: str, call: Append) -> None:
    """Raise ValueError or TypeError that names the wrong argument."""
    q, k, cache, cu_seqlens = call.q, call.k, call.cache, call.rotation.cu_seqlens
    packed = cu_seqlens is not None or call.packed
    check_rows(op, "k", k, packed)
    if packed and cu_seqlens is None and cache.slot_mapping is None:
        raise ValueError(f"{op}: packed k needs cu_seqlens or slot_mapping, got neither")
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, k)
    if q is not None:
        check_rows(op, "q", q, packed)
        check_matching(op, q, k)
    check_cache(op, cache, k, call.sequences)
    check_new(op, k, call.v, cache, k)
    _check_rotation(op, call)


def check_values(op: str, call: Append) -> None:
    """Check the values of integer tensors, on a CPU, where reading them costs nothing."""
    check_slots(op, call.cache, call.rotation.cu_seqlens, call.seqlen, "k")


def _check_rotation(op: str, call: Append) -> None:
    q, k, rotation = call.q, call.k, call.rotation
    positions, stored = rotation.positions, rotation.stored
    if rotation.inv_freq is None:
        if q is not None:
            raise ValueError(f"{op}: q must be None without frequencies, which would rotate it")
        if positions is not None:  # not read
            check_dense(op, "positions", positions)
        return
    if q is not None and stored is not None:
        raise ValueError(f"{op}: q must be None with a map of keys, got one")
    first, second = (k, None) if q is None else (q, k)
    if call.packed and rotation.cu_seqlens is None:
        first, second = (x if x is None else x[None] for x in (first, second))
    rope_args = (rotation.inv_freq, positions, rotation.cu_seqlens, rotation.log_decay)
    numbers = {name: getattr(rotation, name) for name in ("attention_factor", "rotary_offset")}
    _told_as(op, lambda: rope_checks.check(first, second, *rope_args, **numbers))
    if positions is None and call.cache.seqlens is None:
        raise ValueError(f"{op}: positions or cache_seqlens must say where the tokens are")
    if positions is None:
        return
    shape = torch.Size((call.batch, call.seqlen))
    if rope_checks.position_kind(positions, shape, call.sequences) == "offsets":
        raise ValueError(
            f"{op}: positions must have an entry a token, got shape {tuple(positions.shape)}"
        )
    if stored is not None and positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{op}: positions must be whole numbers for a score method, got {positions.dtype}"
        )


def _told_as(op: str, run: Callable[[], None]) -> None:
    """Run a check of the rotation; its errors begin with the name of this op."""
    try:
        run()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}{str(error).removeprefix('rope')}") from None
