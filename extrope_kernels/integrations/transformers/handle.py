"""The handle of an extension: what it says of itself, saving it, and the way back."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, NoReturn

from torch import nn

from .generate import Reach, forget_pages
from .patches import Applied, Patches, hooked_forwards
from .rotation import RotaryForward, unwrap_apply, wrap_apply
from .saved import describe, save


class Extension:
    """An extension in place: `restore()`, or the end of a `with` block, undoes it.

    before: the extension that `restore` undoes too, if there is one.
    reason: why `extend` chose the method for a length; None if the user named it.
    changes: False if the model reaches that length as it is.
    """

    def __init__(self, model: nn.Module, patches: Patches, applied: Applied) -> None:
        self.model = model
        self.method = applied.method
        self.applied = applied
        self.before: Extension | None = None
        self.reason: str | None = None
        self.changes = True
        self._layers = 0  # that attend by a score method
        self._by_length = patches.by_length
        self._overrides: list[tuple[nn.Module, str, Any, Any]] = []
        forget_pages(model)

    def __repr__(self) -> str:
        if not self.changes:
            return f"nothing changed: {self.reason}"
        layers = f", {self._layers} layers" if self._layers else ""
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.applied}{layers}, {self._reach()}{reason}"

    def _reach(self) -> str:
        if (length := self.length) is not None:
            return f"reaches {length:,} tokens"
        if self._by_length:
            return "reaches any length, chosen per request"
        return "reaches any length" if self.method == "rerope" else "reach unknown"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say that a handle is no model."""
        raise TypeError("a handle of extend cannot be called: call the model, which is extended")

    def __getattr__(self, name: str) -> Any:
        """Say that a handle is no model."""
        if not name.startswith("_") and hasattr(self.model, name):
            verb = {"generate": "generate with the model"}.get(name, f"use the model's {name}")
            raise AttributeError(f"a handle of extend has no {name}: {verb}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def length(self) -> int | None:
        """The tokens that the model reaches by a method that stretches its trained length.

        None if the method sets no end (ReRoPE, dynamic methods) or does not say it (another base,
        chunks). `extend` leaves max_position_embeddings alone: tell `length` to
        clients that cut prompts there.
        """
        return describe(self.model, self.applied).length

    def extend(self, model: nn.Module) -> Extension:
        """Extend another model by all extensions of this one, such as a trainer's reference model.

        model: as for `extend`.

        Returns its own handle; a mesh is left out. Raises as `extend`.
        """
        from .extend import extend_by_all  # which makes handles

        return extend_by_all(model, self.applied.all())

    def warn_past(self, owner: nn.Module) -> Patches:
        """Return the patches that warn of what goes past this extension's length."""
        stretched = not self._by_length and self.applied.parameters.get("factor", 1) > 1
        if not stretched or self.length is None:
            return Patches()
        return Reach(owner, self.applied, self.length).patches(self.model)

    @property
    def first(self) -> Extension:
        """The extension that `restore` undoes last."""
        return self if self.before is None else self.before.first

    def complete(self, patches: Patches) -> None:
        """Put patches in place, and what they ask for then."""
        self._add(patches)
        for more in patches.then:
            self.complete(more())
        if patches.probe is not None:
            self._layers = len(patches.probe.far)

    def _add(self, patches: Patches) -> None:
        for module, name, value in [*patches.overrides, *hooked_forwards(patches.hooks)]:
            self._overrides.append((module, name, value, vars(module).get(name)))
            vars(module)[name] = value
            if isinstance(value, RotaryForward) and value.fused is not None:
                wrap_apply(value.fused.modeling, value)

    def save_pretrained(
        self, folder: str | os.PathLike, *, length: int | None = None, **options: Any
    ) -> None:
        """Save the model with all extensions that are in place.

        Other programs read its config: rope_parameters for rope, abf, ntk_aware, pi, dynamic_ntk,
        yarn, llama3 and longrope, where the model's class computes the same by them, and the new
        max_position_embeddings. config.json leaves out all else, with a warning and a section of
        the model card. extrope.json beside it has everything for `extend_from_saved`, except a
        mesh, and a Score or RopeFreqs of your own.

        length: max_position_embeddings of the config; by default the length that its frequencies
            reach, or the model's own if that is longer.
        options: for the model's own `save_pretrained`; without push_to_hub, which would upload the
            plain model's config.

        Raises ValueError after `restore`, TypeError if it is not a model of transformers.
        """
        if not self._overrides:
            raise ValueError("extend: save_pretrained must come before restore, got it after")
        save(self.model, folder, length, options)

    def restore(self) -> None:
        """Restore the model as it was before `extend`, to the bit. A second call does nothing.

        If something has wrapped the model's `generate` since (FSDP does), its wrapper stays.
        Raises RuntimeError, and changes nothing, if a later extension of the model is in place.
        """
        last = {(module, name): value for module, name, value, _ in self._overrides}
        replaced = {name for (module, name), x in last.items() if vars(module).get(name) is not x}
        if replaced - {"generate"}:
            raise RuntimeError(
                f"extend: the extension by {self.method} must be the model's last, "
                "got one after it; restore that one first"
            )
        forget_pages(self.model)
        while self._overrides:
            module, name, value, previous = self._overrides.pop()
            if vars(module).get(name) is not value:
                continue  # `generate` in a wrapper of FSDP: ours in it does nothing from now on
            if previous is None:
                del vars(module)[name]
            else:
                vars(module)[name] = previous
            if isinstance(value, RotaryForward) and value.fused is not None:
                unwrap_apply(value.fused.modeling, value)
        if self.before is not None:
            self.before.restore()

    def __enter__(self) -> Extension:
        if not self._overrides:  # the block would run the plain model
            raise ValueError("extend: a handle must be entered before restore, got it after")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()
