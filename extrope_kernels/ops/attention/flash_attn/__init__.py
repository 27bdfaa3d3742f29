"""Attention over regions, composed from calls of an installed flash-attention."""

from .composition import backward, forward
from .engines import missing

__all__ = ["backward", "forward", "missing"]
