"""Padded rows: a batch over a growing cache, and one over a static cache in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .... import rope_attention, rope_attention_with_kvcache
from ..attention import records
from . import Batch
from .packed import PackedBatch, packed_by_positions


@dataclass(frozen=True, eq=False)
class PaddedBatch(Batch):
    """The tokens of one forward, and earlier ones in the cache.

    past, new: numbers of tokens, padding included.
    runs: (start, stop, pad) for rows start .. stop - 1, whose first `pad` slots are padding.
    positions: (batch or 1, new) int64; 0 in the padding.
    """

    past: int
    new: int
    runs: tuple[tuple[int, int, int], ...]
    positions: Tensor
    leftpad: Tensor | None

    @property
    def total(self) -> int:
        """The number of keys in a row after this forward."""
        return self.past + self.new

    def last(self, count: int) -> PaddedBatch:
        """Return rows of only the last new tokens; the others count as past."""
        past, positions = self.total - count, self.positions[:, self.new - count :]
        return replace(self, past=past, new=count, positions=positions)

    def to(self, device: torch.device | str | int) -> PaddedBatch:
        return self if self.leftpad is None else replace(self, leftpad=self.leftpad.to(device))

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        size = call.pop("chunk_size", None)
        if k.shape[1] > self.total:  # a static cache has unused slots
            k, v = k[:, : self.total], v[:, : self.total]
        forgotten = self.total - k.shape[1]  # tokens that a sliding window's cache dropped
        bounded = "sliding_window" in call or size is not None
        if q.shape[1] != self.new or (forgotten and not bounded):
            raise ValueError(
                f"extend: a cache must return all {self.total} keys of a layer in their order, "
                f"got {k.shape[1]}"
            )
        if self.new == 1 and not forgotten and size is None and not records(q, k, v):
            call |= {"cache_seqlens": self.total, "cache_leftpad": self.leftpad}
            return rope_attention_with_kvcache(q, k, v, **call)
        outs = []
        for start, stop, pad in self.runs:
            skip = min(max(pad - self.past, 0), self.new)
            first = max(pad - forgotten, 0)
            if forgotten or size is not None:
                call["q_start"] = self.past + skip - pad
                call["k_start"] = forgotten + first - pad
            run = (q[start:stop, skip:], k[start:stop, first:], v[start:stop, first:])
            if size is None:
                out = rope_attention(*run, rotated="k", **call)
            else:
                out = _attend_in_chunks(*run, size, **call)
            # Results in the padding are unused, but NaN there would spread.
            outs.append(nn.functional.pad(out, (0, 0, 0, 0, skip, 0)) if skip else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_in_chunks(
    q: Tensor, k: Tensor, v: Tensor, size: int, *, q_start: int, k_start: int, **call: Any
) -> Tensor:
    """Attend from each query to its own chunk; chunks count from a row's first token."""
    outs: list[Tensor] = []
    here, end = q_start, q_start + q.shape[1]
    if here // size * size < k_start:
        raise ValueError(
            f"extend: a cache must return all keys of a chunk of {size}, got those from "
            f"{k_start} on for token {here}"
        )
    while here < end or not outs:
        begin = here // size * size
        stop = min(begin + size, end)
        keys = slice(begin - k_start, stop - k_start)
        run = (q[:, here - q_start : stop - q_start], k[:, keys], v[:, keys])
        outs.append(rope_attention(*run, q_start=here, k_start=begin, rotated="k", **call))
        here = stop
    return torch.cat(outs, 1)


def read_batch(
    tokens: Tensor, past: int, mask: Any, position_ids: Tensor | None
) -> PaddedBatch | PackedBatch:
    """Return the rows of a forward; raise ValueError for other masks and positions.

    tokens: (batch, new, ...); only shape and device count.
    mask: (batch, past + new) with 0 for padding, or None.
    position_ids: (batch or 1, new), or one such per axis, or None. They must follow the mask, or
        count slots with padding, which gives the same distances. Without a past they may restart,
        to begin packed sequences.
    """
    batch, new = tokens.shape[:2]
    mask, may_pack = full_mask(mask), not past
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = _tokens_of_mask(mask, batch, past, new)
        may_pack &= mask is None
    pads = [] if mask is None else _pads(mask, batch, past + new)
    positions = slots = torch.arange(past, past + new, device=tokens.device)[None]
    runs, leftpad = ((0, batch, 0),), None
    if any(pads):
        runs = _runs(pads)
        leftpad = torch.tensor(pads, dtype=torch.int32, device=tokens.device)
        positions = (positions - leftpad[:, None]).clamp(min=0)
    if position_ids is not None:
        real = None if mask is None else mask[:, past : past + new].bool()
        if not _counts(position_ids, positions, real) and not _counts(position_ids, slots):
            packed = None
            if may_pack and position_ids.dim() == 2:
                packed = packed_by_positions(position_ids.expand(batch, new), real)
            if packed is None:
                raise ValueError(
                    "extend: position_ids must count 0, 1, 2, ... from the first token of each "
                    "row or packed sequence, got others; mark padding by attention_mask, pack "
                    "without a cache or a mask of pairs; score methods refuse tokens with several "
                    "positions, as images have"
                )
            return packed
    return PaddedBatch(past, new, runs, positions, leftpad)


def no_mask(device: torch.device | None = None) -> Tensor:
    """Return a finished mask, so that transformers builds none of (seqlen, seqlen)."""
    return torch.ones(1, 1, 1, 1, device=device)


