"""Norms of queries and keys right before the rotation, done by the op that rotates.

The op norms and rotates in one pass and rounds once, after the rotation. A model in 16 bits rounds
its norm's result too, some before and after the weights. Results differ from the model's own by
those roundings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...._usage import shortened
from ..model import Override, unsupported
from ..probe.attention import call_of
from ..probe.layers import Recorded, Recorder, first_call, probe_layers, replaced, without_dropout
from ..probe.rotary import RotaryModule, argument_names, by_name, owners_of, rotating_layers
from .hooks import Patches
from .rotary_forward import Norm, Rotation
from .state import in_progress

_NAMES = ("q_norm", "k_norm")
_ARGUMENT = "position_embeddings"


def tried_patches(
    model: nn.Module, rotary_modules: Sequence[RotaryModule], always: bool
) -> Patches:
    """Run four tokens through an extended model; return the patches that leave norms to the op.

    always: run them even if no norm may be left, to find what a model does between its rotary
        embedding and its layers.

    Raises ValueError if a forward fails that is always run.
    """
    patches = Patches()
    fused = owners_of([each for each in rotary_modules if each.fused is not None])
    for owner in owners_of(rotary_modules):
        layers = _normed_layers(owner) if owner in fused else []
        if not layers and not always:
            continue
        try:
            seen = _arguments(first_call(model, owner), layers)
        except Exception as error:  # a foreign model may raise anything
            if not always:
                continue
            raise unsupported(
                owner,
                "its code between the rotary embedding and the layers needs tables of cos and sin "
                f"({shortened(error)})",
            ) from error
        for layer, arguments in seen.items():
            if (norm := _agreeing(layer, arguments)) is not None:
                patches.overrides += norm.overrides()
                patches.hooks.append((layer, norm.before_layer, norm.after_layer))
    return patches


class FusedNorm:
    """The norms of one layer.

    from_one: they multiply by 1 + weight, as in Gemma.
    """

    def __init__(self, layer: nn.Module, from_one: bool) -> None:
        self.norms: list[nn.Module] = [getattr(layer, name) for name in _NAMES]
        self.deferred = [DeferredNorm(self, norm) for norm in self.norms]
        self.eps = _eps_of(self.norms[0])
        self.from_one = from_one
        self.argument_names = argument_names(layer)

    def overrides(self) -> list[Override]:
        return [(each.norm, "forward", each) for each in self.deferred]

    def before_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand the weights to the rotation if the op rotates: forward pre-hook of the layer."""
        arguments = by_name(self.argument_names, args, kwargs)
        given = arguments.get(_ARGUMENT)
        rotation = given[0] if isinstance(given, tuple) and given else None
        rotation_norms = (
            isinstance(rotation, Rotation)
            # PEFT's modules_to_save puts a copy in a norm's place.
            and all(getattr(layer, name) is norm for name, norm in zip(_NAMES, self.norms))
            and all(each.is_in_place() for each in self.deferred)
            and not torch.is_autocast_enabled(self.norms[0].weight.device.type)
        )
        in_progress.norm = self if rotation_norms else None
        if rotation_norms:
            norm = Norm(*(self._weight(norm) for norm in self.norms), self.eps)
            arguments[_ARGUMENT] = (rotation.after(norm),) * 2
        return (), arguments

    def after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        """Let norms norm again if called by themselves: forward hook of the layer."""
        in_progress.norm = None

    def _weight(self, norm: nn.Module) -> Tensor:
        return 1.0 + norm.weight.float() if self.from_one else norm.weight


class DeferredNorm:
    """Replacement forward of a norm."""

    def __init__(self, fused: FusedNorm, norm: nn.Module) -> None:
        self.fused = fused
        self.norm = norm

    def is_in_place(self) -> bool:
        """Return False if another patch replaced this one, or acts on the norm."""
        return vars(self.norm).get("forward") is self and _is_own(self.norm)

    def __call__(self, x: Tensor) -> Tensor:
        if getattr(in_progress, "norm", None) is self.fused:
            return x
        return type(self.norm).forward(self.norm, x)


