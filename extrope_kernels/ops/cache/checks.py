"""Refuse wrong caches, and appends to them, before anything is written."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._math.dtypes import FP8
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
from .._tables.specs import DENSE, INT32, ROWS, Spec
from ..rope import checks as rope_checks
from .call import Append, KVCache, Scales

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
    q, k, cache, cu_seqlens = call.q, call.k, call.cache, call.rotation.cu_seqlens
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
    check_slots(op, call.cache, call.rotation.cu_seqlens, call.seqlen, "k")
    positions, stored = call.rotation.positions, call.rotation.stored
    if positions is not None and has_values(positions):
        rope_checks.check_positions(op, positions if stored is None else stored(positions))


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
    names = ("attention_factor", "rotary_offset", "decay_origin")
    numbers = {name: getattr(rotation, name) for name in names}
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
