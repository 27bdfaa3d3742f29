"""A method's parameters: those the user gives, and the model's own for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ... import RopeFreqs
from ...methods import METHODS
from .architecture import RotarySite, unsupported
from .scores import PARAMETERS

# Parameters that a method exists to choose, so the model's value is not what is meant.
_OWN_DEFAULTS = {"abf": {"base"}, "dynamic_yarn": {"max_position_embeddings"}}


def bind_method(
    method: str, site: RotarySite, given: Mapping[str, Any]
) -> tuple[Callable[..., RopeFreqs], bool]:
    """Return the method with all its parameters for one model, and whether it still takes seq_len.

    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    if method not in METHODS:
        raise ValueError(f"extend: method must be one of {', '.join(PARAMETERS)}, got {method!r}")
    accepted = inspect.signature(METHODS[method]).parameters
    if unknown := [name for name in given if name not in accepted]:
        names = ", ".join(name for name in accepted if name != "dim")
        raise TypeError(f"extend: parameters of {method} must be among {names}, got {unknown[0]}")
    if given.get("dim", site.dim) != site.dim:
        raise ValueError(
            f"extend: dim must be {site.dim}, the rotary dimension of the model, got {given['dim']}"
        )
    own = _OWN_DEFAULTS.get(method, ())
    values = {k: v for k, v in _from_config(site).items() if k in accepted and k not in own}
    values |= given
    takes_length = "seq_len" in accepted and "seq_len" not in given
    missing = [
        name
        for name, parameter in accepted.items()
        if parameter.default is parameter.empty and name not in values and name != "seq_len"
    ]
    if missing:
        raise ValueError(f"extend: {method} needs {' and '.join(missing)}, which is missing")
    bound = partial(METHODS[method], **values)
    _check(method, bound(seq_len=1) if takes_length else bound(), site)
    return bound, takes_length


def own_freqs(site: RotarySite) -> RopeFreqs:
    """Return the frequencies that the model itself rotates by, on its device.

    Raises ValueError where they change with the length.
    """
    rotary, kind = site.rotary, site.rotary.rope_type
    prefix = ""
    if site.layer_type is not None:
        kind, prefix = kind[site.layer_type], f"{site.layer_type}_"
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
    factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
    return RopeFreqs(inv_freq.detach().float().clone(), factor)


def _from_config(site: RotarySite) -> dict[str, Any]:
    config = site.rotary.config
    longest = getattr(config, "max_position_embeddings", None)
    trained = getattr(config, "original_max_position_embeddings", None)
    values = {
        "dim": site.dim,
        "base": site.parameters.get("rope_theta"),
        "max_position_embeddings": longest,
        "original_max_position_embeddings": trained
        or site.parameters.get("original_max_position_embeddings")
        or longest,
    }
    return {name: value for name, value in values.items() if value is not None}


def _check(method: str, freqs: RopeFreqs, site: RotarySite) -> None:
    if freqs.inv_freq.shape[-1] * 2 != site.dim:
        raise ValueError(
            f"extend: {method} must yield {site.dim // 2} frequencies, "
            f"got {freqs.inv_freq.shape[-1]}"
        )
