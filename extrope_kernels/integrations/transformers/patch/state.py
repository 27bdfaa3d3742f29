"""The state of a forward: by which way it reaches hooks, rotary embeddings, layers and norms.

A forward in progress has one state, `in_progress`, which each thread has for itself:

    "request"           the `Request` that `generate` has begun
    "norm"              the layer's norms (`norms.FusedNorm`) that the rotation does in its pass
    a key of our hooks  the rows (`Batch`) that the owner reads, or True once the hooks have run

Those who begin something set it and take it back, after an error too. Copies of a model share the
keys: they may go on with each other's caches. `ThreadFrequencies` are each thread's too.

In three places it cannot be used, and state travels with the model's own objects instead:

- From the rotary embedding to the layers. A layer may be recomputed for its gradients, when the
  forward is over, maybe in another thread. So the rotary embedding returns a `Rotation` or a
  `ScoreAttention` in place of its tables. Layers unpack two tables, so both are the same object.
- From a layer to its attention. What a layer passes on in any case is its mask, so the attention
  takes that place. A keyword argument of the name `ARGUMENT` has it where accelerate removes masks
  (a mesh), and brings the batch to layers with rotary embeddings of their own.
- From one forward to the next. A cache keeps the frequencies and the score's stored form that its
  keys were rotated by, as attributes `FREQS_ON_CACHE` and `STORED_ON_CACHE`: its copies have them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .... import RopeFreqs

FreqsByKind = dict[str | None, RopeFreqs]  # by kind of layers; None if a model has one kind

in_progress = threading.local()

FREQS_ON_CACHE = "_extrope_freqs"
STORED_ON_CACHE = "_extrope_stored"


@dataclass
class Request:
    """A call of `generate`.

    limit: tokens that it may reach, padding included.
    pads: padding of each row, if known; the first forward may see only a piece of the prompt.
    freqs: its frequencies, by the key of the hooks that chose.
    """

    limit: int
    pads: list[int] | None = None
    freqs: dict[str, FreqsByKind] = field(default_factory=dict)


class ThreadFrequencies(threading.local):
    """The frequencies of forwards, which those in other threads do not change."""

    def __init__(self, freqs: FreqsByKind) -> None:  # in each thread anew
        self.freqs = dict(freqs)

    def __reduce__(self) -> tuple[type, tuple[FreqsByKind]]:
        return type(self), (self.freqs,)
