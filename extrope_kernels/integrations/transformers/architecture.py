"""Where a model rotates: its rotary embeddings, and which kinds of layers each of them serves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import methods
from .._shared.kinds import is_bounded
from .fused import Fused, find_fused
from .tables import change_of_tables, prefix_of

LAYERS = ("full", "all")


@dataclass(frozen=True, eq=False)
class RotarySite:
    """One rotary embedding and what surrounds it.

    owner: the module whose forward takes the tokens, and in which the rotary embedding is called.
    layer_types: the kinds of layers to extend, where the model has a rotation per kind; else None.
    fused: how the op does what the layers do with tables; None where it is not the same thing.
    orders: for each of them, where its frequencies are not in the order of the pairs, the pair that
        each is for; else None.
    single: the rotary embedding yields one tensor, of complex numbers, not (cos, sin).
    """

    owner: nn.Module
    rotary: nn.Module
    layer_types: tuple[str | None, ...]
    orders: tuple[Tensor | None, ...]
    fused: Fused | None
    single: bool

    def parameters(self, layer_type: str | None) -> Mapping[str, Any]:
        """Return the entries of config.rope_parameters for a kind of layers."""
        return parameters_of(self.rotary, layer_type)

    def dim(self, layer_type: str | None) -> int:
        """Return how many dims of a head the frequencies of a kind of layers are for."""
        return 2 * getattr(self.rotary, f"{prefix_of(layer_type)}inv_freq").shape[-1]

    def order(self, layer_type: str | None) -> Tensor | None:
        """Return the order of the frequencies of a kind of layers, None where it is the usual."""
        return self.orders[self.layer_types.index(layer_type)]


def find_sites(model: nn.Module, layers: str = "full") -> list[RotarySite]:
    """Return every rotary embedding of `model`; raise ValueError if one cannot be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"extend: model must be a transformers model, got {type(model).__name__}")
    if layers not in LAYERS:
        raise ValueError(f"extend: layers must be full or all, got {layers!r}")
    sites = [_site(owner, rotary, layers) for owner, rotary in _rotary_embeddings(model)]
    if not sites:
        raise ValueError(
            "extend: model must have a rotary embedding configured by rope_parameters, "
            f"got a {type(model).__name__} without"
        )
    return sites


def generator_of(model: nn.Module) -> nn.Module:
    """Return the model of transformers in a wrapper (PEFT's, torch.compile's), which generates
    however the wrapper is called, or taken off; an encoder beside it has no `generate`.
    """
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return next((part for part in parts if hasattr(part, "generate")), model)


def _rotary_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield those of the language model; a vision tower rotates by rows and columns of patches."""
    for path, module in model.named_modules():
        parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
        if not hasattr(module, "rope_type") or not isinstance(parameters, Mapping):
            continue
        around = _around(model, path)
        if isinstance(module.config, _language_configs(around)):
            yield _owner(around), module


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules around the one at `path`, the innermost first."""
    names = path.split(".")[:-1]
    return [model.get_submodule(".".join(names[:end])) for end in range(len(names), -1, -1)]


def _language_configs(around: list[nn.Module]) -> tuple[type, ...]:
    """Return the classes of the language model's config and of its parts' (Blt).

    The config is the outermost one of transformers: a wrapper may have none, or another.
    """
    from transformers import PreTrainedModel

    whole = next((each for each in reversed(around) if isinstance(each, PreTrainedModel)), None)
    if whole is None:
        return (object,)
    text = whole.config.get_text_config(decoder=True)
    parts = [
        getattr(text, name, None)
        for name in getattr(text, "sub_configs", ())
        if not name.startswith(("vision", "audio"))
    ]
    return (type(text), *(type(part) for part in parts if part is not None))


def _owner(around: list[nn.Module]) -> nn.Module:
    """Return the innermost module around the rotary embedding that takes tokens."""
    for module in around:
        if "inputs_embeds" in inspect.signature(type(module).forward).parameters:
            return module
    return around[0]


def _site(owner: nn.Module, rotary: nn.Module, layers: str) -> RotarySite:
    layer_types: tuple[str | None, ...] = (None,)
    if any(isinstance(value, Mapping) for value in rotary.config.rope_parameters.values()):
        kinds = [kind for kind in rotary.rope_type if hasattr(rotary, f"{kind}_inv_freq")]
        layer_types = tuple(kind for kind in kinds if layers == "all" or not is_bounded(kind))
        if not layer_types:
            raise unsupported(owner, "all its layers that rotate have a sliding window or chunks")
    try:
        # Built anew, so that neither the buffers nor the history of the model's own are touched.
        with torch.device("cpu"):
            fresh = type(rotary)(rotary.config)
        singles = {change_of_tables(fresh, layer_type) for layer_type in layer_types}
    except Exception as error:  # whatever a foreign signature leads to
        raise unsupported(owner, f"its rotation cannot be tried out ({error})") from error
    single = True in singles
    orders = tuple(_order(owner, fresh, layer_type) for layer_type in layer_types)
    fused = None
    if not single and orders == (None,) * len(orders):
        fused = find_fused(owner, fresh, layer_types)
    return RotarySite(owner, rotary, layer_types, orders, fused, single)


def _order(owner: nn.Module, rotary: nn.Module, layer_type: str | None) -> Tensor | None:
    """Return the order in which the model holds its ladder; None where that is the usual one.

    Raises ValueError where the frequencies are no ladder of the configuration's base at all.
    """
    parameters = parameters_of(rotary, layer_type)
    if parameters.get("rope_type", "default") != "default" or "rope_theta" not in parameters:
        return None
    own = getattr(rotary, f"{prefix_of(layer_type)}inv_freq").float()
    ladder = methods.rope(2 * own.numel(), base=parameters["rope_theta"]).inv_freq
    if torch.allclose(own, ladder, rtol=1e-4):
        return None
    if not torch.allclose(own.sort().values, ladder.sort().values, rtol=1e-4):
        raise unsupported(owner, "its frequencies are not the powers of its rope_theta")
    order = torch.empty_like(own, dtype=torch.int64)
    order[own.argsort()] = ladder.argsort()
    return order


def parameters_of(rotary: nn.Module, layer_type: str | None) -> Mapping[str, Any]:
    """Return the entries of a rotary embedding's rope_parameters for a kind of layers."""
    parameters = rotary.config.rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def kind_of(layer: nn.Module) -> str:
    """Return what the config calls the layer's kind; nothing where it has no names for kinds."""
    kinds = getattr(getattr(layer, "config", None), "layer_types", None)
    index = getattr(layer, "layer_idx", None)
    return kinds[index] if kinds and index is not None and index < len(kinds) else ""


def unsupported(owner: nn.Module, reason: str) -> ValueError:
    """Return the error that says why a model cannot be extended."""
    return ValueError(f"extend: {type(owner).__name__} is not a supported architecture: {reason}")


def shortened(error: Exception) -> str:
    """Return the first line of an error of other code, to be quoted."""
    return str(error).split("\n")[0][:200]
