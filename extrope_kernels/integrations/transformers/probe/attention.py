"""How a model's layers call their attention, and if the op can attend in its place.

A layer passes its mask on to its attention, whatever it does before. So an object in the mask's
place can compute the attention: `attend(layer, q, k, v, options)`, with q, k, v of (batch, heads,
seqlen, head_dim) and the options of transformers' interface, returns (batch, seqlen, heads,
head_dim). Layers call their attention in three ways, one `Call` each.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .... import RopeFreqs, rope_attention
from ...._usage import shortened
from ..attention import BOUNDARIES, KNOWN, softmax_options
from ..model import (
    Override,
    reprefix_error,
    unsupported,
)
from .rotary import forward_of

TOKENS = 4  # of a probe
ATTENTION = "extrope_score"  # in the config of a layer that attends by a score method
# The object in the mask's place is passed by this name too, as accelerate removes masks.
ARGUMENT = "extrope_attention"
_METHOD = ["self", "query", "key", "value", "attention_mask"]
_sdpa = nn.functional.scaled_dot_product_attention


class Call:
    """A call through transformers' registered functions, by the name in the layer's config."""

    attention = ATTENTION

    def overrides(self, layer: nn.Module) -> list[Override]:
        """Return attributes that make the layer use the object in the mask's place."""
        register_attention()
        config = copy.copy(layer.config)  # everything in it is shared
        config._attn_implementation_internal = self.attention
        return [(layer, "config", config)]

    def with_attention(
        self, layer: nn.Module, arguments: Mapping[str, Any], attention: Any
    ) -> dict[str, Any]:
        """Return a layer's arguments with what leads to `attention` in the place of its mask.

        Of several, by name, that is the first one (Zaya's convolutions have another).
        """
        mask, before = self.mask(layer, attention), arguments.get("attention_mask")
        if isinstance(before, Mapping):
            mask = {**before, next(iter(before)): mask}
        return {**arguments, "attention_mask": mask}

    def mask(self, layer: nn.Module, attention: Any) -> Any:
        """Return the object for the mask's place that leads to `attention`."""
        return attention

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor | None:
        """Attend by the layer's own function; None if it has none."""
        function = forward_of(layer).__globals__.get("eager_attention_forward")
        return function and function(layer, q, k, v, mask, **options)[0]


class SdpaCall(Call):
    """A call of PyTorch's function, for layers whose config names it (Falcon)."""

    attention = "sdpa"

    def mask(self, layer: nn.Module, attention: Any) -> Any:
        return _SdpaMask(layer, attention)

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor:
        return _sdpa(q, k, v, mask, scale=options["scaling"], enable_gqa=True).transpose(1, 2)


class MethodCall(Call):
    """A call of the layer's own method of (query, key, value, mask): GPT-NeoX-Japanese."""

    def __init__(self, name: str) -> None:
        self.name = name

    def overrides(self, layer: nn.Module) -> list[Override]:
        return [(layer, self.name, partial(_attend_by_mask, layer))]

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor:
        return getattr(type(layer), self.name)(layer, q, k, v, mask)[0].transpose(1, 2)


def call_of(module: nn.Module) -> Call | None:
    """Return how a module calls its attention; None if no op can replace that."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "attention_mask" not in code.co_varnames[: code.co_argcount]:
        return None
    if "config" in vars(module):
        if "ALL_ATTENTION_FUNCTIONS" in code.co_names:
            return Call()
        if _sdpa.__name__ in code.co_names:
            return SdpaCall()
    for name in code.co_names:
        method = inspect.getattr_static(type(module), name, None)
        if inspect.isfunction(method) and list(inspect.signature(method).parameters) == _METHOD:
            return MethodCall(name)
    return None


def calls_in(owner: nn.Module) -> dict[nn.Module, Call]:
    """Return an owner's modules whose attention an op can replace, with their calls of it."""
    calls = ((module, call_of(module)) for module in owner.modules())
    return {module: call for module, call in calls if call is not None}


