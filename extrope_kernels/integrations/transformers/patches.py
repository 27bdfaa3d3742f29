"""What an extension changes in a model: attributes that hide others, and hooks around forwards.

Some programs call a module's `forward` directly, past its hooks (sentence-transformers does).
`route_forward_through_hooks` sends those calls through the hooks.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ... import RopeFreqs
from ...scores import SCORES, Score
from .._shared.saved import in_words
from .model import Override, in_progress

ON_OWNER = "_extrope_extensions"  # the attribute that has a model's last `Applied`
# A module, what runs before its forward, and what runs after it or None.
Hook = tuple[nn.Module, Callable[..., Any], "Callable[..., Any] | None"]


@dataclass
class Patches:
    """An extension's changes in a model.

    overrides: (module, name, value) each, attributes that hide those of the module's class.
    hooks: (module, before its forward, after it or None) each.
    then: what is to be tried or added once these are in place: each returns more patches.
    probe: what a score method found in the model (`LayerProbe`).
    by_length: frequencies follow the length. raw: keys are cached unrotated.
    """

    overrides: list[Override] = field(default_factory=list)
    hooks: list[Hook] = field(default_factory=list)
    then: list[Callable[[], Patches]] = field(default_factory=list)
    probe: Any = None
    by_length: bool = False
    raw: bool = False


@dataclass(frozen=True)
class Applied:
    """An extension of a model, as `extend` was called.

    own: a `Score` or `RopeFreqs` of the user's, which `method` names then.
    before: the earlier extension of the model. This is no list because torch.export replaces a
        module's lists by copies.
    """

    method: str
    parameters: dict[str, Any]
    layers: str = "full"
    cache: str | None = None
    own: Score | RopeFreqs | None = None
    before: Applied | None = None

    def __str__(self) -> str:
        return in_words(self.all())

    @property
    def is_score(self) -> bool:
        return isinstance(self.own, Score) or (self.own is None and self.method in SCORES)

    def all(self) -> list[Applied]:
        """Return all extensions of the model up to this one, which is the last."""
        return [self] if self.before is None else [*self.before.all(), self]


def route_forward_through_hooks(owners: Sequence[nn.Module], patches: Patches) -> None:
    """Send direct calls of the owners' `forward` through their hooks; add it last."""
    for each in map(ForwardThroughHooks, owners):
        patches.overrides.append((each.module, "forward", each))
        patches.hooks.append((each.module, each.before_forward, None))


class ForwardThroughHooks:
    """Replacement forward of a module with hooks, which sends every call through them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = vars(module).get("forward")
        self.key = uuid.uuid4().hex

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note that the hooks run: the last forward pre-hook of an extension."""
        setattr(in_progress, self.key, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(in_progress, self.key, False):
            return self.module(*args, **kwargs)
        setattr(in_progress, self.key, False)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
