"""DeepSeek's temperature: the part of YaRN that its layers put into their softmax scale.

Latent attention rotates some dims of a head, and YaRN scales the logits of all of them. So the
layers multiply their softmax scale by mscale^2, which they take from the configuration when they
are built, where others scale cosines and sines. Other frequencies bring their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from .architecture import RotarySite
from .fused import forward_of

# By what their modules call the factor on cosines and sines; what it does to the scale has a
# function of its own since transformers 5.15 alone.
_FACTOR = "yarn_get_mscale"
_IN_FORCE = "_extrope_mscale"
# What a method's parameters of these names mean is in the softmax scale.
NAMES = ("mscale", "mscale_all_dim")


def softmax_scales(
    site: RotarySite, method: str, given: Mapping[str, Any]
) -> list[tuple[nn.Module, str, Any]]:
    """Return the overrides of the layers' `scaling`; none where the model has no such layers."""
    config = site.parameters(site.layer_types[0])
    parameters: dict[str, Any] = {"rope_type": "default"}
    if method == "yarn":
        own = {name: config[name] for name in NAMES if name in config}
        parameters = {"rope_type": "yarn", **own, **given}
    overrides: list[tuple[nn.Module, str, Any]] = []
    for layer in site.owner.modules():
        if (function := _function(layer)) is not None:
            in_force = getattr(layer, _IN_FORCE, config)
            ratio = _scale(function, parameters) / _scale(function, in_force)
            overrides.append((layer, "scaling", layer.scaling * ratio))
            overrides.append((layer, _IN_FORCE, parameters))
    return overrides


def scales_softmax(site: RotarySite) -> bool:
    """Say whether layers of the owner take YaRN's temperature into their softmax scale."""
    return any(_function(layer) is not None for layer in site.owner.modules())


def _function(layer: nn.Module) -> Callable[..., float] | None:
    forward = forward_of(layer) if hasattr(layer, "scaling") else None
    return None if forward is None else forward.__globals__.get(_FACTOR)


def _scale(function: Callable[..., float], parameters: Mapping[str, Any]) -> float:
    """Return what a layer multiplies its softmax scale by."""
    mscale = parameters.get("mscale_all_dim")
    if parameters.get("rope_type", "default") == "default" or not mscale:
        return 1.0
    return function(parameters["factor"], mscale) ** 2
