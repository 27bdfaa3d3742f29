"""PermuteFormer's linear attention: O(seqlen), with a decay for each head."""

from . import fused, schema  # noqa: F401  (defines the ops)
from .api import (
    PermuteFormerState,
    backends,
    default_decay,
    permuteformer_attention,
    permuteformer_step,
)
from .state import seen, state_of

__all__ = [
    "PermuteFormerState",
    "backends",
    "default_decay",
    "permuteformer_attention",
    "permuteformer_step",
    "seen",
    "state_of",
]
