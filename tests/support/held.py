"""The peak of a call's own memory: bytes of the tensors that it made and that are alive."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """A mode that counts the bytes of tensors made under it, by op; not the memory inside kernels.

    most: the largest sum at any time. then: its parts, (op, bytes) each, largest first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, str, int]] = {}
        self.most = 0
        self.then: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        made = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if _is(x)}
        self.alive = {key: kept for key, kept in self.alive.items() if not kept[0].expired()}
        for x in tree_leaves(made):
            if _is(x) and (key := x.untyped_storage()._cdata) not in given | self.alive.keys():
                size = x.untyped_storage().nbytes()
                self.alive[key] = (StorageWeakRef(x.untyped_storage()), str(func), size)
        held = sum(size for _, _, size in self.alive.values())
        if held > self.most:
            self.most = held
            found = ((name, size) for _, name, size in self.alive.values())
            self.then = sorted(found, key=lambda kept: -kept[1])
        return made


def _is(x: Any) -> bool:
    return isinstance(x, Tensor)
