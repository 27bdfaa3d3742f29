"""What a model's rotary embedding gives of a method's parameters, and its own frequencies."""

from __future__ import annotations

import torch

from ... import RopeFreqs
from .._shared.parameters import ModelValues, values_in
from .architecture import RotarySite, unsupported
from .softmax_scale import NAMES, scales_softmax
from .tables import prefix_of


def values_of(site: RotarySite, layer_type: str | None) -> ModelValues:
    """Return what the model says of the rotation of one kind of layers."""
    parameters = site.parameters(layer_type)
    values = values_in(site.rotary.config, parameters, site.dim(layer_type))
    if scales_softmax(site):
        values |= {name: parameters[name] for name in NAMES if parameters.get(name) is not None}
    unrotated = 0
    if parameters.get("rope_type") == "proportional":
        own = getattr(site.rotary, f"{prefix_of(layer_type)}inv_freq")
        unrotated = int((own == 0).sum())
    return ModelValues(values, unrotated)


def own_freqs(site: RotarySite, layer_type: str | None) -> RopeFreqs:
    """Return the frequencies that the model itself rotates by, on its device.

    Raises ValueError where they change with the length.
    """
    rotary, kind, prefix = site.rotary, site.rotary.rope_type, prefix_of(layer_type)
    if layer_type is not None:
        kind = kind[layer_type]
    if "dynamic" in kind or kind == "longrope":
        raise unsupported(
            site.owner,
            f"its frequencies ({kind}) change with the length; "
            "extend it by a method of that name first",
        )
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    if inv_freq.dtype != torch.float32:
        # Rounded by a cast of the whole model; the config still says what they were.
        with torch.device("cpu"):
            inv_freq = getattr(type(rotary)(rotary.config), f"{prefix}inv_freq").to(inv_freq.device)
    if (order := site.order(layer_type)) is not None:
        inv_freq = inv_freq[order.argsort().to(inv_freq.device)]
    factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    return RopeFreqs(inv_freq.detach().float().clone(), factor)
