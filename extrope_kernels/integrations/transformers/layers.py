"""What a model's layers do: two runs of it on four tokens tell which a score method can serve.

Layers call the attention function that their config names. In a probe that is ours, and the layer's
attribute is a `Recorder`, which keeps the arguments. Once all tokens are at position 0, once at
0, 1, 5, 11: the difference is the rotation, wherever in a layer it happens. Each run has the tokens
in a second row backwards: if that is not the first row backwards, tokens mix outside of attention.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, product
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope, rope_attention
from ..._usage import shortened
from .._shared.parameters import is_bounded
from .attention import (
    KNOWN,
    ON_LAYER,
    ExtendedLayer,
    attending_overrides,
    is_rows,
    no_rotation,
    refuse_dropout,
    softmax_options,
)
from .model import BOUNDED, Override, forward_of, reprefix_error, unsupported
from .patches import Hook, hooked_forwards
from .rotary import probe_numbers, rotating_layers
from .rotation import RotaryForward, ThreadFrequencies, unwrap_apply, wrap_apply

POSITIONS = (0, 1, 5, 11)  # of a probe's four tokens


@contextmanager
def replaced(overrides: Sequence[Override]) -> Iterator[None]:
    """Hide attributes of modules for a while."""
    before = [(module, name, vars(module).get(name)) for module, name, _ in overrides]
    for module, name, value in overrides:
        vars(module)[name] = value
    try:
        yield
    finally:
        for module, name, value in reversed(before):
            if value is None:
                del vars(module)[name]
            else:
                vars(module)[name] = value


def calls_attention(module: nn.Module) -> bool:
    """Return True for a module that calls a function of transformers' interface."""
    forward = forward_of(module)
    return (
        "config" in vars(module)
        and forward is not None
        and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names
    )


