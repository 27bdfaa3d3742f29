"""The changes that `extend` makes for a frequency method.

A `RotaryForward` replaces the forward of each rotary embedding. A method that depends on the length
is frozen per request: keys are cached after rotation, so all tokens of a request must be rotated by
the same frequencies. A request starts with a forward whose cache is empty or absent, and with every
call of `generate` that does not continue a filled cache. Its frequencies are chosen then, for the
length that it will reach, for each row of a batch by its own. They stay with its cache and with
copies of it, whatever other requests come between.
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from ...methods import yarn_temperature
from .._shared.parameters import (
    PARAMETERS,
    ModelValues,
    bind_method,
    model_values,
)
from .generate import Frozen, Request, batching_patches, on_cache, request_patches
from .model import (
    Override,
    cache_of,
    caches_in,
    forward_of,
    in_progress,
    tokens_in,
    tokens_of,
    unsupported,
)
from .patches import Applied, Patches
from .rotary import RotaryModule, attribute_of
from .rotation import FreqsByKind, RotaryForward, ThreadFrequencies, fingerprint
from .scores import raw_key_patches


def frequency_patches(
    model: nn.Module, rotary_modules: list[RotaryModule], applied: Applied
) -> Patches:
    """Return the patches of a frequency method; the model is not changed yet.

    With cache "raw" every forward rotates all keys anew.
    """
    method, cache, patches = applied.method, applied.cache, Patches()
    for rotary_module in rotary_modules:
        functions, freqs, takes_length = {}, {}, False
        for layer_type in rotary_module.layer_types:
            function, takes_length = _bound(rotary_module, layer_type, applied)
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
        told = {kind: fingerprint(each) for kind, each in freqs.items()}
        of_threads = ThreadFrequencies(freqs, told, takes_length)
        rotary = RotaryForward(rotary_module, of_threads, method)
        patches.overrides += rotary.overrides()
        patches.overrides += _softmax_scales(rotary_module, applied)
        if takes_length:
            patches.by_length = True
            kind = LengthHooks if cache is None else EachLengthHooks
            length = kind(rotary, functions)
            patches.hooks.append((rotary_module.owner, length.before_forward, length.after_forward))
    if patches.by_length and cache is None:
        patches.overrides += request_patches(model)
    patches.overrides += batching_patches(model, method if patches.by_length else None)
    if cache is not None:
        patches.then.append(partial(raw_key_patches, model, applied))
    return patches


def _bound(
    rotary_module: RotaryModule, layer_type: str | None, applied: Applied
) -> tuple[Callable[..., RopeFreqs], bool]:
    """Return a method bound to its parameters, and if it takes a length yet."""
    own, dim = applied.own, rotary_module.dim(layer_type)
    if not isinstance(own, RopeFreqs):
        values = values_of(rotary_module, layer_type)
        return bind_method("extend", applied.method, applied.parameters, values)
    if tuple(own.inv_freq.shape) != (dim // 2,):
        raise ValueError(
            f"extend: RopeFreqs must have inv_freq ({dim // 2},) for the {dim} dims that "
            f"{type(rotary_module.owner).__name__} rotates, got {tuple(own.inv_freq.shape)}"
        )
    return lambda: own, False


def values_of(rotary_module: RotaryModule, layer_type: str | None) -> ModelValues:
    """Return the model's values for the rotation of one kind of layers."""
    parameters = rotary_module.parameters(layer_type)
    config, dim = rotary_module.module.config, rotary_module.dim(layer_type)
    unrotated = 0
    if parameters.get("rope_type") == "proportional":
        unrotated = int((attribute_of(rotary_module.module, layer_type, "inv_freq") == 0).sum())
    values = model_values(config, layer_type, parameters, dim, unrotated)
    if rotary_module.learned:  # in a training up to the longest length
        over = rotary_module.own_freqs(layer_type).to("cpu")
        trained = {"original_max_position_embeddings": config.max_position_embeddings, "over": over}
        values = replace(values, trained=trained)
    return values


class Row(NamedTuple):
    """Tokens of the shortest and the longest of the sequences that are packed into a row."""

    shortest: int
    longest: int


