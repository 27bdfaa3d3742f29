"""Rotary position embedding with any frequencies, at memory speed, forward and backward."""

from .api import apply_rope, apply_rope_qk, backends

__all__ = ["apply_rope", "apply_rope_qk", "backends"]
