"""Patches of the methods that generate: `generate`, its masks, and continuous batching.

A forward in progress has one state, `in_progress`, which each thread has for itself:

    "request"           the `Request` that `generate` has begun
    a key of our hooks  the cache that the owner reads

Those who begin something set it and take it back, after an error too. Copies of a model share the
keys: they may go on with each other's caches. `rotation.ThreadFrequencies` are each thread's too.

In three places it cannot be used, and state travels with the model's own objects instead:

- From the rotary embedding to the layers. A layer may be recomputed for its gradients, when the
  forward is over, maybe in another thread. So the rotary embedding returns a `Rotation` in place of
  its tables. Layers unpack two tables, so both are the same object.
- From the owner to a layer's attention. The mask tells the rows; what is read of it is kept on it.
- From one forward to the next. A cache keeps the frequencies of its request (`on_cache`) and what
  filled it (`caches.Filled`), in attributes: its copies have them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import paged
from .attention import INTERFACE
from .model import Override, cache_of, generation_config_owner, in_progress, tokens_of
from .patches import ON_OWNER, Applied, Patches
from .rotation import FreqsByKind

_ON_CACHE = "_extrope"


class Frozen(NamedTuple):
    """The frequencies of a request, chosen for its longest row, and their fingerprints."""

    freqs: FreqsByKind
    fingerprints: dict[str | None, str]
    longest: int


def on_cache(cache: Any) -> dict[str, Any]:
    """Return the frequencies that a cache tells: `Frozen` by the key of hooks."""
    if not hasattr(cache, _ON_CACHE):
        setattr(cache, _ON_CACHE, {})
    return getattr(cache, _ON_CACHE)


@dataclass
class Request:
    """A call of `generate`.

    limit: tokens that it may reach, padding included.
    pads: padding of each row, if known; the first forward may see only a piece of the prompt.
    drafts: made by a model that another one asks to draft.
    frozen: its frequencies, by the key of the hooks that chose.
    """

    limit: int
    pads: list[int] | None = None
    drafts: bool = False
    frozen: dict[str, Frozen] = field(default_factory=dict)


def _replaced(model: nn.Module, name: str, function: Callable[..., Any], *bound: Any) -> list:
    """Return the override of a method of the model that generates; none if it has no such method.

    function: takes that model, what it replaces (maybe an earlier replacement), `bound`, and the
        arguments of a call.
    """
    owner = generation_config_owner(model)
    if not hasattr(owner, name):
        return []
    previous = vars(owner).get(name) or partial(getattr(type(owner), name), owner)
    return [(owner, name, partial(function, owner, previous, *bound))]


def request_patches(model: nn.Module) -> list[Override]:
    """Return the override of `generate` by which each call is one request."""
    return _replaced(model, "generate", _generate_one_request)


def mask_patches(model: nn.Module) -> list[Override]:
    """Return the override that keeps the mask of rows for layers that attend by a score method."""
    owner = generation_config_owner(model)
    has = hasattr(owner, "generate")
    return [(owner, "create_masks_for_generate", keep_mask)] if has else []


def batching_patches(model: nn.Module, refused: str | None = None) -> list[Override]:
    """Return the override of continuous batching.

    refused: the extension's method, if its frequencies depend on the length.
    """
    return _replaced(model, "init_continuous_batching", _start_batching, refused)


def _start_batching(
    model: nn.Module,
    previous: Callable[..., Any],
    refused: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replace `model.init_continuous_batching`; refused: as for `batching_patches`."""
    if refused is not None:
        raise ValueError(
            f"extend: {refused} must be given a seq_len for continuous batching, got none; one "
            "forward has requests of many lengths, and one set of frequencies"
        )
    _stay_out_of_graphs()
    implementation = model.config._attn_implementation
    if implementation == INTERFACE:
        # The manager takes names that it knows; extended layers keep theirs.
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        manager = previous(*args, **kwargs)
    except BaseException:
        if implementation == INTERFACE:
            model.set_attn_implementation(implementation)
        raise
    if implementation == INTERFACE:
        manager._original_attn_impl = implementation  # its `stop` restores it
    return manager


