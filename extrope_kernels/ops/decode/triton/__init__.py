"""Decode in Triton, for GPUs; read decode.py first."""

from ..._math.triton.launch import INTERPRETED
from .decode import decode, decode_launches

__all__ = ["INTERPRETED", "decode", "decode_launches"]
