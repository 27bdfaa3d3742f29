"""The config that yields an extension's frequencies, where transformers has a type for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..._rope_types import ROPE_TYPES
from ...methods import METHODS, stray
from .._shared.parameters import BY_AXIS, PARAMETERS, bind_method, values_for
from .attending import plain_class
from .frequencies import values_of
from .rotary import RotaryModule, attribute_of, find_rotary_modules

if TYPE_CHECKING:
    from torch import nn

    from .._shared.saved import Saved

TRAINED = "original_max_position_embeddings"
# Methods with a type in configs.
_TYPES = {each.method: name for name, each in reversed(ROPE_TYPES.items()) if name != "axial"}
_TYPES |= {"abf": "default", "ntk_aware": "default"}
# All other entries of a config on a rotation (a share of the dims, axes) stay.
_SCALING = {key for each in ROPE_TYPES.values() for key in each.keys}
_SCALING |= {"rope_type", "type", "rope_theta", "alpha"}


def with_frequencies(model: nn.Module, extension: Saved) -> Any:
    """Return a copy of the config that yields an extension's frequencies; None if none does."""
    rotary_modules = find_rotary_modules(model, extension.layers)
    text = model.config.get_text_config(decoder=True)
    if any(each.learned for each in rotary_modules):
        return None  # those who read it would multiply by the weights again
    if any(plain_class(x.module.config) is not plain_class(text) for x in rotary_modules):
        return None
    if "over" in PARAMETERS[extension.method] and "over" not in extension.parameters:
        return None  # kinds of layers were trained under different scalings: read them there
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    by_kind = None not in rotary_modules[0].layer_types
    for name in stray(text, by_kind):  # a reader may take them for scalings
        del text.rope_parameters[name]
    for each in rotary_modules:
        for kind in each.layer_types:
            if (entries := _entries(each, kind, extension)) is None:
                return None
            text.rope_parameters = (
                entries if kind is None else {**text.rope_parameters, kind: entries}
            )
    if getattr(text, "rope_scaling_layers", None) is not None:  # Molmo 2 scales these alone
        text.rope_scaling_layers = list(range(text.num_hidden_layers))
    trained = values_of(rotary_modules[0], rotary_modules[0].layer_types[0]).values.get(TRAINED)
    if not _names_trained(text) and trained != getattr(text, "max_position_embeddings", None):
        text.original_max_position_embeddings = trained  # the scaling before had it
    if extension.length is not None:
        longest = getattr(text, "max_position_embeddings", None) or 0
        set_longest(text, max(extension.length, longest))
    elif extension.method == "dynamic_ntk":  # its type takes the longest for the trained length
        text.max_position_embeddings = extension.parameters["max_position_embeddings"]
    return config if _agrees(rotary_modules, extension, config) else None


def _entries(
    rotary_module: RotaryModule, layer_type: str | None, extension: Saved
) -> dict[str, Any] | None:
    """Return the rope_parameters for one kind of layers; None if no type takes them."""
    method, given = extension.method, extension.parameters
    wrapped = given.get("resonance") or given.get(BY_AXIS)
    if method not in _TYPES or wrapped or given.get("ramp", "index") != "index":
        return None
    # Read again with the changed base, its factor would apply twice.
    if "seq_len" in given or (method == "ntk_aware" and "base" not in given):
        return None
    kind = _TYPES[method]
    signature = inspect.signature(METHODS[method]).parameters
    values = {name: each.default for name, each in signature.items()}
    own = values_of(rotary_module, layer_type)
    values |= values_for(method, own, given) | given
    if values.get("over") is not None or (method == "rope" and own.trained and "base" not in given):
        return None  # no type scales another scaling
    base = values["base"]
    if method == "ntk_aware":
        dim = rotary_module.dim(layer_type)
        base *= values["factor"] ** (dim / (dim - 2))
    if method == "longrope" and values["factor"] is None:
        values["factor"] = values["max_position_embeddings"] / values[TRAINED]
    kept = {k: v for k, v in rotary_module.parameters(layer_type).items() if k not in _SCALING}
    told = {key: values[key] for key in ROPE_TYPES[kind].keys if values[key] is not None}
    return {**kept, "rope_type": kind, "rope_theta": base, **told}


def set_longest(text: Any, length: int) -> None:
    """Write the length that the extended model reaches; keep the trained one."""
    longest = getattr(text, "max_position_embeddings", None)
    if length == longest:
        return
    if not _names_trained(text):
        text.original_max_position_embeddings = getattr(text, TRAINED, None) or longest
    text.max_position_embeddings = length


def _names_trained(text: Any) -> bool:
    """Return True if a config's rope_parameters name the trained length."""
    kinds = text.rope_parameters.values()
    nested = [each for each in kinds if isinstance(each, Mapping)] or [text.rope_parameters]
    return any(TRAINED in each for each in nested)


def _agrees(rotary_modules: Sequence[RotaryModule], extension: Saved, config: Any) -> bool:
    """Return True if transformers reads a config, and computes the extension's frequencies."""
    try:
        text = type(config).from_dict(config.to_dict()).get_text_config(decoder=True)
        with torch.device("cpu"):
            built = [(each, type(each.module)(text)) for each in rotary_modules]
    except Exception:  # each class has its own rules, and its own errors
        return False
    for each, rotary in built:
        for kind in each.layer_types:
            function, takes_length = bind_method(
                "extend", extension.method, extension.parameters, values_of(each, kind)
            )
            freqs = function(seq_len=1) if takes_length else function()
            own = attribute_of(rotary, kind, "inv_freq").float()
            if (order := each.orders[kind]) is not None:
                own = own[order.argsort()]
            factor = float(attribute_of(rotary, kind, "attention_scaling", 1.0))
            same = own.shape == freqs.inv_freq.shape
            same = same and torch.allclose(own, freqs.inv_freq, rtol=1e-5)
            if not same or abs(factor - freqs.attention_factor) > 1e-6:
                return False
    return True
