"""The changes that `extend` makes for a frequency method.

A `RotaryForward` replaces the forward of each rotary embedding. A method that depends on the length
is frozen per request: keys are cached after rotation, so all tokens of a request must be rotated by
the same frequencies. A request starts with a forward whose cache is empty or absent, and with every
call of `generate` that does not continue a filled cache. Its frequencies are chosen then, for the
length that it will reach. They stay with its cache and with copies of it, whatever other requests
come between.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .... import RopeFreqs
from ..._shared.parameters import PARAMETERS, ModelValues, bind_method, trained_in, values_in
from ..model import Override, cache_of, caches_in, tokens_in, tokens_of, unsupported
from ..probe.rotary import RotaryModule, argument_names, attribute_of, by_name, forward_of
from .hooks import Patches
from .rotation import RotaryForward
from .state import FREQS_ON_CACHE, FreqsByKind, ThreadFrequencies, in_progress


def frequency_patches(
    rotary_modules: list[RotaryModule],
    method: str,
    parameters: Mapping[str, Any],
    cache: str | None,
) -> Patches:
    """Return the patches of a frequency method; the model is not changed yet.

    cache: "raw" if every forward rotates all keys anew.
    """
    patches = Patches()
    for rotary_module in rotary_modules:
        if getattr(rotary_module.module.config, "alibi", False):
            raise unsupported(rotary_module.owner, "its layers have ALiBi in place of a rotation")
        functions, freqs, takes_length = {}, {}, False
        for layer_type in rotary_module.layer_types:
            function, takes_length = bind_method(
                "extend", method, parameters, values_of(rotary_module, layer_type)
            )
            functions[layer_type] = function
            freqs[layer_type] = function(seq_len=1) if takes_length else function()
        if any(each.log_decay is not None for each in freqs.values()):
            if cache is not None:
                raise ValueError(
                    f"extend: cache must be None for {method}, whose keys grow without bound where "
                    f"positions do not start anew, got {cache!r}"
                )
            if rotary_module.fused is None:
                raise unsupported(
                    rotary_module.owner,
                    f"one table rotates its queries and keys, but {method} needs two",
                )
        rotary = RotaryForward(rotary_module, ThreadFrequencies(freqs), method)
        patches.overrides += rotary.overrides()
        patches.overrides += _softmax_scales(rotary_module, method, parameters)
        if takes_length:
            kind = LengthHooks if cache is None else EachLengthHooks
            length = kind(rotary_module, rotary, functions)
            patches.hooks.append((rotary_module.owner, length.before_forward, length.after_forward))
    return patches


def values_of(rotary_module: RotaryModule, layer_type: str | None) -> ModelValues:
    """Return the model's values for the rotation of one kind of layers."""
    parameters = rotary_module.parameters(layer_type)
    config, dim = rotary_module.module.config, rotary_module.dim(layer_type)
    values, trained = values_in(config, parameters, dim), trained_in(config, parameters, dim)
    if any(_mscale_function(layer) is not None for layer in rotary_module.owner.modules()):
        values |= {name: parameters[name] for name in _MSCALES if parameters.get(name) is not None}
    unrotated = 0
    if parameters.get("rope_type") == "proportional":
        unrotated = int((attribute_of(rotary_module.module, layer_type, "inv_freq") == 0).sum())
    return ModelValues(values, trained, unrotated)