def forget_pages(model: nn.Module) -> None:
    """Drop a manager that the model keeps: its pages hold keys of the earlier rotation."""
    generator = generation_config_owner(model)
    if hasattr(generator, "destroy_cached_continuous_batching_manager"):
        generator.destroy_cached_continuous_batching_manager()


@cache
def _stay_out_of_graphs() -> None:
    """Let compiled steps call the attention over pages, as they call transformers' own.

    PyTorch 2.13 cannot compile a product of sizes of views of pages, all of them unknown. Done
    late, because it imports the compiler.
    """
    paged.attend = torch.compiler.disable(paged.attend)


def _generate_one_request(
    model: nn.Module, previous: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Replace `model.generate`: each call is one request, for all its forwards."""
    outer = getattr(in_progress, "request", None)  # of a model that asks this one to draft
    mask = kwargs.get("attention_mask")
    known = isinstance(mask, Tensor) and mask.dim() == 2
    pads = (mask == 0).sum(-1).tolist() if known else None
    drafts = outer is not None
    in_progress.request = Request(_reach(model, *args, **kwargs), pads, drafts)
    try:
        return previous(*args, **kwargs)
    finally:
        in_progress.request = outer


class Reach:
    """Warns once of a generation, or of a forward, past the tokens that an extension reaches.

    applied: the extension on `owner` that has this length; one after it may reach further.
    """

    def __init__(self, owner: nn.Module, applied: Applied, length: int) -> None:
        self.owner = owner
        self.applied = applied
        self.length = length
        self.warned = False

    def patches(self, model: nn.Module) -> Patches:
        """Return the override of `generate`, and the hook of the owner's forwards."""
        overrides = _replaced(model, "generate", self.generate)
        return Patches(overrides, [(self.owner, self.before_forward, None)])

    def generate(
        self, model: nn.Module, previous: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Replace `model.generate`."""
        if not self.warned and _reach(model, *args, **kwargs) > self.length:
            self._warn("this generation may go")
        return previous(*args, **kwargs)

    def before_forward(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Look how far a forward reads: hook before it. No device is read for it."""
        if self.warned or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        tokens, positions = tokens_of(arguments), arguments.get("position_ids")
        cache = cache_of(arguments)
        past = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        if tokens is None or isinstance(past, Tensor) or past + tokens.shape[1] <= self.length:
            return
        packed = positions is not None and positions.device.type != "cpu"  # it may be
        if not packed and (positions is None or int(positions.max()) >= self.length):
            self._warn("this forward goes")

    def _warn(self, what: str) -> None:
        if vars(self.owner).get(ON_OWNER) is not self.applied:
            return
        self.warned = True
        warnings.warn(
            f"extend: {what} past the {self.length:,} tokens that {self.applied.method} reaches",
            stacklevel=3,  # of the caller of `generate`
        )


def _reach(
    model: nn.Module, inputs: Any = None, generation_config: Any = None, *_: Any, **kwargs: Any
) -> int:
    """Return the tokens that `generate` may reach; those of the prompt if it sets no limit."""
    # Beside embeddings there may be ids of no tokens.
    prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    prompt = max((x.shape[1] for x in prompts if x is not None), default=1)
    defaults = getattr(model, "generation_config", None)

    def limit(name: str) -> int | None:
        if name in kwargs:
            return kwargs[name]
        values = (getattr(config, name, None) for config in (generation_config, defaults))
        return next((value for value in values if value is not None), None)

    if (new_tokens := limit("max_new_tokens")) is not None:
        return prompt + new_tokens
    return max(prompt, limit("max_length") or 0)


def keep_mask(*, attention_mask: Any = None, **arguments: Any) -> Any:
    """Replace a model's `create_masks_for_generate`: keep the mask, which rows are read from.

    With a static cache it gets the cache's length, so that every step has the same shapes.
    """
    layers = getattr(cache_of(arguments), "layers", ())
    slots = max((getattr(layer, "max_cache_len", 0) for layer in layers), default=0)
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return attention_mask
    return nn.functional.pad(attention_mask, (0, max(slots - attention_mask.shape[1], 0)))
