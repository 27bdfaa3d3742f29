"""A cache of work that depends only on the layouts of a call's tensors.

Checks and the parts of a launch cost a call more than the rest of it, and mostly the layouts are
those of the call before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

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


def once_per_layout(check: Callable[..., None]) -> Callable[..., None]:
    """Let check(*args), which may raise, run until it has passed for the layouts of its tensors.

    Whatever has no layout, such as a list or a tensor of a graph, is checked every time.
    """

    @functools.wraps(check)
    def run(*args: Any) -> None:
        key = None if torch.compiler.is_compiling() else _key_of(args)
        if key is None:
            check(*args)
        else:
            cached_by_layout(check, key, *args)

    return run


def _key_of(args: tuple[Any, ...]) -> Hashable | None:
    """Return a key with everything about arguments except tensors' data; None if there is none."""
    key = []
    try:
        for x in args:
            if isinstance(x, tuple):
                x = _key_of(x)
                if x is None:
                    return None
            elif type(x) in (Tensor, Parameter):
                x = (x.shape, x.stride(), x.dtype, x.device)
            elif isinstance(x, Tensor):
                return None
            key.append(x)
        hash(found := tuple(key))
    except (RuntimeError, TypeError):
        return None
    return found


def forget() -> None:
    """Drop everything, for example after a change of the tables of tiles."""
    _done.clear()
