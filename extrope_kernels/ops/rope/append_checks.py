"""What an append to a key/value cache is given, and the checks of it before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...scores.base import SAME, PlainMap
from .._shared.checks import (
    DTYPES,
    check_cu_seqlens,
    check_dense,
    check_ints,
    check_matching,
    check_rows,
    has_values,
    overlaps_itself,
    refuse_flags,
)
from .._shared.dtypes import FP8, Scales, check_cache_dtype, check_scale_values, check_scales
from .._shared.maps import maps_of
from .._shared.positions import sequence_of_token
from . import checks as rope_checks


@dataclass(frozen=True)
class Append:
    """The arguments of `rope_append`."""

    q: Tensor | None
    k: Tensor
    v: Tensor
    k_cache: Tensor  # (batch, max_len, heads_k, head_dim), or (pages, page_size, ...)
    v_cache: Tensor
    q_norm_weight: Tensor | None
    k_norm_weight: Tensor | None
    inv_freq: Tensor | None  # None: no rotation
    cache_seqlens: Tensor | None = None  # (sequences,) int32: slots in use, left padding included
    block_table: Tensor | None = None  # (sequences, max_pages) int32
    slot_mapping: Tensor | None = None  # of k's tokens: page * page_size + slot, -1 for nowhere
    cu_seqlens: Tensor | None = None
    cache_leftpad: Tensor | None = None  # (sequences,) int32: the slot of position 0
    positions: Tensor | None = None  # None: after the slots in use
    log_decay: Tensor | None = None
    axes: Tensor | None = None
    k_scale: Tensor | None = None  # for a cache in float8_e4m3fn
    v_scale: Tensor | None = None
    # The columns of a map for k, or of none: q is then not rotated.
    map_kinds: Sequence[int] | None = None
    map_moduli: Sequence[int] | None = None
    map_divisors: Sequence[float] | None = None
    map_floors: Sequence[bool] | None = None
    map_offsets: Sequence[float] | None = None
    map_caps: Sequence[float] | None = None
    map_rows: Sequence[int] | None = None
    norm_eps: float = 1e-6
    attention_factor: float = 1.0
    interleaved: bool = False
    rotary_offset: int | None = None  # None: 0
    decay_origin: float = 0.0

    @property
    def scales(self) -> Scales:
        return Scales(self.k_scale, self.v_scale)

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
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def capacity(self) -> int:
        """The number of slots per sequence."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k_cache.shape[1]

    @property
    def rotates_q(self) -> bool:
        return self.inv_freq is not None and self.map is None

    @property
    def map(self) -> PlainMap | None:
        """The map by which a score method stores keys."""
        return None if self.map_kinds is None else maps_of("rope_append", vars(self), 1)[0]

    def sequence_and_place(self) -> tuple[Tensor, Tensor]:
        """Return each token's sequence and its index in that one's new tokens: (batch, seqlen)."""
        index = torch.arange(self.seqlen, device=self.k.device)
        if self.cu_seqlens is None:
            sequence = torch.arange(self.batch, device=self.k.device)[:, None]
            return sequence.expand(-1, self.seqlen), index.expand(self.batch, -1)
        sequence = sequence_of_token(self.cu_seqlens, self.seqlen)
        return sequence[None], (index - self.cu_seqlens[sequence])[None]

    def token_positions(self) -> Tensor:
        """Return `positions`, or those that follow the slots in use: (batch, seqlen) int64."""
        if self.positions is not None:
            return self.positions
        sequence, place = self.sequence_and_place()
        first = self.cache_seqlens.long()
        if self.cache_leftpad is not None:
            first = first - self.cache_leftpad
        return first[sequence] + place

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mask of written tokens, and their blocks and slots: (batch, seqlen) each."""
        page_size = self.k_cache.shape[1]
        if self.slot_mapping is not None:
            slot = self.slot_mapping.long().view(self.batch, self.seqlen)
            return slot >= 0, slot // max(page_size, 1), slot % max(page_size, 1)
        sequence, place = self.sequence_and_place()
        slot = self.cache_seqlens.long()[sequence] + place
        written = (slot >= 0) & (slot < self.capacity)
        if self.cu_seqlens is not None:
            written = written & (place < self.cu_seqlens.diff()[sequence])
        if self.block_table is None:
            return written, sequence, slot
        page = torch.where(written, slot // page_size, 0)
        return written, self.block_table[sequence, page].long(), slot % page_size


def check(op: str, call: Append) -> None:
    """Raise ValueError or TypeError that names the wrong argument."""
    if not isinstance(call.k, Tensor):
        raise TypeError(f"{op}: k must be a Tensor, got {type(call.k).__name__}")
    packed = call.cu_seqlens is not None or call.packed
    check_rows(op, "k", call.k, packed)
    if packed and call.cu_seqlens is None and call.slot_mapping is None:
        raise ValueError(f"{op}: packed k needs cu_seqlens or slot_mapping, got neither")
    _check_values_tensor(op, call)
    if call.cu_seqlens is not None:
        check_cu_seqlens(op, call.cu_seqlens, call.k)
    if call.q is not None:
        check_rows(op, "q", call.q, packed)
        check_matching(op, call.q, call.k)
    for name, cache, x in (("k_cache", call.k_cache, call.k), ("v_cache", call.v_cache, call.v)):
        _check_cache(op, name, cache, x, call.scales)
    check_scales(op, call.scales, call.k_cache.shape[2], call.k)
    if call.v_cache.shape[:2] != call.k_cache.shape[:2]:
        raise ValueError(
            f"{op}: v_cache must have k_cache's blocks and slots {tuple(call.k_cache.shape[:2])}, "
            f"got {tuple(call.v_cache.shape[:2])}"
        )
    _check_places(op, call)
    refuse_flags(op, interleaved=call.interleaved)
    _check_rotation(op, call)


def check_values(op: str, call: Append) -> None:
    """Check the values of integer tensors, on a CPU, where reading them costs nothing."""
    places = (call.cache_seqlens, call.block_table, call.slot_mapping)
    given = (*places, call.cu_seqlens, call.cache_leftpad, *call.scales)
    if not all(x is None or has_values(x) for x in given):
        return
    cu = call.cu_seqlens
    if cu is not None and (cu[0] != 0 or (cu.diff() < 0).any() or cu[-1] > call.seqlen):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to the {call.seqlen} tokens at most, "
            f"got {cu.tolist()}"
        )
    check_scale_values(op, call.scales)
    leftpad = call.cache_leftpad
    if leftpad is not None and leftpad.numel() and leftpad.min() < 0:
        raise ValueError(f"{op}: cache_leftpad must be >= 0, got {leftpad.tolist()}")
    if call.slot_mapping is not None:
        slots, count = call.slot_mapping, call.k_cache.shape[:2].numel()
        if slots.numel() and not (slots.min() >= -1 and slots.max() < count):
            raise ValueError(
                f"{op}: slot_mapping must be -1 or one of the cache's {count} slots, "
                f"got {slots.tolist()}"
            )
        return
    new = call.seqlen if cu is None else cu.diff()
    ends = call.cache_seqlens.long() + new
    if ends.numel() and not (call.cache_seqlens.min() >= 0 and ends.max() <= call.capacity):
        raise ValueError(
            f"{op}: cache_seqlens must be between 0 and the cache's {call.capacity} slots, the new "
            f"tokens included, got {call.cache_seqlens.tolist()}"
        )
    if call.block_table is not None:
        written, block, _ = call.rows()
        used = block[written]
        if used.numel() and not (used.min() >= 0 and used.max() < call.k_cache.shape[0]):
            raise ValueError(
                f"{op}: block_table must name pages between 0 and {call.k_cache.shape[0] - 1}, "
                f"got {used.tolist()}"
            )


def _check_values_tensor(op: str, call: Append) -> None:
    """Check v, which may have another head_dim than k."""
    k, v = call.k, call.v
    check_rows(op, "v", v, k.dim() == 3)
    if v.dtype != k.dtype or v.device != k.device:
        raise ValueError(
            f"{op}: v must be {k.dtype} on {k.device} like k, got {v.dtype} on {v.device}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(
            f"{op}: v must have k's tokens and heads {tuple(k.shape[:-1])}, "
            f"got {tuple(v.shape[:-1])}"
        )


def _check_cache(op: str, name: str, cache: Tensor, x: Tensor, scales: Scales) -> None:
    check_rows(op, name, cache, False, (*DTYPES, FP8))
    check_cache_dtype(op, name, cache, x, scales)
    if cache.shape[2:] != x.shape[-2:]:
        raise ValueError(
            f"{op}: {name} must have the heads and head_dim that are written, "
            f"{tuple(x.shape[-2:])}, got {tuple(cache.shape[2:])}"
        )
    if overlaps_itself(cache):
        raise ValueError(
            f"{op}: {name} must not be expanded to be written to, got strides {cache.stride()}"
        )


def _check_places(op: str, call: Append) -> None:
    """Check the tensors that decide which slots are written."""
    for name, x, shape in (
        ("cache_seqlens", call.cache_seqlens, (call.sequences,)),
        ("cache_leftpad", call.cache_leftpad, (call.sequences,)),
        ("block_table", call.block_table, (call.sequences, None)),
    ):
        if x is not None:
            check_ints(op, name, x, shape, call.k)
    if call.slot_mapping is not None:
        tokens = tuple(call.k.shape[:-2])
        check_ints(op, "slot_mapping", call.slot_mapping, tokens, call.k, (torch.int64,))
        if call.block_table is not None:
            raise ValueError(
                f"{op}: block_table and slot_mapping both say where to write, give one"
            )
        return
    if call.cache_seqlens is None:
        raise ValueError(f"{op}: cache_seqlens or slot_mapping must say where to write, got none")
    if call.block_table is None:
        if call.k_cache.shape[0] != call.sequences:
            raise ValueError(
                f"{op}: k_cache must be (batch, max_len, heads_k, head_dim) of batch "
                f"{call.sequences} without block_table, got {tuple(call.k_cache.shape)}"
            )
    elif call.k_cache.shape[1] == 0:
        raise ValueError(f"{op}: k_cache must have a block_size >= 1, got 0")


def _check_rotation(op: str, call: Append) -> None:
    q, k = call.q, call.k
    if q is None and call.q_norm_weight is not None:
        raise ValueError(f"{op}: q_norm_weight needs a q, got None")
    first, second = (k, None) if q is None else (q, k)
    weights = (call.q_norm_weight, call.k_norm_weight)
    weights = weights if q is not None else weights[::-1]
    _told_as(op, lambda: rope_checks.check_norm(first, second, *weights, call.norm_eps))
    if call.inv_freq is None:
        if call.map is not None:
            raise ValueError(f"{op}: a score method needs frequencies, got None")
        if call.positions is not None:  # not read
            check_dense(op, "positions", call.positions)
        return
    if call.map is not None:  # the attention rotates q
        first, second = k, None
    if call.packed and call.cu_seqlens is None:
        first, second = (x if x is None else x[None] for x in (first, second))
    rope_args = (call.inv_freq, call.positions, call.cu_seqlens, call.log_decay, call.axes)
    options = {
        "attention_factor": call.attention_factor,
        "rotary_offset": call.rotary_offset or 0,
    }
    _told_as(op, lambda: rope_checks.check(first, second, *rope_args, **options))
    if call.positions is None and call.cache_seqlens is None:
        raise ValueError(f"{op}: positions or cache_seqlens must say where the tokens are")
    if call.positions is None:
        return
    shape = torch.Size((call.batch, call.seqlen))
    if rope_checks.position_kind(call.positions, shape, call.sequences) == "offsets":
        raise ValueError(
            f"{op}: positions must have an entry a token, got shape {tuple(call.positions.shape)}"
        )
    if call.map is not None:
        whole = call.positions.dtype in (torch.int32, torch.int64)
        placed = call.positions.dim() == 3 and call.map == SAME  # by pair
        if not placed and (call.positions.dim() > 2 or not whole):
            raise ValueError(
                f"{op}: positions must be whole numbers of one axis for a score method, "
                f"got {call.positions.dtype} {tuple(call.positions.shape)}"
            )


def _told_as(op: str, run: Callable[[], None]) -> None:
    """Run a check of the rotation; its errors begin with the name of this op."""
    try:
        run()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}{str(error).removeprefix('rope')}") from None
