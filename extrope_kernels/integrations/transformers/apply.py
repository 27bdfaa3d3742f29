"""`apply_rotary_pos_emb`, the global of a modeling module by which its layers rotate q and k.

It is wrapped so that a `Rotation` rotates by itself, and tables, which come from every other model,
go to the function that was there.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

APPLY = "apply_rotary_pos_emb"

# For each modeling module the function that was there, the one in its place, and who needs it.
_wrapped: dict[str, tuple[Callable[..., Any], Callable[..., Any], weakref.WeakSet]] = {}


def wrap_apply(modeling: str, user: object) -> None:
    """Make the modeling module's `apply_rotary_pos_emb` take rotations, for `user`."""
    module = importlib.import_module(modeling)
    current = getattr(module, APPLY)
    _, wrapper, users = _wrapped.get(modeling, (None, None, weakref.WeakSet()))
    if current is not wrapper:
        wrapper = _taking_rotations(current)
        _wrapped[modeling] = (current, wrapper, users)
        setattr(module, APPLY, wrapper)
    users.add(user)


def unwrap_apply(modeling: str, user: object) -> None:
    """Give up `user`'s claim; the last one puts the original function back."""
    original, wrapper, users = _wrapped[modeling]
    users.discard(user)
    if users:
        return
    del _wrapped[modeling]
    module = importlib.import_module(modeling)
    if getattr(module, APPLY) is wrapper:
        setattr(module, APPLY, original)


def original_apply(modeling: str) -> Callable[..., Any]:
    """Return the modeling module's own `apply_rotary_pos_emb`, wrapped or not."""
    current = getattr(importlib.import_module(modeling), APPLY)
    original, wrapper, _ = _wrapped.get(modeling, (None, None, None))
    return original if current is wrapper else current


def _taking_rotations(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, Tensor):
            return original(q, k, cos, sin, *args, **kwargs)
        return cos.rotate(q, k, *(args or (kwargs.get("unsqueeze_dim", 1),)))

    return apply_rotary_pos_emb
