"""Region attention in Triton, forward, backward and over a cache, for GPUs."""

from ..._math.triton.launch import INTERPRETED
from .backward import backward, backward_launches
from .forward import forward, forward_launches

__all__ = [
    "INTERPRETED",
    "backward",
    "backward_launches",
    "forward",
    "forward_launches",
]