def full_mask(mask: Any) -> Any:
    """Return the mask of layers that see all keys, if a model gets one per kind of layers."""
    if not isinstance(mask, Mapping):
        return mask
    if all(each is None for each in mask.values()):
        return None
    for kind, each in mask.items():
        if kind.startswith("full"):
            return each
    raise ValueError(
        "extend: attention_mask must be (batch, seqlen), or a dict with full_attention, "
        f"got one with {' and '.join(mask)}"
    )


def _tokens_of_mask(mask: Tensor, batch: int, past: int, new: int) -> Tensor | None:
    """Return the tokens visible in a finished mask, (batch or 1, 1, new, keys).

    Raises ValueError unless it is causal, as the ops are.
    """
    total = past + new
    if mask.shape[-2] != new:  # ones, which mean no mask
        return None
    seen = mask[:, 0, :, :total]
    seen = (seen if seen.dtype == torch.bool else seen == 0).expand(batch, new, total)
    real = seen[:, -1]
    index = torch.arange(total, device=mask.device)
    causal = real[:, None, :] & (index[None, :] <= index[past:, None])
    # A padding token sees nothing, or everything if a softmax over nothing would be NaN.
    own = seen.diagonal(past, 1, 2) & ~seen.all(2)
    if (own & ~real[:, past:]).any():
        raise ValueError(
            "extend: attention_mask must have one sequence a row, got one whose last token does "
            "not see all tokens; mark packed sequences by position_ids"
        )
    wrong = (seen != causal) & real[:, past:, None]
    if wrong.any():
        raise ValueError(
            "extend: attention_mask must be causal for a score method, got one in which tokens "
            "see later ones"
        )
    return real


def _pads(mask: Any, batch: int, total: int) -> list[int]:
    """Return each row's number of padded slots on the left, read on the host."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"extend: attention_mask must be (batch, seqlen), cached tokens included, got {got}"
        )
    if mask.shape[0] != batch or mask.shape[1] < total:
        raise ValueError(
            f"extend: attention_mask must be ({batch}, {total}), cached tokens included, "
            f"got {tuple(mask.shape)}"
        )
    real = mask[:, :total].bool()
    before = torch.cat((real.new_zeros(batch, 1), real[:, :-1]), 1)
    begins = (real & ~before).sum(1)
    pads, begins = torch.stack((_leading(real), begins)).tolist()
    if any(count > 1 for count in begins):
        raise ValueError(
            "extend: attention_mask must have each row's tokens in one piece, "
            "got padding between tokens; pad on the left to generate"
        )
    return pads


def _leading(real: Tensor) -> Tensor:
    """Return the number of padded slots at each row's beginning."""
    return (real.cumsum(1) == 0).sum(1)


def _runs(pads: list[int]) -> tuple[tuple[int, int, int], ...]:
    runs, start = [], 0
    for pad, rows in groupby(pads):
        stop = start + len(list(rows))
        runs.append((start, stop, pad))
        start = stop
    return tuple(runs)


def _counts(given: Tensor, positions: Tensor, real: Tensor | None = None) -> bool:
    """Return True if position_ids equal positions, except in padding; read on the host."""
    wrong = given != positions
    return not (wrong if real is None else wrong & real).any()


@dataclass(frozen=True, eq=False)
class StaticBatch(Batch):
    """The tokens of one forward over a static cache under `torch.compile`.

    One graph runs for every step: values that change between steps are tensors, and nothing is read
    on the host. Only forwards without compilation have the checks of `read_batch`.

    positions: (batch or 1, new) int64; 0 in the padding.
    ends: (batch,) int32, each row's slots in use after the new tokens are cached.
    """

    positions: Tensor
    ends: Tensor
    leftpad: Tensor | None

    def to(self, device: torch.device | str | int) -> StaticBatch:
        leftpad = None if self.leftpad is None else self.leftpad.to(device)
        return StaticBatch(self.positions, self.ends.to(device), leftpad)

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        if "sliding_window" in call or "chunk_size" in call:
            raise ValueError(
                "extend: layers with a sliding window or chunks must not be extended in a graph "
                "over a static cache, which forgets their keys; extend with layers='full'"
            )
        call |= {"cache_seqlens": self.ends, "cache_leftpad": self.leftpad}
        return rope_attention_with_kvcache(q, k, v, **call)


def static_batch(tokens: Tensor, past: Tensor, mask: Any) -> StaticBatch:
    """Return the rows of a forward whose past, for all rows, is a tensor of the cache.

    tokens: (batch, new, ...). mask: (batch, slots) with 0 for padding and unused slots; or None.
    Raises ValueError for another mask: a graph cannot read its values.
    """
    mask = full_mask(mask)
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            "extend: attention_mask must be (batch, seqlen) in a graph over a static cache, "
            f"got {tuple(mask.shape)}"
        )
    batch, new = tokens.shape[:2]
    positions = (torch.arange(new, device=tokens.device) + past)[None]
    leftpad = None
    if mask is not None:
        leftpad = _leading(mask.bool())
        positions = (positions - leftpad[:, None]).clamp(min=0)
        leftpad = leftpad.to(torch.int32)
    # The cache increases `past` in place.
    ends = (past + new).to(torch.int32).repeat(batch)
    return StaticBatch(positions, ends, leftpad)
