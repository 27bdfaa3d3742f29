"""Rotary position embedding with any frequencies, at memory speed, forward and backward."""

from . import schema  # noqa: F401  (defines the ops)
from .api import apply_rope, apply_rope_qk, backends

__all__ = ["apply_rope", "apply_rope_qk", "backends"]
