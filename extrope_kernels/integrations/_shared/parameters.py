"""A method's parameters: those the user gives, and the model's own for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ... import RopeFreqs
from ...methods import METHODS, WRAPPERS
from ...ops.attention import check_log_n
from ...scores import SCORES, Score

_FUNCTIONS = METHODS | SCORES
_RESONANCE = "resonance"
# For dual_chunk: the length from which its temperature grows (`scores.query_scale.qwen_1m`).
_TRAINED = "original_max_position_embeddings"
# Every method that an integration takes, with the names of its parameters: its own, and those that
# all methods of its kind take.
PARAMETERS: dict[str, tuple[str, ...]] = {
    name: (
        *inspect.signature(function).parameters,
        "log_n" if name in SCORES else _RESONANCE,
        *((_TRAINED,) if name == "dual_chunk" else ()),
    )
    for name, function in _FUNCTIONS.items()
}
# Parameters that a method exists to choose: the model's value is no default for them.
_OWN_DEFAULTS = {"abf": {"base"}, "dynamic_yarn": {"max_position_embeddings"}}
DUAL_CHUNKS = "dual_chunk_attention_config"  # of a transformers configuration
SPARSE = (
    f"of {DUAL_CHUNKS} the sparse part (vertical and slash lines) is left out: "
    "each query sees all keys"
)
# Parts of the names of kinds of layers that see a bounded number of keys.
_BOUNDED = ("sliding", "chunked", "local")


@dataclass(frozen=True)
class ModelValues:
    """A model's own values for one of its rotations.

    values: parameters of methods by name, including dim.
    unrotated: number of its last frequencies that are 0: dims that the model has never rotated.
    """

    values: Mapping[str, Any]
    unrotated: int = 0

    @property
    def dim(self) -> int:
        """The rotary dimension."""
        return self.values["dim"]


def plain(value: Any) -> Any:
    """Return numbers of torch and numpy as Python's, and tensors as lists: JSON has no others."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def values_in(config: Any, parameters: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Return a transformers configuration's values for parameters of methods.

    parameters: its rope_parameters, those of one kind of layers.
    """
    longest = getattr(config, "max_position_embeddings", None)
    trained = getattr(config, _TRAINED, None)
    values = {
        "dim": dim,
        "base": parameters.get("rope_theta"),
        "max_position_embeddings": longest,
        _TRAINED: trained
        or parameters.get(_TRAINED)
        or score_values_in(config, "dual_chunk").get(_TRAINED)
        or longest,
    }
    return {name: value for name, value in values.items() if value is not None}


def values_for(method: str, model: ModelValues) -> dict[str, Any]:
    """Return a model's values for parameters of a frequency method."""
    accepted, own = PARAMETERS[method], _OWN_DEFAULTS.get(method, ())
    return {k: v for k, v in model.values.items() if k in accepted and k not in own}


def bind_method(
    op: str, method: str, given: Mapping[str, Any], model: ModelValues
) -> tuple[Callable[..., RopeFreqs], bool]:
    """Bind a frequency method to all its parameters; return also if it still takes seq_len.

    op: the beginning of errors.
    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    if given.get("dim", model.dim) != model.dim:
        raise ValueError(
            f"{op}: dim must be {model.dim}, the rotary dimension of the model, got {given['dim']}"
        )
    accepted, values = PARAMETERS[method], values_for(method, model)
    check_names(op, method, given, values)
    takes_length = "seq_len" in accepted and "seq_len" not in given
    parameters = values | given
    rounded = parameters.pop(_RESONANCE, False)
    if not isinstance(rounded, bool):
        raise TypeError(f"{op}: {_RESONANCE} must be True or False, got {rounded!r}")
    bound = partial(METHODS[method], **parameters)
    _check_dim(op, method, bound(seq_len=1) if takes_length else bound(), model.dim)
    if model.unrotated and method != "proportional":
        bound = partial(_without, bound, model.unrotated)
    return partial(_rounded, bound) if rounded else bound, takes_length


def _without(method: Callable[..., RopeFreqs], unrotated: int, **parameters: Any) -> RopeFreqs:
    freqs = method(**parameters)
    freqs.inv_freq[..., -unrotated:] = 0.0
    return freqs


def _rounded(method: Callable[..., RopeFreqs], **parameters: Any) -> RopeFreqs:
    return WRAPPERS[_RESONANCE](method(**parameters))


def bind_score(op: str, method: str, given: Mapping[str, Any]) -> tuple[Score, float | None]:
    """Bind a score method to its parameters; return log_n too.

    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    check_names(op, method, given)
    parameters = dict(given)
    check_log_n(op, log_n := parameters.pop("log_n", None))
    scale_from(op, parameters)
    parameters.pop(_TRAINED, None)
    return SCORES[method](**parameters), log_n


def scale_from(op: str, given: Mapping[str, Any]) -> int | None:
    """Return the length from which dual_chunk's logits grow, or None.

    Raises ValueError if it is not a length.
    """
    trained = given.get(_TRAINED)
    if trained is not None and (type(trained) is not int or trained < 1):
        raise ValueError(f"{op}: {_TRAINED} must be a whole number of tokens > 0, got {trained!r}")
    return trained


def score_values_in(config: Any, method: str) -> dict[str, Any]:
    """Return a transformers configuration's values for parameters of a score method.

    Qwen's models of 1M tokens have some. Their local_size is our local_window: chunks have
    chunk_size - local_size tokens in both.
    """
    found = getattr(config, DUAL_CHUNKS, None) if method == "dual_chunk" else None
    values = {
        "chunk_size": (found or {}).get("chunk_size"),
        "local_window": (found or {}).get("local_size"),
        _TRAINED: (found or {}).get(_TRAINED) or None,  # 0 is none
    }
    return {name: value for name, value in values.items() if value is not None}


def check_names(
    op: str, method: str, given: Mapping[str, Any], others: Iterable[str] | None = ()
) -> None:
    """Raise TypeError for a parameter that the method does not have, ValueError for a missing one.

    given: by the user; others: by the model, None if not known yet; seq_len comes later.
    """
    accepted = PARAMETERS[method]
    if unknown := [name for name in given if name not in accepted]:
        names = ", ".join(name for name in accepted if name != "dim")
        raise TypeError(f"{op}: parameters of {method} must be among {names}, got {unknown[0]}")
    if others is None:
        return
    missing = [
        name
        for name, parameter in inspect.signature(_FUNCTIONS[method]).parameters.items()
        if parameter.default is parameter.empty and name not in {"seq_len", *given, *others}
    ]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{op}: {method} needs {' and '.join(missing)}, which {are} missing")


def _check_dim(op: str, method: str, freqs: RopeFreqs, dim: int) -> None:
    if freqs.inv_freq.shape[-1] * 2 != dim:
        raise ValueError(
            f"{op}: {method} must yield {dim // 2} frequencies, got {freqs.inv_freq.shape[-1]}"
        )


def is_bounded(kind: str) -> bool:
    """Return True if layers of this name see a bounded number of keys.

    A "reference_sliding_attention" sees the prompt from anywhere: not bounded.
    """
    return kind.startswith(_BOUNDED) or kind.endswith(_BOUNDED)
