"""Work that depends on the layouts of a call's tensors alone, done once for each of them.

Checks and what a launch is made of cost a call more than the rest of it; the layouts of its tensors
are mostly those of the call before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import Tensor

Result = TypeVar("Result")
_MOST = 4096
_done: dict[Hashable, Any] = {}
_MISSING = object()


def layouts_of(*tensors: Tensor | None) -> Hashable:
    """Everything of these tensors but their data."""
    return tuple([None if x is None else (x.shape, x.stride(), x.dtype, x.device) for x in tensors])


def planned(make: Callable[..., Result], key: Hashable, *args: Any) -> Result:
    """Return make(*args), called once for each key; it may keep none of the tensors."""
    key = (make, key)
    found = _done.get(key, _MISSING)
    if found is _MISSING:
        if len(_done) >= _MOST:
            _done.clear()
        found = _done[key] = make(*args)
    return found


def forget() -> None:
    """Drop all of it: after a change of what it was made from, such as tables of tiles."""
    _done.clear()
