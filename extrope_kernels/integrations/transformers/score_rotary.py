"""The rotation where the attention rotates: queries stay raw, keys go to their stored position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import RopeFreqs, apply_rope
from .attention import register_attention
from .rotary import FusedRotary, PendingRotation, wrap_apply
from .scores import Score


@dataclass(frozen=True, eq=False)
class StoredRotation(PendingRotation):
    """On its way to layers whose attention takes raw queries, and keys as a cache holds them.

    stored: (batch or 1, seqlen) float64 positions of keys; None leaves them as they are.
    """

    stored: Tensor | None

    def plain(self) -> PendingRotation:
        """The rotation for layers that are not extended."""
        return PendingRotation(self.freqs, self.positions, self.interleaved)

    def to(self, device: torch.device | str | int, **_: Any) -> StoredRotation:
        """Move to `device`."""
        moved = self.plain().to(device)
        stored = None if self.stored is None else self.stored.to(device)
        return StoredRotation(moved.freqs, moved.positions, moved.interleaved, stored)

    def _turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.stored is None:
            return q, k
        # The attention factor of both sides goes onto the queries, in the attention.
        freqs = RopeFreqs(self.freqs.inv_freq)
        return q, apply_rope(k, freqs, positions=self.stored, interleaved=self.interleaved)


class ScoreRotary:
    """Stands in for the forward of a rotary embedding whose layers attend by a score method.

    inner: what yields the frequencies: the model's own, or those of an extension before this one.
    """

    def __init__(self, inner: FusedRotary, score: Score) -> None:
        self.inner = inner
        self.score = score

    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Any, Any]:
        cos, sin = self.inner(x, position_ids, layer_type)
        if not isinstance(cos, PendingRotation):
            return cos, sin
        stored = self.score.stored(cos.positions)
        return StoredRotation(cos.freqs, cos.positions, cos.interleaved, stored), None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As for `FusedRotary`; and another process may not know of the attention yet."""
        self.__dict__.update(state)
        wrap_apply(self.inner.modeling, self)
        register_attention()
