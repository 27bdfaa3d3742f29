"""What an extension changes in a model: attributes that hide others, and hooks around forwards."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ... import RopeFreqs
from ...scores import SCORES, Score
from .._shared.saved import in_words
from .model import Override, argument_names, by_name

ON_OWNER = "_extrope_extensions"  # the attribute that has a model's last `Applied`
# A module, what runs before its forward, and what runs after it or None. The first gets the module
# and the arguments by name, which it may change; the second the output, None after an error.
Hook = tuple[nn.Module, Callable[..., None], "Callable[..., None] | None"]


@dataclass
class Patches:
    """An extension's changes in a model.

    overrides: (module, name, value) each, attributes that hide those of the module's class.
    hooks: around forwards, in their order.
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


def hooked_forwards(hooks: Sequence[Hook]) -> list[Override]:
    """Return the overrides by which modules run hooks; those in place go on before them."""
    modules = dict.fromkeys(module for module, _, _ in hooks)
    return [
        (module, "forward", HookedForward(module, [each for each in hooks if each[0] is module]))
        for module in modules
    ]


class HookedForward:
    """Replacement forward of a module, with hooks.

    PyTorch's own hooks would be passed by where a program calls `forward` directly, as
    sentence-transformers does.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[Hook]) -> None:
        before = vars(module).get("forward")
        earlier = before.hooks if isinstance(before, HookedForward) else ()
        self.module = module
        self.hooks = (*earlier, *(each[1:] for each in hooks))
        self.replaced = before.replaced if isinstance(before, HookedForward) else before
        self.argument_names = argument_names(module)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments, output = by_name(self.argument_names, args, kwargs), None
        try:
            for before, _ in self.hooks:
                before(self.module, arguments)
            if self.replaced is not None:
                output = self.replaced(**arguments)
            else:
                output = type(self.module).forward(self.module, **arguments)
        finally:  # so that no part of the model waits for this forward's end
            for _, after in self.hooks:
                if after is not None:
                    after(self.module, output)
        return output
