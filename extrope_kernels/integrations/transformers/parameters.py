"""A method's parameters: those the user gives, and the model's own for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from ... import RopeFreqs
from ...methods import METHODS
from ...scores import SCORES, Score
from .architecture import RotarySite, prefix_of, unsupported
from .softmax_scale import NAMES, scales_softmax

_FUNCTIONS = METHODS | SCORES
# Every method that `extend` takes, and the names of its parameters.
PARAMETERS: dict[str, tuple[str, ...]] = {
    name: (*inspect.signature(function).parameters, *(("log_n",) if name in SCORES else ()))
    for name, function in _FUNCTIONS.items()
}
# Parameters that a method exists to choose, so the model's value is not what is meant.
_OWN_DEFAULTS = {"abf": {"base"}, "dynamic_yarn": {"max_position_embeddings"}}


def bind_method(
    method: str, site: RotarySite, layer_type: str | None, given: Mapping[str, Any]
) -> tuple[Callable[..., RopeFreqs], bool]:
    """Return a frequency method with all its parameters, and whether it still takes seq_len.

    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    dim = site.dim(layer_type)
    if given.get("dim", dim) != dim:
        raise ValueError(
            f"extend: dim must be {dim}, the rotary dimension of the model, got {given['dim']}"
        )
    accepted, own = PARAMETERS[method], _OWN_DEFAULTS.get(method, ())
    from_config = _from_config(site, layer_type)
    values = {k: v for k, v in from_config.items() if k in accepted and k not in own}
    _check_names(method, given, values)
    takes_length = "seq_len" in accepted and "seq_len" not in given
    bound = partial(METHODS[method], **values | given)
    _check_dim(method, bound(seq_len=1) if takes_length else bound(), dim)
    if (still := _unrotated(site, layer_type)) and method != "proportional":
        bound = partial(_without, bound, still)
    return bound, takes_length


def _unrotated(site: RotarySite, layer_type: str | None) -> int:
    """The last frequencies of a ladder may be 0: dims that the model has never rotated."""
    if site.parameters(layer_type).get("rope_type") != "proportional":
        return 0
    return int((getattr(site.rotary, f"{prefix_of(layer_type)}inv_freq") == 0).sum())


def _without(method: Callable[..., RopeFreqs], still: int, **parameters: Any) -> RopeFreqs:
    freqs = method(**parameters)
    freqs.inv_freq[..., -still:] = 0.0
    return freqs


def bind_score(method: str, given: Mapping[str, Any]) -> tuple[Score, float | None]:
    """Return a score method with its parameters, and log_n.

    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    _check_names(method, given)
    parameters = {name: value for name, value in given.items() if name != "log_n"}
    return SCORES[method](**parameters), given.get("log_n")


def own_freqs(site: RotarySite, layer_type: str | None) -> RopeFreqs:
    """Return the frequencies that the model itself rotates by, on its device.

    Raises ValueError where they change with the length.
    """
    rotary, kind, prefix = site.rotary, site.rotary.rope_type, prefix_of(layer_type)
    if layer_type is not None:
        kind = kind[layer_type]
    if "dynamic" in kind or kind == "longrope":
        raise unsupported(
            site.owner,
            f"its frequencies ({kind}) change with the length; "
            "extend it by a method of that name first",
        )
    inv_freq = getattr(rotary, f"{prefix}inv_freq")
    if inv_freq.dtype != torch.float32:
        # Rounded by a cast of the whole model; the config still says what they were.
        with torch.device("cpu"):
            inv_freq = getattr(type(rotary)(rotary.config), f"{prefix}inv_freq").to(inv_freq.device)
    if (order := site.order(layer_type)) is not None:
        inv_freq = inv_freq[order.argsort().to(inv_freq.device)]
    factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    return RopeFreqs(inv_freq.detach().float().clone(), factor)


def _from_config(site: RotarySite, layer_type: str | None) -> dict[str, Any]:
    config, parameters = site.rotary.config, site.parameters(layer_type)
    longest = getattr(config, "max_position_embeddings", None)
    trained = getattr(config, "original_max_position_embeddings", None)
    values = {
        "dim": site.dim(layer_type),
        "base": parameters.get("rope_theta"),
        "max_position_embeddings": longest,
        "original_max_position_embeddings": trained
        or parameters.get("original_max_position_embeddings")
        or longest,
    }
    if scales_softmax(site):
        values |= {name: parameters.get(name) for name in NAMES}
    return {name: value for name, value in values.items() if value is not None}


def _check_names(method: str, given: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """given: by the user; others: by the model's configuration; seq_len comes with a request."""
    accepted = PARAMETERS[method]
    if unknown := [name for name in given if name not in accepted]:
        names = ", ".join(name for name in accepted if name != "dim")
        raise TypeError(f"extend: parameters of {method} must be among {names}, got {unknown[0]}")
    missing = [
        name
        for name, parameter in inspect.signature(_FUNCTIONS[method]).parameters.items()
        if parameter.default is parameter.empty and name not in {"seq_len", *given, *others}
    ]
    if missing:
        raise ValueError(f"extend: {method} needs {' and '.join(missing)}, which is missing")


def _check_dim(method: str, freqs: RopeFreqs, dim: int) -> None:
    if freqs.inv_freq.shape[-1] * 2 != dim:
        raise ValueError(
            f"extend: {method} must yield {dim // 2} frequencies, got {freqs.inv_freq.shape[-1]}"
        )
