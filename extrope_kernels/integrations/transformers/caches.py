"""Caches that cross `extend` or `restore` go on right, or are refused in one line.

Keys are cached rotated. What rotated them, if not the plain model, stands on the cache and on its
copies: no mark means the plain model. An owner's hooks compare it with what is in force. After
`restore` nothing of ours runs in a model, so `Cache.update` of transformers looks for marks too.
"""

from __future__ import annotations

import functools
import uuid
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .model import cache_of, caches_in, in_progress, tokens_in
from .patches import ON_OWNER, Applied, Hook, Patches
from .rotary import RotaryModule, attribute_of, owners_of
from .rotation import RotaryForward, fingerprint

_MARK = "_extrope_filled"
_BY_PLAIN = "by the plain model"
_hooks_by_key: weakref.WeakValueDictionary[str, CacheHooks] = weakref.WeakValueDictionary()


class Filled(NamedTuple):
    """What rotated a cache's keys.

    by: the extension, in words. rotation: equal if keys are rotated equally; () as by the plain
    model. key: of the hooks that know if a forward of an extended model is in progress.
    """

    by: str
    rotation: tuple[Any, ...]
    key: str


def _plain_fingerprint(rotary_module: RotaryModule, layer_type: str | None) -> str | None:
    """Return that of the model's own frequencies; None if none are equal to them.

    Those change with the length, are rounded by a cast of the model, or have no values yet.
    """
    inv_freq = attribute_of(rotary_module.module, layer_type, "inv_freq")
    if inv_freq.dtype.itemsize < 4 or inv_freq.is_meta:
        return None
    try:
        return fingerprint(rotary_module.own_freqs(layer_type))
    except ValueError:
        return None


def cache_hooks(
    rotary_modules: Sequence[RotaryModule], patches: Patches, applied: Applied
) -> list[Hook]:
    """Return the hooks of all owners; the last of an extension that come before their forwards.

    patches: of the extension's method, not yet in place.
    """
    rotaries = {
        value.module: value for _, _, value in patches.overrides if isinstance(value, RotaryForward)
    }
    raw = patches.raw or applied.cache is not None
    owners, hooks = owners_of(rotary_modules), []
    for owner in owners:
        modules = [each.module for each in rotary_modules if each.owner is owner]
        in_place = [rotaries.get(each, vars(each).get("forward")) for each in modules]
        each = CacheHooks(owners[0], in_place, applied, raw)
        hooks.append((owner, each.before_forward, each.after_forward))
    return hooks


class CacheHooks:
    """Hooks around an owner's forward that compare what filled its cache with what is in force.

    first: the owner that has the model's extensions; those of the last one count.
    rotaries: what is in place of the forwards of its rotary embeddings, in their order.
    raw: keys are cached unrotated.
    """

    def __init__(
        self,
        first: nn.Module,
        rotaries: Sequence[Any],
        applied: Applied,
        raw: bool,
    ) -> None:
        self.first = first
        self.rotaries = [each for each in rotaries if isinstance(each, RotaryForward)]
        self.applied = applied
        self.raw = raw
        self.by = str(applied)
        self.key = uuid.uuid4().hex
        _hooks_by_key[self.key] = self
        self.plain = [
            {kind: _plain_fingerprint(each.rotary_module, kind) for kind in each.freqs}
            for each in self.rotaries
        ]
        _look_at_updates()

    def before_forward(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Refuse a cache that was filled otherwise, and mark it: hook before the owner's forward.

        It comes after those that choose frequencies.
        """
        cache = _keys_of(cache_of(arguments))
        if not self.are_in_force() or cache is None:
            return
        setattr(in_progress, self.key, cache)
        mark = getattr(cache, _MARK, None)
        if self._is_known_to_graph(mark):
            return
        rotation = self._rotation()
        if rotation != (mark.rotation if mark else ()) and _is_filled(cache, mark is not None):
            raise _refusal(f"under {self.by}" if rotation else _BY_PLAIN, mark)
        self._mark(cache, rotation, mark)

    def after_forward(self, module: nn.Module, output: Any) -> None:
        """Mark the cache that the forward made: hook after the owner's forward."""
        setattr(in_progress, self.key, None)
        if self.are_in_force():
            for each in caches_in(output):
                cache = _keys_of(each)
                mark = getattr(cache, _MARK, None)
                if cache is not None and not self._is_known_to_graph(mark):
                    self._mark(cache, self._rotation(), mark)

    def are_in_force(self) -> bool:
        """Return True if the extension is the model's last one."""
        return getattr(self.first, ON_OWNER, None) is self.applied

    def _is_known_to_graph(self, mark: Filled | None) -> bool:
        """Return True in a graph if this extension has marked the cache.

        The frequencies in force are the cache's then; one graph serves requests of any length.
        """
        return torch.compiler.is_compiling() and mark is not None and mark.key == self.key

    def _rotation(self) -> tuple[Any, ...]:
        """Return what rotates keys otherwise than the plain model does; () if nothing does."""
        if self.raw:
            return ("raw",)
        return tuple(
            (number, kind, told)
            for number, rotary in enumerate(self.rotaries)
            for kind, told in rotary.thread_freqs.fingerprints.items()
            if told != self.plain[number][kind]
        )

    def _mark(self, cache: Any, rotation: tuple[Any, ...], mark: Filled | None) -> None:
        if rotation or mark is not None:
            setattr(cache, _MARK, Filled(self.by, rotation, self.key) if rotation else None)


def _keys_of(cache: Any) -> Any:
    """Return the cache of transformers that a decoder's keys are in; None for none, or others."""
    from transformers.cache_utils import Cache  # torch.compile of 2.11 imports nothing lazy

    cache = getattr(cache, "self_attention_cache", cache)
    return cache if isinstance(cache, Cache) else None


def _is_filled(cache: Any, marked: bool) -> bool:
    """Return True if a cache has tokens; in a graph that cannot tell, if it has a mark."""
    if torch.compiler.is_compiling() and isinstance(cache.get_seq_length(), Tensor):
        return marked
    return tokens_in(cache) > 0


def _refusal(expected: str, mark: Filled | None) -> ValueError:
    by = _BY_PLAIN if mark is None else f"under {mark.by}"
    return ValueError(
        f"extend: cache must have been filled {expected}, got one filled {by}, whose keys are "
        "rotated otherwise; begin with an empty one"
    )


@functools.cache
def _look_at_updates() -> None:
    """Let `Cache.update` refuse a marked cache outside of an extended model's forward; once.

    While the extension is in force, such an update is a caller's own: one that joins caches.
    """
    from transformers.cache_utils import Cache

    original = Cache.update

    @functools.wraps(original)
    def update(
        self: Any,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        mark = getattr(self, _MARK, None)
        if mark is not None and getattr(in_progress, mark.key, None) is not self:
            hooks = None if torch.compiler.is_compiling() else _hooks_by_key.get(mark.key)
            if hooks is not None and hooks.are_in_force():
                return original(self, key_states, value_states, layer_idx, *args, **kwargs)
            past = self.get_seq_length(layer_idx)
            if (torch.compiler.is_compiling() and isinstance(past, Tensor)) or int(past) > 0:
                raise _refusal(_BY_PLAIN, mark)
            setattr(self, _MARK, None)
        return original(self, key_states, value_states, layer_idx, *args, **kwargs)

    Cache.update = update
