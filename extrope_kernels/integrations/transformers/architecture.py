"""Where a model rotates, and whether it does so in a way that the fused op reproduces."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope_qk
from .apply import APPLY, original_apply

_EXTENDED_LAYER_TYPE = "full_attention"


@dataclass(frozen=True, eq=False)
class RotarySite:
    """One rotary embedding and what surrounds it.

    owner: the module whose forward calls the rotary embedding once for all layers.
    layer_type: the kind of layers to extend, where the model has a rotation per kind; else None.
    parameters: the entries of config.rope_parameters for them.
    dim: how many dims of a head are rotated.
    interleaved: pairs are dims (2i, 2i+1), not (i, i + dim/2).
    modeling: name of the module whose global `apply_rotary_pos_emb` the layers call.
    """

    owner: nn.Module
    rotary: nn.Module
    layer_type: str | None
    parameters: Mapping[str, Any]
    dim: int
    interleaved: bool
    modeling: str


def find_sites(model: nn.Module) -> list[RotarySite]:
    """Return every rotary embedding of `model`; raise ValueError if one cannot be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"extend: model must be a transformers model, got {type(model).__name__}")
    sites = [_site(owner, rotary) for owner, rotary in _rotary_embeddings(model)]
    if not sites:
        raise ValueError(
            "extend: model must have a rotary embedding configured by rope_parameters, "
            f"got a {type(model).__name__} without"
        )
    return sites


def _rotary_embeddings(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for owner in model.modules():
        for child in owner.children():
            parameters = getattr(getattr(child, "config", None), "rope_parameters", None)
            if hasattr(child, "rope_type") and isinstance(parameters, Mapping):
                yield owner, child


def _site(owner: nn.Module, rotary: nn.Module) -> RotarySite:
    parameters = rotary.config.rope_parameters
    layer_type = None
    if any(isinstance(value, Mapping) for value in parameters.values()):
        layer_type = _EXTENDED_LAYER_TYPE
        parameters = parameters.get(layer_type)
        if layer_type not in rotary.rope_type:
            raise unsupported(owner, f"it has no {layer_type} layers")
    if "mrope_section" in parameters:
        raise unsupported(owner, "it rotates by several axes of positions")
    modeling = _modeling_module(owner)
    prefix = "" if layer_type is None else f"{layer_type}_"
    dim = 2 * getattr(rotary, f"{prefix}inv_freq").shape[-1]
    interleaved = _pairing(owner, rotary, layer_type, prefix, modeling)
    return RotarySite(owner, rotary, layer_type, parameters, dim, interleaved, modeling)


def _modeling_module(owner: nn.Module) -> str:
    """Return the one module whose `apply_rotary_pos_emb` all of the owner's layers rotate with."""
    modules = set()
    for layer in rotating_layers(owner):
        forward = _forward(layer)
        functions = {name for name in forward.__code__.co_names if _is_rotation(name)}
        if functions != {APPLY}:
            raise unsupported(owner, f"{forward.__qualname__} does not rotate by {APPLY} alone")
        modules.add(forward.__globals__["__name__"])
    if len(modules) != 1:
        raise unsupported(owner, f"{len(modules)} modeling modules rotate its q and k by {APPLY}")
    return modules.pop()


def rotating_layers(owner: nn.Module) -> list[nn.Module]:
    """Return the attention layers that rotate their queries and keys by the owner's embedding."""
    layers = []
    for module in owner.modules():
        forward = _forward(module)
        if forward and {"position_embeddings", "cos", "sin"} <= set(forward.__code__.co_varnames):
            layers.append(module)
    return layers


def _is_rotation(name: str) -> bool:
    return name.startswith("apply") and "rotary" in name


def _forward(module: nn.Module) -> FunctionType | None:
    forward = inspect.unwrap(type(module).forward)
    return forward if isinstance(forward, FunctionType) else None


def _pairing(
    owner: nn.Module, rotary: nn.Module, layer_type: str | None, prefix: str, modeling: str
) -> bool:
    """Return whether dims are paired (2i, 2i+1), by comparing the model's own functions to ours.

    Catches what names cannot tell: other orders of the dims, signs, or axes of position.
    """
    positions = torch.tensor([[0, 1, 5, 11]])
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    try:
        # Built anew, so that neither the buffers nor the history of the model's own are touched.
        with torch.device("cpu"):
            fresh = type(rotary)(rotary.config)
        inv_freq = getattr(fresh, f"{prefix}inv_freq").float()
        freqs = RopeFreqs(inv_freq, float(getattr(fresh, f"{prefix}attention_scaling", 1.0)))
        q = torch.linspace(-1, 1, 4 * 2 * inv_freq.numel()).view(1, 1, 4, -1)
        cos, sin = fresh.forward(q, positions, **kwargs)
        expected = original_apply(modeling)(q, q.flip(-1), cos, sin)
    except Exception as error:  # whatever a foreign signature leads to
        raise unsupported(owner, f"its rotation cannot be tried out ({error})") from error
    for interleaved in (False, True):
        if _agrees(expected, q, freqs, positions, interleaved):
            return interleaved
    raise unsupported(owner, "its rotation pairs the dims of a head in another way")


def _agrees(
    expected: Any, q: Tensor, freqs: RopeFreqs, positions: Tensor, interleaved: bool
) -> bool:
    got = apply_rope_qk(
        q.transpose(1, 2),
        q.flip(-1).transpose(1, 2),
        freqs,
        positions=positions,
        interleaved=interleaved,
        backend="reference",
    )
    return all(
        isinstance(theirs, Tensor)
        and theirs.shape == q.shape
        and torch.allclose(theirs, ours.transpose(1, 2), atol=1e-3)
        for theirs, ours in zip(expected, got, strict=True)
    )


def unsupported(owner: nn.Module, reason: str) -> ValueError:
    """Return the error that says why a model cannot be extended."""
    return ValueError(f"extend: {type(owner).__name__} is not a supported architecture: {reason}")
