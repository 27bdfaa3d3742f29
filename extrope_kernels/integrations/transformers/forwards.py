"""The arguments and the results of forwards, whatever a model calls them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn


def argument_names(module: nn.Module) -> list[str]:
    """Return the names of a forward's arguments in their order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward by their names."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache given to a model, or None: its name has changed within version 5."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def tokens_of(arguments: Mapping[str, Any]) -> Tensor:
    """Return a model's tokens, (batch, seqlen) of ids or (batch, seqlen, hidden_size)."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def caches_in(output: Any) -> Iterator[Any]:
    """Yield the caches that a model returns."""
    for value in output.values() if isinstance(output, Mapping) else output:
        if hasattr(value, "get_seq_length"):
            yield value
