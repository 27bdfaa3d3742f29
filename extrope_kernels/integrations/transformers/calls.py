"""How layers call their attention, and how they call an op instead.

Whatever the way, what stands in the mask's place is asked: `attend(layer, q, k, v, options)`, with
q, k, v of (batch, heads, seqlen, head_dim) and the options of transformers' interface, returns
(batch, seqlen, heads, head_dim).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn

from .forwards import argument_names
from .fused import forward_of
from .rotation import ATTENTION

Override = tuple[nn.Module, str, Any]


class Call(Protocol):
    """A way in which layers call their attention."""

    def overrides(self, layer: nn.Module) -> list[Override]:
        """Return the attributes that make the layer ask what stands in the mask's place."""
        ...

    def mask(self, layer: nn.Module, attending: Any) -> Any:
        """Return what to put in the mask's place, so that `attending` is asked."""
        ...

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor | None:
        """Attend as the layer itself does; None where there is no function of its own."""
        ...


def call_of(module: nn.Module) -> Call | None:
    """Return how a module calls its attention; None where it has none that an op can replace."""
    forward = forward_of(module)
    if forward is None or "attention_mask" not in argument_names(module):
        return None
    names = forward.__code__.co_names
    if "config" in vars(module):
        if "ALL_ATTENTION_FUNCTIONS" in names:
            return Interface()
        if Sdpa.function.__name__ in names:
            return Sdpa()
    for name in names:
        method = inspect.getattr_static(type(module), name, None)
        if inspect.isfunction(method) and list(inspect.signature(method).parameters) == _METHOD:
            return Method(name)
    return None


def calls_in(owner: nn.Module) -> dict[nn.Module, Call]:
    """Return the modules of an owner whose attention an op can replace, and how each calls it."""
    calls = ((module, call_of(module)) for module in owner.modules())
    return {module: call for module, call in calls if call is not None}


_METHOD = ["self", "query", "key", "value", "attention_mask"]


@dataclass(frozen=True)
class Interface:
    """Through transformers' registered functions, by the name in the layer's config."""

    def overrides(self, layer: nn.Module) -> list[Override]:
        return [(layer, "config", _switched(layer.config, ATTENTION))]

    def mask(self, layer: nn.Module, attending: Any) -> Any:
        return attending

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor | None:
        function = forward_of(layer).__globals__.get("eager_attention_forward")
        return function and function(layer, q, k, v, mask, **options)[0]


@dataclass(frozen=True)
class Sdpa:
    """By PyTorch's function, where the layer's config names it (Falcon)."""

    function = nn.functional.scaled_dot_product_attention

    def overrides(self, layer: nn.Module) -> list[Override]:
        return [(layer, "config", _switched(layer.config, "sdpa"))]

    def mask(self, layer: nn.Module, attending: Any) -> Any:
        return _SdpaMask(layer, attending)

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor:
        out = Sdpa.function(q, k, v, mask, scale=options["scaling"], enable_gqa=True)
        return out.transpose(1, 2)


@dataclass(frozen=True, eq=False)
class _SdpaMask:
    """A mask for which PyTorch's function asks how to attend."""

    layer: nn.Module
    attending: Any

    def __getitem__(self, index: Any) -> _SdpaMask:
        """The layers of transformers before 5.2 cut their mask to the keys that there are."""
        return self

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if function is not Sdpa.function:
            return NotImplemented
        q, k, v, mask, dropout, is_causal, scale = _sdpa_arguments(*args, **(kwargs or {}))
        if is_causal:
            raise ValueError("extend: is_causal must be False beside a mask, got True")
        options = {"scaling": scale, "dropout": dropout}
        return mask.attending.attend(mask.layer, q, k, v, options).transpose(1, 2)


def _sdpa_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,  # heads tell, whatever it says
) -> tuple:
    return query, key, value, attn_mask, dropout_p, is_causal, scale


@dataclass(frozen=True)
class Method:
    """By a method of (query, key, value, attention_mask) of the layer (GPT-NeoX-Japanese)."""

    name: str

    def overrides(self, layer: nn.Module) -> list[Override]:
        return [(layer, self.name, partial(_attend_by_mask, layer))]

    def mask(self, layer: nn.Module, attending: Any) -> Any:
        return attending

    def own(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict
    ) -> Tensor:
        return getattr(type(layer), self.name)(layer, q, k, v, mask)[0].transpose(1, 2)


def _attend_by_mask(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any
) -> tuple[Tensor, None]:
    options = {"dropout": dropout_of(layer) if layer.training else 0.0}
    return attention_mask.attend(layer, query, key, value, options).transpose(1, 2), None


def dropout_of(layer: nn.Module) -> float:
    """Return the probability with which a layer in training drops weights."""
    dropout = getattr(layer, "attention_dropout", 0.0)
    return dropout.p if isinstance(dropout, nn.Dropout) else dropout


def _switched(config: Any, attention: str) -> Any:
    """Return a layer's config with the attention replaced; everything in it is shared."""
    config = copy.copy(config)
    config._attn_implementation_internal = attention
    return config
