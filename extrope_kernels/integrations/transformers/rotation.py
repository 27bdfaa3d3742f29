"""A rotary embedding's other forward, and the `Rotation` that it returns in place of its tables.

A model calls its rotary embedding once per forward and hands the resulting (cos, sin) to
`apply_rotary_pos_emb`, a global of its modeling module, in every layer. A `Rotation` takes the
place of both, and the global is wrapped to rotate by it. Tables of other models go to the original
function.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import RopeFreqs, apply_rope_qk
from .model import Override, exports_to_onnx
from .rotary import APPLY, RotaryModule, Tables

FreqsByKind = dict[str | None, RopeFreqs]  # by kind of layers; None if a model has one kind

# For each modeling module: its original function, the wrapped one, and their users.
_wrapped: dict[str, tuple[Callable[..., Any], Callable[..., Any], weakref.WeakSet]] = {}


class Rotation:
    """Frequencies and positions of one forward.

    Casts and checkpoints of tensors do not see into it: the frequencies stay float32 and the
    positions integers in a model of any dtype. It is no dataclass, whose fields FSDP casts.

    positions: (batch or 1, seqlen); None leaves queries and keys as they are.
    """

    def __init__(
        self,
        freqs: RopeFreqs,
        positions: Tensor | None,
        interleaved: bool,
    ) -> None:
        self.freqs = freqs
        self.positions = positions
        self.interleaved = interleaved

    def unrotated(self) -> Rotation:
        """Return what leaves queries and keys raw."""
        return Rotation(self.freqs, None, self.interleaved)

    def to(self, device: torch.device | torch.dtype | str | int, **_: Any) -> Rotation:
        """Move to `device`: accelerate's hooks call it if a model spans several devices."""
        if isinstance(device, torch.dtype):
            return self
        positions = None if self.positions is None else self.positions.to(device)
        return Rotation(self.freqs.to(device), positions, self.interleaved)

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Rotate like `apply_rotary_pos_emb`; q and k have heads in dimension `unsqueeze_dim`."""
        if self.positions is None:
            return q, k
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
        return apply_rope_qk(q, k, self.freqs, **options)


class ThreadFrequencies(threading.local):
    """The frequencies of forwards, which those in other threads do not change.

    fingerprints: texts that differ where these do, which a graph compares. by_length: a forward
    may change them, by its length.
    """

    def __init__(
        self,
        freqs: FreqsByKind,
        fingerprints: Mapping[str | None, str],
        by_length: bool = False,
    ) -> None:
        self.freqs = dict(freqs)  # in each thread anew
        self.fingerprints = dict(fingerprints)
        self.by_length = by_length

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.freqs, self.fingerprints, self.by_length)


def fingerprint(freqs: RopeFreqs) -> str:
    """Return a text that differs where frequencies or amplitudes do; a graph has one for all."""
    if torch.compiler.is_compiling():
        return "chosen in a graph"
    told = hashlib.sha256(repr(freqs.attention_factor).encode())
    for each in (freqs.inv_freq, freqs.log_decay):
        told.update(b"" if each is None else each.detach().cpu().numpy().tobytes())
    return told.hexdigest()[:16]


class RotaryForward:
    """Replacement forward of a rotary embedding, with other frequencies.

    thread_freqs: frequencies by kind of layers (None if the model has one kind); other kinds keep
        the model's own tables. A method that depends on the length sets them at the start of every
        forward; an extension by a score method shares those of the extension before it.
    method: the extension's.
    shared: the ranks that share tokens (`context_parallel.Shared`), if it is over a mesh.
    """

    def __init__(
        self, rotary_module: RotaryModule, thread_freqs: ThreadFrequencies, method: str
    ) -> None:
        self.rotary_module = rotary_module
        self.module = rotary_module.module
        self.fused = rotary_module.fused
        self.thread_freqs = thread_freqs
        self.method = method
        self.shared: Any = None
        self._tables: dict[str | None, Tables] = {}

    def overrides(self) -> list[Override]:
        """Return the attributes of the rotary embedding that it hides."""
        return [(self.module, "forward", self), (self.module, "extra_repr", self.extra_repr)]

    @property
    def freqs(self) -> FreqsByKind:
        """The frequencies of this thread's forward."""
        return self.thread_freqs.freqs

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        """Return a `Rotation` in place of the tables if the op rotates, else the model's tables."""
        if layer_type not in self.freqs:
            return type(self.module).forward(self.module, x, position_ids, layer_type)
        freqs = self.freqs_on(layer_type, x.device)
        if self.fused is not None and position_ids.dim() == 2 and not exports_to_onnx():
            if not torch.compiler.is_compiling():
                # Again, as Liger may have replaced the function since (a Trainer's option).
                wrap_apply(self.fused.modeling, self)
            return (Rotation(freqs, position_ids, self.fused.interleaved),) * 2
        made = self.tables(layer_type, freqs, x, position_ids)
        if self.fused is not None and made[0].dim() != 3:
            shape = tuple(position_ids.shape)
            raise ValueError(f"extend: position_ids must be (batch, seqlen), got {shape}")
        return made

    def extra_repr(self) -> str:
        """Replace the rotary embedding's `extra_repr`, which `print(model)` shows."""
        kinds = (f"{kind or ''} {freqs}".strip() for kind, freqs in self.freqs.items())
        return f"extended by {self.method}: {', '.join(kinds)}"

    def tables(
        self, layer_type: str | None, freqs: RopeFreqs, x: Tensor, position_ids: Tensor
    ) -> Any:
        """Return the model's own tables for these frequencies."""
        if freqs.log_decay is not None:
            raise ValueError(
                f"extend: {type(self.module).__name__} makes one table for queries and keys, "
                f"which {self.method} scales differently"
            )
        made = self._tables.get(layer_type)
        if made is None or made.freqs is not freqs:
            made = self._tables[layer_type] = self.rotary_module.tables(layer_type, freqs)
        return made(x, position_ids)

    def freqs_on(self, layer_type: str | None, device: torch.device) -> RopeFreqs:
        """Return the frequencies of a kind of layers, and keep them on that device."""
        freqs = self.freqs[layer_type]
        if freqs.inv_freq.device != device:
            # Tensors made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False):
                freqs = self.freqs[layer_type] = freqs.to(device)
        return freqs

    def __getstate__(self) -> dict[str, Any]:
        """Drop tables: they are made anew when needed."""
        return {**vars(self), "_tables": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wrap the global function that copies need too."""
        vars(self).update(state)
        if self.fused is not None:
            wrap_apply(self.fused.modeling, self)


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


class _TakesRotations:
    """Stands in for a modeling module's `apply_rotary_pos_emb`: takes rotations, beside tables.

    Layers of `kernels` 0.19 have copies of the function, which are loaded as `type(function)()`
    makes them: of the original's type.
    """

    original: Callable[..., Any]

    def __new__(cls) -> Any:
        return type(cls.original)()

    def __call__(self, q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, Tensor):
            return self.original(q, k, cos, sin, *args, **kwargs)
        return cos.rotate(q, k, *(args or (kwargs.get("unsqueeze_dim", 1),)))

    def __reduce__(self) -> str:
        """Copy and pickle as functions do, by name."""
        return APPLY


def _taking_rotations(original: Callable[..., Any]) -> Callable[..., Any]:
    kind = type(APPLY, (_TakesRotations,), {"original": staticmethod(original)})
    return functools.update_wrapper(object.__new__(kind), original)
