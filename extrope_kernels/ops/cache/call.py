"""`KVCache`, the cache of every op that reads or writes one, and `Append`, a write into it.

Wrong ones are refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ...scores.base import PairRow, PlainMap, check_map
from .._math.dtypes import FP8
from .._math.maps import SCHEMA, maps_of
from .._math.positions import sequence_of_token
from .._tables import specs
from .._tables.checks import (
    check_cu_seqlens,
    check_dense,
    has_values,
    meet,
    memory_of,
    narrowed,
    overlaps_itself,
    share_bytes,
)
from .._tables.fields import fields_of
from .._tables.specs import ANY, DENSE, FLOAT32, INT32, LIKE, ROWS, Spec
from ..rope import call as rope_call
from ..rope.call import RopeTensors


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


class Append(NamedTuple):
    """A call of `rope_append`.

    Keys, and queries beside them, rotate as `rope_fwd` does it with `rope` and `options`.
    """

    q: Tensor | None  # only where it rotates: with frequencies, and without a score method
    k: Tensor
    v: Tensor
    cache: KVCache
    # inv_freq None: nothing rotates; positions None: those that follow the slots in use.
    rope: RopeTensors
    options: Mapping[str, Any] = {}
    stored: PlainMap | None = None  # the map by which a score method stores keys

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
        cu_seqlens = self.rope.cu_seqlens
        return self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def sequence_and_place(self) -> tuple[Tensor, Tensor]:
        """Return each token's sequence and its index in that one's new tokens: (batch, seqlen)."""
        index = torch.arange(self.seqlen, device=self.k.device)
        cu_seqlens = self.cache.cu_seqlens_new
        if cu_seqlens is None:
            sequence = torch.arange(self.batch, device=self.k.device)[:, None]
            return sequence.expand(-1, self.seqlen), index.expand(self.batch, -1)
        sequence = sequence_of_token(cu_seqlens, self.seqlen)
        return sequence[None], (index - cu_seqlens[sequence])[None]

    def token_positions(self) -> Tensor:
        """Return `positions`, or those that follow the slots in use: (batch, seqlen) int64."""
        if self.rope.positions is not None:
            return self.rope.positions
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
    rope = RopeTensors(inv_freq, positions, cu_seqlens, log_decay)
    of_rope = {name: x for name, x in options.items() if name not in SCHEMA}
    return Append(q, k, v, cache, rope, of_rope, _stored(options))


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


# -------------------------------------------------------------------------------------------------
# What is refused, before anything runs

_OF_CACHE = {field.name: field for field in fields_of(KVCache)}
_PLANES = (_OF_CACHE["k"].spec, _OF_CACHE["v"].spec)
_PAGED = tuple(
    x._replace(dims=x.dims.replace("batch max_len", "num_blocks block_size")) for x in _PLANES
)
_PLACES = (
    *(_OF_CACHE[name].spec for name in ("seqlens", "block_table", "leftpad")),
    *(field.spec for field in fields_of(Scales)),
    _OF_CACHE["slot_mapping"].spec,
)
_NEW = (
    Spec("k", "batch seqlen heads_k head_dim"),
    Spec("v", "batch seqlen heads_k head_dim_v"),
)

KEYS = (
    Spec("k", "batch seqlen heads_k head_dim", ROWS),
    Spec("cu_seqlens", "sequences+1", INT32, optional=True, strides=DENSE),
    Spec("q", "batch seqlen heads_q head_dim", optional=True),
)


def cache_lengths(
    op: str,
    cache_seqlens: Tensor | int,
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    name: str = "cu_seqlens",
) -> Tensor:
    """Return the lengths as ops take them: int64 narrowed, or one int for all sequences.

    x: (batch, seqlen, heads, head_dim), or packed with cu_seqlens, the argument called `name`; one
        sequence if packed without.
    """
    if isinstance(cache_seqlens, Tensor):
        return narrowed(cache_seqlens)
    if isinstance(cache_seqlens, bool) or not isinstance(cache_seqlens, (int, torch.SymInt)):
        raise TypeError(
            f"{op}: cache_seqlens must be an int or a Tensor, got {type(cache_seqlens).__name__}"
        )
    if not 0 <= cache_seqlens < 2**31:
        raise ValueError(
            f"{op}: cache_seqlens must be between 0 and the cache's slots, got {cache_seqlens}"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: q must be a Tensor, got {type(x).__name__}")
    # The op refuses a nested x by name.
    batch = (x.size(0),) if x.is_nested else x.shape[:-3] or (1,)
    if cu_seqlens is not None:
        check_cu_seqlens(op, cu_seqlens, x, name)
        batch = (cu_seqlens.shape[0] - 1,)
    return torch.full(batch, cache_seqlens, dtype=torch.int32, device=x.device)


def check_cache(
    op: str, cache: KVCache, sizes: specs.Sizes, like: tuple[str, Tensor], packed: bool
) -> None:
    """Check a cache for rows of known sizes.

    like: the rows, queries or new keys, and their name; packed: they are.
    """
    tensors = (cache.k, cache.v, *cache.tensors, cache.slot_mapping)
    table = (_PAGED if cache.paged else _PLANES) + _PLACES
    specs.check(op, specs.for_rows(table, packed), tensors, sizes, like)
    given = [f"{n}_scale" for n, x in zip("kv", cache.scales) if x is not None]
    for name, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        if x.dtype == FP8 and len(given) < 2:
            raise ValueError(
                f"{op}: {name} in {FP8} needs k_scale and v_scale, (heads_k,) float32, "
                f"got {given[0] if given else 'none'}"
            )
        if x.dtype != FP8 and given:
            raise ValueError(
                f"{op}: k_scale and v_scale are for caches in {FP8}, got {name} in {x.dtype}"
            )
    if cache.slot_mapping is not None and cache.block_table is not None:
        raise ValueError(f"{op}: block_table and slot_mapping both say where to write, give one")
    if cache.slot_mapping is None and cache.seqlens is None:
        raise ValueError(f"{op}: cache_seqlens or slot_mapping must say where to write, got none")
    if cache.paged and cache.k.shape[1] == 0:
        raise ValueError(f"{op}: k_cache must have a block_size >= 1, got 0")


def check_new(
    op: str,
    k: Tensor,
    v: Tensor,
    cache: KVCache,
    sizes: specs.Sizes,
    like: tuple[str, Tensor],
    packed: bool,
) -> None:
    """Check keys and values to be written into a checked cache; the rest as in `check_cache`."""
    specs.check(op, specs.for_rows(_NEW, packed), (k, v), sizes, like)
    for name, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        if overlaps_itself(x):
            raise ValueError(
                f"{op}: {name} must not be expanded to be written to, got strides {x.stride()}"
            )


def refuse_aliases(op: str, cache: KVCache, **read: Tensor | None) -> None:
    """Refuse to write caches that share memory, or in which rows lie that the call reads."""
    k_memory, v_memory = memory_of(cache.k), memory_of(cache.v)
    if meet(k_memory, v_memory) and share_bytes(cache.k, cache.v):
        raise ValueError(
            f"{op}: k_cache and v_cache must be two tensors to be written to, "
            "got two that share memory"
        )
    for name, x in read.items():
        memory = None if x is None else memory_of(x)
        for cache_name, to, place in (
            ("k_cache", cache.k, k_memory),
            ("v_cache", cache.v, v_memory),
        ):
            if meet(memory, place) and share_bytes(x, to):
                raise ValueError(
                    f"{op}: {name} must not share memory with {cache_name}, which is written"
                )


def check_slots(
    op: str, cache: KVCache, cu_seqlens: Tensor | None, tokens: int, name: str = "q"
) -> None:
    """Check the values of a cache's integer tensors, on a CPU, where reading them costs nothing.

    cu_seqlens: boundaries of `tokens` tokens, those of the argument `name`.
    """
    given = (*cache.tensors, cache.slot_mapping, cu_seqlens)
    if not all(x is None or has_values(x) for x in given):
        return
    if cu_seqlens is not None:
        ends, label = cu_seqlens.tolist(), "cu_seqlens_q" if name == "q" else "cu_seqlens"
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > tokens:
            raise ValueError(
                f"{op}: {label} must rise from 0 to {name}'s {tokens} tokens at most, got {ends}"
            )
    _check_scale_values(op, cache.scales)
    if cache.leftpad is not None and cache.leftpad.numel() and cache.leftpad.min() < 0:
        raise ValueError(f"{op}: cache_leftpad must be >= 0, got {cache.leftpad.tolist()}")
    if cache.slot_mapping is not None:
        slots, count = cache.slot_mapping, cache.k.shape[:2].numel()
        if slots.numel() and not (slots.min() >= -1 and slots.max() < count):
            raise ValueError(
                f"{op}: slot_mapping must be -1 or one of the cache's {count} slots, "
                f"got {slots.tolist()}"
            )
        return
    ends = cache.ends()
    if ends.numel() and not (cache.seqlens.min() >= 0 and ends.max() <= cache.capacity):
        new = cache.appended or "its"
        raise ValueError(
            f"{op}: cache_seqlens must be between 0 and the cache's {cache.capacity} slots"
            + (f", {new} new tokens included" if cache.writes else "")
            + f", got {cache.seqlens.tolist()}"
        )
    if cache.block_table is None:
        return
    page_size = cache.k.shape[1]
    first = cache.seqlens if name == "k" else torch.zeros_like(cache.seqlens)
    page = torch.arange(cache.block_table.shape[1], device="cpu")
    used = (page >= (first // page_size)[:, None]) & (page * page_size < ends[:, None])
    used = cache.block_table[used & (first < ends)[:, None]]
    if used.numel() and not (used.min() >= 0 and used.max() < cache.k.shape[0]):
        raise ValueError(
            f"{op}: block_table must name pages between 0 and {cache.k.shape[0] - 1}, "
            f"got {used.tolist()}"
        )


def _check_scale_values(op: str, scales: Scales) -> None:
    """Check that scales are positive, on a CPU, where reading them costs nothing."""
    for name, x in zip(("k_scale", "v_scale"), scales):
        if x is not None and not ((x > 0) & x.isfinite()).all():
            raise ValueError(f"{op}: {name} must be positive numbers, got {x.tolist()}")


def check(op: str, call: Append) -> None:
    """Raise ValueError or TypeError that names the wrong argument."""
    q, k, cache, cu_seqlens = call.q, call.k, call.cache, call.rope.cu_seqlens
    packed, like, sizes = cu_seqlens is not None or call.packed, ("k", k), {}
    specs.check(op, specs.for_rows(KEYS, packed), (k, cu_seqlens, q), sizes)
    if packed and cu_seqlens is None:
        if cache.slot_mapping is None:
            raise ValueError(f"{op}: packed k needs cu_seqlens or slot_mapping, got neither")
        sizes["sequences"] = (1, "k")
    check_cache(op, cache, sizes, like, packed)
    check_new(op, k, call.v, cache, sizes, like, packed)
    _check_rotation(op, call)


def check_values(op: str, call: Append) -> None:
    """Check the values of integer tensors, on a CPU, where reading them costs nothing."""
    check_slots(op, call.cache, call.rope.cu_seqlens, call.seqlen, "k")
    positions, stored = call.rope.positions, call.stored
    if positions is not None and has_values(positions):
        rope_call.check_positions(op, positions if stored is None else stored(positions))


def _check_rotation(op: str, call: Append) -> None:
    q, k, rope, stored = call.q, call.k, call.rope, call.stored
    positions = rope.positions
    if rope.inv_freq is None:
        if q is not None:
            raise ValueError(f"{op}: q must be None without frequencies, which would rotate it")
        if positions is not None:  # not read
            check_dense(op, "positions", positions)
        return
    if q is not None and stored is not None:
        raise ValueError(f"{op}: q must be None with a map of keys, got one")
    first, second = (k, None) if q is None else (q, k)
    if call.packed and rope.cu_seqlens is None:
        first, second = (x if x is None else x[None] for x in (first, second))
    _told_as(op, lambda: rope_call.check(first, second, rope, **call.options))
    if positions is None and call.cache.seqlens is None:
        raise ValueError(f"{op}: positions or cache_seqlens must say where the tokens are")
    if positions is None:
        return
    shape = torch.Size((call.batch, call.seqlen))
    if rope_call.position_kind(positions, shape, call.sequences) == "offsets":
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
