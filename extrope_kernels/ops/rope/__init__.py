"""Rotary position embedding with any frequencies, at memory speed, forward and backward."""

from .api import apply_rope, apply_rope_qk, backends
from .append import rope_append_kvcache
from .cos_sin import apply_cos_sin

__all__ = ["apply_cos_sin", "apply_rope", "apply_rope_qk", "backends", "rope_append_kvcache"]
