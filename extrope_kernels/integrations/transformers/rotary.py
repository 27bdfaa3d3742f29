"""What stands in for the forward of a model's rotary embedding, and yields a `Rotation`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import RopeFreqs
from .apply import wrap_apply
from .architecture import RotarySite
from .rotation import Rotation, register_attention


class Rotary:
    """Stands in for the forward of a rotary embedding.

    freqs: per layer type (None where the model makes no difference) the frequencies to rotate by;
        other layer types keep the tables of the model itself. A method that depends on the length
        sets them at the start of every forward; an extension by a score method shares them with
        the one before it.
    method: the extension's.
    """

    def __init__(self, site: RotarySite, freqs: dict[str | None, RopeFreqs], method: str) -> None:
        self.rotary = site.rotary
        self.interleaved = site.interleaved
        self.modeling = site.modeling
        self.freqs = freqs
        self.method = method

    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Any, Any]:
        if layer_type not in self.freqs:
            return type(self.rotary).forward(self.rotary, x, position_ids, layer_type)
        if position_ids.dim() != 2:
            shape = tuple(position_ids.shape)
            raise ValueError(f"extend: position_ids must be (batch, seqlen), got {shape}")
        return Rotation(self.freqs_on(layer_type, x.device), position_ids, self.interleaved), None

    def freqs_on(self, layer_type: str | None, device: torch.device) -> RopeFreqs:
        """Return the frequencies of a layer type, and keep them on that device."""
        freqs = self.freqs[layer_type]
        if freqs.inv_freq.device != device:
            # Tensors made in inference mode could not be saved for a backward later on.
            with torch.inference_mode(False):
                freqs = self.freqs[layer_type] = freqs.to(device)
        return freqs

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies need the wrapped global, in another process the attention's name as well."""
        self.__dict__.update(state)
        wrap_apply(self.modeling, self)
        register_attention()
