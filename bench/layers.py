"""A cache for each layer, as models have them: a step finds none of them in the processor's own.

On a GPU the replays see to that: see harness.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from harness import Call
from machine import device
from torch import Tensor

BYTES = 2**29  # of all layers together, more than the last level of caches keeps
MOST = 64


def layers_of(*cache: Tensor) -> list[Sequence[Tensor]]:
    """Copies of a cache."""
    size = sum(x.nbytes for x in cache)
    count = min(BYTES // size, MOST) if device() == "cpu" else 1
    return [cache, *(tuple(x.clone() for x in cache) for _ in range(count - 1))]


def by_layer(step: Callable[..., object], layers: Sequence[Sequence[Tensor]]) -> Call:
    """A call of step(*cache) for one layer after another."""
    caches = itertools.cycle(layers)
    return lambda: step(*next(caches))
