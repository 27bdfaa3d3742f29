"""The rows of a batch that a model reads: padded, packed, or in pages.

`Batch` is what all kinds have in common. Positions count from each row's first token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Batch:
    """The tokens of one forward.

    positions: (batch or 1, new). leftpad: (batch,) int32, or None without padding on the left.
    has_boundaries: a row may hold several sequences, and the batch knows where they begin.
    """

    positions: Tensor
    leftpad: Tensor | None = None
    has_boundaries = False

    def to(self, device: torch.device | str | int) -> Batch:
        """Move to `device` what `attend` reads."""
        return self

    def for_layer(self, layer: nn.Module, arguments: dict[str, Any], attention: Any) -> Any:
        """Return the arguments of a layer that attends by `attention`."""
        return arguments

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        """Attend from the new tokens to all, (batch, new, heads, head_dim).

        q: (batch, new, heads, head_dim). k, v: as a cache returns them, heads before head_dim too.
        call: score, freqs and options of the ops, and chunk_size if the layer attends in chunks.
        """
        raise NotImplementedError
