"""Attention over a key/value cache: a sequence's last tokens, at inference."""

from . import schema  # noqa: F401  (defines the ops)
from .api import attend_with_kvcache, backends
from .blockwise_causal import blockwise_causal_attention_with_kvcache
from .dual_chunk import dual_chunk_attention_with_kvcache
from .rerope import rerope_attention_with_kvcache
from .string import string_attention_with_kvcache

__all__ = [
    "attend_with_kvcache",
    "backends",
    "blockwise_causal_attention_with_kvcache",
    "dual_chunk_attention_with_kvcache",
    "rerope_attention_with_kvcache",
    "string_attention_with_kvcache",
]
