"""What stands in for the forward of a model's rotary embedding, and yields other frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import RopeFreqs
from .apply import wrap_apply
from .architecture import RotarySite
from .rotation import Rotation, register_attention
from .tables import Tables

if TYPE_CHECKING:
    from .context_parallel import Shared


class Rotary:
    """Stands in for the forward of a rotary embedding.

    freqs: per layer type (None where the model makes no difference) the frequencies to rotate by;
        other layer types keep the tables of the model itself. A method that depends on the length
        sets them at the start of every forward; an extension by a score method shares them with
        the one before it.
    method: the extension's.
    shared: with whom, where the extension is over a mesh.
    """

    def __init__(self, site: RotarySite, freqs: dict[str | None, RopeFreqs], method: str) -> None:
        self.rotary = site.rotary
        self.fused = site.fused
        self.single = site.single
        self.orders = dict(zip(site.layer_types, site.orders, strict=True))
        self.freqs = freqs
        self.method = method
        self.shared: Shared | None = None
        self._tables: dict[str | None, Tables] = {}

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Return a `Rotation` in place of cos where the op takes over, else the model's tables."""
        if layer_type not in self.freqs:
            return type(self.rotary).forward(self.rotary, x, position_ids, layer_type)
        freqs = self.freqs_on(layer_type, x.device)
        if self.fused is not None and position_ids.dim() == 2:
            return Rotation(freqs, position_ids, self.fused.interleaved), None
        made = self.tables(layer_type, freqs, x, position_ids)
        if self.fused is not None and made[0].dim() != 3:
            shape = tuple(position_ids.shape)
            raise ValueError(f"extend: position_ids must be (batch, seqlen), got {shape}")
        return made

    def tables(
        self, layer_type: str | None, freqs: RopeFreqs, x: Tensor, position_ids: Tensor
    ) -> Any:
        """Return what the model's own rotary embedding makes of these frequencies."""
        if freqs.log_decay is not None:
            raise ValueError(
                f"extend: {type(self.rotary).__name__} makes one table for queries and keys, "
                "which xpos scales differently"
            )
        made = self._tables.get(layer_type)
        if made is None or made.freqs is not freqs:
            made = self._tables[layer_type] = Tables(
                self.rotary, layer_type, freqs, self.orders[layer_type]
            )
        return made(x, position_ids)

    def freqs_on(self, layer_type: str | None, device: torch.device) -> RopeFreqs:
        """Return the frequencies of a layer type, and keep them on that device."""
        freqs = self.freqs[layer_type]
        if freqs.inv_freq.device != device:
            # Tensors made in inference mode could not be saved for a backward later on.
            with torch.inference_mode(False):
                freqs = self.freqs[layer_type] = freqs.to(device)
        return freqs

    def __getstate__(self) -> dict[str, Any]:
        """Tables are made anew where they are needed."""
        return {**vars(self), "_tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies need the wrapped global, in another process the attention's name as well."""
        vars(self).update(state)
        if self.fused is not None:
            wrap_apply(self.fused.modeling, self)
        register_attention()
