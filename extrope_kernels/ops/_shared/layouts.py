"""A cache of work that depends only on the layouts of a call's tensors.

Checks and the parts of a launch cost a call more than the rest of it, and mostly the layouts are
those of the call before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")
_MOST = 4096
_done: dict[Hashable, Any] = {}
_MISSING = object()


def layout_key(*tensors: Tensor | None) -> Hashable:
    """Return a key with everything about these tensors except their data."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


def cached_by_layout(make: Callable[..., Result], key: Hashable, *args: Any) -> Result:
    """Return make(*args), called once per key; its result must not keep any tensor."""
    key = (make, key)
    found = _done.get(key, _MISSING)
    if found is _MISSING:
        found = make(*args)
        if len(_done) >= _MOST:
            _done.clear()
        _done[key] = found
    return found


def forget() -> None:
    """Drop everything, for example after a change of the tables of tiles."""
    _done.clear()
