"""The state of a forward: by which way it reaches hooks, rotary embeddings and layers.

A forward in progress has one state, `in_progress`, which each thread has for itself:

    "request"           the `Request` that `generate` has begun
    a key of our hooks  the cache that the owner reads, or True once the hooks have run

Those who begin something set it and take it back, after an error too. Copies of a model share the
keys: they may go on with each other's caches. `rotation.ThreadFrequencies` are each thread's too.

In three places it cannot be used, and state travels with the model's own objects instead:

- From the rotary embedding to the layers. A layer may be recomputed for its gradients, when the
  forward is over, maybe in another thread. So the rotary embedding returns a `Rotation` in place of
  its tables. Layers unpack two tables, so both are the same object.
- From the owner to a layer's attention. The mask tells the rows; what is read of it is kept on it.
- From one forward to the next. A cache keeps the frequencies of its request (`on_cache`) and what
  filled it (`caches.Filled`), in attributes: its copies have them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ... import RopeFreqs

FreqsByKind = dict[str | None, RopeFreqs]  # by kind of layers; None if a model has one kind

in_progress = threading.local()

_ON_CACHE = "_extrope"


class Frozen(NamedTuple):
    """The frequencies of a request, chosen for its longest row, and their fingerprints."""

    freqs: FreqsByKind
    fingerprints: dict[str | None, str]
    longest: int


def on_cache(cache: Any) -> dict[str, Any]:
    """Return the frequencies that a cache tells: `Frozen` by the key of hooks."""
    if not hasattr(cache, _ON_CACHE):
        setattr(cache, _ON_CACHE, {})
    return getattr(cache, _ON_CACHE)


@dataclass
class Request:
    """A call of `generate`.

    limit: tokens that it may reach, padding included.
    pads: padding of each row, if known; the first forward may see only a piece of the prompt.
    drafts: made by a model that another one asks to draft.
    frozen: its frequencies, by the key of the hooks that chose.
    """

    limit: int
    pads: list[int] | None = None
    drafts: bool = False
    frozen: dict[str, Frozen] = field(default_factory=dict)
