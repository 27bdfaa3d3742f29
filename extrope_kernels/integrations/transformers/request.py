"""What a call of `extend` asks for: a method by its name, or a Score or RopeFreqs of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ... import RopeFreqs
from ..._names import meant
from ...scores import SCORES, Score
from .._shared.choice import Choice
from .._shared.parameters import PARAMETERS, lengths_in
from .length import as_stated, choose, factor_for, needs_factor, window_for
from .patch.hooks import Applied
from .patch.rotation import RotaryForward
from .probe.rotary import RotaryModule
from .saved import STRETCHING, describe

_BY_LENGTH = ("dynamic", "longrope")  # rope types whose frequencies follow the length


def read_method(
    model: nn.Module,
    method: str | Score | RopeFreqs,
    length: int | None,
    layers: str,
    given: Mapping[str, Any],
) -> tuple[str, dict[str, Any], Score | RopeFreqs | None]:
    """Return a method's name, its parameters, and the Score or RopeFreqs if it is the user's own.

    length: stands in place of a factor, or of ReRoPE's window.
    Raises TypeError or ValueError for what is no method, and for a length or parameters that do not
    go with it.
    """
    if isinstance(method, Score | RopeFreqs):
        name = method.name if isinstance(method, Score) else type(method).__name__
        takes = {"log_n"} if isinstance(method, Score) else set()
        if wrong := [*(given.keys() - takes), *(() if length is None else ("length",))]:
            raise TypeError(f"extend: {wrong[0]} must be left out with a {type(method).__name__}")
        return name, dict(given), method
    if not isinstance(method, str):
        raise TypeError(
            "extend: method must be a name, with the method's parameters beside it, as in "
            "extend(model, 'yarn', factor=4.0), a Score or a RopeFreqs, "
            f"got {type(method).__name__}"
        )
    if method not in PARAMETERS:
        raise ValueError(
            f"extend: method must be one of {', '.join(PARAMETERS)}, got {method!r}"
            f"{meant(method, PARAMETERS)}"
        )
    if length is not None:
        if method == "rerope" and "window" not in given:
            return method, {**given, "window": window_for(model, length, layers)}, None
        return method, {**given, "factor": factor_for(model, method, length, layers, given)}, None
    if needs_factor(method) and "factor" not in given and set(given) <= set(PARAMETERS[method]):
        raise ValueError(f"extend: {method} needs factor= or length=, got neither")
    return method, dict(given), None


def choose_method(
    model: nn.Module,
    length: int | None,
    layers: str,
    given: Mapping[str, Any],
    refused: str | None = None,
) -> tuple[Choice, str]:
    """Choose a method for `length` tokens, and the layers that it extends; as `length.choose`."""
    if length is None:
        name = next(iter(given), "neither")
        raise TypeError(
            f"extend: method or length must be given, got {name}{meant(name, ('method', 'length'))}"
        )
    return choose(model, length, layers, given, refused)


def with_stated(rotary_modules: list[RotaryModule], asked: Applied) -> Applied:
    """Give LongRoPE the factors that the configuration states."""
    if asked.method != "longrope" or asked.own or "short_factor" in asked.parameters:
        return asked
    method, stated = as_stated(rotary_modules)
    return replace(asked, parameters=stated | asked.parameters) if method == "longrope" else asked


def by_length_as_stated(
    rotary_modules: list[RotaryModule],
) -> tuple[str, dict[str, Any]] | None:
    """Return the method that a configuration states, if its frequencies follow the length.

    None for others, and for a model that is extended.
    """
    for each in rotary_modules:
        if isinstance(vars(each.module).get("forward"), RotaryForward):
            return None
    kinds = [each.parameters(kind) for each in rotary_modules for kind in each.layer_types]
    if any(each.get("rope_type") in _BY_LENGTH for each in kinds):
        return as_stated(rotary_modules)
    return None


def why_no_region(applied: Applied) -> str:
    """Return why an extension is wrong in a region of `context_parallel`; "" if it is not."""
    if applied.is_score:
        return f"{applied.method} does not attend by PyTorch's function"
    if "seq_len" in PARAMETERS.get(applied.method, ()):
        return f"{applied.method} would take the length of a rank's tokens for the sequence's"
    return ""


def warn_of_nothing(rotary_modules: list[RotaryModule], applied: Applied) -> None:
    """Warn of arguments that leave nothing extended, or shorten what a model reads."""
    method, given = applied.method, applied.parameters
    factor = given.get("factor")
    if method in STRETCHING and isinstance(factor, int | float):
        if factor == 1 and method != "longrope":  # whose other factors may stretch
            _warn(f"factor 1 of {method} leaves nothing extended")
        elif 0 < factor < 1 and method not in SCORES:  # Leaky ReRoPE's is InvLeaky
            _warn(f"factor {factor:g} of {method} is below 1: it shortens what a model reads")
    name = {"dual_chunk": "chunk_size", "string": ""}.get(method, "window")
    size = given.get(name) if applied.own is None and applied.is_score else None
    longest = _reach(rotary_modules, applied) if isinstance(size, int) else None
    if longest is not None and size >= longest:
        _warn(
            f"{name} {size:,} of {method} leaves nothing extended: the model reaches "
            f"{longest:,} tokens"
        )


def _reach(rotary_modules: list[RotaryModule], applied: Applied) -> int | None:
    """Return the tokens that a model reached before an extension; None if that is not known."""
    if applied.before is not None:
        return describe(rotary_modules[0].owner, applied.before).length
    first = rotary_modules[0]
    known = lengths_in(first.module.config, first.layer_types[0])
    return None if known is None else known.reach


def _warn(text: str) -> None:
    warnings.warn(f"extend: {text}", stacklevel=6)  # of the caller of `extend`
