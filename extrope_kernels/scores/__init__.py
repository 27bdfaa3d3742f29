"""Score methods: pure functions from their parameters to a `Score`.

A score method changes the relative position that a (query, key) pair sees. It is described by
regions of keys and position maps; `SCORES` names them all. Kernels know regions and maps only: a
new method is one file here. `query_scale` has temperatures, factors of a query's logits.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from .._names import AXES, no_attribute

# "as" exports the names to type checkers, which cannot read __all__ from the table.
from . import query_scale
from .base import FIRST_KEY, UNROTATED, PairMap, PositionMap, Region, Score
from .blockwise_causal import blockwise_causal as blockwise_causal
from .dpe import dpe as dpe
from .dual_chunk import dual_chunk as dual_chunk
from .rerope import leaky_rerope as leaky_rerope
from .rerope import rerope as rerope
from .self_extend import self_extend as self_extend
from .string import string as string

SCORES: dict[str, Callable[..., Score]] = {
    score.__name__: score
    for score in (
        rerope,
        leaky_rerope,
        self_extend,
        dual_chunk,
        blockwise_causal,
        string,
        dpe,
    )
}
AXES[__name__] = tuple(SCORES)

__all__ = [
    "FIRST_KEY",
    "SCORES",
    "UNROTATED",
    "PairMap",
    "PositionMap",
    "Region",
    "Score",
    "query_scale",
    *SCORES,
]

if not TYPE_CHECKING:  # to type checkers every name would exist

    def __getattr__(name: str) -> None:
        """Say where a frequency method is, or what was meant."""
        raise no_attribute(__name__, name, AXES[__name__])
