"""Methods that depend on the length of the sequence: frozen per request.

Keys are cached after rotation, so every token of a request must be rotated by the same frequencies.
A request starts with a forward whose cache is empty or absent, and with every call of `generate`
that does not continue a filled cache. Its frequencies are chosen then, for the length that it will
reach, and stay with its cache: with copies of it too, and unaffected by requests in between.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ... import RopeFreqs
from .architecture import RotarySite
from .forwards import argument_names, by_name, cache_of, caches_in, tokens_of
from .rotary import Rotary

Ladders = dict[str | None, RopeFreqs]  # by layer type

_ON_CACHE = "_extrope_freqs"
# Of the call of `generate` in progress: the tokens it may reach, and the frequencies it has chosen.
_current_call: ContextVar[tuple[int, dict[str, Ladders]] | None] = ContextVar(
    "extrope_generate", default=None
)


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

    def _freqs(self, arguments: Mapping[str, Any], cache: Any) -> Ladders:
        if torch.compiler.is_compiling() and (freqs := getattr(cache, _ON_CACHE, {}).get(self.key)):
            return freqs  # a graph of a step: the prompt has chosen
        limit, chosen = _current_call.get() or (None, {})
        if self.key in chosen:
            return chosen[self.key]
        past = 0 if cache is None else int(cache.get_seq_length())
        freqs = getattr(cache, _ON_CACHE, {}).get(self.key) if past else None
        if freqs is None:
            tokens, shared = tokens_of(arguments), self.rotary.shared
            length = past + tokens.shape[1]
            positions = arguments.get("position_ids")
            if shared is not None:
                length *= shared.size
            elif limit is not None:
                length = max(length, limit)
            elif positions is not None:
                length = int(positions.max()) + 1  # read on the host, once a request
            freqs = {
                layer_type: method(seq_len=length).to(tokens.device)
                for layer_type, method in self.methods.items()
            }
        chosen[self.key] = freqs
        return freqs

    def _attach(self, cache: Any, freqs: Ladders) -> None:
        if not hasattr(cache, _ON_CACHE):
            setattr(cache, _ON_CACHE, {})
        getattr(cache, _ON_CACHE)[self.key] = freqs


def generate_one_request(
    model: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any
) -> Any:
    """Stand in for `model.generate`: each call is one request, whatever forwards it makes.

    previous: what stood in for it before, if anything did.
    """
    token = _current_call.set((_length(model, *args, **kwargs), {}))
    try:
        if previous is not None:
            return previous(*args, **kwargs)
        return type(model).generate(model, *args, **kwargs)
    finally:
        _current_call.reset(token)


def _length(
    model: nn.Module, inputs: Any = None, generation_config: Any = None, *_: Any, **kwargs: Any
) -> int:
    """Return the tokens that the call may reach; those of the prompt if it sets no limit."""
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
