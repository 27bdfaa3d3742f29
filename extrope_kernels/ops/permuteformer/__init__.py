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
from .permutations import head_permutations

__all__ = [
    "PermuteFormerState",
    "backends",
    "head_permutations",
    "permute",
    "permute_qk",
    "permuteformer_attention",
    "permuteformer_step",
]
