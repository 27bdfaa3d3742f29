"""Where the rows of a batch begin: positions are counted from each row's first token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from ...ops.attention import attend
from ...ops.decode import attend_with_kvcache
from ...scores import Score


class ForwardRows(Protocol):
    """The tokens of one forward: `Rows`, or those of a static cache, of pages, or of a mesh."""

    @property
    def positions(self) -> Tensor:
        """(batch or 1, new), counted from each row's first token."""
        ...

    @property
    def leftpad(self) -> Tensor | None:
        """(batch,) int32, the padding of each row; None where no row has any."""
        ...

    def to(self, device: torch.device | str | int) -> ForwardRows:
        """Move what the attention needs to `device`."""
        ...

    def attend(
        self,
        layer: nn.Module,
        score: Score,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs: RopeFreqs,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend from (batch, new, heads, head_dim) to keys and values as a cache returns them.

        options: those of the ops, and chunk_size where the layer attends in chunks.
        """
        ...


@dataclass(frozen=True, eq=False)
class Rows:
    """The tokens of one forward and those before them in the cache.

    past, new: numbers of tokens, padding included.
    runs: (start, stop, pad) for rows start .. stop - 1, whose first `pad` slots are padding.
    positions: (batch or 1, new) int64; 0 in the padding.
    leftpad: (batch,) int32, the padding of each row; None where no row has any.
    """

    past: int
    new: int
    runs: tuple[tuple[int, int, int], ...]
    positions: Tensor
    leftpad: Tensor | None

    @property
    def total(self) -> int:
        """Keys that a row has after this forward."""
        return self.past + self.new

    def last(self, count: int) -> Rows:
        """Return the last tokens alone, those before them among the past."""
        past, positions = self.total - count, self.positions[:, self.new - count :]
        return replace(self, past=past, new=count, positions=positions)

    def to(self, device: torch.device | str | int) -> Rows:
        """Move what the attention needs to `device`."""
        return self if self.leftpad is None else replace(self, leftpad=self.leftpad.to(device))

    def attend(
        self,
        layer: nn.Module,
        score: Score,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs: RopeFreqs,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend from (batch, new, heads, head_dim) to keys and values as a cache returns them."""
        size = options.pop("chunk_size", None)
        if k.shape[1] > self.total:  # a static cache is longer than what it holds
            k, v = k[:, : self.total], v[:, : self.total]
        forgotten = self.total - k.shape[1]  # by a cache of a sliding window
        bounded = "sliding_window" in options or size is not None
        if q.shape[1] != self.new or (forgotten and not bounded):
            raise ValueError(
                f"extend: a cache must return all {self.total} keys of a layer in their order, "
                f"got {k.shape[1]}"
            )
        if self.new == 1 and not forgotten and size is None and not records(q, k, v):
            options |= {"cache_seqlens": self.total, "cache_leftpad": self.leftpad}
            return attend_with_kvcache(score, q, k, v, freqs, **options)
        outs = []
        for start, stop, pad in self.runs:
            skip = min(max(pad - self.past, 0), self.new)
            first = max(pad - forgotten, 0)
            if forgotten or size is not None:
                options["q_start"] = self.past + skip - pad
                options["k_start"] = forgotten + first - pad
            run = (q[start:stop, skip:], k[start:stop, first:], v[start:stop, first:])
            if size is None:
                out = attend(score, *run, freqs, keys_stored=True, **options)
            else:
                out = _attend_in_chunks(score, *run, freqs, size, **options)
            # Nothing looks at the padding, but NaN there would spread.
            outs.append(nn.functional.pad(out, (0, 0, 0, 0, skip, 0)) if skip else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _attend_in_chunks(
    score: Score,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    freqs: RopeFreqs,
    size: int,
    *,
    q_start: int,
    k_start: int,
    **options: Any,
) -> Tensor:
    """A query sees the keys of its own chunk; chunks count from a row's first token."""
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
        options |= {"q_start": here, "k_start": begin}
        outs.append(attend(score, *run, freqs, keys_stored=True, **options))
        here = stop
    return torch.cat(outs, 1)


def records(*tensors: Tensor) -> bool:
    """Say whether a graph of gradients is made of what is done with the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def read_rows(tokens: Tensor, past: int, mask: Tensor | None, position_ids: Tensor | None) -> Rows:
    """Return the rows of a forward; raise ValueError for masks and positions that make none.

    tokens: (batch, new, ...), of which only shape and device count.
    mask: (batch, past + new) with 0 for padding, or None.
    position_ids: (batch or 1, new) or one such per axis, or None; must be what the mask says, or
        the numbers of the slots, padding included, which are as far from one another.
    """
    batch, new = tokens.shape[:2]
    mask = full_mask(mask)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        mask = _tokens_of_mask(mask, batch, past, new)
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
            raise ValueError(
                "extend: position_ids must count 0, 1, 2, ... from each row's first token, "
                "got others; attention_mask says where a row begins, and tokens with several "
                "positions, as images have, have no one distance"
            )
    return Rows(past, new, runs, positions, leftpad)


def no_mask(device: torch.device | None = None) -> Tensor:
    """Return a mask that is made already: transformers makes none of (seqlen, seqlen) then."""
    return torch.ones(1, 1, 1, 1, device=device)


def full_mask(mask: Any) -> Any:
    """Return the mask of the layers that see all keys, where a model is given one per kind."""
    if not isinstance(mask, Mapping):
        return mask
    if all(each is None for each in mask.values()):
        return None
    for kind, each in mask.items():
        if kind.startswith("full"):
            return each
    raise ValueError(
        "extend: attention_mask must be (batch, seqlen), or one by the name of full_attention, "
        f"got {' and '.join(mask)}"
    )


def _tokens_of_mask(mask: Tensor, batch: int, past: int, new: int) -> Tensor | None:
    """Return what a mask that is made already, (batch or 1, 1, new, keys), is made from.

    Raises ValueError unless it is that of causal rows, which is what the ops compute.
    """
    total = past + new
    if mask.shape[-2] != new:  # ones that stand for no mask
        return None
    seen = mask[:, 0, :, :total]
    seen = (seen if seen.dtype == torch.bool else seen == 0).expand(batch, new, total)
    real = seen[:, -1]
    index = torch.arange(total, device=mask.device)
    causal = real[:, None, :] & (index[None, :] <= index[past:, None])
    # A token of padding sees nothing or, where a softmax of nothing would be NaN, everything.
    own = seen.diagonal(past, 1, 2) & ~seen.all(2)
    if (own & ~real[:, past:]).any():
        raise ValueError(
            "extend: attention_mask must be of one sequence a row, got one in which the last token "
            "does not see tokens that see themselves; packed rows have no place in it"
        )
    wrong = (seen != causal) & real[:, past:, None]
    if wrong.any():
        raise ValueError(
            "extend: attention_mask must be causal, got one in which tokens see later ones; "
            "a distance of that direction has no place in a score method"
        )
    return real


def _pads(mask: Tensor, batch: int, total: int) -> list[int]:
    """The number of padded slots at the left of each row, read on the host."""
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
    padded = (real.cumsum(1) == 0).sum(1)
    pads, begins = torch.stack((padded, begins)).tolist()
    if any(count > 1 for count in begins):
        raise ValueError(
            "extend: attention_mask must have each row's tokens in one piece, "
            "got padding between tokens; pad on the left to generate"
        )
    return pads


def _runs(pads: list[int]) -> tuple[tuple[int, int, int], ...]:
    runs, start = [], 0
    for pad, rows in groupby(pads):
        stop = start + len(list(rows))
        runs.append((start, stop, pad))
        start = stop
    return tuple(runs)


def _counts(given: Tensor, positions: Tensor, real: Tensor | None = None) -> bool:
    """Say whether position_ids are these, padding aside; read on the host."""
    wrong = given != positions
    return not (wrong if real is None else wrong & real).any()
