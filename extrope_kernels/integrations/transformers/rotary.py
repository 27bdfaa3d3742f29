"""The rotation inside a transformers model: what flows in place of cos and sin, and who takes it.

A model calls its rotary embedding once per forward and hands the (cos, sin) it returns to
`apply_rotary_pos_emb`, a global of the modeling module, in every layer. `FusedRotary` stands in for
the forward of one model's rotary embedding and returns a `PendingRotation` instead of tables; the
global is wrapped so that a pending rotation goes to the fused op, and tables, which come from every
other model, to the function that was there.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope_qk

APPLY = "apply_rotary_pos_emb"


class Rotation:
    """What layers get in place of cos, with None in place of sin."""

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Rotate q and k as `apply_rotary_pos_emb` does: heads in the dimension `unsqueeze_dim`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class PendingRotation(Rotation):
    """Frequencies and positions on their way to the layers, in place of cos and sin.

    Opaque to whatever casts or checkpoints tensors in between, so the frequencies stay float32 and
    the positions integers in a model of any dtype.

    positions: (batch or 1, seqlen) integers.
    """

    freqs: RopeFreqs
    positions: Tensor
    interleaved: bool

    def to(self, device: torch.device | str | int, **_: Any) -> PendingRotation:
        """Move to `device`: accelerate's hooks call this where a model spans several devices."""
        return PendingRotation(self.freqs.to(device), self.positions.to(device), self.interleaved)

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"extend: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
        heads_first = unsqueeze_dim == 1
        if heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        q, k = self._turn(q, k)
        return (q.transpose(1, 2), k.transpose(1, 2)) if heads_first else (q, k)

    def _turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope_qk(
            q, k, self.freqs, positions=self.positions, interleaved=self.interleaved
        )


class FusedRotary:
    """Stands in for the forward of a rotary embedding.

    freqs: per layer type (None where the model makes no difference) the frequencies to rotate by;
        other layer types keep the tables of the model itself. A method that depends on the length
        sets them at the start of every forward.
    """

    def __init__(
        self,
        rotary: nn.Module,
        freqs: dict[str | None, RopeFreqs],
        interleaved: bool,
        modeling: str,
    ) -> None:
        self.rotary = rotary
        self.freqs = freqs
        self.interleaved = interleaved
        self.modeling = modeling

    def __call__(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Any, Any]:
        if layer_type not in self.freqs:
            return type(self.rotary).forward(self.rotary, x, position_ids, layer_type)
        if position_ids.dim() != 2:
            shape = tuple(position_ids.shape)
            raise ValueError(f"extend: position_ids must be (batch, seqlen), got {shape}")
        freqs = self.freqs_on(layer_type, x.device)
        return PendingRotation(freqs, position_ids, self.interleaved), None

    def freqs_on(self, layer_type: str | None, device: torch.device) -> RopeFreqs:
        """Return the frequencies of a layer type, and keep them on that device."""
        freqs = self.freqs[layer_type]
        if freqs.inv_freq.device != device:
            # Tensors made in inference mode could not be saved for a backward later on.
            with torch.inference_mode(False):
                freqs = self.freqs[layer_type] = freqs.to(device)
        return freqs

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and unpickled models need the wrapped global as much as the original does."""
        self.__dict__.update(state)
        wrap_apply(self.modeling, self)


@dataclass(eq=False)
class _Wrapped:
    original: Callable[..., Any]
    wrapper: Callable[..., Any]
    users: weakref.WeakSet


_wrapped: dict[str, _Wrapped] = {}


def wrap_apply(modeling: str, user: object) -> None:
    """Make the modeling module's `apply_rotary_pos_emb` take pending rotations, for `user`."""
    entry = _wrapped.get(modeling)
    module = importlib.import_module(modeling)
    current = getattr(module, APPLY)
    if entry is None or current is not entry.wrapper:
        users = weakref.WeakSet() if entry is None else entry.users
        entry = _wrapped[modeling] = _Wrapped(current, _taking_pending_rotations(current), users)
        setattr(module, APPLY, entry.wrapper)
    entry.users.add(user)


def unwrap_apply(modeling: str, user: object) -> None:
    """Give up `user`'s claim; the last one puts the original function back."""
    entry = _wrapped[modeling]
    entry.users.discard(user)
    if entry.users:
        return
    del _wrapped[modeling]
    module = importlib.import_module(modeling)
    if getattr(module, APPLY) is entry.wrapper:
        setattr(module, APPLY, entry.original)


def original_apply(modeling: str) -> Callable[..., Any]:
    """Return the modeling module's own `apply_rotary_pos_emb`, wrapped or not."""
    current = getattr(importlib.import_module(modeling), APPLY)
    entry = _wrapped.get(modeling)
    return entry.original if entry is not None and current is entry.wrapper else current


def _taking_pending_rotations(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, Rotation):
            return cos.rotate(q, k, *(args or (kwargs.get("unsqueeze_dim", 1),)))
        return original(q, k, cos, sin, *args, **kwargs)

    return apply_rotary_pos_emb
