"""The rotation in Triton: one launch rotates q and k, forward and backward, in place or not."""

from .launch import rotate

__all__ = ["rotate"]
