"""Attention that changes which relative position a query and a key see."""

from . import schema  # noqa: F401  (defines the ops)
from .api import backends
from .blockwise_causal import blockwise_causal_attention
from .dual_chunk import dual_chunk_attention
from .kvcache import rerope_attention_with_kvcache
from .merge import merge_attention
from .rerope import rerope_attention

__all__ = [
    "backends",
    "blockwise_causal_attention",
    "dual_chunk_attention",
    "merge_attention",
    "rerope_attention",
    "rerope_attention_with_kvcache",
]
