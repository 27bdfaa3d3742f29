"""Scans of decayed linear attention in Triton, for GPUs."""

from .launch import row_dots, scan

__all__ = ["row_dots", "scan"]
