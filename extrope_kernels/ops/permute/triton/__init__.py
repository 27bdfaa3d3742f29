"""The permutation in Triton: one launch for q and k, after a small one that finds the cycles."""

from .launch import permute
from .ops import permute_fwd

__all__ = ["permute", "permute_fwd"]
