"""Check options before anything slow begins, and choose the parameters of methods."""

from __future__ import annotations

import inspect
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._names import meant, not_among
from .._usage import UsageError
from ..integrations._shared.parameters import PARAMETERS, plain
from ..integrations._shared.saved import Saved, SavedFolder, find
from ..integrations.transformers.extend import extend, extend_by_all
from ..integrations.transformers.handle import Extension
from ..methods import METHODS
from ..scores import SCORES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = ("float32", "bfloat16")
AUTO = "auto"  # the method that `extend` chooses for a length
AS_SAVED = "saved"  # the extensions that the model's folder was saved with


def method_params(
    method: str,
    length: int,
    reach: int,
    trained: int | None = None,
    given: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a method's parameters for a text of `length` tokens: the given ones, and defaults.

    A method that requires a factor gets length / trained, at least 1. `_score_params` has the
    defaults of score methods, from reach. Other parameters, such as `base`, come from the model.

    reach, trained: as of `methods.lengths`; without a scaling they are equal.
    """
    given = dict(given or {})
    if method == AS_SAVED:
        return given
    if method in SCORES:
        return _score_params(method, length, reach, given) | given
    parameters = inspect.signature(METHODS[method]).parameters
    factor = parameters.get("factor")
    if factor is None or factor.default is not factor.empty:
        return given
    return {"factor": max(1.0, length / (trained or reach))} | given


def _score_params(method: str, length: int, trained: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return default parameters of a score method for a text of `length` tokens.

    window: half the training length; on SmolLM2 it cost less than three quarters
        (docs/guide/measured.md). factor: 16, as in Leaky ReRoPE's code
        (https://github.com/bojone/rerope). chunk_size, local_window: 3/4 and 1/8 of the training
        length, as in ChunkLlama. block_size: the training length, as in LEX. string: a shift of a
        third of the training length, and a window of 128, or 1/16 of a shorter training length.
    """
    if method == "self_extend":
        return _groups(length, trained, given)
    usual = {
        "window": max(1, trained // 2),
        "factor": 16.0,
        "chunk_size": max(1, 3 * trained // 4),
        "local_window": trained // 8,
        "block_size": max(2, trained // 2 * 2),
        "shift": max(1, trained // 3),
    }
    if method == "string":
        usual["window"] = min(128, trained // 16)
    parameters = inspect.signature(SCORES[method]).parameters
    return {n: usual[n] for n, p in parameters.items() if p.default is p.empty and n in usual}


def _groups(length: int, trained: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return a window of a quarter of the training length, and a group by SelfExtend's authors.

    Their group is the smallest that keeps the largest relative position below two thirds of the
    training length. The window is rounded down to a multiple of it.
    """
    window = given.get("window")
    if type(window) is not int or window < 1:  # the method refuses it
        window = max(1, trained // 4)
    room = max(1, 2 * trained // 3 - window)
    group = 1 if length <= trained else min(window, math.ceil((length - window) / room))
    group = given.get("factor", group)
    fits = isinstance(group, int) and 0 < group <= window
    return {"window": window // group * group if fits else window, "factor": group}


def saved_folder(*models: Any) -> SavedFolder | None:
    """Return how the first of the folders that was saved as extended was; raises UsageError."""
    try:
        found = (find(each) for each in models if isinstance(each, str | os.PathLike))
        return next((each for each in found if each is not None), None)
    except ValueError as error:
        raise UsageError(str(error)) from error


def extended(model: PreTrainedModel, method: str, params: Mapping[str, Any]) -> Extension:
    """Extend a model by the method of a row, with the row's parameters."""
    if method == AS_SAVED:
        return extend_by_all(model, [Saved(**each) for each in params["extensions"]])
    return extend(model, method, **params)


def refusal(model: PreTrainedModel, method: str, params: Mapping[str, Any]) -> str | None:
    """Return why a model cannot be extended by the method of a row; None if it can."""
    try:
        extended(model, method, params).restore()
    except (ValueError, TypeError, NotImplementedError) as error:
        return str(error)
    return None


def chosen(model: PreTrainedModel, length: int) -> tuple[str, dict[str, Any]]:
    """Return the method that `extend` chooses for a length, with its parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths within the training are read for comparison
        try:
            with extend(model, length=length) as handle:
                return handle.method, dict(handle.applied.parameters)
        except ValueError as error:
            raise UsageError(str(error)) from error


def check_methods(
    methods: str | Iterable[str] | Mapping[str, Mapping[str, Any]] | None,
    saved: SavedFolder | None,
) -> dict[str, dict[str, Any]]:
    """Return the given parameters of each method; raises UsageError if one is unknown.

    methods: `AS_SAVED` if None. saved: how the model's folder was saved as extended.
    """
    if methods is None and saved is None:
        raise UsageError("methods must be named for a model that was not saved as extended")
    if methods is None:
        methods = AS_SAVED
    if isinstance(methods, str):
        methods = [methods]
    named = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    if not named:
        raise UsageError("methods must list at least one")
    for name in named:
        if name not in (*PARAMETERS, AUTO, AS_SAVED):
            raise UsageError(not_among("method", name, (*PARAMETERS, AUTO, AS_SAVED)))
    for method, given in named.items():
        known = [key for key in PARAMETERS.get(method, ()) if key != "dim"]
        if wrong := [name for name in given if name not in known]:
            listed = ", ".join(known) or "none"
            hint = meant(wrong[0], known)
            raise UsageError(f"{method} has no {wrong[0]}{hint}; it has {listed}")
    found = {
        method: {name: plain(value) for name, value in given.items()}
        for method, given in named.items()
    }
    if AS_SAVED in found:
        if saved is None:
            raise UsageError(f"{AS_SAVED} needs a model's folder that was saved as extended")
        found[AS_SAVED] = {"extensions": [asdict(each) for each in saved.extensions]}
    return found


def check_lengths(lengths: int | Iterable[int]) -> list[int]:
    """Return the lengths, rising; raises UsageError for one that is none."""
    wanted = {lengths} if isinstance(lengths, int) else set(lengths)
    if wrong := [n for n in wanted or {None} if type(n) is not int or n < 2]:
        raise UsageError(f"lengths must be whole numbers of tokens >= 2, got {wrong[0]}")
    return sorted(wanted)


def check_positive(**given: int) -> None:
    """Raise UsageError for a count that is no whole number from 1 on."""
    for name, value in given.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} must be >= 1, got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError if an option has none of its choices."""
    if value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_out(path: Path) -> Path:
    """Return the output folder, made if it is missing; raises UsageError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UsageError(f"out {path}: cannot write there: {error.strerror}") from error
    return path
