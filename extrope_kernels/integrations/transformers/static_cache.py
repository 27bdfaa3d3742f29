"""The rows of a forward over a static cache under `torch.compile`: lengths stay on the device.

A graph is made once and run for every step, so what changes from step to step must be a tensor in
it, and nothing may be read on the host. The checks of `rows` are left to forwards outside of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from ...ops.decode import attend_with_kvcache
from ...scores import Score
from .forwards import cache_of
from .rows import full_mask


@dataclass(frozen=True, eq=False)
class StaticRows:
    """The tokens of one forward.

    positions: (batch or 1, new) int64; 0 in the padding.
    ends: (batch,) int32, the slots of each row in use once the cache has the new tokens.
    leftpad: (batch,) int32, or None where no row has padding.
    """

    positions: Tensor
    ends: Tensor
    leftpad: Tensor | None

    def to(self, device: torch.device | str | int) -> StaticRows:
        """Move what the attention needs to `device`."""
        leftpad = None if self.leftpad is None else self.leftpad.to(device)
        return StaticRows(self.positions, self.ends.to(device), leftpad)

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
        """Attend from (batch, new, heads, head_dim) to the slots of (batch, slots, ...) in use."""
        if "sliding_window" in options or "chunk_size" in options:
            raise ValueError(
                "extend: layers with a sliding window or chunks must not be extended in a graph "
                "over a static cache, which forgets their keys; extend with layers='full'"
            )
        options |= {"cache_seqlens": self.ends, "cache_leftpad": self.leftpad}
        return attend_with_kvcache(score, q, k, v, freqs, **options)


def static_rows(tokens: Tensor, past: Tensor, mask: Any) -> StaticRows:
    """Return the rows of a forward whose past, of all rows, is a tensor of the cache.

    tokens: (batch, new, ...). mask: (batch, slots) with 0 for padding and for slots to come; None.
    Raises ValueError for another mask: what it says cannot be looked at in a graph.
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
        leftpad = (mask.bool().cumsum(1) == 0).sum(1)
        positions = (positions - leftpad[:, None]).clamp(min=0)
        leftpad = leftpad.to(torch.int32)
    # The cache counts on in place.
    ends = (past + new).to(torch.int32).repeat(batch)
    return StaticRows(positions, ends, leftpad)


def keep_mask(*, attention_mask: Any = None, **arguments: Any) -> Any:
    """Stand in for a model's `create_masks_for_generate`: rows are read from the mask as it is.

    For a static cache it gets that one's length, so that every step has the same shapes.
    """
    layers = getattr(cache_of(arguments), "layers", ())
    slots = max((getattr(layer, "max_cache_len", 0) for layer in layers), default=0)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return attention_mask
    return nn.functional.pad(attention_mask, (0, max(slots - attention_mask.shape[1], 0)))
