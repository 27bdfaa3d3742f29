"""What `additional_config={"extrope": {...}}` asks for. Nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...methods import METHODS
from ...scores import SCORES, Score
from .._shared.parameters import bind_score, check_names

NAME = "extrope"  # of the entry in additional_config; and what errors begin with
_METHODS = tuple(name for name in METHODS if name != "axial")  # whose positions are those of images


@dataclass(frozen=True)
class Settings:
    """The methods of one engine.

    method: a frequency method, None for the model's own frequencies; parameters: the user's.
    score, log_n: of a score method, None for attention as it is.
    """

    method: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    score: Score | None = None
    log_n: float | None = None


def read_settings(additional_config: Any) -> Settings | None:
    """Return the settings in an engine's additional_config; None where there are none of ours.

    Raises ValueError or TypeError for what no model can be served by.
    """
    entry = additional_config.get(NAME) if isinstance(additional_config, Mapping) else None
    if entry is None:
        return None
    asked = isinstance(entry, Mapping) and (entry.get("method"), entry.get("score"))
    if not asked or asked == (None, None):
        raise ValueError(
            f"{NAME}: additional_config must have a method, a score or both under {NAME!r}, "
            f"got {entry!r}"
        )
    parameters = dict(entry)
    method, score = parameters.pop("method", None), parameters.pop("score", None)
    if method is None and parameters:
        raise ValueError(f"{NAME}: {next(iter(parameters))} must come with a method, got none")
    if method is not None:
        if method not in _METHODS:
            raise ValueError(f"{NAME}: method must be one of {', '.join(_METHODS)}, got {method!r}")
        check_names(NAME, method, parameters, None)
    return Settings(method, parameters, *_read_score(score))


def describe(additional_config: Mapping[str, Any]) -> str:
    """Return an engine's methods in words: `rerope window=2048 over yarn factor=4.0`."""
    entry = dict(additional_config[NAME])
    said = [dict(each) for each in (entry.pop("score", None), entry) if each]
    return " over ".join(
        " ".join([each.pop("method"), *(f"{name}={value}" for name, value in each.items())])
        for each in said
        if each.get("method")
    )


def _read_score(entry: Any) -> tuple[Score | None, float | None]:
    if entry is None:
        return None, None
    if not isinstance(entry, Mapping) or entry.get("method") not in tuple(SCORES):
        got = entry.get("method") if isinstance(entry, Mapping) else entry
        raise ValueError(
            f"{NAME}: score must have a method, one of {', '.join(SCORES)}, got {got!r}"
        )
    parameters = dict(entry)
    return bind_score(NAME, parameters.pop("method"), parameters)
