"""Packed rows: several sequences one after another in a row, as trainers pack them.

Sequences begin where positions start anew (TRL's packing and padding_free, transformers'
`DataCollatorWithFlattening`), or at boundaries under the name of transformers' flash attention.
Each sequence attends only to itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .... import rope_attention
from ..attention import BOUNDARIES
from . import Batch

_OF_KEYS = "cu_seq_lens_k"


@dataclass(frozen=True, eq=False)
class PackedBatch(Batch):
    """The tokens of one forward of packed rows; it has no cache.

    positions: (batch, new) int64, counted from each sequence's first token.
    cu_seqlens: (sequences + 1,) int32, the boundaries in all rows one after another. Padding is a
        sequence too: then nothing else sees it.
    """

    positions: Tensor
    cu_seqlens: Tensor
    has_boundaries = True

    def to(self, device: torch.device | str | int) -> PackedBatch:
        return replace(self, cu_seqlens=self.cu_seqlens.to(device))

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        if "chunk_size" in call:
            raise ValueError(
                "extend: layers with chunks must not be extended for packed rows, got "
                f"{type(layer).__name__}; extend with layers='full'"
            )
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = rope_attention(*flat, rotated="k", cu_seqlens=self.cu_seqlens, **call)
        return out.unflatten(0, q.shape[:2])


def packed_by_positions(given: Tensor, real: Tensor | None) -> PackedBatch | None:
    """Return the rows whose positions start anew with each sequence; None if there are none.

    given: (batch, new) position_ids. real: (batch, new) bool, False in padding; None without.
    """
    begins = given.diff(prepend=given[:, :1]) != 1  # the first of a row too
    if real is not None:
        changes = real != torch.cat((~real[:, :1], real[:, :-1]), 1)
        begins = begins & real | changes
    starts = begins.flatten().nonzero()[:, 0]
    index = torch.arange(given.numel(), device=given.device)
    positions = (index - starts[begins.flatten().cumsum(0) - 1]).view(given.shape)
    wrong = given != positions
    if (wrong if real is None else wrong & real).any():
        return None
    return PackedBatch(positions, _with_end(starts, given.numel()))


def packed_by_boundaries(tokens: Tensor, arguments: Mapping[str, Any]) -> PackedBatch:
    """Return the rows by boundaries among a model's arguments; in a graph no value is read.

    tokens: (1, new, ...). Tokens past the last boundary are padding.
    Raises ValueError for several rows, and for boundaries that do not rise, that differ for keys,
    or that contradict position_ids.
    """
    boundaries, of_keys = arguments[BOUNDARIES], arguments.get(_OF_KEYS)
    if not isinstance(boundaries, Tensor) or boundaries.dim() != 1 or len(tokens) != 1:
        got = tuple(boundaries.shape) if isinstance(boundaries, Tensor) else type(boundaries)
        raise ValueError(
            f"extend: {BOUNDARIES} must be a tensor (sequences + 1,) for tokens in one row, got "
            f"{got} for {len(tokens)} rows"
        )
    if of_keys is not None and of_keys.shape != boundaries.shape:
        raise ValueError(f"extend: {_OF_KEYS} must be {BOUNDARIES} in packed rows, got another")
    boundaries, new = boundaries.to(tokens.device), tokens.shape[1]
    index = torch.arange(new, device=tokens.device)
    sequence = torch.searchsorted(boundaries, index, right=True) - 1
    positions = (index - boundaries[sequence])[None]
    if not torch.compiler.is_compiling():
        _check(boundaries, positions, arguments.get("position_ids"))
    return PackedBatch(positions, _with_end(boundaries, new))


def _check(boundaries: Tensor, positions: Tensor, given: Tensor | None) -> None:
    """Raise ValueError for boundaries that do not fit; the host reads all at once."""
    new = positions.shape[1]
    rises = (boundaries[0] == 0) & (boundaries.diff() >= 0).all() & (boundaries[-1] <= new)
    counts = torch.ones_like(rises)
    if given is not None:
        padding = torch.arange(new, device=positions.device) >= boundaries[-1]
        counts = ((given == positions) | padding).all()
    rises, counts = torch.stack((rises, counts)).tolist()
    if not rises:
        raise ValueError(
            f"extend: {BOUNDARIES} must rise from 0 to the row's {new} tokens at most, "
            f"got {boundaries.tolist()}"
        )
    if not counts:
        raise ValueError(
            "extend: position_ids must count 0, 1, 2, ... from the first token of each sequence in "
            f"{BOUNDARIES}, got others"
        )


def _with_end(starts: Tensor, tokens: int) -> Tensor:
    return nn.functional.pad(starts.to(torch.int32), (0, 1), value=tokens)
