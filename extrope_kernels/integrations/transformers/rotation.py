"""What goes through one forward of an extended model in place of cosines and sines.

A model calls its rotary embedding once per forward and hands the (cos, sin) it returns to
`apply_rotary_pos_emb` in every layer. A `Rotation` goes the same way, in place of cos, with None in
place of sin.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import RopeFreqs, apply_rope, apply_rope_qk

INTERFACE = "extrope"  # the name for `model.set_attn_implementation`
# What takes the mask's place comes by this name, too, where others take masks away (accelerate).
ARGUMENT = "extrope_attending"
ATTENTION = "extrope_score"  # the one in the config of a layer that attends by a score method


class Norm(NamedTuple):
    """What `apply_rope_qk` takes of the norm before a rotation."""

    q_norm_weight: Tensor
    k_norm_weight: Tensor
    norm_eps: float

    def to(self, device: torch.device | str | int) -> Norm:
        return Norm(self.q_norm_weight.to(device), self.k_norm_weight.to(device), self.norm_eps)


class Rotation:
    """Frequencies and positions of one forward.

    Opaque to whatever casts or checkpoints tensors on the way, so the frequencies stay float32 and
    the positions integers in a model of any dtype. No dataclass: FSDP casts what those hold.

    positions: (batch or 1, seqlen); None leaves queries and keys as they are.
    keys_only: queries stay raw, as the attention of a score method takes them.
    norm: that of the layer, where it comes right before and is left to the rotation.
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

    def to(self, device: torch.device | str | int, **_: Any) -> Rotation:
        """Move to `device`: accelerate's hooks call this where a model spans several devices."""
        positions = None if self.positions is None else self.positions.to(device)
        norm = None if self.norm is None else self.norm.to(device)
        return Rotation(self.freqs.to(device), positions, self.interleaved, self.keys_only, norm)

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Stand in for `apply_rotary_pos_emb`; q and k have heads in dimension `unsqueeze_dim`."""
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"extend: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
        # The op takes any strides but this one, which some layers leave.
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
        if norm:  # by angles of 0, which leave the rest to the attention
            q, k = apply_rope_qk(q, k, RopeFreqs(torch.zeros_like(self.freqs.inv_freq)), **norm)
        return q, (k if self.positions is None else apply_rope(k, self.freqs, **options))


def register_attention() -> None:
    """Make transformers know the attention of score methods by its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; what takes the mask's place attends."""
    attention_mask = options.pop(ARGUMENT, attention_mask)
    if attention_mask is None or isinstance(attention_mask, Tensor):
        raise RuntimeError(
            f"extend: {type(module).__name__} must be run by its model, got a call of its own"
        )
    return attention_mask.attend(module, query, key, value, options), None
