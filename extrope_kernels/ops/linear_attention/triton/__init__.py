"""Sweeps of decayed linear attention in Triton, for GPUs."""

from .launch import row_dots, sweep

__all__ = ["row_dots", "sweep"]
