"""Check options before anything slow begins, and choose defaults."""

from __future__ import annotations

import importlib.util
import inspect
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..integrations.transformers import PARAMETERS
from ..methods import METHODS
from ..scores import SCORES
from . import UsageError


@dataclass(frozen=True)
class Plan:
    """The runs: every method at every length, a row of the table each.

    lengths: tokens of each run, rising.
    params: the user's parameters of each method.
    factor: the user's factor for all frequency methods; None for length / training length.
    window: the user's window for the score methods; None for the default of each.
    """

    methods: list[str]
    lengths: list[int]
    params: dict[str, dict[str, Any]] = field(default_factory=dict)
    factor: float | None = None
    window: int | None = None

    def method_params(
        self, method: str, length: int, training_length: int, unscaled: int | None = None
    ) -> dict[str, Any]:
        """Return the parameters of a run; others, such as `base`, come from the model.

        A method that requires a factor gets length / training_length, at least 1. If it replaces a
        scaling of the model's configuration, it gets length / unscaled. A method with a default
        factor keeps that unless the user gives one. `_score_defaults` has the rest.

        unscaled: as from `models.unscaled_length`; training_length if None.
        """
        given = self.params.get(method, {})
        if method not in METHODS:
            window = given.get("window", self.window)
            return _score_defaults(method, length, training_length, window, given) | given
        parameters = inspect.signature(METHODS[method]).parameters
        parameter = parameters.get("factor")
        chosen: dict[str, Any] = {}
        if parameter is not None and self.factor is not None:
            chosen["factor"] = self.factor
        elif parameter is not None and parameter.default is inspect.Parameter.empty:
            # dynamic_ntk counts from max_position_embeddings, even if the model scales.
            of_config = unscaled is None or "max_position_embeddings" in parameters
            chosen["factor"] = max(1.0, length / (training_length if of_config else unscaled))
        return chosen | given


def _score_defaults(
    method: str, length: int, trained: int, window: int | None, given: dict[str, Any]
) -> dict[str, Any]:
    """Return default parameters of a score method for a text of `length` tokens.

    window: half the training length; on SmolLM2 it cost less than three quarters
        (docs/guide/choose.md). factor: 16, as in Leaky ReRoPE's code
        (https://github.com/bojone/rerope). chunk_size, local_window: 3/4 and 1/8 of the training
        length, as in ChunkLlama. block_size: the training length, as in LEX.
    """
    if method in _OWN_RULES:
        return _OWN_RULES[method](length, trained, window, given)
    usual = {
        "window": window or max(1, trained // 2),
        "factor": 16.0,
        "chunk_size": max(1, 3 * trained // 4),
        "local_window": trained // 8,
        "block_size": max(2, trained // 2 * 2),
    }
    parameters = inspect.signature(SCORES[method]).parameters
    return {n: usual[n] for n, p in parameters.items() if p.default is p.empty and n in usual}


def _groups(length: int, trained: int, window: int | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return a window of a quarter of the training length, and a group by SelfExtend's authors.

    Their group is the smallest that keeps the largest relative position below two thirds of the
    training length. The window is rounded down to a multiple of it.
    """
    window = window or max(1, trained // 4)
    room = max(1, 2 * trained // 3 - window)
    group = 1 if length <= trained else min(window, math.ceil((length - window) / room))
    group = given.get("factor", group)
    fits = isinstance(group, int) and 0 < group <= window
    return {"window": window // group * group if fits else window, "factor": group}


def _shifts(length: int, trained: int, *_: object) -> dict[str, Any]:
    """Return a shift of a third of the training length, and the window of STRING's authors.

    The window is 128, or 1/16 of a training length shorter than theirs.
    """
    return {"shift": max(1, trained // 3), "window": min(128, trained // 16)}


# Score methods whose authors have a rule; others get defaults by the names of their parameters.
_OWN_RULES: dict[str, Callable[..., dict[str, Any]]] = {"self_extend": _groups, "string": _shifts}


def make_plan(
    methods: Iterable[str] | Mapping[str, Mapping[str, Any]],
    lengths: int | Iterable[int],
    factor: float | None = None,
    window: int | None = None,
) -> Plan:
    """Return the checked plan; raises UsageError."""
    if isinstance(methods, str):
        methods = [methods]
    named = dict(methods) if isinstance(methods, Mapping) else {name: {} for name in methods}
    if not named:
        raise UsageError("--methods must list at least one")
    if unknown := [name for name in named if name not in PARAMETERS]:
        listed = ", ".join(PARAMETERS)
        raise UsageError(f"--methods: unknown {', '.join(unknown)}; choose from {listed}")
    for method, given in named.items():
        known = [key for key in PARAMETERS[method] if key != "dim"]
        if wrong := [name for name in given if name not in known]:
            listed = ", ".join(known)
            raise UsageError(f"--param: {method} has no {wrong[0]}; it has {listed}")
    wanted = {lengths} if isinstance(lengths, int) else set(lengths)
    if wrong := [n for n in wanted or {None} if type(n) is not int or n < 2]:
        raise UsageError(f"--lengths must be whole numbers of tokens >= 2, got {wrong[0]}")
    if factor is not None and not factor > 0:
        raise UsageError(f"--factor must be > 0, got {factor:g}")
    check_numbers(window=window)
    params = {method: dict(given) for method, given in named.items()}
    return Plan(list(named), sorted(wanted), params, factor, window)


def check_numbers(**given: int | None) -> None:
    """Raise UsageError for a count that is no whole number from 1 on."""
    for name, value in given.items():
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"--{name} must be >= 1, got {value!r}")


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise UsageError if an option has none of its choices."""
    if value not in choices:
        raise UsageError(f"--{name} must be one of {', '.join(choices)}, got {value!r}")


def require(*packages: str) -> None:
    """Raise UsageError, with the command to run, if one of `packages` is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(not_installed(missing))


def not_installed(packages: Sequence[str]) -> str:
    """Return the message that packages are missing, with the command that installs them."""
    command = f"pip install {' '.join(packages)} (or, in a checkout, pip install '.[demo]')"
    return f"{', '.join(packages)} not installed; run: {command}"


def check_out(path: str) -> Path:
    """Return the output folder, made if it is missing; raises UsageError."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"--out {path}: cannot write there: {error.strerror}") from error
    return folder
