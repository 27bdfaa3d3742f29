"""What `extend` changes for a frequency method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from .._shared.parameters import bind_method
from .architecture import RotarySite, generator_of, unsupported
from .model_values import values_of
from .requests import LengthDependence, generate_one_request
from .rotary import Rotary
from .softmax_scale import softmax_scales


def frequency_changes(
    model: nn.Module,
    sites: list[RotarySite],
    method: str,
    parameters: Mapping[str, Any],
    layers: str,
) -> tuple[list, list]:
    """Return the overrides and the hooks of an `Extension`; nothing is changed yet."""
    overrides, hooks = [], []
    for site in sites:
        if getattr(site.rotary.config, "alibi", False):
            raise unsupported(site.owner, "its layers have ALiBi in place of a rotation")
        functions, freqs, takes_length = {}, {}, False
        for layer_type in site.layer_types:
            function, takes_length = bind_method(
                "extend", method, parameters, values_of(site, layer_type)
            )
            functions[layer_type] = function
            freqs[layer_type] = function(seq_len=1) if takes_length else function()
        if site.fused is None and any(each.log_decay is not None for each in freqs.values()):
            raise unsupported(
                site.owner, f"one table rotates its queries and keys, {method} scales them apart"
            )
        rotary = Rotary(site, freqs, method)
        overrides.append((site.rotary, "forward", rotary))
        overrides += softmax_scales(site, method, parameters)
        if takes_length:
            length = LengthDependence(site, rotary, functions)
            hooks.append((site.owner, length.before_forward, length.after_forward))
    generator = generator_of(model)
    if hooks and hasattr(generator, "generate"):
        generate = partial(generate_one_request, generator, vars(generator).get("generate"))
        overrides.append((generator, "generate", generate))
    return overrides, hooks
