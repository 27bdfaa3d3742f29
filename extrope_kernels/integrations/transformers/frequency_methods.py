"""What `extend` changes for a frequency method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from .architecture import RotarySite
from .parameters import bind_method
from .requests import LengthDependence, generate_one_request
from .rotary import Rotary


def frequency_changes(
    model: nn.Module, sites: list[RotarySite], method: str, parameters: Mapping[str, Any]
) -> tuple[list, list]:
    """Return the overrides and the hooks of an `Extension`; nothing is changed yet."""
    overrides, hooks = [], []
    for site in sites:
        function, takes_length = bind_method(method, site, parameters)
        freqs = {site.layer_type: function(seq_len=1) if takes_length else function()}
        rotary = Rotary(site, freqs, method)
        overrides.append((site.rotary, "forward", rotary))
        if takes_length:
            length = LengthDependence(site, rotary, function)
            hooks.append((site.owner, length.before_forward, length.after_forward))
    if hooks and hasattr(model, "generate"):
        generate = partial(generate_one_request, model, vars(model).get("generate"))
        overrides.append((model, "generate", generate))
    return overrides, hooks
