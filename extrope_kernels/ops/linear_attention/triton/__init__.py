"""Scans of decayed linear attention in Triton, for GPUs."""

from .launch import scan, scan_resolved
from .row_dots import row_dots

__all__ = ["row_dots", "scan", "scan_resolved"]