def _is_own(norm: nn.Module) -> bool:
    """Return True if a module has no hooks, and its weight is neither sharded nor elsewhere."""
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
    weight = norm._parameters.get("weight")
    return (
        not any(hooks)
        and not norm._backward_pre_hooks
        and type(weight) is nn.Parameter
        and weight.device.type != "meta"
    )


def _eps_of(norm: nn.Module) -> float:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


def _may_be_fused(norm: nn.Module | None) -> bool:
    """Return True if a module can be an RMSNorm with one weight per dim.

    Cohere's norms have one for each head and dim.
    """
    return (
        isinstance(norm, nn.Module)
        and "forward" not in vars(norm)
        and _is_own(norm)
        and set(norm._parameters) == {"weight"}
        and not (norm._buffers or norm._modules)
        and norm.weight.dim() == 1
        and isinstance(_eps_of(norm), float)
    )


def _normed_layers(owner: nn.Module) -> list[nn.Module]:
    """Return the layers whose norms the op may do."""
    layers = []
    for layer in rotating_layers(owner):
        norms = [getattr(layer, name, None) for name in _NAMES]
        if call_of(layer) is None or not all(_may_be_fused(norm) for norm in norms):
            continue
        if _eps_of(norms[0]) == _eps_of(norms[1]):
            layers.append(layer)
    return layers


def _arguments(owner: nn.Module, layers: Sequence[nn.Module]) -> dict[nn.Module, dict[str, Any]]:
    """Run an owner on four tokens; return what its layers get."""
    seen: dict[nn.Module, dict[str, Any]] = {}

    def note(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[layer] = by_name(argument_names(layer), args, kwargs)

    handles = [each.register_forward_pre_hook(note, with_kwargs=True) for each in layers]
    try:
        probe_layers(owner)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def _agreeing(layer: nn.Module, arguments: dict[str, Any]) -> FusedNorm | None:
    """Return the norms of a layer if the op computes the same with them, by calling it alone.

    arguments: of the layer, with a rotation.
    """
    with _other_weights([getattr(layer, name) for name in _NAMES]), without_dropout(layer):
        try:
            own = _record(layer, arguments)
            for from_one in (False, True):
                norm = FusedNorm(layer, from_one)
                with replaced(norm.overrides()):
                    _, normed = norm.before_layer(layer, (), arguments)
                    ours = _record(layer, normed)
                    deferred = in_progress.norm is not None
                if deferred and _same(own, ours):
                    return norm
        except Exception:  # a foreign layer may raise anything
            pass
        finally:
            in_progress.norm = None
    return None


def _record(layer: nn.Module, arguments: dict[str, Any]) -> Recorded:
    """Call a layer, past its hooks; return the arguments of its attention."""
    call = call_of(layer)
    recorder = Recorder({layer: call})
    with replaced(call.overrides(layer)):
        layer.forward(**call.with_attention(layer, arguments, recorder))
    return recorder.seen[layer]


@contextmanager
def _other_weights(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Give norms weights that tell dims apart.

    With a new model's weights a norm after the rotation equals one before it.
    """
    before = [norm.weight for norm in norms]
    for norm, weight in zip(norms, before):
        spread = torch.linspace(0.5, 2.0, weight.numel(), device=weight.device)
        norm._parameters["weight"] = nn.Parameter(spread.to(weight.dtype).view_as(weight), False)
    try:
        yield
    finally:
        for norm, weight in zip(norms, before):
            norm._parameters["weight"] = weight


def _same(own: Recorded, ours: Recorded) -> bool:
    """Compare up to the roundings of the model's norm, which the op does not have.

    The norm rounds each dim twice, before and after the weights: four times for a pair that
    rotates, then the result once.
    """
    for x, y in ((own.q, ours.q), (own.k, ours.k)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        unit, unit32 = torch.finfo(x.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        tolerance = (6 * unit + 32 * unit32) * x.abs().max().item()
        if not (x.float() - y.float()).abs().max() <= tolerance:
            return False
    return torch.equal(own.v, ours.v)
