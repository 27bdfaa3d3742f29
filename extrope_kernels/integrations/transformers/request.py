"""What a call of `extend` asks for: a method with its parameters, or a length that chooses them."""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ... import RopeFreqs
from ..._checks import check_length
from ..._names import meant, not_among
from ..._rope_types import ROPE_TYPES, rope_type
from ...methods import METHODS, stray
from ...scores import SCORES, Score
from .._shared.choice import FARTHEST, MEASURED, Choice, choose_method, times
from .._shared.parameters import PARAMETERS, is_bounded, lengths_in, score_values_in, window_of
from .._shared.saved import STRETCHING
from .model import BOUNDED
from .patches import ON_OWNER, Applied
from .rotary import RotaryModule, find_rotary_modules
from .rotation import RotaryForward
from .saved import describe
from .scores import why_no_images

_TRAINED = "original_max_position_embeddings"


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
    if isinstance(method, str) and method in ROPE_TYPES:
        method = ROPE_TYPES[method].method
    if not isinstance(method, str):
        raise TypeError(
            "extend: method must be a name, with the method's parameters beside it, as in "
            "extend(model, 'yarn', factor=4.0), a Score or a RopeFreqs, "
            f"got {type(method).__name__}"
        )
    if method not in PARAMETERS:
        raise ValueError(f"extend: {not_among('method', method, PARAMETERS)}")
    if length is None:
        if method == "rerope" and "window" not in given:
            raise ValueError(f"extend: rerope needs {_windows(model, layers)} or length=")
        known = set(given) <= set(PARAMETERS[method])
        if _needs_factor(method) and "factor" not in given and known:
            raise ValueError(f"extend: {method} needs factor= or length=, got neither")
        return method, dict(given), None
    by_window = method == "rerope" and "window" not in given
    if not by_window and not _needs_factor(method):
        example = next(f"{name}=" for name in PARAMETERS[method] if name != "dim")
        raise ValueError(
            "extend: length must go without a method, or with one whose factor is the length over "
            f"the trained one (yarn), got {method}; give its own parameters ({example} ...)"
        )
    if "factor" in given and not by_window:
        raise ValueError(f"extend: factor or length must be given for {method}, got both")
    rotary_modules = find_rotary_modules(model, layers)
    _warn_of_strays(rotary_modules[0])
    trained, reach = _lengths(rotary_modules, length, given)
    if by_window:
        return method, {**given, "window": max(1, reach // 2)}, None
    return method, {**given, "factor": max(1.0, length / trained)}, None


def as_tokens(length: int | str | None) -> int | None:
    """Return a length in tokens; a text may say it as on the command line, "16k"."""
    if not isinstance(length, str):
        return length
    import extrope_cli

    try:
        return extrope_cli.tokens(length)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"extend: length {error}") from None


def _windows(model: nn.Module, layers: str) -> str:
    """Return ReRoPE's window for a model, as an argument and in words."""
    reach = find_rotary_modules(model, layers)[0].reach
    if reach is None:
        return "window=, half the trained length,"
    return f"window={max(1, reach // 2)}, half of the {reach:,} tokens that the model reaches,"


def _needs_factor(method: str) -> bool:
    """Return True for a method that needs a factor, which a length can give."""
    names = inspect.signature(METHODS[method]).parameters if method in METHODS else {}
    factor = names.get("factor")
    return factor is not None and factor.default is factor.empty and "seq_len" not in names


def choose(
    model: nn.Module,
    length: int | None,
    layers: str,
    given: Mapping[str, Any],
    refused: str | None = None,
) -> tuple[Choice, str]:
    """Choose a method for `length` tokens, and the layers that it extends.

    given: parameters of the user; only the trained length may be among them.
    refused: why the model was refused a score method, if it was.

    Raises ValueError for an extended model, and one whose trained length is not known; TypeError
    without a length and for other parameters.
    """
    if length is None:
        name = next(iter(given), "neither")
        raise TypeError(
            f"extend: method or length must be given, got {name}{meant(name, ('method', 'length'))}"
        )
    if unknown := [name for name in given if name != _TRAINED]:
        raise TypeError(f"extend: {unknown[0]} needs a method that has it, got none")
    rotary_modules = find_rotary_modules(model, "all")
    if (applied := vars(rotary_modules[0].owner).get(ON_OWNER)) is not None:
        raise ValueError(
            "extend: length alone must be for a model that is not extended, got one extended by "
            f"{applied.method}; restore that one first, or name the method"
        )
    if refused is None:
        _warn_of_strays(rotary_modules[0])
    trained, reach = _lengths(rotary_modules, length, given)
    config = rotary_modules[0].module.config
    chunks = {"chunk_size", "local_window"} <= set(score_values_in(config, "dual_chunk"))
    first_try, refused = refused is None, refused or why_no_images(model, rotary_modules)
    kinds = [kind for each in rotary_modules for kind in each.layer_types]
    # Phi-3's window is longer than its training: distances within it are not all trained.
    trained_within = (getattr(config, "sliding_window", None) or 0) < reach
    bounded = (refused or "").startswith(BOUNDED) and trained_within
    if bounded or all(is_bounded(kind or "") for kind in kinds):
        return _as_it_is(rotary_modules, BOUNDED), "all"
    choice = choose_method(length, trained, reach, refused=refused, chunks=chunks)
    if first_try and length > FARTHEST * reach:
        warnings.warn(
            f"extend: length {length:,} is {times(length, reach)} times the {reach:,} tokens that "
            f"the model reaches; methods are measured at up to {MEASURED} times",
            stacklevel=4,  # of the caller of `extend`
        )
    if choice is None:
        reason = f"{length:,} tokens are within the {reach:,} that the model reaches"
        return _as_it_is(rotary_modules, reason), layers
    if choice.method in METHODS:
        choice = replace(choice, parameters={**given, **choice.parameters})
    return choice, layers


def _as_it_is(rotary_modules: list[RotaryModule], reason: str) -> Choice:
    """Choose the rotation that the configuration states, which changes nothing."""
    return Choice(*_as_stated(rotary_modules), reason, changes=False)


def _as_stated(rotary_modules: list[RotaryModule]) -> tuple[str, dict[str, Any]]:
    """Return the method and the parameters that the configuration states.

    Those of the layers that see all keys, else of the first ones.
    """
    kinds = rotary_modules[0].layer_types
    widest = next((kind for kind in kinds if not is_bounded(kind or "")), kinds[0])
    stated = rotary_modules[0].parameters(widest)
    of_type = rope_type(stated.get("rope_type"))
    # `rope` leaves a scaling of the training in force, HunYuan's dynamic one with an alpha too.
    in_force = not of_type.by_length and of_type.scaling != "replaced"
    method = "rope" if in_force or stated.get("alpha") is not None else of_type.method
    names = inspect.signature(METHODS[method]).parameters
    return method, {name: stated[name] for name in names if stated.get(name) is not None}


def _lengths(
    rotary_modules: list[RotaryModule], length: int, given: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the trained length and the one that the model reaches as it is; check `length`."""
    check_length("extend", "length", length)
    first = rotary_modules[0]
    known = lengths_in(first.module.config)
    trained, reach = (None, None) if known is None else (known.trained, known.reach)
    if first.learned:  # with its scaling, as `values_of` has it
        trained = reach
    if (told := given.get(_TRAINED)) is not None:
        trained = reach = check_length("extend", _TRAINED, told)
    if trained is None or reach is None:
        raise ValueError(
            f"extend: {_TRAINED} must be given with length for {type(first.owner).__name__}, "
            "whose configuration has no trained length"
        )
    if length <= trained:
        warnings.warn(
            f"extend: the model was trained to {trained:,} tokens, which length {length:,} does "
            "not exceed",
            stacklevel=5,  # of the caller of `extend`
        )
    return trained, reach


def _warn_of_strays(rotary_module: RotaryModule) -> None:
    """Warn of rope parameters that nothing reads: a length beside them may not be the trained."""
    by_kind = None not in rotary_module.layer_types
    if names := stray(rotary_module.module.config, by_kind):
        kinds = "of its kinds of layers" if by_kind else "that all layers share"
        warnings.warn(
            f"extend: rope_parameters has {', '.join(names)}, which the model does not read: it "
            f"reads those {kinds}. If max_position_embeddings is not the length it was trained to, "
            f"give {_TRAINED}=",
            stacklevel=5,  # of the caller of `extend`
        )


def with_stated(rotary_modules: list[RotaryModule], asked: Applied) -> Applied:
    """Give LongRoPE the factors that the configuration states."""
    if asked.method != "longrope" or asked.own or "short_factor" in asked.parameters:
        return asked
    method, stated = _as_stated(rotary_modules)
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
    if any(rope_type(each.get("rope_type")).by_length for each in kinds):
        return _as_stated(rotary_modules)
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
    window = window_of(method, given) if applied.own is None else None
    if window is None:
        return
    name, size = window
    first, before = rotary_modules[0], applied.before
    longest = first.reach if before is None else describe(first.owner, before).length
    if longest is not None and size >= longest:
        _warn(
            f"{name} {size:,} of {method} leaves nothing extended: the model reaches "
            f"{longest:,} tokens"
        )


def _warn(text: str) -> None:
    warnings.warn(f"extend: {text}", stacklevel=6)  # of the caller of `extend`
