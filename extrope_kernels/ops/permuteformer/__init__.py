"""PermuteFormer: powers of per-head permutations as positions, and linear attention over them."""

from . import op  # noqa: F401  (defines the ops)
from .api import (
    PermuteFormerState,
    backends,
    permute,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
)
from .checks import MAX_DIM, check
from .permutations import head_permutations
from .reference import seen, state_of
from .scans import default_decay

__all__ = [
    "MAX_DIM",
    "PermuteFormerState",
    "backends",
    "check",
    "default_decay",
    "head_permutations",
    "permute",
    "permute_qk",
    "permuteformer_attention",
    "permuteformer_step",
    "seen",
    "state_of",
]