@dataclass(frozen=True)
class Recorded:
    """A layer's arguments to its attention: q, k, v of (2, heads, 4, head_dim), and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: Mapping[str, Any]


class UnfitLayer(Exception):
    """A layer does something that a score method cannot; the message says what."""


class Recorder:
    """In the place of an `ExtendedLayer`: keeps the arguments.

    called: the layers that the owner has called. seen: their arguments to attention.
    output: the owner's output.
    """

    def __init__(self) -> None:
        self.called: dict[nn.Module, list[Any]] = {}
        self.seen: dict[nn.Module, Recorded] = {}
        self.output: Any = None

    def before_layer(self, layer: nn.Module, arguments: dict[str, Any]) -> None:
        mask = arguments.get("attention_mask")
        self.called[layer] = list(mask.values()) if isinstance(mask, Mapping) else [mask]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        name = type(module).__name__
        if key.shape[2] != query.shape[2]:
            raise UnfitLayer(
                f"{name} attends to keys beside those of the tokens, which have no distance"
            )
        known = [each.data_ptr() for each in self.called[module] if isinstance(each, Tensor)]
        if mask is not None and not is_rows(mask) and mask.data_ptr() not in known:
            raise UnfitLayer(
                "its layers choose or weigh keys by a mask made of their contents, a score method "
                "by distances alone"
            )
        self.seen[module] = Recorded(query, key, value, options)
        # Made of the values alone: later layers are then the same in both runs.
        groups = query.shape[1] // value.shape[1]
        return value.repeat_interleave(groups, 1).transpose(1, 2).contiguous()


@torch.no_grad()
def recorded(
    model: nn.Module,
    owner: nn.Module,
    rotaries: Sequence[nn.Module] = (),
    positions: Sequence[int] = (0, 1, 2, 3),
) -> Recorder:
    """Run an owner, and return what its layers give their attention.

    rotaries: rotary embeddings that get these positions.
    Raises ValueError for a model that cannot be tried out, or whose layers do what ops do not.
    """
    layers, recorder = [each for each in owner.modules() if calls_attention(each)], Recorder()
    overrides = attending_overrides(owner, layers)
    overrides += [(layer, ON_LAYER, recorder) for layer in layers]
    hooks: list[Hook] = [(layer, recorder.before_layer, None) for layer in layers]
    hooks += [(rotary, partial(_give_positions, positions), None) for rotary in rotaries]
    try:
        with replaced([*overrides, *hooked_forwards(hooks)]):
            recorder.output = run_on_four_tokens(first_call(model, owner))
    except UnfitLayer as unfit:
        raise unsupported(owner, str(unfit)) from unfit
    except Exception as error:  # a foreign layer may raise anything
        reason = f"its layers cannot be tried out on four tokens ({shortened(error)})"
        raise unsupported(owner, reason) from error
    return recorder


def _give_positions(positions: Sequence[int], rotary: nn.Module, arguments: dict[str, Any]) -> None:
    given = arguments["position_ids"]
    if given.shape[-1] == len(positions):  # not of keys made of several tokens
        others = torch.tensor(positions, dtype=given.dtype, device=given.device)
        arguments["position_ids"] = others.expand(given.shape)


def first_call(model: nn.Module, owner: nn.Module) -> nn.Module:
    """Return the module that a probe of an owner calls: FSDP wants its root called first."""
    return model if _fsdp_modules(model) else owner


def _fsdp_modules(module: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [each for each in module.modules() if fsdp and isinstance(each, fsdp.FSDPModule)]


@torch.no_grad()
def run_on_four_tokens(owner: nn.Module) -> Any:
    """Run an owner, or its `first_call`, without dropout; return its output of (2, 4) tokens."""
    embed = getattr(owner, "get_input_embeddings", None)
    weights = embed() if embed is not None else owner
    tokens = torch.arange(4, device=_device_of(weights))[None]
    with without_dropout(owner):
        output = owner(input_ids=torch.cat((tokens, tokens.flip(1))), use_cache=False)
    for module in _fsdp_modules(owner):
        module.reshard()  # the root keeps its parameters whole for a backward
    return output


@contextmanager
def without_dropout(owner: nn.Module) -> Iterator[None]:
    """Put the modules that are in training into evaluation mode for a while."""
    training = [module for module in owner.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def refuse_without_weights(owner: nn.Module, method: str) -> None:
    """Raise ValueError for a model without weights, which cannot be tried out."""
    offloaded = any(hasattr(module, "_hf_hook") for module in owner.modules())  # by accelerate
    if not offloaded and all(weight.device.type == "meta" for weight in owner.parameters()):
        raise ValueError(
            f"extend: {type(owner).__name__} must have its weights for {method}, "
            "got parameters on the meta device"
        )


def _device_of(weights: nn.Module) -> Any:
    """Return a module's device; accelerate keeps offloaded weights on meta."""
    device = next(weights.parameters()).device
    hook = getattr(weights, "_hf_hook", None)
    return getattr(hook, "execution_device", device) if device.type == "meta" else device