def _rows_of(arguments: Mapping[str, Any], past: int, shape: Sequence[int]) -> list[Row]:
    """Return the tokens of a forward's rows, with those in the cache and without padding.

    shape: (batch, new). Without a mask or positions all rows have the same.
    """
    mask, positions = arguments.get("attention_mask"), arguments.get("position_ids")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or torch.compiler.is_compiling():
        mask = None  # a graph does not read it
    if positions is None:
        lengths = [past + shape[1]] if mask is None else mask.sum(-1).tolist()
        return [Row(length, length) for length in map(int, lengths)]
    if positions.dim() == 3 or torch.compiler.is_compiling():
        longest = int(positions.max()) + 1
        return [Row(longest, longest)]
    positions = positions.expand(*shape)
    if mask is not None:
        real = mask[:, past : past + shape[1]].bool()
        positions = positions.masked_fill(~real, -1)
    # A sequence ends where the next position is not larger. Padding without a mask is at 0 or 1.
    ends = nn.functional.pad(positions[:, 1:] <= positions[:, :-1], (0, 1), value=True)
    longest = positions.amax(-1)
    shortest = torch.where(ends & (positions > 1), positions, longest[:, None]).amin(-1)
    return [Row(*row) for row in (torch.stack((shortest, longest), 1) + 1).tolist()]


