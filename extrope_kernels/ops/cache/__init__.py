"""The cache of keys and values, and who writes it."""

from .api import rope_append_kvcache

__all__ = ["rope_append_kvcache"]