class LayerProbe:
    """The attention layers of an owner.

    far: layers to extend, which rotate and see all keys, with how they do. near: the others that
    rotate. still: layers that see all keys and do not rotate. seen: what each layer's attention
    got. others_mix: True if tokens mix outside of attention.

    Raises ValueError if a layer does something that the ops do not.
    """

    def __init__(
        self, model: nn.Module, owner: nn.Module, rotaries: Sequence[RotaryForward]
    ) -> None:
        self.model = model
        self.owner = owner
        self.rotaries = rotaries
        self.tried = fast_rotaries(rotaries)
        still = self._record(self.tried, (0, 0, 0, 0))
        moved = self._record(self.tried, POSITIONS)
        for layer in rotating_layers(owner):
            if not calls_attention(layer) or (layer in moved.called and layer not in moved.seen):
                name = type(layer).__name__
                reason = f"{name} rotates and weighs keys itself, with nothing to replace"
                raise unsupported(owner, reason)
        self.seen = moved.seen
        self.far: dict[nn.Module, ExtendedLayer] = {}
        self.near: list[nn.Module] = []
        self.still: list[nn.Module] = []
        for layer in self.seen:
            self._sort(layer, still.seen[layer], moved.seen[layer])
        if not self.far:
            bounded = f"{BOUNDED}, so none sees distances past it"
            raise unsupported(owner, bounded if self.near else "none of its layers rotates")
        self.others_mix = mixes(moved.output)

    def scale_by_themselves(self) -> None:
        """Find the layers whose norm undoes the attention factor: a third run, twice as loud.

        By the size of queries: norms add an epsilon.
        """
        loud = self._record(fast_rotaries(self.rotaries, amplitude=2.0), POSITIONS)
        for layer, found in self.far.items():
            dims = 2 * found.rotary.freqs[found.layer_type].inv_freq.shape[-1]
            normal, twice = (
                each[layer].q[..., found.start : found.start + dims].float().norm()
                for each in (self.seen, loud.seen)
            )
            found.scaled = bool(twice > math.sqrt(2) * normal)

    def _record(self, rotaries: Sequence[RotaryForward], positions: Sequence[int]) -> Recorder:
        overrides = [override for each in rotaries for override in each.overrides()]
        fused = [each for each in rotaries if each.fused is not None]
        for each in fused:
            wrap_apply(each.fused.modeling, each)
        try:
            with replaced(overrides):
                modules = [each.module for each in rotaries]
                return recorded(self.model, self.owner, modules, positions)
        finally:
            for each in fused:
                unwrap_apply(each.fused.modeling, each)

    def _sort(self, layer: nn.Module, still: Recorded, moved: Recorded) -> None:
        rotates = not (close(still.q, moved.q) and close(still.k, moved.k))
        if is_windowed(self.owner, layer, moved.options):
            if rotates:
                self.near.append(layer)
        elif not rotates:
            self.still.append(layer)
        else:
            found = self._rotation(layer, still, moved)
            check_options(self.owner, layer, moved.options)
            attend_as_own(self.owner, layer, moved)
            self.far[layer] = found

    def _rotation(self, layer: nn.Module, still: Recorded, moved: Recorded) -> ExtendedLayer:
        """Return how a layer's heads rotate."""
        name = type(layer).__name__
        if not close(still.v, moved.v):
            reason = f"{name} rotates its values too, so its output is not of distances"
            raise unsupported(self.owner, reason)
        both = zip(self.rotaries, self.tried, strict=True)
        kinds = [(rotary, tried, kind) for rotary, tried in both for kind in tried.freqs]
        for rotary, tried, kind in kinds:
            around = [each for each in self.seen if rotary.module in each.modules()]
            if around and layer not in around:
                continue
            own = tried.freqs_on(kind, still.q.device)
            last = still.q.shape[-1] - 2 * own.inv_freq.shape[-1]
            for start, pairs, sign in product({0, last}, (False, True), (1, -1)):
                freqs = RopeFreqs(sign * own.inv_freq)
                layout = {"interleaved": pairs, "rotary_offset": start}
                if last >= 0 and all(
                    close(_rotated(a, freqs, layout), b)
                    for a, b in ((still.q, moved.q), (still.k, moved.k))
                ):
                    return ExtendedLayer(None, rotary, kind, start, pairs, sign)
        raise unsupported(
            self.owner,
            f"what {name} does after its rotation makes its logits depend on more than distances",
        )


