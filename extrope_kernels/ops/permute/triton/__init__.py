"""The permutation in Triton: one launch for q and k, after a small one that finds the cycles."""

from .launch import permute

__all__ = ["permute"]
