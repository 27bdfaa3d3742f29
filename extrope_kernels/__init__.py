"""Fused kernels that let a transformer with rotary positions read past its training length."""

from . import methods
from .methods import RopeFreqs
from .ops.rope import apply_rope, apply_rope_qk

__version__ = "0.1.0"
__all__ = ["RopeFreqs", "apply_rope", "apply_rope_qk", "methods"]