def fast_rotaries(rotaries: Sequence[RotaryForward], amplitude: float = 1.0) -> list[RotaryForward]:
    """Return forwards of rotary embeddings so fast that four tokens tell pairs and kinds apart."""
    number, made = count(), []
    for each in rotaries:
        freqs = {
            kind: RopeFreqs(
                probe_numbers(0.2, 1.1, each.rotary_module.dim(kind) // 2)
                * (1 + 0.37 * next(number)),
                amplitude,
            )
            for kind in each.freqs
        }
        made.append(RotaryForward(each.rotary_module, ThreadFrequencies(freqs, {}), each.method))
    return made


def mixes(output: Any) -> bool:
    """Return True if tokens mix outside of attention: a row is not the other one backwards."""
    there, back = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return not close(there, back.flip(0))


def is_windowed(owner: nn.Module, layer: nn.Module, options: Mapping[str, Any]) -> bool:
    """Return True if a layer sees a window or a chunk alone.

    A window is known to the attention, or only to the cache (Phimoe, Moshi), chunks only to the
    mask, which transformers makes by the layer's name.
    """
    if options.get("sliding_window") or is_bounded(kind_of(layer)):
        return True
    return window_of_cache(owner, layer) is not None


def kind_of(layer: nn.Module) -> str:
    """Return the config's name for the layer's kind; "" if it has no names for kinds."""
    kinds = getattr(getattr(layer, "config", None), "layer_types", None)
    index = getattr(layer, "layer_idx", None)
    return kinds[index] if kinds and index is not None and index < len(kinds) else ""


def window_of_cache(owner: nn.Module, layer: nn.Module) -> int | None:
    """Return the window that a layer's cache keeps, even if the layer itself knows none.

    Raises ValueError for a model's own cache, which may keep other keys beside the window.
    """
    from transformers import DynamicCache

    index = getattr(layer, "layer_idx", None)
    try:
        cached = DynamicCache(config=owner.config).layers[index]
    except (AttributeError, IndexError, KeyError, TypeError):  # another layer's keys, or cache
        return None
    window = getattr(cached, "sliding_window", None)
    if window is not None and not type(cached).__module__.startswith(DynamicCache.__module__):
        raise unsupported(owner, f"its {type(cached).__name__} keeps more keys than a window")
    return window


def check_options(owner: nn.Module, layer: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that the ops lack. options: the layer's, for its attention."""
    name = type(layer).__name__
    options = {key: value for key, value in options.items() if value is not None}
    if layer.training:
        dropout = getattr(layer, "attention_dropout", 0.0)
        options["dropout"] = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    refuse_dropout(layer, options)
    if not getattr(layer, "is_causal", True) or options.get("is_causal") is False:
        raise unsupported(
            owner, f"{name} is not causal, but score methods have no distance to later keys"
        )
    if others := [key for key in options if key not in KNOWN]:
        raise unsupported(owner, f"{name} attends with {' and '.join(sorted(others))}")


@torch.no_grad()
def attend_as_own(owner: nn.Module, layer: nn.Module, given: Recorded) -> None:
    """Raise ValueError unless the op gives the same as a layer's own attention."""
    q, k, v = (x.to(given.v.dtype) for x in (given.q, given.k, given.v))
    # Large logits would round the layer's softmax away from the op's (Granite's are not scaled).
    q = q * (16 / (q.norm(dim=-1).amax() * k.norm(dim=-1).amax())).clamp(max=1)
    options = softmax_options(layer, given.options) | no_rotation(q)
    try:
        ours = rope_attention(*(x.transpose(1, 2) for x in (q, k, v)), **options)
    except ValueError as error:  # heads that the op does not support
        raise reprefix_error(error) from None
    mask = v.new_full((4, 4), torch.finfo(v.dtype).min).triu(1)[None, None]
    function = forward_of(layer).__globals__.get("eager_attention_forward")
    try:
        own = function and function(layer, q, k, v, mask, **given.options)[0]
    except Exception as error:  # a foreign function may raise anything
        reason = f"its own attention cannot be tried out ({shortened(error)})"
        raise unsupported(owner, f"{type(layer).__name__}: {reason}") from error
    if own is None or not close(ours, own.view_as(ours)):
        raise unsupported(owner, f"{type(layer).__name__} attends in a way of its own")


def close(a: Tensor, b: Tensor) -> bool:
    """Return True if equal up to a few roundings, at best of float32, the dtype of tables."""
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = 16 * eps * max(b.abs().max().item(), 1e-30)
    return bool((a - b).abs().max() <= tolerance)


def _rotated(x: Tensor, freqs: RopeFreqs, layout: Mapping[str, Any]) -> Tensor:
    """Rotate x, (batch, heads, 4, head_dim), to the probe's positions."""
    options = {"positions": torch.tensor(POSITIONS, device=x.device), "backend": "reference"}
    return apply_rope(x.transpose(1, 2), freqs, **layout, **options).transpose(1, 2)
