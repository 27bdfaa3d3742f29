"""Probe how a model's layers attend, by four tokens: `LayerProbe`.

The model runs with an attention that only records its arguments: once with tables of position 0,
once with those of positions 0 to 3 and of frequencies for the probe. The difference is the
rotation, wherever in a layer it happens. Then the op attends to the same arguments by a score that
changes nothing, and must give the results of the layer's own attention. A third run, backwards and
by louder tables, tells what else must be known.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .... import RopeFreqs, apply_rope
from ...._usage import shortened
from ..._shared.parameters import is_bounded
from ..model import BOUNDED, Override, unsupported
from .attention import (
    TOKENS,
    Call,
    attend_as_own,
    calls_in,
    check_options,
    close,
)
from .rotary import RotaryModule, argument_names, by_name, probe_numbers, rotating_layers

_AMPLITUDE = 2.0  # of a probe of attention factors


@dataclass(frozen=True)
class Heads:
    """The rotation of an extended layer's heads, and the bounds of the keys that they see.

    start: the first rotated dim; the frequencies tell how many there are.
    interleaved: the pairing of dims. sign: -1 if pairs are rotated backwards. scaled: False if a
    norm after the rotation undoes the attention factor (Llama 4).
    chunk_size: in tokens, if the layer attends in chunks. sliding_window: in tokens, if its cache
    keeps no more, even if its attention gets no such option.
    """

    start: int
    interleaved: bool
    sign: int
    scaled: bool = True
    chunk_size: int | None = None
    sliding_window: int | None = None

    @property
    def layout(self) -> dict[str, Any]:
        """The arguments that tell the ops which dims rotate."""
        return {"interleaved": self.interleaved, "rotary_offset": self.start}


@dataclass(frozen=True)
class Recorded:
    """A layer's arguments to its attention: q, k, v of (1, heads, 4, head_dim), and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


class UnfitLayer(Exception):
    """A layer does something that a score method cannot; the message says what."""


class Recorder:
    """An attention that records its arguments; it takes the mask's place, so layers call it.

    calls: each layer's form of call of its attention.
    called: the layers that the owner has called. seen: their arguments to attention.
    output: the owner's output.
    """

    def __init__(self, calls: Mapping[nn.Module, Call]) -> None:
        self.calls = calls
        self.called: set[nn.Module] = set()
        self.seen: dict[nn.Module, Recorded] = {}
        self.output: Any = None

    @contextmanager
    def in_place(self, overrides: Iterable[Override] = ()) -> Iterator[None]:
        """Make the layers call this recorder for a while. overrides: more attributes to hide."""
        overrides = list(overrides)
        for layer, call in self.calls.items():
            overrides += call.overrides(layer)
        handles = [
            layer.register_forward_pre_hook(self.before_layer, with_kwargs=True)
            for layer in self.calls
        ]
        try:
            with replaced(overrides):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def before_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        self.called.add(layer)
        arguments = by_name(argument_names(layer), args, kwargs)
        return (), self.calls[layer].with_attention(layer, arguments, self)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise UnfitLayer(
                f"{type(module).__name__} attends to keys beside those of the tokens, "
                "which have no distance"
            )
        self.seen[module] = Recorded(q, k, v, options)
        # Made of the values alone: later layers are then the same in both runs.
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()


@contextmanager
def replaced(overrides: Sequence[Override]) -> Iterator[None]:
    """Hide attributes of modules for a while."""
    before = [(module, name, vars(module).get(name)) for module, name, _ in overrides]
    for module, name, value in overrides:
        vars(module)[name] = value
    try:
        yield
    finally:
        for module, name, value in before:
            if value is None:
                del vars(module)[name]
            else:
                vars(module)[name] = value


def first_call(model: nn.Module, owner: nn.Module) -> nn.Module:
    """Return the module that a probe of an owner calls: FSDP wants its root called first."""
    return model if _fsdp_modules(model) else owner


