"""Methods that depend on the length of the sequence: frozen per request.

Keys are cached after rotation, so every token of a request must be rotated by the same frequencies.
A request starts with a forward whose cache is empty or absent, and with every call of `generate`
that does not continue a filled cache. Its frequencies are chosen then, for the length that it will
reach, and stay with its cache: with copies of it too, and unaffected by requests in between.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ... import RopeFreqs
from .rotary import FusedRotary

_ON_CACHE = "_extrope_freqs"


@dataclass
class _GenerateCall:
    length: int
    freqs: dict[str, RopeFreqs] = field(default_factory=dict)


_current_call: ContextVar[_GenerateCall | None] = ContextVar("extrope_generate", default=None)


class LengthDependence:
    """Chooses a `FusedRotary`'s frequencies at the start of its owner's forwards, through hooks."""

    def __init__(
        self,
        owner: nn.Module,
        fused: FusedRotary,
        layer_type: str | None,
        method: Callable[..., RopeFreqs],
    ) -> None:
        self.fused = fused
        self.layer_type = layer_type
        self.method = method
        self.key = uuid.uuid4().hex  # equal in copies of the model, which may continue its caches
        self.argument_names = list(inspect.signature(type(owner).forward).parameters)[1:]

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: set the frequencies of the request that this forward belongs to."""
        arguments = dict(zip(self.argument_names, args, strict=False)) | kwargs
        cache = arguments.get("cache")
        cache = arguments.get("past_key_values") if cache is None else cache
        freqs = self._freqs(arguments, cache)
        self.fused.freqs[self.layer_type] = freqs
        if cache is not None:
            self._attach(cache, freqs)

    def after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook: mark the cache that the forward made."""
        for value in output.values() if isinstance(output, Mapping) else output:
            if hasattr(value, "get_seq_length"):
                self._attach(value, self.fused.freqs[self.layer_type])

    def _freqs(self, arguments: Mapping[str, Any], cache: Any) -> RopeFreqs:
        call = _current_call.get()
        if call is not None and self.key in call.freqs:
            return call.freqs[self.key]
        past = 0 if cache is None else int(cache.get_seq_length())
        freqs = getattr(cache, _ON_CACHE, {}).get(self.key) if past else None
        if freqs is None:
            tokens = arguments.get("input_ids")
            tokens = arguments.get("inputs_embeds") if tokens is None else tokens
            length = past + tokens.shape[1]
            positions = arguments.get("position_ids")
            if call is not None:
                length = max(length, call.length)
            elif positions is not None:
                length = int(positions.max()) + 1  # read on the host, once a request
            freqs = self.method(seq_len=length).to(tokens.device)
        if call is not None:
            call.freqs[self.key] = freqs
        return freqs

    def _attach(self, cache: Any, freqs: RopeFreqs) -> None:
        if not hasattr(cache, _ON_CACHE):
            setattr(cache, _ON_CACHE, {})
        getattr(cache, _ON_CACHE)[self.key] = freqs


class OneRequest:
    """Stands in for a model's `generate`: each call is one request, whatever forwards it makes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.previous = vars(model).get("generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _current_call.set(_GenerateCall(self._length(*args, **kwargs)))
        try:
            if self.previous is not None:
                return self.previous(*args, **kwargs)
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            _current_call.reset(token)

    def _length(self, inputs: Any = None, generation_config: Any = None, *_: Any, **kwargs) -> int:
        """Return the tokens that the call may reach; those of the prompt if it sets no limit."""
        prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        prompt = next((x.shape[1] for x in prompts if x is not None), 1)
        defaults = getattr(self.model, "generation_config", None)

        def limit(name: str) -> int | None:
            if name in kwargs:
                return kwargs[name]
            values = (getattr(config, name, None) for config in (generation_config, defaults))
            return next((value for value in values if value is not None), None)

        if (new_tokens := limit("max_new_tokens")) is not None:
            return prompt + new_tokens
        return max(prompt, limit("max_length") or 0)
