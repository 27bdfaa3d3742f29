"""Attention with a cache: one new token or many, packed or not."""

from .api import rope_attention_with_kvcache

__all__ = ["rope_attention_with_kvcache"]
