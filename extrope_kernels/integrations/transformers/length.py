"""The method and the factor for a length, where `extend` is told the length."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..._checks import check_length
from ...methods import METHODS
from .._shared.choice import Choice, choose_method
from .._shared.parameters import PARAMETERS, is_bounded, lengths_in, score_values_in
from .model import BOUNDED
from .patch.hooks import ON_OWNER
from .patch.scores import why_no_images
from .probe.rotary import RotaryModule, find_rotary_modules

_TRAINED = "original_max_position_embeddings"
# The methods of scalings that a model may state, besides those that `rope` leaves in force.
_STATED = {"yarn": "yarn", "dynamic": "dynamic_ntk", "longrope": "longrope", "su": "longrope"}


def choose(
    model: nn.Module,
    length: int,
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
    if unknown := [name for name in given if name != _TRAINED]:
        raise TypeError(f"extend: {unknown[0]} needs a method that has it, got none")
    rotary_modules = find_rotary_modules(model, "all")
    if (applied := vars(rotary_modules[0].owner).get(ON_OWNER)) is not None:
        raise ValueError(
            "extend: length alone must be for a model that is not extended, got one extended by "
            f"{applied.method}; restore that one first, or name the method"
        )
    trained, reach = _lengths(rotary_modules, length, given)
    config = rotary_modules[0].module.config
    chunks = {"chunk_size", "local_window"} <= set(score_values_in(config, "dual_chunk"))
    refused = refused or why_no_images(model, rotary_modules)
    kinds = [kind for each in rotary_modules for kind in each.layer_types]
    # Phi-3's window is longer than its training: distances within it are not all trained.
    trained_within = (getattr(config, "sliding_window", None) or 0) < reach
    bounded = (refused or "").startswith(BOUNDED) and trained_within
    if bounded or all(is_bounded(kind or "") for kind in kinds):
        return _as_it_is(rotary_modules, BOUNDED), "all"
    choice = choose_method(length, trained, reach, refused=refused, chunks=chunks)
    if choice is None:
        reason = f"{length:,} tokens are within the {reach:,} that the model reaches"
        return _as_it_is(rotary_modules, reason), layers
    if choice.method in METHODS:
        choice = replace(choice, parameters={**given, **choice.parameters})
    return choice, layers


def _as_it_is(rotary_modules: list[RotaryModule], reason: str) -> Choice:
    """Choose the rotation that the configuration states, which changes nothing."""
    return Choice(*as_stated(rotary_modules), f"as it is: {reason}")


def as_stated(rotary_modules: list[RotaryModule]) -> tuple[str, dict[str, Any]]:
    """Return the method and the parameters that the configuration states."""
    stated = _stated(rotary_modules)
    method = _STATED.get(stated.get("rope_type"), "rope")
    if stated.get("alpha") is not None:  # HunYuan's dynamic one, which does not follow the length
        method = "rope"
    names = inspect.signature(METHODS[method]).parameters
    return method, {name: stated[name] for name in names if stated.get(name) is not None}


def window_for(model: nn.Module, length: int, layers: str) -> int:
    """Return ReRoPE's window for `length` tokens: half of those that the model reaches."""
    _, reach = _lengths(find_rotary_modules(model, layers), length, {})
    return max(1, reach // 2)


def needs_factor(method: str) -> bool:
    """Return True for a method that needs a factor, which a length can give."""
    names = inspect.signature(METHODS[method]).parameters if method in METHODS else {}
    factor = names.get("factor")
    return factor is not None and factor.default is factor.empty and "seq_len" not in names


def factor_for(
    model: nn.Module, method: str, length: int, layers: str, given: Mapping[str, Any]
) -> float:
    """Return the factor by which a frequency method reaches `length` tokens.

    Raises ValueError if the method has no such factor, or `given` has it.
    """
    if not needs_factor(method):
        example = next(f"{name}=" for name in PARAMETERS[method] if name != "dim")
        raise ValueError(
            "extend: length must go without a method, or with one whose factor is the length over "
            f"the trained one (yarn), got {method}; give its own parameters ({example} ...)"
        )
    if "factor" in given:
        raise ValueError(f"extend: factor or length must be given for {method}, got both")
    rotary_modules = find_rotary_modules(model, layers)
    trained, _ = _lengths(rotary_modules, length, given)
    return max(1.0, length / trained)


def _lengths(
    rotary_modules: list[RotaryModule], length: int, given: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the trained length and the one that the model reaches as it is; check `length`."""
    check_length("extend", "length", length)
    first = rotary_modules[0]
    known = lengths_in(first.module.config, _widest(first))
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
            stacklevel=6,
        )
    return trained, reach


def _stated(rotary_modules: list[RotaryModule]) -> Mapping[str, Any]:
    """Return the rope_parameters of the layers that see all keys, else of the first ones."""
    return rotary_modules[0].parameters(_widest(rotary_modules[0]))


def _widest(rotary_module: RotaryModule) -> str | None:
    """Return the first kind of layers that sees all keys, else the first."""
    kinds = rotary_module.layer_types
    return next((kind for kind in kinds if not is_bounded(kind or "")), kinds[0])
