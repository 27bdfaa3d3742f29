"""What `extend` changes for a frequency method.

A `Rotary` stands in for the forward of each rotary embedding. A method that depends on the length
of the sequence is frozen per request: keys are cached after rotation, so every token of a request
must be rotated by the same frequencies. A request starts with a forward whose cache is empty or
absent, and with every call of `generate` that does not continue a filled cache. Its frequencies are
chosen then, for the length that it will reach, and stay with its cache: with copies of it too, and
unaffected by requests in between.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from .._shared.parameters import PARAMETERS, ModelValues, bind_method, values_in
from .find import (
    Changes,
    Override,
    RotarySite,
    Tables,
    argument_names,
    attribute_of,
    by_name,
    cache_of,
    caches_in,
    forward_of,
    generator_of,
    tokens_of,
    unsupported,
)
from .rotation import Rotation, wrap_apply

if TYPE_CHECKING:
    from .context_parallel import Shared

FreqsByKind = dict[str | None, RopeFreqs]

_ON_CACHE = "_extrope_freqs"
# Of the call of `generate` in progress: the tokens it may reach, and the frequencies it has chosen.
_current_call: ContextVar[tuple[int, dict[str, FreqsByKind]] | None] = ContextVar(
    "extrope_generate", default=None
)


def frequency_changes(
    model: nn.Module,
    sites: list[RotarySite],
    method: str,
    parameters: Mapping[str, Any],
    cache: str | None,
) -> Changes:
    """Return what a frequency method changes; nothing is changed yet.

    cache: "raw" where keys are rotated at every forward anew.
    """
    changes = Changes()
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
        changes.overrides.append((site.rotary, "forward", rotary))
        changes.overrides += _softmax_scales(site, method, parameters)
        if takes_length:
            kind = LengthDependence if cache is None else EachLength
            length = kind(site, rotary, functions)
            changes.hooks.append((site.owner, length.before_forward, length.after_forward))
    generator = generator_of(model)
    if changes.hooks and cache is None and hasattr(generator, "generate"):
        generate = partial(_generate_one_request, generator, vars(generator).get("generate"))
        changes.overrides.append((generator, "generate", generate))
    return changes


def values_of(site: RotarySite, layer_type: str | None) -> ModelValues:
    """Return what the model says of the rotation of one kind of layers."""
    parameters = site.parameters(layer_type)
    values = values_in(site.rotary.config, parameters, site.dim(layer_type))
    if any(_mscale_function(layer) is not None for layer in site.owner.modules()):
        values |= {name: parameters[name] for name in _MSCALES if parameters.get(name) is not None}
    unrotated = 0
    if parameters.get("rope_type") == "proportional":
        unrotated = int((attribute_of(site.rotary, layer_type, "inv_freq") == 0).sum())
    return ModelValues(values, unrotated)


class Rotary:
    """Stands in for the forward of a rotary embedding.

    freqs: by the kind of layers (None where the model makes no difference) the frequencies to
        rotate by; other kinds keep the tables of the model itself. A method that depends on the
        length sets them at the start of every forward; an extension by a score method shares them
        with the one before it.
    method: the extension's.
    shared: with whom, where the extension is over a mesh.
    """

    def __init__(self, site: RotarySite, freqs: FreqsByKind, method: str) -> None:
        self.site = site
        self.rotary = site.rotary
        self.fused = site.fused
        self.freqs = freqs
        self.method = method
        self.shared: Shared | None = None
        self._tables: dict[str | None, Tables] = {}

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Return a `Rotation` in place of cos where the op takes over, else the model's tables."""
        if layer_type not in self.freqs:
            return type(self.rotary).forward(self.rotary, x, position_ids, layer_type)
        freqs = self.freqs_on(layer_type, x.device)
        if self.fused is not None and position_ids.dim() == 2 and not exports_to_onnx():
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
                f"which {self.method} scales differently"
            )
        made = self._tables.get(layer_type)
        if made is None or made.freqs is not freqs:
            made = self._tables[layer_type] = self.site.tables(layer_type, freqs)
        return made(x, position_ids)

    def freqs_on(self, layer_type: str | None, device: torch.device) -> RopeFreqs:
        """Return the frequencies of a kind of layers, and keep them on that device."""
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
        """Copies need the wrapped global."""
        vars(self).update(state)
        if self.fused is not None:
            wrap_apply(self.fused.modeling, self)


def exports_to_onnx() -> bool:
    """Say whether a graph is made for ONNX, which has PyTorch's own operations alone."""
    onnx = None if torch.compiler.is_dynamo_compiling() else sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


