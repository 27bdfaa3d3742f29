"""Region attention in Triton, forward, backward and over a cache, for GPUs."""

from .backward import backward
from .decode import decode
from .forward import forward

__all__ = ["backward", "decode", "forward"]
