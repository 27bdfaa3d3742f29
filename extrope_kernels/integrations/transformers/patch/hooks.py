"""What an extension changes in a model: attributes that hide others, and hooks around forwards.

Some programs call a module's `forward` directly, past its hooks (sentence-transformers does).
`route_forward_through_hooks` sends those calls through the hooks.
"""

from __future__ import annotations

import inspect
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ....scores import SCORES
from ..._shared.parameters import PARAMETERS
from ..model import Override
from ..probe.rotary import argument_names, by_name
from .state import in_progress

ON_OWNER = "_extrope_extensions"  # the attribute that has a model's last `Applied`
# A module, what runs before its forward, and what runs after it or None.
Hook = tuple[nn.Module, Callable[..., Any], "Callable[..., Any] | None"]


@dataclass
class Patches:
    """An extension's changes in a model.

    overrides: (module, name, value) each, attributes that hide those of the module's class.
    hooks: (module, before its forward, after it or None) each.
    layers: those that attend by a score method.
    """

    overrides: list[Override] = field(default_factory=list)
    hooks: list[Hook] = field(default_factory=list)
    layers: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Applied:
    """An extension of a model, as `extend` was called.

    before: the earlier extension of the model. This is no list because torch.export replaces a
        module's lists by copies.
    """

    method: str
    parameters: dict[str, Any]
    layers: str
    cache: str | None
    before: Applied | None = None

    def __str__(self) -> str:
        given = "".join(f" {name}={_brief(value)}" for name, value in self.parameters.items())
        over = "" if self.before is None else f" over {self.before}"
        return f"{self.method}{given}{over}"

    def all(self) -> list[Applied]:
        """Return all extensions of the model up to this one, which is the last."""
        return [self] if self.before is None else [*self.before.all(), self]


def _brief(value: Any) -> str:
    """Return a parameter's value for a line of text: lists and frequencies may be long."""
    text = f"{value:.6g}" if isinstance(value, float) and not value.is_integer() else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


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


class TrainingGuard:
    """What an extension needs to know of its training, at the first forward.

    It warns if a trainer compares the model with a plain reference model, and lets adapters of PEFT
    that were added since keep the extension.

    TRL's trainers load `ref_model` anew from the model's folder, so the losses of DPO and the
    divergence of GRPO would be those of two different models. A trainer is known by its attribute,
    on the way to the first forward in training.
    """

    def __init__(self) -> None:
        self.looked = False

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Look at the callers, once: forward pre-hook of the owner."""
        if torch.compiler.is_compiling() or self.looked:
            return
        if not (module.training and torch.is_grad_enabled()):
            return
        from ..saved import save_beside_adapters

        save_beside_adapters()
        self.looked, frame = True, inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            reference = getattr(caller, "__dict__", {}).get("ref_model")
            if isinstance(reference, nn.Module) and not any(
                ON_OWNER in vars(each) for each in reference.modules()
            ):
                warnings.warn(
                    f"extend: ref_model of {type(caller).__name__} is the plain model, this one is "
                    "extended: call handle.extend(trainer.ref_model) before train()",
                    stacklevel=2,
                )
                return
            frame = frame.f_back


class RegionGuard:
    """A guard that raises in a region of torch's `context_parallel` if a model has no mesh.

    The region shards tokens and replaces PyTorch's attention, so the model would compute something
    else. Only frequencies that no length changes are right, at positions that are sharded too.
    """

    def __init__(self, method: str) -> None:
        self.why = ""
        if method in SCORES:
            self.why = f"{method} does not attend by PyTorch's function"
        elif "seq_len" in PARAMETERS[method]:
            self.why = f"{method} would take the length of a rank's tokens for the sequence's"

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise in such a region: forward pre-hook of the owner."""
        if torch.compiler.is_compiling():
            return
        function = nn.functional.scaled_dot_product_attention
        if not (getattr(function, "__module__", None) or "").startswith("torch.distributed"):
            return
        given = by_name(argument_names(module), args, kwargs).get("position_ids")
        if self.why or given is None:
            raise ValueError(
                "extend: a model in a region of torch's context_parallel must be extended with a "
                f"mesh, got one without; {self.why or 'position_ids are not given'}"
            )
