"""Four tokens through a model whose attention only records what it gets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from .architecture import RotarySite
from .calls import Call, Override
from .forwards import argument_names, by_name
from .rotation import register_attention
from .tables import Tables, trial_numbers

TOKENS = 4
# Rotary embeddings with the kinds of layers to extend, and the trial's frequencies for each.
Ladders = list[tuple[RotarySite, "str | None", Tensor]]


@dataclass(frozen=True)
class Recorded:
    """What a layer hands to its attention: q, k, v of (1, heads, 4, head_dim), and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


class Recorder:
    """Takes the mask's place, and so is asked to attend.

    calls: how each layer calls its attention. name: of the mask among several, where layers get a
    mapping of them; None for the whole argument.
    called: layers that the owner has called; seen: what those with an attention gave to it.
    masks: as the owner gave them. names: of those, where layers got several.
    output: of the owner.
    """

    def __init__(self, calls: Mapping[nn.Module, Call], name: str | None = None) -> None:
        self.calls = calls
        self.name = name
        self.called: dict[nn.Module, None] = {}
        self.seen: dict[nn.Module, Recorded] = {}
        self.masks: dict[nn.Module, Any] = {}
        self.names: list[str] = []
        self.output: Any = None

    @contextmanager
    def in_place(
        self,
        overrides: Iterable[Override] = (),
        hooks: Iterable[tuple[nn.Module, Callable[..., Any]]] = (),
    ) -> Iterator[None]:
        """Have the layers ask this recorder for a while.

        overrides: more attributes to hide. hooks: more forward pre-hooks, after the recorder's own.
        """
        register_attention()
        overrides = list(overrides)
        for layer, call in self.calls.items():
            overrides += call.overrides(layer)
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for module, hook in [*((layer, self.before_layer) for layer in self.calls), *hooks]
        ]
        try:
            with replaced(overrides):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def note_layer(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of every layer that rotates."""
        self.called[layer] = None

    def before_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        arguments = by_name(argument_names(layer), args, kwargs)
        mask = self.masks[layer] = arguments.get("attention_mask")
        self.names = list(mask) if isinstance(mask, Mapping) else self.names
        return (), with_mask(arguments, self.name, self.calls[layer].mask(layer, self))

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        if k.shape[2] != q.shape[2]:
            raise UnfitLayer(
                f"{type(module).__name__} attends to keys beside those of the tokens, "
                "which have no distance"
            )
        self.seen[module] = Recorded(q, k, v, options)
        # Of the values alone, so that what comes after is the same in both runs.
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()


class UnfitLayer(Exception):
    """Says what of a layer a score method cannot do."""


def with_mask(arguments: dict[str, Any], name: str | None, value: Any) -> dict[str, Any]:
    """Return a layer's arguments with `value` as the mask of that name, or as the only one."""
    if name is not None:
        value = {**arguments["attention_mask"], name: value}
    return arguments | {"attention_mask": value}


class TrialTables:
    """Stands in for a rotary embedding: tables of the trial's frequencies for what is extended."""

    def __init__(self, site: RotarySite, ladders: Ladders, still: bool) -> None:
        self.rotary = site.rotary
        self.still = still
        self.tables = {
            layer_type: Tables(site.rotary, layer_type, RopeFreqs(inv_freq), site.order(layer_type))
            for other, layer_type, inv_freq in ladders
            if other is site
        }

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        if layer_type not in self.tables:
            return type(self.rotary).forward(self.rotary, x, position_ids, layer_type)
        positions = torch.arange(position_ids.shape[-1], device=x.device) * (not self.still)
        return self.tables[layer_type](x, positions.expand(position_ids.shape))


def ladders_of(sites: list[RotarySite]) -> Ladders:
    """Return the kinds of layers to extend, each with frequencies of its own for the trial.

    They are fast enough for four tokens to tell all pairs, and kinds, apart.
    """
    kinds = [(site, layer_type) for site in sites for layer_type in site.layer_types]
    return [
        (site, kind, trial_numbers(0.2, 1.1, site.dim(kind) // 2) * (1 + 0.37 * number))
        for number, (site, kind) in enumerate(kinds)
    ]


def sees_chunks(mask: Any, size: int) -> bool:
    """Say whether a layer's mask of the trial lets tokens see their own chunks of that size."""
    if not isinstance(mask, Tensor) or mask.shape[-2:] != (TOKENS, TOKENS):
        return False
    token = torch.arange(TOKENS, device=mask.device)
    own = token[:, None] // size == token // size
    seen = mask if mask.dtype == torch.bool else mask == 0
    return bool((seen == (own & (token <= token[:, None]))).all())


@contextmanager
def replaced(overrides: list[Override]) -> Iterator[None]:
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


def entrance(model: nn.Module, owner: nn.Module) -> nn.Module:
    """Return what a trial of an owner calls: FSDP wants its root called first."""
    return model if _fsdp_modules(model) else owner


def _fsdp_modules(module: nn.Module) -> list[Any]:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [each for each in module.modules() if fsdp and isinstance(each, fsdp.FSDPModule)]


@torch.no_grad()
def run_on_trial(owner: nn.Module, backwards: bool = False, **options: Tensor) -> Any:
    """Run an owner, or its `entrance`, on four tokens as in evaluation; return its output.

    backwards: the last token first.
    """
    embed = getattr(owner, "get_input_embeddings", None)
    weights = embed() if embed is not None else owner
    tokens = torch.arange(TOKENS, device=_device_of(weights))[None]
    options = {name: value.to(tokens.device) for name, value in options.items()}
    tokens = tokens.flip(1) if backwards else tokens
    with _evaluating(owner):
        output = owner(input_ids=tokens, use_cache=False, **options)
    for module in _fsdp_modules(owner):
        module.reshard()  # the root keeps its parameters whole, for a backward
    return output


def _device_of(weights: nn.Module) -> Any:
    """Return where a module computes; accelerate keeps weights that it has offloaded on meta."""
    device = next(weights.parameters()).device
    hook = getattr(weights, "_hf_hook", None)
    return getattr(hook, "execution_device", device) if device.type == "meta" else device


@contextmanager
def _evaluating(owner: nn.Module) -> Iterator[None]:
    """No dropout: both runs of a trial must be the same but for the positions."""
    training = [module for module in owner.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
