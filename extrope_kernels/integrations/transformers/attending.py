"""A config by which a model makes our masks and its layers call our attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .attention import INTERFACE
from .model import Override


class _Attending:
    """Mixed into a config's class: its attention is ours, whatever the config says."""

    @property
    def _attn_implementation(self) -> str:
        return INTERFACE

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._attn_implementation_internal = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain = object.__new__(plain_class(self))
        plain.__dict__ = self.__dict__
        return attending, (plain,)


def attending(config: Any) -> Any:
    """Return a view of a config, by which layers call our attention; all else is in one dict.

    Other models may share the config, and other layers go on to the attention that it names.
    """
    kind = type(config)
    if not issubclass(kind, _Attending):
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        kind = type(kind.__name__, (_Attending, kind), names)
    view = object.__new__(kind)
    view.__dict__ = config.__dict__
    return view


def plain_class(config: Any) -> type:
    """Return the class of a config, or of the one that it is a view of."""
    kind = type(config)
    return kind.__mro__[2] if issubclass(kind, _Attending) else kind


def attending_overrides(owner: nn.Module, layers: Iterable[nn.Module]) -> list[Override]:
    """Return the overrides by which an owner makes our masks, and layers call our attention."""
    views: dict[int, Any] = {}
    modules = [each for each in (owner, *layers) if hasattr(each, "config")]
    for module in modules:
        views.setdefault(id(vars(module.config)), attending(module.config))
    return [(module, "config", views[id(vars(module.config))]) for module in modules]