class LengthDependence:
    """Chooses a `Rotary`'s frequencies at the start of its owner's forwards, through hooks."""

    def __init__(
        self, site: RotarySite, rotary: Rotary, methods: dict[str | None, Callable[..., RopeFreqs]]
    ) -> None:
        self.rotary = rotary
        self.methods = methods
        self.key = uuid.uuid4().hex  # equal in copies of the model, which may continue its caches
        self.argument_names = argument_names(site.owner)

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: set the frequencies of the request that this forward belongs to."""
        arguments = by_name(self.argument_names, args, kwargs)
        cache = cache_of(arguments)
        freqs = self._freqs(arguments, cache)
        self.rotary.freqs.update(freqs)
        if cache is not None:
            self._attach(cache, freqs)

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: mark the cache that the forward made."""
        for cache in caches_in(output):
            self._attach(cache, dict(self.rotary.freqs))

    def _freqs(self, arguments: Mapping[str, Any], cache: Any) -> FreqsByKind:
        of_cache = getattr(cache, _ON_CACHE, {}).get(self.key)
        if torch.compiler.is_compiling() and of_cache:
            return of_cache  # a graph of a step: the prompt has chosen
        limit, chosen = _current_call.get() or (None, {})
        if self.key not in chosen:
            past = 0 if cache is None else int(cache.get_seq_length())
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
        """Return the tokens that a request will reach, as far as its first forward knows."""
        length = past + tokens_of(arguments).shape[1]
        positions = arguments.get("position_ids")
        if self.rotary.shared is not None:
            return length * self.rotary.shared.size
        if limit is not None:
            return max(length, limit)
        # Read on the host, once a request.
        return length if positions is None else int(positions.max()) + 1

    def _attach(self, cache: Any, freqs: FreqsByKind) -> None:
        if not hasattr(cache, _ON_CACHE):
            setattr(cache, _ON_CACHE, {})
        getattr(cache, _ON_CACHE)[self.key] = freqs


class EachLength(LengthDependence):
    """Chooses frequencies for every forward anew, by the tokens that there are then."""

    def _freqs(self, arguments: Mapping[str, Any], cache: Any) -> FreqsByKind:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"extend: a model under {self.rotary.method} with cache='raw' cannot be compiled, "
                "as its frequencies change from step to step"
            )
        past = 0 if cache is None else int(cache.get_seq_length())
        return self._of_length(self._length(arguments, past, None), arguments)

    def _attach(self, cache: Any, freqs: FreqsByKind) -> None:
        """Nothing: a cache of raw keys is for any frequencies."""


def _generate_one_request(
    model: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """Stand in for `model.generate`: each call is one request, whatever forwards it makes.

    previous: what stood in for it before, if anything did.
    """
    token = _current_call.set((_reach(model, *args, **kwargs), {}))
    try:
        if previous is not None:
            return previous(*args, **kwargs)
        return type(model).generate(model, *args, **kwargs)
    finally:
        _current_call.reset(token)


def _reach(
    model: nn.Module, inputs: Any = None, generation_config: Any = None, *_: Any, **kwargs: Any
) -> int:
    """Return the tokens that `generate` may reach; those of the prompt if it sets no limit."""
    prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    prompt = next((x.shape[1] for x in prompts if x is not None), 1)
    defaults = getattr(model, "generation_config", None)

    def limit(name: str) -> int | None:
        if name in kwargs:
            return kwargs[name]
        values = (getattr(config, name, None) for config in (generation_config, defaults))
        return next((value for value in values if value is not None), None)

    if (new_tokens := limit("max_new_tokens")) is not None:
        return prompt + new_tokens
    return max(prompt, limit("max_length") or 0)


# DeepSeek's temperature. Latent attention rotates some dims of a head, and YaRN scales the logits
# of all of them. So the layers multiply their softmax scale by mscale^2, which they take from the
# configuration when they are built; other frequencies bring their own. They are known by the
# function that their modules have for it.
_MSCALE = "yarn_get_mscale"
_MSCALES = ("mscale", "mscale_all_dim")
_MSCALE_IN_FORCE = "_extrope_mscale"


def _softmax_scales(site: RotarySite, method: str, given: Mapping[str, Any]) -> list[Override]:
    """Return the overrides of the layers' `scaling`; none where the model has no such layers."""
    config = site.parameters(site.layer_types[0])
    parameters: dict[str, Any] = {"rope_type": "default"}
    if set(_MSCALES) <= set(PARAMETERS[method]):
        own = {name: config[name] for name in _MSCALES if name in config}
        parameters = {"rope_type": method, **own, **given}
    overrides: list[Override] = []
    for layer in site.owner.modules():
        if (function := _mscale_function(layer)) is not None:
            in_force = getattr(layer, _MSCALE_IN_FORCE, config)
            ratio = _mscale(function, parameters) / _mscale(function, in_force)
            overrides.append((layer, "scaling", layer.scaling * ratio))
            overrides.append((layer, _MSCALE_IN_FORCE, parameters))
    return overrides


def _mscale_function(layer: nn.Module) -> Callable[..., float] | None:
    forward = forward_of(layer) if hasattr(layer, "scaling") else None
    return None if forward is None else forward.__globals__.get(_MSCALE)


def _mscale(function: Callable[..., float], parameters: Mapping[str, Any]) -> float:
    """Return what a layer multiplies its softmax scale by."""
    mscale = parameters.get("mscale_all_dim")
    if parameters.get("rope_type", "default") == "default" or not mscale:
        return 1.0
    return function(parameters["factor"], mscale) ** 2
