"""Region attention in Triton, forward and backward, for GPUs."""

from .launch import backward, forward

__all__ = ["backward", "forward"]
