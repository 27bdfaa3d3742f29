"""Norms of queries and keys right before the rotation, left to the op that rotates.

The op norms and rotates in one pass and rounds once, after the rotation; a model in 16 bits rounds
its norm's result too, some before the weights and after. So results differ from the model's own by
those roundings.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import RotarySite
from .calls import call_of
from .forwards import argument_names, by_name
from .fused import rotating_layers
from .rotation import Norm, Rotation
from .tables import trial_numbers
from .trial import Recorded, Recorder, run_on_trial

NAMES = ("q_norm", "k_norm")
_ARGUMENT = "position_embeddings"
# Of each thread: `norm`, that of the layer in progress if the rotation norms in it.
_in_progress = threading.local()


class FusedNorm:
    """The norms of one layer.

    from_one: they multiply by 1 + weight, as Gemma's do.
    """

    def __init__(self, layer: nn.Module, from_one: bool) -> None:
        self.norms: list[nn.Module] = [getattr(layer, name) for name in NAMES]
        self.deferred = [DeferredNorm(self, norm) for norm in self.norms]
        self.from_one = from_one
        self.argument_names = argument_names(layer)

    def overrides(self) -> list[tuple[nn.Module, str, Any]]:
        return [(each.norm, "forward", each) for each in self.deferred]

    def before_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of the layer: hand the weights to the rotation, where the op rotates."""
        arguments = by_name(self.argument_names, args, kwargs)
        given = arguments.get(_ARGUMENT)
        rotation = given[0] if isinstance(given, tuple) and given else None
        rotation_norms = (
            isinstance(rotation, Rotation)
            and all(each.is_in_place() for each in self.deferred)
            and not torch.is_autocast_enabled(self.norms[0].weight.device.type)
        )
        _in_progress.norm = self if rotation_norms else None
        if rotation_norms:
            norm = Norm(*(self._weight(norm) for norm in self.norms), eps_of(self.norms[0]))
            arguments[_ARGUMENT] = (rotation.after(norm), *given[1:])
        return (), arguments

    def after_layer(self, layer: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook of the layer: a norm that is called by itself norms."""
        _in_progress.norm = None

    def _weight(self, norm: nn.Module) -> Tensor:
        return 1.0 + norm.weight.float() if self.from_one else norm.weight


class DeferredNorm:
    """Stands in for the forward of a norm."""

    def __init__(self, fused: FusedNorm, norm: nn.Module) -> None:
        self.fused = fused
        self.norm = norm

    def is_in_place(self) -> bool:
        """Not after something else has taken over what it took over."""
        return vars(self.norm).get("forward") is self and is_own(self.norm)

    def __call__(self, x: Tensor) -> Tensor:
        if getattr(_in_progress, "norm", None) is self.fused:
            return x
        return type(self.norm).forward(self.norm, x)


def norm_changes(sites: list[RotarySite]) -> tuple[list, list]:
    """Return the overrides and the hooks of an `Extension` that is in place already."""
    overrides, hooks = [], []
    for owner in {site.owner: None for site in sites if site.fused is not None}:
        for layer, fused in _agreeing(owner).items():
            overrides += fused.overrides()
            hooks.append((layer, fused.before_layer, fused.after_layer))
    return overrides, hooks


def is_own(norm: nn.Module) -> bool:
    """Whether nothing but the module itself acts on its input and output, and it holds its weight:
    neither hooks, nor a weight that is sharded or elsewhere.
    """
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
    weight = norm._parameters.get("weight")
    return (
        not any(hooks)
        and not norm._backward_pre_hooks
        and type(weight) is nn.Parameter
        and weight.device.type != "meta"
    )


def eps_of(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)


def _agreeing(owner: nn.Module) -> dict[nn.Module, FusedNorm]:
    """Those layers of an owner whose attention gets the same from both, with any weights."""
    found = {}
    for layer in rotating_layers(owner):
        kinds = {_kind(getattr(layer, name, None)) for name in NAMES}
        epsilons = {eps_of(getattr(layer, name)) for name in NAMES if None not in kinds}
        if len(kinds) == len(epsilons) == 1 and call_of(layer) is not None:
            found[layer] = FusedNorm(layer, kinds == {"from one"})
    if not found:
        return {}
    with _any_weights(found):
        try:
            own, ours = _record(owner, found, fused=False), _record(owner, found, fused=True)
        except Exception:  # whatever a foreign layer leads to
            return {}
    # Where one layer goes wrong, what those after it are given is no longer the same.
    same = all(layer in own and layer in ours and _same(own[layer], ours[layer]) for layer in found)
    return found if same else {}


def _kind(norm: nn.Module | None) -> str | None:
    """Return "weight" or "from one" of an RMSNorm, by its results on a few rows; None of another
    module, or one that is not its own.
    """
    if not isinstance(norm, nn.Module) or "forward" in vars(norm) or not is_own(norm):
        return None
    if set(norm._parameters) != {"weight"} or norm._buffers or norm._modules:
        return None
    if norm.weight.dim() != 1:  # of each head its own (Cohere)
        return None
    weight = trial_numbers(0.5, 2.0, norm.weight.numel())
    trial = copy.deepcopy(norm).to("cpu", torch.float32)
    trial.weight.data.copy_(weight)
    # Of small rows, eps is most of the mean square.
    x = trial_numbers(-1, 2, 2 * weight.numel()).view(2, -1) * weight.new_tensor([[1.0], [1e-3]])
    normal = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps_of(norm))
    with torch.no_grad():
        try:
            got = trial(x)
        except Exception:  # whatever a foreign signature leads to
            return None
    for kind, factor in (("weight", weight), ("from one", 1.0 + weight)):
        if got.shape == x.shape and torch.allclose(got, normal * factor, rtol=1e-5, atol=1e-6):
            return kind
    return None


def _record(
    owner: nn.Module, found: dict[nn.Module, FusedNorm], fused: bool
) -> dict[nn.Module, Recorded]:
    """What the layers hand to their attention, on four tokens."""
    recorder = Recorder({layer: call_of(layer) for layer in found})
    norms = found if fused else {}
    overrides = [each for norm in norms.values() for each in norm.overrides()]
    hooks = [(layer, norm.before_layer) for layer, norm in norms.items()]
    with recorder.in_place(overrides, hooks):
        run_on_trial(owner)
    return recorder.seen


@contextmanager
def _any_weights(found: dict[nn.Module, FusedNorm]) -> Iterator[None]:
    """Weights that tell dims apart: with those of a new model, a norm after the rotation is one
    before it.
    """
    norms = [norm for fused in found.values() for norm in fused.norms]
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
    """But for the roundings that the model's norm has and the op has not.

    Two of each dim, before and after the weights, so four of a pair that rotates; one of each
    result. What follows in later layers is from values, and exact.
    """
    for x, y in ((own.q, ours.q), (own.k, ours.k)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return False
        unit, unit32 = torch.finfo(x.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
        tolerance = (6 * unit + 32 * unit32) * x.abs().max().item()
        if not (x.float() - y.float()).abs().max() <= tolerance:
            return False
    return torch.equal(own.v, ours.v)
