"""Powers of per-head permutations, PermuteFormer's stand-in for the rotation, at memory speed."""

from . import schema  # noqa: F401  (defines the ops)
from .api import backends, permute, permute_qk
from .permutations import head_permutations

__all__ = ["backends", "head_permutations", "permute", "permute_qk"]
