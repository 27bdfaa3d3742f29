"""The fused step into a key/value cache: norm, rotation and the write of keys and values."""

from . import schema  # noqa: F401  (defines the op)
from .api import rope_append_kvcache

__all__ = ["rope_append_kvcache"]
