"""Region attention in Triton, forward, backward and over a cache, for GPUs."""

from ..._shared.triton.launch import INTERPRETED
from .backward import backward, backward_launches
from .decode import decode, decode_launches
from .forward import forward, forward_launches

__all__ = [
    "INTERPRETED",
    "backward",
    "backward_launches",
    "decode",
    "decode_launches",
    "forward",
    "forward_launches",
]
