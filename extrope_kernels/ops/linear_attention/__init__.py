"""PermuteFormer's linear attention: O(seqlen), with a decay for each head."""

from . import fused, schema  # noqa: F401  (defines the ops)
from .api import (
    PermuteFormerState,
    backends,
    default_decay,
    permuteformer_attention,
    permuteformer_step,
)
from .checks import MAX_DIM, check
from .state import seen, state_of

__all__ = [
    "MAX_DIM",
    "PermuteFormerState",
    "backends",
    "check",
    "default_decay",
    "permuteformer_attention",
    "permuteformer_step",
    "seen",
    "state_of",
]