class LengthHooks:
    """Hooks that choose a `RotaryForward`'s frequencies at the start of its owner's forwards."""

    def __init__(
        self, rotary: RotaryForward, methods: dict[str | None, Callable[..., RopeFreqs]]
    ) -> None:
        self.rotary = rotary
        self.methods = methods
        self.key = uuid.uuid4().hex  # equal in copies of the model, which may continue its caches
        self.warned = False

    def before_forward(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Set the frequencies of this forward's request: hook before it."""
        cache = cache_of(arguments)
        # One graph serves requests of any length, so it does not look at texts of theirs.
        known = torch.compiler.is_compiling() and cache is not None and self.key in on_cache(cache)
        frozen = self._frozen(arguments, cache)
        self.rotary.freqs.update(frozen.freqs)
        if not known:
            self.rotary.thread_freqs.fingerprints.update(frozen.fingerprints)
        if cache is not None:
            self._attach(cache, frozen)

    def after_forward(self, module: nn.Module, output: Any) -> None:
        """Mark the cache that the forward made: hook after it."""
        for cache in caches_in(output):
            if self.key not in on_cache(cache):
                told = dict(self.rotary.thread_freqs.fingerprints)
                self._attach(cache, Frozen(dict(self.rotary.freqs), told, tokens_in(cache)))

    def _frozen(self, arguments: Mapping[str, Any], cache: Any) -> Frozen:
        of_cache = None if cache is None else on_cache(cache).get(self.key)
        if torch.compiler.is_compiling() and of_cache:
            return of_cache  # a graph of a step: its prompt has chosen
        request = getattr(in_progress, "request", None)
        chosen = {} if request is None else request.frozen
        if self.key not in chosen:
            past = tokens_in(cache)
            if past and of_cache is not None:
                chosen[self.key] = of_cache
                if request is not None and not request.drafts and not self.warned:
                    self._warn_of_second(of_cache, self._rows(arguments, past, request))
            else:
                rows = self._rows(arguments, past, request)
                freqs, device = self._of_rows(rows), tokens_of(arguments).device
                chosen[self.key] = Frozen(
                    {kind: each.to(device) for kind, each in freqs.items()},
                    {kind: fingerprint(each) for kind, each in freqs.items()},
                    max(row.longest for row in rows),
                )
        return chosen[self.key]

    def _warn_of_second(self, first: Frozen, rows: Sequence[Row]) -> None:
        """Warn of a request on a filled cache, if its frequencies would be others by its length."""
        longest = max(row.longest for row in rows)
        if any(
            each(seq_len=longest) != each(seq_len=first.longest) for each in self.methods.values()
        ):
            self.warned = True
            warnings.warn(
                f"extend: a cache that is used again keeps the frequencies of its first request: "
                f"{self.rotary.method} chose them for {first.longest:,} tokens, this request may "
                f"reach {longest:,}. Give a seq_len, or begin with an empty cache",
                stacklevel=2,
            )

    def _of_rows(self, rows: Sequence[Row]) -> FreqsByKind:
        """Return the frequencies of a batch; those of each row, if they differ and the op rotates.

        Raises ValueError if one set of frequencies cannot serve them.
        """
        lengths = dict.fromkeys(length for row in rows for length in row)
        freqs: FreqsByKind = {}
        for kind, method in self.methods.items():
            of_length = {length: method(seq_len=length) for length in lengths}
            first, *others = of_length.values()
            if all(each == first for each in others):
                freqs[kind] = first
                continue
            of_rows = [of_length[row.longest] for row in rows]
            if (
                any(of_length[row.shortest] != of_length[row.longest] for row in rows)
                or any(each.attention_factor != first.attention_factor for each in others)
                or self.rotary.fused is None
                # A score method's rows share theirs.
                or vars(self.rotary.module).get("forward") is not self.rotary
            ):
                raise ValueError(
                    f"extend: {self.rotary.method} must have rows and packed sequences of one "
                    f"length in a batch, got {min(lengths)} and {max(lengths)} tokens, whose "
                    "frequencies differ; give it a seq_len, or batch equal lengths"
                )
            stacked = torch.stack([each.inv_freq for each in of_rows])
            freqs[kind] = replace(first, inv_freq=stacked)
        return freqs

    def _rows(self, arguments: Mapping[str, Any], past: int, request: Request | None) -> list[Row]:
        """Return the tokens that each row will reach, as known in its first forward.

        past: tokens in the cache. request: the call of `generate`, if it is one.
        """
        batch, new = tokens_of(arguments).shape[:2]
        length, limit = past + new, 0 if request is None else request.limit
        if self.rotary.shared is not None:
            rows = [Row(length * self.rotary.shared.size, length * self.rotary.shared.size)]
        elif request is not None and request.pads and batch % len(request.pads) == 0:
            each = batch // len(request.pads)  # beams of a prompt stand together
            ends = [max(length, limit) - pads for pads in request.pads for _ in range(each)]
            rows = [Row(end, end) for end in ends]
        else:  # read on the host, once a request
            more = max(length, limit) - length
            rows = [
                Row(row.shortest + more, row.longest + more)
                for row in _rows_of(arguments, past, (batch, new))
            ]
        return [Row(max(row.shortest, 1), max(row.longest, 1)) for row in rows]

    def _attach(self, cache: Any, frozen: Frozen) -> None:
        on_cache(cache)[self.key] = frozen


class EachLengthHooks(LengthHooks):
    """Hooks that choose frequencies for every forward anew, by its number of tokens."""

    def _frozen(self, arguments: Mapping[str, Any], cache: Any) -> Frozen:
        if torch.compiler.is_compiling():
            raise ValueError(
                f"extend: a model under {self.rotary.method} with cache='raw' cannot be compiled, "
                "as its frequencies change from step to step"
            )
        freqs = self._of_rows(self._rows(arguments, tokens_in(cache), None))
        device = tokens_of(arguments).device
        return Frozen({kind: each.to(device) for kind, each in freqs.items()}, {}, 0)

    def _attach(self, cache: Any, frozen: Frozen) -> None:
        """Do nothing: a cache of raw keys fits any frequencies."""


# DeepSeek's temperature. Latent attention rotates some dims of a head, but YaRN scales the logits
# of all. So the layers multiply their softmax scale by mscale^2, which they read from the
# configuration when they are built. Other frequencies bring their own factor. Such layers are known
# by functions of their modules: transformers 5.25 has the first alone, older ones the second.
_MSCALE = {"yarn_apply_mscale", "yarn_get_mscale"}
_MSCALE_IN_FORCE = "_extrope_mscale"


def _softmax_scales(rotary_module: RotaryModule, applied: Applied) -> list[Override]:
    """Return the overrides of the layers' `scaling`; none if the model has no such layers."""
    method, kind = applied.method, rotary_module.layer_types[0]
    config, parameters = rotary_module.parameters(kind), {"rope_type": "default"}
    if "mscale_all_dim" in PARAMETERS.get(method, ()):
        own = values_of(rotary_module, kind).yarn
        parameters = {"rope_type": method, **own, **applied.parameters}
    overrides: list[Override] = []
    for layer in rotary_module.owner.modules():
        forward = forward_of(layer) if hasattr(layer, "scaling") else None
        if forward is not None and not _MSCALE.isdisjoint(forward.__globals__):
            if parameters.get("mscale_all_dim") and "factor" not in parameters:
                raise ValueError(
                    f"extend: mscale_all_dim must be 0 for {method} of {type(layer).__name__}, "
                    "whose softmax scale cannot follow the length, got "
                    f"{parameters['mscale_all_dim']}"
                )
            in_force = getattr(layer, _MSCALE_IN_FORCE, config)
            ratio = _mscale(parameters) / _mscale(in_force)
            overrides.append((layer, "scaling", layer.scaling * ratio))
            overrides.append((layer, _MSCALE_IN_FORCE, parameters))
    return overrides


def _mscale(parameters: Mapping[str, Any]) -> float:
    """Return a layer's factor on its softmax scale."""
    mscale = parameters.get("mscale_all_dim")
    if parameters.get("rope_type", "default") == "default" or not mscale:
        return 1.0
    return yarn_temperature(parameters["factor"], mscale) ** 2