def _fsdp_modules(module: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [each for each in module.modules() if fsdp and isinstance(each, fsdp.FSDPModule)]


@torch.no_grad()
def probe_layers(owner: nn.Module, backwards: bool = False) -> Any:
    """Run an owner, or its `first_call`, on four tokens without dropout; return its output.

    backwards: True for the last token first.
    """
    embed = getattr(owner, "get_input_embeddings", None)
    weights = embed() if embed is not None else owner
    tokens = torch.arange(TOKENS, device=_device_of(weights))[None]
    tokens = tokens.flip(1) if backwards else tokens
    with without_dropout(owner):
        output = owner(input_ids=tokens, use_cache=False)
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


# Rotary embeddings with the kinds of layers to extend, and each one's frequencies for the probe.
_ProbeFreqs = list[tuple[RotaryModule, "str | None", Tensor]]


def _probe_freqs(rotary_modules: Sequence[RotaryModule]) -> _ProbeFreqs:
    """Return frequencies so fast that four tokens tell all pairs and kinds apart."""
    kinds = [(each, layer_type) for each in rotary_modules for layer_type in each.layer_types]
    return [
        (each, kind, probe_numbers(0.2, 1.1, each.dim(kind) // 2) * (1 + 0.37 * number))
        for number, (each, kind) in enumerate(kinds)
    ]


class _ProbeTables:
    """A rotary embedding that gives extended layers tables of the probe's frequencies."""

    def __init__(
        self, rotary_module: RotaryModule, freqs: _ProbeFreqs, still: bool, amplitude: float
    ) -> None:
        self.rotary = rotary_module.module
        self.still = still
        self.tables = {
            layer_type: rotary_module.tables(layer_type, RopeFreqs(inv_freq, amplitude))
            for other, layer_type, inv_freq in freqs
            if other is rotary_module
        }

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        if layer_type not in self.tables:
            return type(self.rotary).forward(self.rotary, x, position_ids, layer_type)
        positions = torch.arange(position_ids.shape[-1], device=x.device) * (not self.still)
        return self.tables[layer_type](x, positions.expand(position_ids.shape))


class LayerProbe:
    """The attention layers that an owner's rotary embeddings serve.

    far: layers to extend, which see all keys, with the rotation of their heads.
    near: layers that attend as before: those without a rotation and, unless layers="all", those
        with a sliding window or chunks, where training has covered all distances.
    calls: each layer's form of call of its attention.
    seen: what each layer's attention got at positions 0 to 3.
    others_mix: True if tokens mix outside of attention (convolutions, states).
    needs_mask: True if something else than the attention of far layers may use the mask: padding
        would change other tokens in convolutions and states.
    around: the layer of a rotary embedding that belongs to one layer.

    Raises ValueError if a layer does something that the ops do not.
    """

    def __init__(
        self,
        model: nn.Module,
        owner: nn.Module,
        rotary_modules: Sequence[RotaryModule],
        layers: str,
    ) -> None:
        self.owner = owner
        self.first_call = first_call(model, owner)
        self.rotary_modules = rotary_modules
        self.freqs = _probe_freqs(rotary_modules)
        self.calls = calls_in(owner)
        self.around = {
            each.module: layer
            for layer in self.calls
            for each in rotary_modules
            if each.module in layer.modules()
        }
        self.far: dict[nn.Module, Heads] = {}
        self.near: list[nn.Module] = []
        still, moved = self._record(still=True), self._record()
        for layer in rotating_layers(owner):
            if layer not in self.calls or (layer in moved.called and layer not in moved.seen):
                name = type(layer).__name__
                reason = f"{name} computes its attention itself, with nothing to replace"
                raise unsupported(owner, reason)
        back = self._record(still=True, backwards=True, amplitude=_AMPLITUDE)
        self.seen, self._loud = moved.seen, back.seen
        rotates = [
            self._sort(each, still.seen[each], moved.seen[each], layers) for each in self.seen
        ]
        if not self.far:
            bounded = f"{BOUNDED}, so none sees distances past it"
            raise unsupported(owner, bounded if any(rotates) else "none of its layers rotates")
        self.others_mix = mixes(still.output, back.output)
        all_far = len(self.far) == getattr(owner.config, "num_hidden_layers", None)
        self.needs_mask = self.others_mix or not all_far

    def _record(
        self, still: bool = False, backwards: bool = False, amplitude: float = 1.0
    ) -> Recorder:
        """Run the owner on four tokens; still: True for all of them at position 0."""
        recorder = Recorder(self.calls)
        overrides = [
            (each.module, "forward", _ProbeTables(each, self.freqs, still, amplitude))
            for each in self.rotary_modules
        ]
        try:
            with recorder.in_place(overrides):
                recorder.output = probe_layers(self.first_call, backwards)
        except UnfitLayer as unfit:
            raise unsupported(self.owner, str(unfit)) from unfit
        except Exception as error:  # a foreign layer may raise anything
            reason = f"its layers cannot be tried out on four tokens ({shortened(error)})"
            if Recorder.__name__ in str(error):
                reason = (
                    "its layers choose or weigh keys by a mask made of their contents, "
                    "a score method by distances alone"
                )
            raise unsupported(self.owner, reason) from error
        return recorder

    def _sort(self, layer: nn.Module, still: Recorded, moved: Recorded, layers: str) -> bool:
        """Sort a layer into far or near; return True if it rotates."""
        heads, freqs = self._heads(layer, still, moved)
        bounds = None if heads is None else self._bounds(layer, moved.options, layers)
        if bounds is None or (bounds and layers == "full"):
            self.near.append(layer)
            return heads is not None
        check_options(self.owner, layer, moved.options)
        qkv = (still.q, still.k, moved.v)
        attend_as_own(self.owner, layer, self.calls[layer], qkv, freqs, heads.layout, moved)
        dims = slice(heads.start, heads.start + 2 * freqs.inv_freq.numel())
        scaled = _grows(still.q[..., dims], self._loud[layer].q[..., dims])
        self.far[layer] = replace(heads, scaled=scaled, **bounds)
        return True

    def _heads(
        self, layer: nn.Module, still: Recorded, moved: Recorded
    ) -> tuple[Heads | None, RopeFreqs | None]:
        """Return a layer's rotation (None without one) and the probe's frequencies."""
        name = type(layer).__name__
        if close(still.q, moved.q) and close(still.k, moved.k):
            return None, None
        if not close(still.v, moved.v):
            reason = f"{name} rotates its values too, so its output is not of distances"
            raise unsupported(self.owner, reason)
        for rotary_module, _, inv_freq in self.freqs:
            if self.around.get(rotary_module.module, layer) is not layer:
                continue
            last = still.q.shape[-1] - 2 * inv_freq.numel()
            starts = {0, last} if last >= 0 else set()
            for start, interleaved, sign in product(starts, (False, True), (1, -1)):
                heads = Heads(start, interleaved, sign)
                freqs = RopeFreqs(sign * inv_freq.to(still.q.device))
                if all(
                    close(_rotated(a, freqs, heads), b)
                    for a, b in ((still.q, moved.q), (still.k, moved.k))
                ):
                    return heads, freqs
        raise unsupported(
            self.owner,
            f"what {name} does after its rotation makes its logits depend on more than distances",
        )

    def _bounds(
        self, layer: nn.Module, options: Mapping[str, Any], layers: str
    ) -> dict[str, int] | None:
        """Return the window or the chunks of a layer, by their name in `Heads`; {} without.

        A window is known to the attention, or only to the cache (Phimoe, Moshi), chunks only to the
        mask, which transformers makes by the layer's name. None for a layer of such a name without
        a size, and for chunks that are not to be extended.
        """
        if window := options.get("sliding_window"):
            return {"sliding_window": window}
        if is_bounded(kind_of(layer)):
            size = getattr(layer.config, "attention_chunk_size", None)
            return {"chunk_size": size} if size and layers == "all" else None
        window = window_of_cache(self.owner, layer)
        return {"sliding_window": window} if window else {}


def mixes(there: Any, back: Any) -> bool:
    """Return True if tokens mix outside of attention.

    The owner runs on four tokens, and on the same backwards, with an attention that gives every
    token its own value: one result must be the other backwards.
    """
    there, back = (
        next(iter(x.values())) if isinstance(x, Mapping) else x[0] for x in (there, back)
    )
    return not close(there, back.flip(1))


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


def _grows(normal: Tensor, loud: Tensor) -> bool:
    """Return True if the probe's amplitude has grown these dims, not been undone by a norm.

    By their size: norms add an epsilon, and tokens that come backwards may mix otherwise.
    """
    return bool(loud.float().norm() > math.sqrt(_AMPLITUDE) * normal.float().norm())


def _rotated(x: Tensor, freqs: RopeFreqs, heads: Heads) -> Tensor:
    """Rotate x, (batch, heads, seqlen, head_dim)."""
    options = {"positions": torch.arange(x.shape[2], device=x.device), "backend": "reference"}
    return apply_rope(x.transpose(1, 2), freqs, **heads.layout, **options).transpose(1, 2)
