"""Attention that changes which relative position a query and a key see."""

from . import schema  # noqa: F401  (defines the ops)
from .api import attend, backends
from .blockwise_causal import blockwise_causal_attention
from .choice import choices
from .dual_chunk import dual_chunk_attention
from .merge import merge_attention
from .rerope import rerope_attention
from .string import string_attention

__all__ = [
    "attend",
    "backends",
    "blockwise_causal_attention",
    "choices",
    "dual_chunk_attention",
    "merge_attention",
    "rerope_attention",
    "string_attention",
]
