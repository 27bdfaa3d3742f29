"""Conversions for calls with DTensors; `distributed` has their sharding rules."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor


def replicated(like: Tensor, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `tensors`; if `like` is a DTensor, plain ones become replicated DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(like, module.DTensor):
        return tensors
    mesh = like.device_mesh

    def on_mesh(x: Any) -> Any:
        if not isinstance(x, Tensor) or isinstance(x, module.DTensor):
            return x
        return module.DTensor.from_local(x, mesh, [module.Replicate()] * mesh.ndim, run_check=False)

    return tuple(on_mesh(x) for x in tensors)


def whole(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return plain tensors, whole on every rank: the inverse of `replicated`."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return tensors
    return tuple(x.full_tensor() if isinstance(x, module.DTensor) else x for x in tensors)