def register_attention() -> None:
    """Register the attention of score methods by name in transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attend by the object in the mask's place: a function of transformers' interface."""
    attention_mask = options.pop(ARGUMENT, attention_mask)
    if attention_mask is None or isinstance(attention_mask, Tensor):
        raise RuntimeError(
            f"extend: {type(module).__name__} must be called by its model, got a direct call"
        )
    return attention_mask.attend(module, query, key, value, options), None


def _attend_by_mask(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any
) -> tuple[Tensor, None]:
    options = {"dropout": dropout_of(layer) if layer.training else 0.0}
    return attention_mask.attend(layer, query, key, value, options).transpose(1, 2), None


@dataclass(frozen=True, eq=False)
class _SdpaMask:
    """A mask that takes over PyTorch's attention function."""

    layer: nn.Module
    attention: Any

    def __getitem__(self, index: Any) -> _SdpaMask:
        """Return itself: before 5.2, transformers' layers cut their mask to the number of keys."""
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function is not _sdpa:
            return NotImplemented
        return _sdpa_by_mask(*args, **(kwargs or {}))


def _sdpa_by_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # ignored: it is False beside a mask
    scale: float | None = None,
    enable_gqa: bool = False,  # ignored: the numbers of heads tell
) -> Tensor:
    options = {"scaling": scale, "dropout": dropout_p}
    out = attn_mask.attention.attend(attn_mask.layer, query, key, value, options)
    return out.transpose(1, 2)


def dropout_of(layer: nn.Module) -> float:
    """Return a layer's dropout probability; 0 outside training."""
    dropout = getattr(layer, "attention_dropout", 0.0)
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout


def no_freqs(x: Tensor) -> RopeFreqs:
    """Return frequencies of 0, for queries and keys that need no rotation by an op."""
    return RopeFreqs(torch.zeros(1, dtype=torch.float32, device=x.device))


def refuse_options(module: nn.Module, options: Mapping[str, Any], packed: bool = False) -> None:
    """Raise ValueError for options that change the attention and may be set at any time.

    packed: the rows are packed, and know the boundaries of sequences.
    """
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )
    if options.get(BOUNDARIES) is not None and not packed:
        raise ValueError(
            f"extend: {BOUNDARIES} must be left out, got one; give each sequence a row"
        )


@torch.no_grad()
def attend_as_own(
    owner: nn.Module,
    layer: nn.Module,
    call: Call,
    qkv: tuple[Tensor, Tensor, Tensor],
    freqs: RopeFreqs,
    layout: Mapping[str, Any],
    given: Any,
) -> None:
    """Raise ValueError unless the op gives the same as a layer's own attention.

    qkv: the op's, of (1, heads, 4, head_dim), rotated by freqs in the dims that `layout` tells.
    given: the layer's own, `Recorded`.
    """
    v = given.v
    qkv = [x.to(v.dtype).transpose(1, 2) for x in qkv]
    options = softmax_options(layer, given.options)
    try:
        ours = rope_attention(*qkv, freqs, **layout, **options)
    except ValueError as error:  # heads that the op does not support
        raise reprefix_error(error) from None
    mask = v.new_full((TOKENS, TOKENS), torch.finfo(v.dtype).min).triu(1)
    q, k = given.q.to(v.dtype), given.k.to(v.dtype)
    try:
        own = call.own(layer, q, k, v, mask[None, None], given.options)
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


def check_options(owner: nn.Module, layer: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ValueError for options that the ops lack. options: the layer's, for its attention."""
    name = type(layer).__name__
    options = {key: value for key, value in options.items() if value is not None}
    if layer.training:
        options["dropout"] = dropout_of(layer)
    refuse_options(layer, options)
    if not getattr(layer, "is_causal", True) or options.get("is_causal") is False:
        raise unsupported(
            owner, f"{name} is not causal, but score methods have no distance to later keys"
        )
    if others := [key for key in options if key not in KNOWN]:
        raise unsupported(owner, f"{name} attends with {' and '.join(sorted(others))}")
