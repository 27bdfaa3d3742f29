"""A `Rotation`, which goes through a forward in place of cosines and sines.

A model calls its rotary embedding once per forward and hands the resulting (cos, sin) to
`apply_rotary_pos_emb`, a global of its modeling module, in every layer. A `Rotation` takes the
place of both, and the global is wrapped to rotate by it. Tables of other models go to the original
function.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import RopeFreqs, apply_rope, apply_rope_qk
from ..probe.rotary import APPLY

# For each modeling module: its original function, the wrapped one, and their users.
_wrapped: dict[str, tuple[Callable[..., Any], Callable[..., Any], weakref.WeakSet]] = {}


class Norm(NamedTuple):
    """The norm before a rotation, as arguments of `apply_rope_qk`."""

    q_norm_weight: Tensor
    k_norm_weight: Tensor
    norm_eps: float


class Rotation:
    """Frequencies and positions of one forward.

    Casts and checkpoints of tensors do not see into it: the frequencies stay float32 and the
    positions integers in a model of any dtype. It is no dataclass, whose fields FSDP casts.

    positions: (batch or 1, seqlen); None leaves queries and keys as they are.
    keys_only: leave queries raw, for the attention of a score method.
    norm: the layer's norm right before, if the rotation does it.
    """

    def __init__(
        self,
        freqs: RopeFreqs,
        positions: Tensor | None,
        interleaved: bool,
        keys_only: bool = False,
        norm: Norm | None = None,
    ) -> None:
        self.freqs = freqs
        self.positions = positions
        self.interleaved = interleaved
        self.keys_only = keys_only
        self.norm = norm

    def after(self, norm: Norm) -> Rotation:
        """Return this rotation with a norm before it."""
        return Rotation(self.freqs, self.positions, self.interleaved, self.keys_only, norm)

    def to(self, device: torch.device | torch.dtype | str | int, **_: Any) -> Rotation:
        """Move to `device`: accelerate's hooks call it if a model spans several devices."""
        if isinstance(device, torch.dtype):
            return self
        positions, norm = self.positions, self.norm
        if positions is not None:
            positions = positions.to(device)
        if norm is not None:
            norm = Norm(norm.q_norm_weight.to(device), norm.k_norm_weight.to(device), norm.norm_eps)
        return Rotation(self.freqs.to(device), positions, self.interleaved, self.keys_only, norm)

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Rotate like `apply_rotary_pos_emb`; q and k have heads in dimension `unsqueeze_dim`."""
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"extend: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
        # The op takes all strides but this one, which some layers leave.
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        if unsqueeze_dim == 2:
            return self._rotate(q, k)
        q, k = self._rotate(q.transpose(1, 2), k.transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2)

    def _rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        options = {"positions": self.positions, "interleaved": self.interleaved}
        norm = {} if self.norm is None else self.norm._asdict()
        if not self.keys_only:
            return apply_rope_qk(q, k, self.freqs, **options, **norm)
        if norm:  # by angles of 0: the attention rotates
            q, k = apply_rope_qk(q, k, RopeFreqs(torch.zeros_like(self.freqs.inv_freq)), **norm)
        return q, (k if self.positions is None else apply_rope(k, self.freqs, **options))


def wrap_apply(modeling: str, user: object) -> None:
    """Wrap the modeling module's `apply_rotary_pos_emb` to take rotations, for `user`."""
    module = importlib.import_module(modeling)
    current = getattr(module, APPLY)
    _, wrapper, users = _wrapped.get(modeling, (None, None, weakref.WeakSet()))
    if current is not wrapper:
        wrapper = _taking_rotations(current)
        _wrapped[modeling] = (current, wrapper, users)
        setattr(module, APPLY, wrapper)
    users.add(user)


def unwrap_apply(modeling: str, user: object) -> None:
    """Remove `user`; the last one restores the original function."""
    original, wrapper, users = _wrapped[modeling]
    users.discard(user)
    if users:
        return
    del _wrapped[modeling]
    module = importlib.import_module(modeling)
    if getattr(module, APPLY) is wrapper:
        setattr(module, APPLY, original)


def _taking_rotations(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, Tensor):
            return original(q, k, cos, sin, *args, **kwargs)
        return cos.rotate(q, k, *(args or (kwargs.get("unsqueeze_dim", 1),)))

    apply_rotary_pos_emb.original = original  # type: ignore[attr-defined]
    return apply_rotary_pos_emb