class LengthHooks:
    """Hooks that choose a `RotaryForward`'s frequencies at the start of its owner's forwards."""

    def __init__(
        self,
        rotary_module: RotaryModule,
        rotary: RotaryForward,
        methods: dict[str | None, Callable[..., RopeFreqs]],
    ) -> None:
        self.rotary = rotary
        self.methods = methods
        self.key = uuid.uuid4().hex  # equal in copies of the model, which may continue its caches
        self.argument_names = argument_names(rotary_module.owner)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Set the frequencies of this forward's request: forward pre-hook."""
        arguments = by_name(self.argument_names, args, kwargs)
        cache = cache_of(arguments)
        freqs = self._freqs(arguments, cache)
        self.rotary.freqs.update(freqs)
        if cache is not None:
            self._attach(cache, freqs)

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Mark the cache that the forward made: forward hook."""
        for cache in caches_in(output):
            self._attach(cache, dict(self.rotary.freqs))

    def _freqs(self, arguments: Mapping[str, Any], cache: Any) -> FreqsByKind:
        of_cache = getattr(cache, FREQS_ON_CACHE, {}).get(self.key)
        if torch.compiler.is_compiling() and of_cache:
            return of_cache  # a graph of a step: its prompt has chosen
        request = getattr(in_progress, "request", None)
        limit, chosen = (None, {}) if request is None else (request.limit, request.freqs)
        if self.key not in chosen:
            past = tokens_in(cache)
            if past and of_cache is not None:
                chosen[self.key] = of_cache
            else:
                length = self._length(arguments, past, limit)
                chosen[self.key] = self._of_length(length, arguments)
        return chosen[self.key]

    def _of_length(self, length: int, arguments: Mapping[str, Any]) -> FreqsByKind:
        device = tokens_of(arguments).device
        return {
            layer_type: method(seq_len=length).to(device)
            for layer_type, method in self.methods.items()
        }

    def _length(self, arguments: Mapping[str, Any], past: int, limit: int | None) -> int:
        """Return the tokens that a request will reach, as known in its first forward."""
        length = past + tokens_of(arguments).shape[1]
        positions = arguments.get("position_ids")
        if self.rotary.shared is not None:
            return length * self.rotary.shared.size
        if limit is not None:
            return max(length, limit)
        # Read on the host, once a request.
        return length if positions is None else int(positions.max()) + 1

    def _attach(self, cache: Any, freqs: FreqsByKind) -> None:
        if not hasattr(cache, FREQS_ON_CACHE):
            setattr(cache, FREQS_ON_CACHE, {})
        getattr(cache, FREQS_ON_CACHE)[self.key] = freqs


class EachLengthHooks(LengthHooks):
    """Hooks that choose frequencies for every forward anew, by its number of tokens."""

    def _freqs(self, arguments: Mapping[str, Any], cache: Any) -> FreqsByKind:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"extend: a model under {self.rotary.method} with cache='raw' cannot be compiled, "
                "as its frequencies change from step to step"
            )
        past = tokens_in(cache)
        return self._of_length(self._length(arguments, past, None), arguments)

    def _attach(self, cache: Any, freqs: FreqsByKind) -> None:
        """Do nothing: a cache of raw keys fits any frequencies."""


# DeepSeek's temperature. Latent attention rotates some dims of a head, but YaRN scales the logits
# of all. So the layers multiply their softmax scale by mscale^2, which they read from the
# configuration when they are built. Other frequencies bring their own factor. Such layers are known
# by a function of their modules.
_MSCALE = "yarn_get_mscale"
_MSCALES = ("mscale", "mscale_all_dim")
_MSCALE_IN_FORCE = "_extrope_mscale"


def _softmax_scales(
    rotary_module: RotaryModule, method: str, given: Mapping[str, Any]
) -> list[Override]:
    """Return the overrides of the layers' `scaling`; none if the model has no such layers."""
    config = rotary_module.parameters(rotary_module.layer_types[0])
    parameters: dict[str, Any] = {"rope_type": "default"}
    if set(_MSCALES) <= set(PARAMETERS[method]):
        own = {name: config[name] for name in _MSCALES if name in config}
        parameters = {"rope_type": method, **own, **given}
    overrides: list[Override] = []
    for layer in rotary_module.owner.modules():
        if (function := _mscale_function(layer)) is not None:
            if parameters.get("mscale_all_dim") and "factor" not in parameters:
                raise ValueError(
                    f"extend: mscale_all_dim must be 0 for {method} of {type(layer).__name__}, "
                    "whose softmax scale cannot follow the length, got "
                    f"{parameters['mscale_all_dim']}"
                )
            in_force = getattr(layer, _MSCALE_IN_FORCE, config)
            ratio = _mscale(function, parameters) / _mscale(function, in_force)
            overrides.append((layer, "scaling", layer.scaling * ratio))
            overrides.append((layer, _MSCALE_IN_FORCE, parameters))
    return overrides


def _mscale_function(layer: nn.Module) -> Callable[..., float] | None:
    forward = forward_of(layer) if hasattr(layer, "scaling") else None
    return None if forward is None else forward.__globals__.get(_MSCALE)


def _mscale(function: Callable[..., float], parameters: Mapping[str, Any]) -> float:
    """Return a layer's factor on its softmax scale."""
    mscale = parameters.get("mscale_all_dim")
    if parameters.get("rope_type", "default") == "default" or not mscale:
        return 1.0
    return function(parameters["factor"], mscale) ** 2
