"""Whether the fused op does what a model's layers do with their tables, found out by trial."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope_qk
from .apply import APPLY, original_apply
from .tables import prefix_of, trial_numbers


@dataclass(frozen=True)
class Fused:
    """The op in place of `apply_rotary_pos_emb`, a global of a modeling module.

    modeling: the module's name.
    interleaved: pairs are dims (2i, 2i+1), not (i, i + dim/2).
    """

    modeling: str
    interleaved: bool


def find_fused(
    owner: nn.Module, rotary: nn.Module, layer_types: tuple[str | None, ...]
) -> Fused | None:
    """Return how the op rotates for the owner's layers; None where it is not the same thing.

    rotary: one like the model's own, on the CPU.
    """
    modules, layers = set(), set(rotating_layers(owner))
    for layer in owner.modules():
        forward = forward_of(layer)
        names = forward.__code__.co_names if forward else ()
        functions = {name for name in names if _is_rotation(name)}
        if layer in layers:
            if functions != {APPLY}:
                return None
            modules.add(forward.__globals__["__name__"])
        elif functions:  # an indexer, which may rotate in a way of its own
            return None
    if len(modules) != 1:
        return None
    (modeling,) = modules
    try:
        pairings = {_pairing(rotary, layer_type, modeling) for layer_type in layer_types}
    except Exception:  # whatever a foreign signature leads to
        return None
    if len(pairings) != 1 or None in pairings:
        return None
    return Fused(modeling, pairings.pop())


def rotating_layers(owner: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers that rotate their queries and keys by (cos, sin) that they are given."""
    for module in owner.modules():
        forward = forward_of(module)
        if forward and {"position_embeddings", "cos", "sin"} <= set(forward.__code__.co_varnames):
            yield module


def forward_of(module: nn.Module) -> FunctionType | None:
    """Return the function behind a module's forward, or None where it is none of Python's."""
    forward = inspect.unwrap(type(module).forward)
    return forward if isinstance(forward, FunctionType) else None


def _is_rotation(name: str) -> bool:
    return name.startswith("apply") and "rotary" in name


def _pairing(rotary: nn.Module, layer_type: str | None, modeling: str) -> bool | None:
    """Return whether dims are paired (2i, 2i+1), by comparing the model's own functions to ours.

    Catches what names cannot tell: other orders of the dims, signs, or axes of position.
    """
    positions = torch.tensor([[0, 1, 5, 11]], device="cpu")
    prefix = prefix_of(layer_type)
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    inv_freq = getattr(rotary, f"{prefix}inv_freq").float()
    freqs = RopeFreqs(inv_freq, float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))
    q = trial_numbers(-1, 1, 4 * 2 * inv_freq.numel()).view(1, 1, 4, -1)
    cos, sin = type(rotary).forward(rotary, q, positions, **kwargs)
    expected = original_apply(modeling)(q, q.flip(-1), cos, sin)
    for interleaved in (False, True):
        if _agrees(expected, q, freqs, positions, interleaved):
            return interleaved
    return None


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
